"""Fetching where ranks share no memory: parts of many tensors in one operation, and when (ZeRO-3 over `delegate`)."""
import copy
import os
import threading

import models
import pytest
import torch
import torch.utils.checkpoint
from ranks import die

import deepspeed_c as deepspeed
from deepspeed_c import _core, distributed
from deepspeed_c.moe.layer import MoE
from deepspeed_c.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed_c.runtime.zero.remote import RemoteHome, _Slot

NODES = {2: None, 3: None, 4: "aabb"}


def opened(rank, world):
    """The communicator of ranks that share no memory; four ranks on two pretended nodes of two."""
    if NODES[world]:
        os.environ["DSC_COMM_NODE"] = NODES[world][rank]
    else:
        os.environ["DSC_COMM_BACKEND"] = "delegate"
    torch.set_num_threads(1)
    distributed.init_distributed("gloo", verbose=False)
    return distributed.world_comm()


def gathered(rank, world):
    comm = opened(rank, world)
    torch.manual_seed(0)
    shapes = ((7, 5), (), (300, 1000), (0,), (64,), (3, 8, 4, 4))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.complex64, torch.int8)
    for turn, is_async in enumerate((False, True, True)):
        wholes, fulls, parts, cuts = [], [], [], []
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            whole = (torch.randn(shape) * 5).to(dtype)
            full = torch.zeros_like(whole)
            if whole.dim() == 4:
                whole = whole.to(memory_format=torch.channels_last)
                full = torch.zeros_like(whole)
            n = whole.numel()
            edges = [n] * (world - 1)
            if (i + turn) % 2:
                edges = sorted(int(x) for x in torch.randint(0, n + 1, (world - 1,)))
            cut = torch.tensor([0, *edges, n])
            flat = torch.as_strided(whole, (n,), (1,))
            wholes.append(whole)
            fulls.append(full)
            parts.append(flat[cut[rank]:cut[rank + 1]].clone())
            cuts.append(cut)
        work = comm.gather_parts(fulls, parts, cuts, f"turn {turn}", is_async)
        if is_async:
            parts = None  # the operation keeps what it needs
            work.wait()
        for whole, full in zip(wholes, fulls, strict=True):
            assert torch.equal(whole, full)
    for wrong in (([fulls[0]], [], [cuts[0]]), ([fulls[2]], [torch.zeros(1)], [cuts[2]]),
                  ([fulls[0]], [torch.zeros(1, dtype=torch.bool)], [cuts[0]]),
                  ([torch.zeros(4)], [torch.zeros(2)], [torch.tensor([4] * (world + 1))])):
        with pytest.raises(ValueError, match="gather_parts"):
            comm.gather_parts(*wrong)
    comm.barrier()
    return comm.backend


@pytest.mark.parametrize("n", [2, 4])
def test_parts_of_many_tensors_come_in_one_operation(ranks, n):
    assert ranks(n, gathered) == ["delegate"] * n


# ---- training ----


def run(rank, stage, dtype, gas, zero=None, kind=models.Awkward, n_steps=3):
    module = models.make(kind)
    zero = {"stage3_param_persistence_threshold": 0, **(zero or {})}
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                  config=models.config(stage, dtype, gas, zero=zero))[0]
    models.train(engine, rank, n_steps, gas, dtype)
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return models.bits(module), norm


ONE_BY_ONE = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
AHEAD = {"stage3_prefetch_bucket_size": 300, "stage3_max_reuse_distance": 100, "stage3_max_live_parameters": 500}
PERSISTENT = {"stage3_param_persistence_threshold": 100}


def equal_to_other_stages(rank, world):
    opened(rank, world)
    wrong = []
    for dtype, gas in (("fp32", 1), ("bf16", 1), ("fp16", 3)):
        expected = run(rank, 2, dtype, gas)
        for zero in (ONE_BY_ONE, AHEAD, PERSISTENT, {}):
            if run(rank, 3, dtype, gas, zero) != expected:
                wrong.append((dtype, gas, zero))
        if gas == 1:
            wrong += [(dtype, stage) for stage in (0, 1) if run(rank, stage, dtype, gas) != expected]
    return wrong


@pytest.mark.parametrize("n", [2, 4])
def test_stages_change_no_bit(ranks, n):
    assert ranks(n, equal_to_other_stages) == [[]] * n


# ---- limits, and what is freed ----

N_LAYERS, WIDTH = 6, 40
LAYER = WIDTH * WIDTH + WIDTH


class Deep(torch.nn.Module):
    def __init__(self, checkpointed=None):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(N_LAYERS))
        self.checkpointed = checkpointed
        self.seen = None

    def forward(self, x):
        for layer in self.layers:
            if self.checkpointed is None:
                x = torch.relu(layer(x))
            else:
                x = torch.utils.checkpoint.checkpoint(lambda x, layer=layer: torch.relu(layer(x)), x,
                                                      use_reentrant=self.checkpointed)
        if self.seen is not None:
            self.seen.append(held(self))
        return x.square().mean()


def held(module):
    """Bytes of storage behind the whole tensors of sharded parameters."""
    return sum(p.ds_full.untyped_storage().nbytes() for p in module.parameters())


def deep(rank, zero, checkpointed=None, stage=3, n_steps=4, watch=None):
    torch.manual_seed(1)
    module = Deep(checkpointed)
    zero = {"stage3_param_persistence_threshold": 0, **zero}
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                  config=models.config(stage, zero=zero))[0]
    if stage == 3:
        home_of(module).counters(True)
    for step in range(n_steps):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank)).requires_grad_()
        engine.backward(engine(x))
        engine.step()
        if watch is not None:
            watch(step, module)
    engine.destroy()
    return models.bits(module)


def home_of(module):
    return next(module.parameters()).ds_home


def limits(rank, world):
    opened(rank, world)
    expected = deep(rank, {}, stage=2)
    found = {}

    def watch(name):
        def look(step, module):
            counters = home_of(module).counters()
            found.setdefault(name, []).append((counters["peak"] / LAYER, counters["live"], held(module), counters))
        return look

    for name, zero in {
        "nothing ahead": {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0},
        "two ahead": {"stage3_prefetch_bucket_size": 2 * LAYER, "stage3_max_reuse_distance": 0},
        "three live": {"stage3_max_live_parameters": 3 * LAYER},
        "all": {},
    }.items():
        assert deep(rank, zero, watch=watch(name)) == expected, name
    return found


@pytest.mark.parametrize("n", [2, 4])
def test_limits_are_kept_and_change_no_bit(ranks, n):
    for found in ranks(n, limits):
        for name, n_live in {"nothing ahead": 1, "two ahead": 3, "three live": 3, "all": N_LAYERS}.items():
            assert all(live == 0 and size == 0 for _, live, size, _ in found[name]), name
            assert found[name][-1][0] <= n_live, name
        fetched = {name: steps[-1][-1]["fetched"] - steps[-2][-1]["fetched"] for name, steps in found.items()}
        ahead = {name: steps[-1][-1]["ahead"] - steps[-2][-1]["ahead"] for name, steps in found.items()}
        # Two parameters in each layer; the last one's backward follows its forward at once.
        assert fetched["nothing ahead"] == 2 * (2 * N_LAYERS - 1) and ahead["nothing ahead"] == 0
        assert fetched["two ahead"] == 2 and ahead["two ahead"] == 2 * (2 * N_LAYERS - 2)
        assert fetched["all"] == 2 and ahead["all"] == 2 * (N_LAYERS - 1)


def saved(rank, world):
    """What autograd has saved keeps no storage alive, and is whole again in backward."""
    opened(rank, world)
    torch.manual_seed(1)
    module = Deep()
    module.seen = []
    zero = {"stage3_param_persistence_threshold": 0, **ONE_BY_ONE}
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                  config=models.config(3, zero=zero))[0]
    storages = []

    def keep(t):
        if t.untyped_storage().nbytes() >= 4 * WIDTH * WIDTH:
            storages.append(t.untyped_storage())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = engine(torch.ones(3, WIDTH, requires_grad=True) + rank)
    assert len(storages) == N_LAYERS
    assert [storage.nbytes() for storage in storages[:-1]] == [0] * (N_LAYERS - 1)
    engine.backward(loss)
    assert [storage.nbytes() for storage in storages] == [0] * N_LAYERS
    return module.seen


def test_what_autograd_saved_is_freed_at_release(ranks):
    assert ranks(2, saved) == [[0]] * 2


def checkpointed(rank, world):
    opened(rank, world)
    expected = deep(rank, {}, stage=2)
    return [(how, name) for how in (True, False) for name, zero in {"one": ONE_BY_ONE, "all": {}}.items()
            if deep(rank, zero, checkpointed=how) != expected]


def test_activation_checkpointing_changes_no_bit(ranks):
    assert ranks(2, checkpointed) == [[]] * 2


class Forces(torch.nn.Module):
    """The gradient of a sum as a value, inside a forward or not; its own backward needs the layers' weights again."""

    def __init__(self, inside):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.inside = inside

    def forward(self, x):
        y = torch.tanh(self.layers[1](torch.tanh(self.layers[0](x))))
        if self.inside:
            y = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        return self.layers[2](y).square().mean()


def trained_on_gradients(rank, stage, inside):
    torch.manual_seed(1)
    module = Forces(inside)
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                  config=models.config(stage, zero={"stage3_param_persistence_threshold": 0}))[0]
    for step in range(2):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank)).requires_grad_()
        loss = engine(x)
        if not inside:
            loss = loss + torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return models.bits(module)


def gradients_of_gradients(rank, world):
    opened(rank, world)
    return [trained_on_gradients(rank, 3, inside) == trained_on_gradients(rank, 2, inside) for inside in (False, True)]


def test_gradients_of_gradients_change_no_bit(ranks):
    assert ranks(2, gradients_of_gradients) == [[True, True]] * 2


class Side(torch.nn.Module):
    """Shows nothing of what it makes."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(WIDTH))

    def forward(self, x, box):
        box.append(torch.tanh(x @ self.weight))


class Sides(torch.nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.layers = torch.nn.ModuleList(Side() for _ in range(8))
        self.checkpointed = checkpointed

    def inner(self, x):
        box = [x]
        for layer in self.layers:
            layer(box[-1], box)
        return box[-1]

    def forward(self, x):
        y = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True) if self.checkpointed else self.inner(x)
        return y.square().mean()


def trained_unseen(rank, stage, checkpointed):
    module = Sides(checkpointed)
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                  config=models.config(stage, zero={"stage3_param_persistence_threshold": 0}))[0]
    for step in range(2):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank)).requires_grad_()
        engine.backward(engine(x))
        engine.step()
    engine.destroy()
    return models.bits(module)


def unseen(rank, world):
    opened(rank, world)
    return [trained_unseen(rank, 3, checkpointed) == trained_unseen(rank, 2, checkpointed)
            for checkpointed in (False, True)]


def test_modules_that_show_no_output_are_whole_in_their_backward(ranks):
    assert ranks(2, unseen) == [[True, True]] * 2


class Blocks(torch.nn.Module):
    """Checkpointed blocks of several modules; autograd saves the frozen weight of a norm itself."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH).requires_grad_(False),
                                torch.nn.Tanh(), torch.nn.Linear(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x.square().mean()


def trained_in_blocks(rank, stage):
    torch.manual_seed(1)
    module = Blocks()
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                  config=models.config(stage, zero={"stage3_param_persistence_threshold": 0}))[0]
    for step in range(2):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank)).requires_grad_()
        engine.scale(engine(x)).backward()
        engine.step()
    engine.destroy()
    return models.bits(module)


def in_blocks(rank, world, shared):
    if not shared:
        opened(rank, world)
    return trained_in_blocks(rank, 3) == trained_in_blocks(rank, 2)


@pytest.mark.parametrize("shared", [False, True])
def test_checkpointed_blocks_of_several_modules_change_no_bit(ranks, shared):
    assert ranks(2, in_blocks, shared) == [True] * 2


class Adapted(torch.nn.Module):
    """A frozen layer with a small trained one beside it, as LoRA has them; `scale` reaches the frozen weight past the
    inputs."""

    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.gate = torch.nn.Parameter(torch.rand(WIDTH, WIDTH), requires_grad=False)
        self.down, self.up = torch.nn.Linear(WIDTH, 2, bias=False), torch.nn.Linear(2, WIDTH, bias=False)
        self.scale = None

    def forward(self, x):
        y = torch.nn.functional.linear(x, self.gate * self.scale)
        return torch.relu(self.base(x) + self.up(self.down(y)))


class Lora(torch.nn.Module):
    def __init__(self, checkpointed=None):
        super().__init__()
        self.layers = torch.nn.ModuleList(Adapted() for _ in range(N_LAYERS))
        self.scale = torch.nn.Parameter(torch.ones(WIDTH))
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer in self.layers:
            layer.scale = self.scale + 1  # a gradient that no input of the layer shows
        for i in (*range(N_LAYERS), 2, 2, 0):  # some layers are used several times
            if self.checkpointed is None:
                x = self.layers[i](x)
            else:
                x = torch.utils.checkpoint.checkpoint(self.layers[i], x, use_reentrant=self.checkpointed)
        return x.square().mean()


def adapted(rank, world):
    opened(rank, world)
    found, expected = [], None
    for stage, checkpointed in ((2, None), (3, None), (3, False), (3, True)):
        torch.manual_seed(1)
        module = Lora(checkpointed)
        engine = engine_of(module, ONE_BY_ONE, stage)
        if stage == 3:
            home_of(module).counters(True)
        train(engine, rank, 2)
        if stage == 2:
            expected = models.bits(module)
        else:
            counters = home_of(module).counters()
            found.append((models.bits(module) == expected, counters["peak"], counters["live"]))
        engine.destroy()
    return found


def test_frozen_parameters_are_released_when_their_own_backward_is_over(ranks):
    layer = 2 * LAYER + WIDTH
    recomputed = N_LAYERS * 2 * WIDTH  # what ends a recomputed forward is thought to be used again at once, and stays
    for found in ranks(2, adapted):
        assert all(same and live == 0 for same, _, live in found)
        assert all(peak <= layer + more for (_, peak, _), more in zip(found, (0, recomputed, 0), strict=True))


class Failing:
    """A communicator of one whose operations fail when they are told to."""

    rank, size, fails = 0, 1, False

    def __init__(self):
        self._comm = _core.Comm.self_(5.0)

    def gather_parts(self, *args):
        if self.fails:
            raise MemoryError("as told")
        return self._comm.gather_parts(*args)


def test_what_a_failed_fetch_did_not_gather_is_gathered_by_the_next():
    home = RemoteHome(Failing(), {"prefetch": 1000, "max_live": 1000, "max_reuse": 1000})
    params = [torch.nn.Parameter(torch.full((10,), float(i))) for i in range(3)]
    for p in params:
        home.add(p)
    for _ in range(3):
        for event, p in enumerate(params):
            home.fetch(event, (p,), "a module")
            home.release((p,), "a module")
        home.after_step()
    home.comm.fails = True
    with pytest.raises(MemoryError):  # the first, and the others ahead of their use
        home.fetch(0, (params[0],), "a module")
    assert home.counters()["live"] == 0 and not any(p.ds_full.untyped_storage().nbytes() for p in params)
    home.comm.fails = False
    for i, p in enumerate(params):
        home.fetch(i, (p,), "a module")
        assert p.untyped_storage().nbytes() == 40 and p.tolist() == [float(i)] * 10
        home.release((p,), "a module")


# ---- what a script does with parameters ----


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(10, 20), torch.nn.Linear(20, 20)
        self.frozen = torch.nn.Linear(20, 20).requires_grad_(False)
        self.c = torch.nn.Linear(20, 5)

    def forward(self, x):
        return self.c(self.frozen(torch.relu(self.b(torch.relu(self.a(x)))))).square().mean()


def pair():
    """Engines at stages 2 and 3 over equal networks; the second one's was made under zero.Init."""
    torch.manual_seed(0)
    whole = Net()
    torch.manual_seed(0)
    config = models.config(3, zero={"stage3_param_persistence_threshold": 0})
    with deepspeed.zero.Init(config_dict_or_path=config):
        sharded = Net()
    assert all(p.shape == (0,) for p in sharded.parameters())
    return [deepspeed.initialize(model=module, model_parameters=module.parameters(), config=of)[0]
            for module, of in ((whole, models.config(2)), (sharded, config))]


def same_values(whole, sharded):
    values = zip(whole.state_dict().values(), sharded.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in values)


def used(rank, world):
    opened(rank, world)
    engines = pair()
    whole, sharded = (engine.module for engine in engines)

    def train(step):
        for engine in engines:
            x = torch.randn(4, 10, generator=torch.Generator().manual_seed(step * 7 + rank))
            engine.backward(engine(x))
            engine.step()
            engine.empty_partition_cache()
        assert same_values(whole, copy.deepcopy(sharded)), step

    train(0)
    with deepspeed.zero.GatheredParameters([sharded.a.weight], modifier_rank=1):
        if rank == 1:
            sharded.a.weight.data.mul_(2)
    with torch.no_grad():
        whole.a.weight.mul_(2)
    train(1)
    failing = sharded.b.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engines[1](torch.ones(4, 10))
    failing.remove()
    assert all(p.shape == (0,) for p in sharded.parameters())
    for module in (whole, sharded):
        module.b.bias = torch.nn.Parameter(torch.full((20,), 0.5))
    train(2)
    for engine in engines:
        engine.eval()
    with torch.no_grad():
        x = torch.ones(4, 10)
        assert torch.equal(whole(x), sharded(x))
    assert torch.equal(deepspeed.utils.safe_get_full_fp32_param(sharded.a.weight), whole.a.weight)
    engines[1].destroy()
    assert type(sharded.a.weight) is torch.nn.Parameter and sharded.a.weight.shape == (20, 10)
    return same_values(whole, sharded)


@pytest.mark.parametrize("n", [2, 4])
def test_what_a_script_does_with_parameters_changes_no_bit(ranks, n):
    assert ranks(n, used) == [True] * n


class Experts(torch.nn.Module):
    def __init__(self, ep_size):
        super().__init__()
        self.inp, self.out = torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)
        self.moe = MoE(hidden_size=16, expert=torch.nn.Linear(16, 16), num_experts=4, ep_size=ep_size, k=1,
                       capacity_factor=4.0, use_rts=False)

    def forward(self, x):
        x, loss, _ = self.moe(torch.relu(self.inp(x)))
        return self.out(x).square().mean() + 0.01 * loss


def with_experts(rank, stage, ep_size):
    torch.manual_seed(0)
    module = Experts(ep_size)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(module.parameters()), "name": "all"})
    config = models.config(stage, zero={"stage3_param_persistence_threshold": 0})
    engine = deepspeed.initialize(model=module, model_parameters=groups, config=config)[0]
    for step in range(3):
        engine.backward(engine(torch.randn(6, 8, generator=torch.Generator().manual_seed(10 * step + rank))))
        engine.step()
    engine.destroy()
    return models.bits(module)


def experts(rank, world):
    opened(rank, world)
    return [with_experts(rank, 3, ep_size) == with_experts(rank, 2, ep_size) for ep_size in (2, 4)]


def test_experts_of_some_ranks_are_gathered_among_these(ranks):
    assert ranks(4, experts) == [[True, True]] * 4


def under_init(rank, world):
    """A module made under zero.Init obeys the limits of initialize's configuration."""
    opened(rank, world)
    torch.manual_seed(1)
    with deepspeed.zero.Init(dtype=torch.float32):
        first = torch.nn.Linear(WIDTH, WIDTH)
    with deepspeed.zero.Init(dtype=torch.float32):
        module = Deep()
    module.layers[0] = first
    engine = engine_of(module, {"stage3_max_live_parameters": 3 * LAYER})
    homes = {p.ds_home for p in module.parameters()}
    train(engine, rank, 3)
    peak = home_of(module).counters()["peak"] / LAYER
    engine.destroy()
    return len(homes), peak


def put_back(rank, world):
    """Hooks that are taken off and put back before each step, as TRL does, keep the recorded order."""
    module = Deep()
    engine = engine_of(module, {})
    ahead = []
    for _ in range(3):
        engine.optimizer.parameter_offload._register_deepspeed_module(module)
        before = home_of(module).counters()["ahead"]
        train(engine, rank, 1)
        ahead.append(home_of(module).counters()["ahead"] - before)
    engine.destroy()
    return ahead[0], ahead[2]


class Twice(torch.nn.Module):
    """A weight that is used in a checkpointed part of a module, and before it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / 10)

    def layer(self, x):
        return torch.nn.functional.linear(x, self.weight).tanh()

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.layer, self.layer(x), use_reentrant=True).square().mean()


def twice(rank, world):
    found = []
    for stage, zero in ((2, {}), (3, ONE_BY_ONE)):
        torch.manual_seed(1)
        module = Twice()
        engine = engine_of(module, zero, stage)
        train(engine, rank, 2)
        engine.destroy()
        found.append(models.bits(module))
    return found[0] == found[1]


def elsewhere(rank, world):
    """An optimizer that torch runs, over parameters of which this rank has a part and others that it has whole."""
    found = []
    for stage in (2, 3):
        torch.manual_seed(0)
        module = Experts(2)
        groups = split_params_into_different_moe_groups_for_optimizer({"params": list(module.parameters()),
                                                                       "name": "all"})
        config = models.config(stage, zero={"stage3_param_persistence_threshold": 0},
                               zero_allow_untested_optimizer=True)
        del config["optimizer"]
        engine = deepspeed.initialize(model=module, optimizer=torch.optim.RMSprop(groups), config=config)[0]
        for step in range(2):
            engine.backward(engine(torch.randn(6, 8, generator=torch.Generator().manual_seed(10 * step + rank))))
            engine.step()
        engine.destroy()
        found.append(models.bits(module))
    return found[0] == found[1]


def engine_of(module, zero, stage=3):
    config = models.config(stage, zero={"stage3_param_persistence_threshold": 0, **zero})
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]


def train(engine, rank, n_steps):
    for step in range(n_steps):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank)).requires_grad_()
        engine.backward(engine(x))
        engine.step()


def replaced(rank, world):
    """A parameter that was replaced before anything was fetched, where nothing stays whole."""
    found = []
    for stage, zero in ((2, {}), (3, ONE_BY_ONE)):
        torch.manual_seed(1)
        module = Deep()
        engine = engine_of(module, zero, stage)
        module.layers[1].bias = torch.nn.Parameter(torch.full((WIDTH,), 0.5))
        train(engine, rank, 2)
        engine.destroy()
        found.append(models.bits(module))
    return found[0] == found[1]


def not_taken(rank, world):
    """An engine that fails to start over another one's parameters leaves it these, and the parts that it steps."""
    nowhere = {"offload_optimizer": {"device": "nvme", "nvme_path": "/dev/null"}}
    found = []
    for failing in (False, True):
        torch.manual_seed(1)
        module = Deep()
        module.layers[1].requires_grad_(False)
        engine = engine_of(module, {"stage3_param_persistence_threshold": WIDTH})
        train(engine, rank, 1)
        for dtype in ("fp32", "bf16") if failing else ():
            with pytest.raises(OSError):
                deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                     config=models.config(3, dtype, zero=nowhere))
        train(engine, rank, 2)
        engine.destroy()
        found.append(models.bits(module))
    return found[0] == found[1]


def several(rank, world):
    return (under_init(rank, world), put_back(rank, world),
            [case(rank, world) for case in (twice, elsewhere, replaced, not_taken)])


def test_init_limits_hooks_put_back_inner_passes_torchs_optimizers_and_replaced_parameters(ranks):
    for (n_homes, peak), (first, later), same in ranks(2, several):
        assert n_homes == 1 and peak <= 3
        assert later > first
        assert same == [True] * 4


# ---- ranks that differ ----


def diverges(rank, world, how):
    opened(rank, world)
    torch.manual_seed(1)
    module = Deep()
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                  config=models.config(3, zero={"stage3_param_persistence_threshold": 0}))[0]
    for step in range(3):
        if step == 2 and rank == 1:
            if how == "skips a module":
                module.layers = module.layers[1:]
            elif how == "another order":
                module.layers = torch.nn.ModuleList(reversed(module.layers))
            else:
                deepspeed.comm.barrier()
        engine.backward(engine(torch.ones(2, WIDTH) + rank))
        engine.step()


@pytest.mark.parametrize("how", ["skips a module", "another order"])
def test_a_rank_that_runs_other_modules_is_an_error_on_all(ranks, how):
    for outcome in ranks.outcomes(3, diverges, how):
        assert outcome.error == "CommError" and outcome.seconds < 8, outcome.describe()
        assert "layers." in outcome.text and "rank 0 called" in outcome.text, outcome.text


def test_a_rank_that_waits_elsewhere_is_an_error_on_all(ranks):
    for outcome in ranks.outcomes(2, diverges, "waits elsewhere"):
        assert outcome.error == "CommError" and outcome.seconds < 8, outcome.describe()
        assert "layers.0" in outcome.text and "barrier" in outcome.text, outcome.text


def dies(rank, world):
    opened(rank, world)
    module = Deep()
    zero = {"stage3_param_persistence_threshold": 0, **ONE_BY_ONE, "stage3_prefetch_bucket_size": 4000}
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                  config=models.config(3, zero=zero))[0]
    for step in range(500):
        if rank == 2 and step == 5:
            threading.Timer(0.02, die).start()
        engine.backward(engine(torch.ones(2, WIDTH) + rank))
        engine.step()


def test_a_rank_killed_while_others_fetch_is_an_error_on_all(ranks):
    found = ranks.outcomes(4, dies)
    for outcome in (*found[:2], found[3]):
        assert outcome.error == "CommError" and outcome.seconds < 8, outcome.describe()
        assert "rank 2" in outcome.text and "died or ended" in outcome.text, outcome.text


def test_a_storage_that_numpy_was_lent_stays_with_the_array():
    full = torch.arange(12.0).reshape(3, 4)
    slot, lent = _Slot(torch.nn.Parameter(full), full), full.numpy()
    slot.resize(0)
    assert full.untyped_storage().nbytes() == 0 and (lent == torch.arange(12.0).reshape(3, 4).numpy()).all()
    slot.resize(slot.n_bytes)
    full.fill_(7)
    assert full.sum() == 84 and lent[0, 1] == 1
