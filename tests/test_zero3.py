"""ZeRO stage 3 on ranks that share memory: sharded parameters change no bit, and act whole wherever they are used."""
import contextlib
import copy
import io
import pickle

import models
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import deepspeed_c as deepspeed
from deepspeed_c.runtime.zero.shared import SharedHome

ALL_SHARDED = {"stage3_param_persistence_threshold": 0}


def engine_of(module, zero=None, **more):
    config = models.config(3, zero={**ALL_SHARDED, **(zero or {})}, **more)
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]


def run(rank, stage, dtype, gas, zero=None, kind=models.Awkward, n_steps=3):
    module = models.make(kind)
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                  config=models.config(stage, dtype, gas, zero=zero or {}))[0]
    losses = models.train(engine, rank, n_steps, gas, dtype)
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return models.bits(module), losses, norm


def equal_to_stage_2(rank, world):
    """All sharded in every dtype; some and all persistent, and several micro-steps, in one each."""
    torch.set_num_threads(1)
    wrong = []
    for dtype, gas, thresholds in (("fp32", 1, (0, 100, 100000)), ("bf16", 1, (0,)), ("fp16", 1, (0,)),
                                   ("bf16", 3, (0, 100000))):
        expected = run(rank, 2, dtype, gas)
        for threshold in thresholds:
            if run(rank, 3, dtype, gas, {"stage3_param_persistence_threshold": threshold}) != expected:
                wrong.append((dtype, gas, threshold))
    return wrong


@pytest.mark.parametrize("world", [1, 2, 4])
def test_stage_3_equals_stage_2_bit_for_bit(ranks, world):
    assert ranks(world, equal_to_stage_2) == [[]] * world


# ---- parameters are whole wherever a module runs ----


class Model(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), tokens.flatten())

    def logits(self, tokens):
        h = self.embed(tokens)
        for layer in self.layers:
            h = h + torch.relu(layer(h))
        return self.head(self.norm(h))

    @torch.no_grad()
    def generate(self, tokens, n):
        for _ in range(n):
            tokens = torch.cat([tokens, self.logits(tokens)[:, -1:].argmax(-1)], 1)
        return tokens


def tokens(rank=0, step=0, n=5):
    return torch.randint(0, 9, (2, n), generator=torch.Generator().manual_seed(100 * rank + step))


def released(module):
    return all(p.shape == (0,) for p in module.parameters())


def ways_in(rank, world):
    """Eval, the inner module, a replaced forward, loops of different lengths per rank: everything in one start."""
    torch.set_num_threads(1)
    plain, module = models.make(Model), models.make(Model)
    engine = engine_of(module)
    x = tokens()
    found = {"released": released(module)}
    engine.eval()
    with torch.no_grad():
        found["eval"] = torch.equal(engine(x), plain(x))
    found["inner"] = torch.equal(module(x), plain(x)) and torch.equal(module.logits(x), plain.logits(x))
    found["generate"] = torch.equal(module.generate(x, 2 + 3 * rank), plain.generate(x, 2 + 3 * rank))
    with torch.inference_mode():
        found["inference mode"] = torch.equal(module(x), plain(x))
    module.forward, before = module.logits, module.forward
    found["replaced forward"] = torch.equal(engine(x), plain.logits(x))
    module.forward = before
    for child in module.modules():  # as Lightning does before it initializes again
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
    engine = engine_of(module)
    found["hooks put back"] = torch.equal(engine(x), plain(x))
    found["released again"] = released(module)
    engine.destroy()
    found["destroyed"] = (all(type(p) is nn.Parameter and torch.equal(p, q)
                              for p, q in zip(module.parameters(), plain.parameters()))
                          and torch.equal(module(x), plain(x)) and not module._forward_hooks
                          and module.head.weight is module.embed.weight)
    module.norm.weight.data += 1.0  # private again: nobody else sees it
    return [name for name, good in found.items() if not good]


@pytest.mark.parametrize("world", [1, 2])
def test_parameters_are_whole_wherever_a_module_runs_and_nowhere_else(ranks, world):
    assert ranks(world, ways_in) == [[]] * world


class Branches(nn.Module):
    """Ranks run different parts of it, different numbers of times."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, plan):
        for name in plan:
            x = x + torch.tanh(getattr(self, name)(x))
        return x.square().mean()


PLANS = ["bc", "abbbc", "ab"]


def diverged(rank, world):
    torch.set_num_threads(1)
    module = models.make(Branches)
    engine = engine_of(module, optimizer={"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}})
    for step in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        with torch.no_grad():
            for _ in range(3 * rank):  # a rank that stops early
                module(x, "c")
        engine.backward(engine(x, PLANS[(rank + step) % 3]))
        engine.step()
    engine.destroy()
    return models.bits(module)


def undiverged(world):
    """The same in one process with plain torch."""
    torch.set_num_threads(1)
    module = models.make(Branches)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.01)
    for step in range(4):
        sums = [torch.zeros_like(p) for p in module.parameters()]
        for rank in range(world):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
            module.zero_grad()
            module(x, PLANS[(rank + step) % 3]).backward()
            for total, p in zip(sums, module.parameters()):
                total += 0 if p.grad is None else p.grad
        for total, p in zip(sums, module.parameters()):
            p.grad = total / world
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_ranks_that_run_different_modules_train_as_one_process_would(ranks):
    results = ranks(3, diverged)
    assert len(set(results)) == 1
    found = torch.frombuffer(bytearray(results[0]), dtype=torch.float32)
    assert torch.allclose(found, undiverged(3), rtol=1e-4, atol=1e-6)


# ---- use of other modules' parameters, leaves, checkpointing ----


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.uses = Uses()

    def forward(self, x, reentrant):
        return Whole(self.uses(x, reentrant), self)


class Uses(nn.Module):
    """Parameters used outside their modules: read from another's forward, handed out, hidden in an output that is no
    tensor; a list of parameters; attention that reads its projection's weight; checkpointing, reentrant and not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.hands_out = HandsOut()
        self.list = nn.ParameterList(nn.Parameter(torch.randn(8) * 0.1) for _ in range(2))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = Hidden()

    def forward(self, x, reentrant=None):
        x = F.linear(x, self.first.weight, self.second.bias)
        x = x * self.hands_out() + sum(p for p in self.list)
        x = x + self.attention(x, x, x, need_weights=False)[0] + self.hidden(x).value
        block = lambda y: torch.tanh(self.second(torch.tanh(self.first(y))))  # noqa: E731
        if reentrant is not None:
            from torch.utils.checkpoint import checkpoint
            for _ in range(2):
                x = checkpoint(block, x, use_reentrant=reentrant)
        else:
            x = block(block(x))
        return x.square().mean()


class HandsOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self):
        return self.scale


class Box:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Whole:
    """An output that leads back to itself and to the model."""

    def __init__(self, value, module):
        self.value, self.module, self.itself = value, module, [self]


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return Box(F.layer_norm(x, (8,), self.norm))


def used(rank, stage, reentrant, leaf, plain_backward):
    module = models.make(Root)
    uses = module.uses
    zero = dict(ALL_SHARDED) if stage == 3 else {}
    if leaf and stage == 3:
        zero["leaf_module"] = {"classes": ["MultiheadAttention"], "names": ["uses.hidden"], "name_suffixes": ["first"]}
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                  config=models.config(stage, zero=zero))[0]
    for step in range(3):
        x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        loss = engine(x.requires_grad_(), reentrant).value
        if plain_backward:
            loss.backward()
        else:
            engine.backward(loss)
        engine.step()
        assert stage < 3 or released(module)
    external = [p is uses.first.weight for _, p in uses.ds_external_parameters()] if stage == 3 else []
    external += [not module.ds_external_parameters()] if stage == 3 else []
    engine.destroy()
    return models.bits(module), external


def uses(rank, world):
    torch.set_num_threads(1)
    wrong = []
    for reentrant, plain_backward in ((None, False), (None, True), (False, True), (True, False)):
        expected, _ = used(rank, 2, reentrant, False, plain_backward)
        for leaf in (False, True):
            found, external = used(rank, 3, reentrant, leaf, plain_backward)
            if found != expected or not (any(external) and external[-1]):
                wrong.append((reentrant, leaf, plain_backward, external))
    return wrong


def test_parameters_used_outside_their_modules_and_checkpointing_change_no_bit(ranks):
    assert ranks(2, uses) == [[], []]


# ---- GatheredParameters ----


def full_values(module):
    with deepspeed.zero.GatheredParameters(module.parameters()):
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def gathered_shapes(rank, world):
    """Every shape of argument that clients pass, and what writing does."""
    torch.set_num_threads(1)
    Gathered = deepspeed.zero.GatheredParameters
    plain, module = models.make(Model), models.make(Model)
    engine = engine_of(module)
    before = dict(plain.named_parameters())
    fresh = nn.Linear(3, 3)
    weight = module.layers[0].weight
    found = {}

    def whole(name, p=weight):
        found[name] = torch.equal(p, before["layers.0.weight"])

    with Gathered(weight):
        whole("one")
        found["status"] = weight.ds_status.name == "AVAILABLE"
    with Gathered([weight, None, weight, fresh.weight, torch.ones(2), *module.parameters()]):
        whole("a list")
    with Gathered([]), Gathered(None), Gathered(fresh.parameters(), modifier_rank=0):
        fresh.weight.data.fill_(1.0)
    with Gathered(p for p in module.parameters()):
        whole("a generator")
    with Gathered(module.state_dict(keep_vars=True).values(), modifier_rank=0):
        whole("a state dict")
    with Gathered(weight), Gathered([weight, module.norm.weight], modifier_rank=None):
        whole("nested")
    with Gathered(weight, modifier_rank=0, enabled=False):
        found["disabled"] = weight.shape == (0,)
    found["released"] = released(module)

    with Gathered(weight, modifier_rank=world - 1):
        with torch.no_grad():
            weight.fill_(float(rank))
        with Gathered(weight, modifier_rank=0):  # nested, by another rank
            whole_rank = weight.clone()
    found["nested writing"] = bool((whole_rank == rank).all())
    values = full_values(module)
    found["the rank's values"] = bool((values["layers.0.weight"] == (0.0)).all())
    with Gathered(weight, modifier_rank=world - 1):
        weight.data = weight.data.clone().fill_(rank + 1.0)
    found["another storage"] = bool((full_values(module)["layers.0.weight"] == world).all())
    try:
        with Gathered(weight, modifier_rank=0):
            weight.data.zero_()
            raise KeyError("the block failed")
    except KeyError:
        found["a block that failed"] = bool((full_values(module)["layers.0.weight"] == world).all())
    try:
        with Gathered(weight, modifier_rank=0):
            weight.data = torch.ones(3)
    except RuntimeError as error:
        found["another shape"] = "layers.0.weight is (3,)" in str(error)
    found["forward"] = engine(tokens(rank)).item() == engine(tokens(rank)).item()
    engine.destroy()
    return [name for name, good in found.items() if not good], "another shape" in found


@pytest.mark.parametrize("world", [1, 2])
def test_gathered_parameters_take_what_clients_pass(ranks, world):
    assert ranks(world, gathered_shapes) == [([], True)] * world


def written_outside(rank, world):
    torch.set_num_threads(1)
    texts = []

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.how = None

        def forward(self, x):
            x = self.inner(x)
            return x.sum()

    def write(module, args, output):
        with torch.no_grad():
            module.weight.mul_(1.0)

    for threshold, where in ((0, "hook"), (0, "reading"), (100, "persistent")):
        module = models.make(Writes)
        engine = engine_of(module, {"stage3_param_persistence_threshold": threshold})
        try:
            if where == "reading":
                with deepspeed.zero.GatheredParameters(module.inner.bias):
                    module.inner.bias.data = torch.ones(4)
            elif where == "hook":
                module.inner.register_forward_hook(write, prepend=True)
                engine(torch.ones(2, 4))
            else:
                with torch.no_grad():
                    module.inner.weight.mul_(1.0)
                engine.backward(engine(torch.ones(2, 4)))
                engine.step()
        except RuntimeError as error:
            texts.append(str(error))
        engine.destroy()
    return texts


def test_a_write_outside_gathered_parameters_names_module_and_parameter(ranks):
    hook, reading, persistent = ranks(1, written_outside)[0]
    assert "inner.weight was written to" in hook and "module inner (Linear)" in hook
    assert "inner.bias was written to" in reading and "GatheredParameters" in reading
    assert "inner.weight was written to" in persistent and "stage3_param_persistence_threshold" in persistent


def written_between_steps(rank, world, dtype, gathered):
    """A rank's values replace a parameter's between steps, in place and by a new parameter; masters follow."""
    torch.set_num_threads(1)
    results = []
    for stage in (2, 3):
        module = models.make(Model)
        engine = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                      config=models.config(stage, dtype, zero=dict(ALL_SHARDED)))[0]
        for step in range(4):
            engine.backward(engine(tokens(rank, step)))
            engine.step()
            new = torch.full((12, 12), 0.01 * step)
            if step == 1 and gathered:
                with deepspeed.zero.GatheredParameters(module.layers[1].weight, modifier_rank=0):
                    module.layers[1].weight.data.copy_(new if stage == 2 or rank == 0 else 0 * new)
            elif step == 1:
                with deepspeed.zero.GatheredParameters(module.layers[1].weight, modifier_rank=0):
                    module.layers[1].weight = nn.Parameter(new.to(module.norm.weight.dtype))
        engine.destroy()
        results.append(models.bits(module))
    return results[0] == results[1]


@pytest.mark.parametrize("gathered", [True, False])
def test_values_written_between_steps_train_on_as_at_stage_2(ranks, gathered):
    assert ranks(2, written_between_steps, "bf16", gathered) == [True, True]


# ---- zero.Init ----


class Built(nn.Module):
    """Made under zero.Init: initialises after the base class did, ties, reads sizes, applies a function."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 12)
        self.body = nn.Sequential(*(Custom() for _ in range(2)))
        self.head = nn.Linear(12, 9, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.full((12,), 0.5))
        self.register_buffer("table", torch.arange(12.0) / 100)
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.mul_(0.5)

    def forward(self, x):
        h = self.body(self.embed(x)) * self.scale + self.table
        return F.cross_entropy(self.head(h).float().flatten(0, 1), x.flatten())


class Custom(nn.Linear):
    def __init__(self):
        super().__init__(12, 12)
        with torch.no_grad():
            self.bias.fill_(0.25)  # after Linear.__init__, in this class's own


def built(rank, world, dtype):
    torch.set_num_threads(1)
    found = {}
    config = models.config(3, dtype, zero=dict(ALL_SHARDED))
    torch.set_default_dtype(models.DTYPES[dtype])  # what Init does to the tensors made inside
    plain = models.make(Built)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3 + rank)  # only the first rank's values count
    with deepspeed.zero.Init(config_dict_or_path=config, remote_device="none", pin_memory=True):
        made = Built.__new__(Built)
        made.__init__()
        found["dtype of tensors"] = torch.zeros(3, dtype=torch.float32).dtype == models.DTYPES[dtype]

        class Late(nn.Linear):
            pass

        late = Late(12, 12)
    found["torch is as before"] = (torch.zeros(3).dtype == torch.float32 and nn.Linear(2, 2).weight.shape == (2, 2)
                                   and "__init_subclass__" not in vars(nn.Module))
    found["released at once"] = released(made) and made.head.weight is made.embed.weight and released(late)
    sizes = made.embed.weight.ds_numel, tuple(made.embed.weight.ds_shape), made.embed.weight.partition_numel()
    found["sizes"] = sizes == (108, (9, 12), -(-108 // world))
    values = full_values(made)
    found["values"] = all(torch.equal(values[name], p) for name, p in plain.named_parameters())
    x = tokens(rank)
    made._is_hf_initialized = made.embed.weight._is_hf_initialized = True
    with torch.no_grad():
        found["runs before initialize"] = torch.equal(made(x), plain(x))
    trained = []
    for module, stage in ((plain, 2), (made, 3)):
        engine = deepspeed.initialize(model=module, model_parameters=module.parameters(), config={
            **config, "zero_optimization": {**config["zero_optimization"], "stage": stage}})[0]
        if stage == 3:
            module.late = late
            found["attached late"] = module.late(torch.ones(1, 12, dtype=models.DTYPES[dtype])).shape == (1, 12)
            del module.late
        for step in range(3):
            engine.backward(engine(tokens(rank, step)))
            engine.step()
        engine.destroy()
        trained.append(models.bits(module))
    found["trained"] = trained[0] == trained[1]
    found["attributes survive"] = made.embed.weight._is_hf_initialized
    return [name for name, good in found.items() if not good]


@pytest.mark.parametrize("world, dtype", [(1, "fp32"), (2, "bf16")])
def test_a_module_built_under_init_trains_as_one_built_without(ranks, world, dtype):
    assert ranks(world, built, dtype) == [[]] * world


def test_apply_inside_init_copies_each_parameter_once(monkeypatch):
    copied, seen = [], []
    copy_of = SharedHome.copy
    monkeypatch.setattr(SharedHome, "copy", lambda home, p: copied.append(p) or copy_of(home, p))
    with deepspeed.zero.Init(dtype=torch.float32):
        module = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 3)), nn.Linear(3, 2)))

        def fill(child):
            seen.append(child)
            for p in child.parameters():
                p.data.add_(float(len(seen)))

        with deepspeed.zero.GatheredParameters(module.parameters(), modifier_rank=0):
            for p in module.parameters():
                p.data.zero_()
        copied.clear()
        assert module.apply(fill) is module
    assert [type(child).__name__ for child in seen] == ["Linear", "Sequential", "Linear", "Sequential", "Sequential"]
    assert sorted(map(id, copied)) == sorted(map(id, module.parameters()))
    assert [float(p.flatten()[0]) for p in whole_values(module).values()] == [12.0, 12.0, 12.0, 12.0]


class OnMeta(nn.Module):
    """Its own parameter has no reset_parameters()."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.own = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return (self.norm(self.inner(x)) * (1 + self.own)).square().mean()


def from_meta(rank, world):
    """On the meta device without Init, under Init, and an existing module given to Init."""
    torch.set_num_threads(1)
    found, trained = {}, []
    config = models.config(3, zero=dict(ALL_SHARDED))
    for way in ("initialize", "init", "module"):
        torch.manual_seed(7)
        with torch.device("meta"), deepspeed.zero.Init(config_dict_or_path=config, enabled=way == "init"):
            module = OnMeta()
        if way == "module":
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
            found["given"] = released(module) and module.own.ds_numel == 6
        torch.manual_seed(7)
        if way != "initialize":  # they had their values when they were placed
            with deepspeed.zero.GatheredParameters(module.parameters(), modifier_rank=0):
                module.inner.reset_parameters()
        engine = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]
        found[f"{way}: buffers"] = not module.norm.running_var.is_meta and bool((module.norm.running_var == 1).all())
        engine.backward(engine(torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))))
        engine.step()
        engine.destroy()
        trained.append(models.bits(module))
    found["trained alike"] = len(set(trained)) == 1
    return [name for name, good in found.items() if not good]


def test_modules_made_on_the_meta_device_get_their_values_when_they_are_placed(ranks):
    assert ranks(2, from_meta) == [[], []]


def init_arguments(rank, world):
    torch.set_num_threads(1)
    found = {}
    Init = deepspeed.zero.Init
    group = torch.distributed.new_group([rank]) if torch.distributed.is_initialized() else None
    with Init(dtype=torch.bfloat16):
        outer = nn.Linear(3, 3)
        with Init(dtype=torch.float32, data_parallel_group=group):
            inner = nn.Linear(3, 3)
            with Init(enabled=False):
                found["disabled inside"] = torch.zeros(1).dtype == torch.float32
        again = nn.Linear(3, 3)
    found["nested"] = [m.weight.dtype for m in (outer, inner, again)] == [torch.bfloat16, torch.float32, torch.bfloat16]
    with Init():
        found["float16 by itself"] = nn.Linear(2, 2).weight.dtype == torch.float16
    small = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 4, "stage3_prefetch_bucket_size": "auto"}}
    with Init(config_dict_or_path=small):
        linear = nn.Linear(3, 3)
    found["small ones stay"] = linear.bias.shape == (3,) and linear.bias.ds_persist and linear.weight.shape == (0,)
    for error, given in ((ValueError, {"remote_device": "disk"}), (ValueError, {"config_dict_or_path": "no file"}),
                         (NotImplementedError, {"zero_quantized_weights": True}),
                         (ValueError, {"config_dict_or_path": {"fp16": {"enabled": True}, "bf16": {"enabled": True}}})):
        try:
            Init(**given)
            found[str(given)] = False
        except error:
            pass
    from deepspeed_c.runtime.zero import partition_parameters as pp
    seen, wrapper = [], pp.zero_wrapper_for_fp_tensor_constructor
    pp.zero_wrapper_for_fp_tensor_constructor = lambda fn, *args, **kwargs: (
        seen.append(set(kwargs)) or (fn if fn is pp._orig_torch_arange else wrapper(fn, *args, **kwargs)))
    try:
        with Init(dtype=torch.bfloat16):
            found["replaced wrapper"] = (torch.arange(2.0).dtype == torch.float32 and torch.ones(2).dtype ==
                                         torch.bfloat16 and torch.ones(2).new_zeros(3).dtype == torch.bfloat16)
    finally:
        pp.zero_wrapper_for_fp_tensor_constructor = wrapper
    found["called with target_device"] = all("target_device" in keys for keys in seen) and len(seen) > 8
    return [name for name, good in found.items() if not good]


def test_init_takes_every_argument_and_puts_torch_back(ranks):
    assert ranks(2, init_arguments) == [[], []]


class Normed(nn.Module):
    """As speech models do: weight norm inside GatheredParameters, the new parameters told as external."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        with deepspeed.zero.GatheredParameters(self.conv.weight, modifier_rank=0):
            self.conv = torch.nn.utils.weight_norm(self.conv, name="weight", dim=2)
        for p in (self.conv.weight_g, self.conv.weight_v):
            deepspeed.zero.register_external_parameter(self, p)

    def forward(self, x):
        return self.conv(x).square().mean()


def odds(rank, world):
    torch.set_num_threads(1)
    found = {}
    config = models.config(3, zero=dict(ALL_SHARDED))
    with deepspeed.zero.Init(config_dict_or_path=config):
        normed = Normed()
    engine = deepspeed.initialize(model=normed, model_parameters=normed.parameters(), config=config)[0]
    before = full_values(normed)
    engine.backward(engine(torch.ones(1, 4, 5)))
    engine.step()
    found["weight norm"] = (not torch.equal(before["conv.weight_v"], full_values(normed)["conv.weight_v"])
                            and {"conv.weight_g", "conv.weight_v", "conv.bias"} == set(before))
    engine.destroy()

    module = models.make(Model)
    values = [p.detach().clone() for p in module.parameters()]
    engine = engine_of(module)
    copied = copy.deepcopy(module)
    found["a copy is ordinary"] = (all(type(p) is nn.Parameter and torch.equal(p, q)
                                       for p, q in zip(copied.parameters(), values)) and copied(tokens()).item() > 0
                                   and copied.head.weight is copied.embed.weight)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    found["saved whole"] = all(torch.equal(p, q) for p, q in zip(loaded.parameters(), values))
    found["pickled"] = torch.equal(pickle.loads(pickle.dumps(module.norm.weight)), torch.ones(12))
    p = module.layers[0].weight
    p.all_gather()
    with torch.no_grad():
        p.fill_(rank + 5.0)
    p.partition(has_been_updated=True)
    found["all_gather, partition"] = bool((full_values(module)["layers.0.weight"] == 5.0).all()) and p.shape == (0,)
    found["parts"] = p.ds_tensor.numel() == 144 // world and p.ds_tensor.ds_numel == p.partition_numel() == 144 // world
    p.ds_active_sub_modules.clear()

    offload = engine.optimizer.parameter_offload  # as TRL takes hooks off and puts them back
    for hook in offload.forward_hooks + offload.backward_hooks:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    offload.param_coordinator._invalidate_trace()
    with deepspeed.zero.GatheredParameters(module.parameters()):
        loss = module(tokens()).item()
    offload._register_deepspeed_module(offload.module)
    found["hooks taken off and put back"] = module(tokens()).item() == loss and released(module)
    try:
        engine(torch.full((1, 1), 99))
    except IndexError:
        found["a forward that failed"] = released(module) and module(tokens()).item() == loss
    output = module(tokens())
    output.register_hook(lambda g: 1 / 0)
    try:
        output.backward()
    except ZeroDivisionError:
        module(tokens())
        found["a backward that failed"] = released(module)
    engine.destroy()

    module = models.make(Model)
    plain = module(tokens()).item()
    engine, optimizer, *_ = deepspeed.initialize(model=module, config={
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **ALL_SHARDED}})
    with torch.no_grad():
        found["without an optimizer"] = engine(tokens()).item() == plain and optimizer.module is module
    engine.destroy()
    module.sparse = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
    try:
        engine_of(module)
    except ValueError as error:
        found["a module that cannot be placed"] = "sparse" in str(error) and module.embed.weight.shape == (9, 12)
    with torch.inference_mode():  # as Lightning validates
        engine, *_ = deepspeed.initialize(model=models.make(Model), config={
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **ALL_SHARDED}})
        found["inference mode"] = engine(tokens()).item() == plain and released(engine.module)
    engine.destroy()

    module = models.make(Model)
    engine = engine_of(module, {"stage3_module_granularity_threshold": 150})
    found["granularity"] = (module(tokens()).item() == plain and not getattr(module, "_z3_leaf", False)
                            and [c._z3_leaf for c in module.children() if hasattr(c, "_z3_leaf")] == [True])
    engine.destroy()
    return [name for name, good in found.items() if not good], len(found)


def test_copies_pickles_clients_names_and_what_fails(ranks):
    assert ranks(2, odds) == [([], 13)] * 2


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def step(engine):
    engine.backward(engine(torch.ones(2, 8)).square().mean())
    engine.step()


def whole_values(module):
    return {name: p.detach().clone() for name, p in copy.deepcopy(module).named_parameters()}


def test_an_engine_that_ends_leaves_alone_what_a_later_one_took():
    module = small()
    first, second = engine_of(module), engine_of(module)
    first.destroy()
    assert released(module)
    before = whole_values(module)
    step(second)
    assert not torch.equal(whole_values(module)["0.weight"], before["0.weight"])
    second.destroy()
    assert all(type(p) is nn.Parameter and p.numel() for p in module.parameters())
    assert type(module[0]._parameters) is dict and not module[0]._forward_hooks


@pytest.mark.parametrize("under_init", [False, True])
def test_an_engine_that_fails_to_start_leaves_sharded_parameters_as_they_were(under_init):
    """One in another dtype, one that fails after it has placed everything, and one that fails while it does."""
    nowhere = {"device": "nvme", "nvme_path": "/dev/null"}
    broken = (models.config(3, "bf16", zero={"offload_optimizer": nowhere}),
              models.config(3, zero={**ALL_SHARDED, "offload_optimizer": nowhere}),
              models.config(3, "bf16", zero={"offload_param": nowhere}))
    found = []
    for failing in (False, True):
        with deepspeed.zero.Init(dtype=torch.float32, enabled=under_init):
            module = small()
        engine = None if under_init else engine_of(module, {"stage3_param_persistence_threshold": 4})
        before = [vars(p).get("ds_full") for p in module.parameters()]
        for config in broken if failing else ():
            with pytest.raises(OSError, match="/dev/null"):
                deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
            assert all(p.ds_full is full for p, full in zip(module.parameters(), before, strict=True))
            assert [p.shape == (0,) for p in module.parameters()] == [True, True, True, under_init]
            assert module(torch.ones(2, 8)).dtype == torch.float32
        engine = engine or engine_of(module)
        for _ in range(2):
            step(engine)
        engine.destroy()
        found.append(models.bits(module))
    assert found[0] == found[1]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_lower_stages_refuse_to_train_sharded_parameters(stage):
    with deepspeed.zero.Init(dtype=torch.float32):
        module = small()
    with pytest.raises(ValueError, match=r"parameter 0.weight is sharded \(4 such parameters\)"):
        deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(stage))
    engine_of(module).destroy()


def test_a_backward_that_failed_leaves_nothing_to_the_next_engine():
    module = small()
    engine = engine_of(module)
    failing = module[0].weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module(torch.ones(2, 8)).sum().backward()
    failing.remove()
    engine.destroy()
    engine = engine_of(module)
    step(engine)
    assert released(module)
    engine.destroy()


class Catches(nn.Module):
    """Goes on where one of its modules is interrupted."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for layer in (self.first, self.second):
            with contextlib.suppress(KeyboardInterrupt):
                x = layer(x)
        return x


def test_a_forward_that_was_interrupted_leaves_nothing_to_the_next():
    def interrupt(*ignored):
        raise KeyboardInterrupt

    module = nn.Sequential(nn.Linear(8, 8), Catches())
    engine = engine_of(module)
    hook = module[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine(torch.ones(2, 8))
    hook.remove()
    step(engine)
    assert released(module) and not any(p.ds_count for p in module.parameters())
    for layer in (module[1].first, module[1].second):
        hook = layer.register_forward_pre_hook(interrupt)
        engine(torch.ones(2, 8))
        hook.remove()
        assert released(module) and not any(p.ds_count for p in module.parameters()), layer
    engine.destroy()


def test_an_engine_may_end_while_its_parameters_are_gathered():
    module = small()
    values = whole_values(module)
    for rank in (None, 0):
        engine = engine_of(module)
        with deepspeed.zero.GatheredParameters(module.parameters(), modifier_rank=rank):
            engine.destroy()
        assert all(torch.equal(p, values[name]) for name, p in module.named_parameters())


class Aside(nn.Module):
    """Puts its result elsewhere and returns None."""

    def __init__(self):
        super().__init__()
        self.weight, self.found = nn.Parameter(torch.eye(8)), {}

    def forward(self, x):
        self.found["y"] = F.linear(x, self.weight)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.aside = nn.Linear(8, 8), Aside()

    def forward(self, x):
        self.aside(self.first(x))
        return self.aside.found["y"]


@pytest.mark.parametrize("plain", [True, False])
def test_parameters_of_a_module_that_returns_none_are_whole_in_its_backward(plain):
    module = Around()
    engine = engine_of(module)
    loss = engine(torch.ones(2, 8)).square().mean()
    loss.backward() if plain else engine.backward(loss)
    engine.step()
    assert released(module)
    engine.destroy()


class Reader(nn.Module):
    """Uses the weight of another module, which a copy of it shares."""

    def __init__(self, other):
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.ones(8, 8)), [other]

    def forward(self, x):
        return F.linear(F.linear(x, self.weight), self.other[0].weight)


def test_a_copied_module_fetches_what_it_reads_of_the_original():
    module = nn.Sequential(nn.Linear(8, 8))
    module.append(Reader(module[0]))
    engine = engine_of(module)
    copied = copy.deepcopy(module[1], {id(module[0]): module[0]})
    assert torch.equal(copied(torch.ones(2, 8)), module[1](torch.ones(2, 8)))
    assert released(module)
    engine.destroy()
