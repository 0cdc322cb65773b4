"""An engine whose parameters are not all reduced over the same ranks: experts, and an mpu's data-parallel groups.

What must come out is that of one process that holds the whole model and sees all ranks' data.
"""
import logging
import os
import time

import models
import pytest
import torch
import torch.distributed as dist
from ranks import die
from torch import nn

import deepspeed_c as deepspeed
from deepspeed_c import comm, utils
from deepspeed_c.distributed import world_comm
from deepspeed_c.moe.utils import is_moe_param
from deepspeed_c.utils import groups
from deepspeed_c.utils.parallel_state_deepspeed import initialize_parallel_state_from_config

WIDTH, TOKENS = 12, 8  # TOKENS of a rank, shared out evenly over a layer's experts
SKIPPED = 1  # the step in which no expert gets a token


def expert_of(rank, n):
    """Which of n experts a rank has: copies of one lie n ranks apart, or on neighbouring ranks."""
    return rank * n // 4 if "DATA_FIRST" in os.environ else rank % n


class Exchange(torch.autograd.Function):
    """Part r of each rank's tokens to rank r of a group, and of their gradients back."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x)
        comm.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = torch.empty_like(grad)
        comm.all_to_all_single(out, grad.contiguous(), group=ctx.group)
        return out, None


class Experts(nn.Module):
    """`n` experts over as many ranks (of which this rank has one), or all of them here; token i goes to expert
    i * n // TOKENS."""

    def __init__(self, n, here):
        super().__init__()
        everyone = [nn.Linear(WIDTH, WIDTH) for _ in range(n)]
        self.n, self.here = n, here
        self.experts = nn.ModuleList(everyone if here is None else [everyone[expert_of(here, n)]])
        for p in self.experts.parameters() if here is not None else ():
            p.allreduce, p.group_name = False, f"ep_size_{n}"

    def set_deepspeed_parallelism(self, data_first=False):
        groups._create_expert_and_data_parallel(self.n, use_data_before_expert_parallel_=data_first)

    def forward(self, x):
        if self.here is None:
            return torch.cat([expert(part) for expert, part in zip(self.experts, x.chunk(self.n))])
        group = groups._get_expert_parallel_group(f"ep_size_{self.n}")
        return Exchange.apply(self.experts[0](Exchange.apply(x, group)), group)


class Net(nn.Module):
    """Shared layers, experts of pairs, experts of one rank each, and a layer that only odd ranks use.

    here: this rank's number, None for the whole model."""

    def __init__(self, here):
        super().__init__()
        torch.manual_seed(5)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.pairs, self.alone = Experts(2, here), Experts(4, here)
        self.side, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x, rank, with_experts=True):
        x = torch.tanh(self.inner(x))
        if with_experts:
            x = x + torch.tanh(self.pairs(x))
        if rank % 2:
            x = x + self.side(x)
        if with_experts:
            x = x + self.alone(x)
        return self.outer(x).float().square().mean()


def batch(rank, step, micro=0):
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + micro)
    return torch.randn(TOKENS, WIDTH, generator=generator)


CONFIG = {"train_micro_batch_size_per_gpu": TOKENS, "gradient_clipping": 0.3,
          "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}}


def config(stage, dtype="fp32", gas=1, overlap=False, **more):
    named = {"fp16": {"fp16": {"enabled": True, "loss_scale": 256}}, "bf16": {"bf16": {"enabled": True}}, "fp32": {}}
    return {**CONFIG, "gradient_accumulation_steps": gas, **named[dtype], **more,
            "use_data_before_expert_parallelism": "DATA_FIRST" in os.environ,
            "zero_optimization": {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 300,
                                  "stage3_param_persistence_threshold": 0}}


def train(rank, settings, dtype="fp32", gas=1, n_steps=3):
    """(bits of all parameters, norms) after some steps, and the module."""
    engine, *_ = deepspeed.initialize(model=Net(rank), config=settings)
    norms = []
    for step in range(n_steps):
        for micro in range(gas):
            engine.backward(engine(batch(rank, step, micro).to(models.DTYPES[dtype]), rank, step != SKIPPED))
            engine.step()
        norms.append(engine.get_global_grad_norm())
    module = engine.module
    engine.destroy()
    return models.bits(module), norms, module


def whole(world, gas=1, n_steps=3, clip=CONFIG["gradient_clipping"]):
    """The same in one process with plain PyTorch: (module, norms)."""
    module, norms = Net(None), []
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(n_steps):
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        for rank in range(world):
            for micro in range(gas):
                (module(batch(rank, step, micro), rank, step != SKIPPED) / (world * gas)).backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), clip).item())
        optimizer.step()
    return module, norms


def own(module, here):
    """What a rank holds of the whole model, in its parameters' order."""
    mine = {}
    for name, p in module.named_parameters():
        layer, _, rest = name.partition(".experts.")
        if not rest:
            mine[name] = p.detach()
        elif int(rest[0]) == expert_of(here, 2 if layer == "pairs" else 4):
            mine[f"{layer}.experts.0{rest[1:]}"] = p.detach()
    return mine


def same(module, reference, rank):
    for name, p in own(reference, rank).items():
        torch.testing.assert_close(module.get_parameter(name).detach(), p, rtol=1e-4, atol=2e-6, msg=name)


def stages_agree(rank, world):
    torch.set_num_threads(1)
    for dtype, gas, ways in (("fp32", 1, ((0, False), (1, True), (2, False), (3, False))),
                             ("fp16", 1, ((0, False), (2, True), (3, True))),
                             ("bf16", 2, ((0, False), (1, False), (0, True)))):
        found = [train(rank, config(stage, dtype, gas, overlap), dtype, gas) for stage, overlap in ways]
        for (stage, overlap), (bits, norms, _) in zip(ways, found):
            assert (bits, norms) == found[0][:2], (dtype, gas, stage, overlap)
        if dtype == "fp32":
            same_as_whole(found[-1], world, gas, rank)
    same_as_whole(train(rank, config(2, "fp32", 2), "fp32", 2), world, 2, rank)
    return found[0][1]


def same_as_whole(trained, world, gas, rank):
    _, norms, module = trained
    reference, theirs = whole(world, gas)
    torch.testing.assert_close(norms, theirs, rtol=1e-5, atol=0)
    same(module, reference, rank)


def test_experts_over_fewer_ranks_train_as_the_whole_model_in_one_process_at_every_stage(ranks):
    norms = ranks(4, stages_agree, timeout=120)
    assert norms.count(norms[0]) == 4


def over_delegate(rank, world):
    """Two pretended machines of two ranks: copies of an expert are on both, or with DATA_FIRST on one of them. Ranks
    that run different modules must fetch them as one at stage 3 there."""
    torch.set_num_threads(1)
    os.environ["DSC_COMM_NODE"] = "aabb"[rank]
    settings = [config(stage) for stage in (0, 1, 2, 3)]
    settings[3]["zero_optimization"]["leaf_module"] = {"classes": ["Net"]}
    found = [train(rank, each) for each in settings]
    assert found[0][:2] == found[1][:2] == found[2][:2] == found[3][:2]
    same_as_whole(found[2], world, 1, rank)
    # Sums of several micro-steps in two forms; at stage 2 those of experts of one rank stay with it all the same.
    one, two = (train(rank, config(stage, "bf16", 2), "bf16", 2)[1] for stage in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-2, atol=0)
    return world_comm().backend


@pytest.mark.parametrize("env", [{}, {"DATA_FIRST": "1"}])
def test_experts_train_over_delegate_with_the_same_bits(ranks, env):
    assert ranks(4, over_delegate, timeout=120, env=env) == ["delegate"] * 4


# ---- what users do with experts ----


def options(rank, world):
    """Settings that change how gradients travel hold for experts of one rank too."""
    plain, norms = whole(world)
    for stage, more in ((1, {"prescale_gradients": True}), (2, {"gradient_predivide_factor": 2.0})):
        _, found, module = train(rank, config(stage, **more))
        torch.testing.assert_close(found, norms, rtol=1e-5, atol=0)
        same(module, plain, rank)
    narrow = [train(rank, config(stage, communication_data_type="bf16"), n_steps=2)[:2] for stage in (0, 2)]
    assert narrow[0] == narrow[1]
    for section in ({"type": "Lamb", "params": {"lr": 0.01}}, {"type": "RMSprop", "params": {"lr": 0.003}}):
        found = [train(rank, config(stage, "bf16", optimizer=section), "bf16", n_steps=2)[:2] for stage in (0, 1)]
        assert found[0] == found[1]


def overflow(rank, world):
    """An expert of one rank gets an infinite gradient: all skip, one says where."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("DeepSpeed").addHandler(handler)
    for stage in (0, 1, 2):
        for layer in ("pairs", "alone"):
            engine, *_ = deepspeed.initialize(model=Net(rank), config=config(stage, fp32={"check_grad_overflow": True}))
            before, lines[:] = models.bits(engine.module), []
            p = getattr(engine.module, layer).experts[0].weight
            handle = p.register_hook(lambda grad: grad * float("inf")) if rank == 3 else None
            engine.backward(engine(batch(rank, 0), rank))
            engine.step()
            assert engine.skipped_steps == 1 and models.bits(engine.module) == before
            assert rank or "on rank 3" in lines[0] and f"{layer}.experts.0.weight" in lines[0], lines
            if handle:
                handle.remove()
            engine.backward(engine(batch(rank, 0), rank))
            engine.step()
            assert engine.was_step_applied() and models.bits(engine.module) != before
            engine.destroy()


def groups_and_parts(rank, world):
    """Optimizer groups, sharing of states, and the accessors of utils, by parameter."""
    reference, _ = whole(world, n_steps=1, clip=1e9)
    for stage in (0, 1, 2):
        engine, optimizer, *_ = deepspeed.initialize(
            model=Net(rank), config=config(stage, gradient_clipping=0, optimizer={"type": "SGD", "params": {
                "lr": 1.0, "momentum": 0.9}}))
        assert [group["name"] for group in optimizer.param_groups] == ["dense-params", "ep_size_2", "ep_size_4"]
        assert [bool(group.get("moe")) for group in optimizer.param_groups] == [False, True, True]
        engine.backward(engine(batch(rank, 0), rank))
        wanted = own_grads(world, rank)
        for name, p in engine.module.named_parameters():
            torch.testing.assert_close(utils.safe_get_full_grad(p), wanted[name], rtol=1e-4, atol=1e-7)
        for name in ("pairs.experts.0.weight", "alone.experts.0.weight", "inner.weight"):
            utils.safe_set_full_grad(engine.module.get_parameter(name), 2 * wanted[name])
        before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        engine.step()
        for name, p in engine.module.named_parameters():
            factor = 2 if name in ("pairs.experts.0.weight", "alone.experts.0.weight", "inner.weight") else 1
            torch.testing.assert_close(before[name] - p.detach(), factor * wanted[name], rtol=1e-4, atol=1e-6)
            assert torch.equal(utils.safe_get_full_optimizer_state(p, "momentum_buffer").sign(), wanted[name].sign())
            assert torch.equal(utils.safe_get_full_fp32_param(p), p)
        # Over all ranks: what steps a parameter is one rank of those that hold it, at stage 0 all of them.
        stepped = torch.tensor([engine._core.part(i)[1] for i in range(len(engine._params))])
        comm.all_reduce(stepped)
        kinds = {"pairs": 2, "alone": 4}
        assert stepped.tolist() == [p.numel() * (world if stage == 0 else kinds.get(name.partition(".")[0], 1))
                                    for name, p in engine.module.named_parameters()]
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        engine.destroy()


def own_grads(world, rank):
    module = Net(None)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    for r in range(world):
        (module(batch(r, 0), r) / world).backward()
    values = Net(None)
    for p, q in zip(values.parameters(), module.parameters()):
        p.data = q.grad
    return own(values, rank)


def data_first(rank, world):
    """Copies of an expert on neighbouring ranks: they take the values of the first."""
    module = Experts(2, rank)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(rank)
    engine, *_ = deepspeed.initialize(model=module, config=config(1))
    assert all((p == rank - rank % 2).all() for p in engine.module.parameters())
    engine.destroy()
    # Experts that all ranks hold are reduced as the rest.
    engine, *_ = deepspeed.initialize(model=Experts(1, 0), config=config(1))
    assert engine._comms == [engine._comm] * 2
    engine.destroy()
    comm.barrier()


def unequal(rank, world):
    """More backward passes on some ranks; without sync; an expert frozen on one pair of ranks only."""
    found = []
    for stage in (0, 1, 2):
        module = Net(rank)
        if rank % 2:
            module.pairs.experts[0].bias.requires_grad_(True)
        engine, *_ = deepspeed.initialize(model=module, config=config(stage))
        for step in range(3):
            if step == 1:
                module.pairs.experts[0].bias.requires_grad_(rank % 2 == 0)
                frozen = module.pairs.experts[0].bias.detach().clone()
            engine.backward(engine(batch(rank, step), rank))
            for extra in range(rank % 2):  # with no exchange in them
                engine.backward(engine(batch(rank, step, 1 + extra), rank, False))
            engine.step()
        assert torch.equal(frozen, module.pairs.experts[0].bias) == (rank % 2 == 1)
        found.append((models.bits(module), engine.get_global_grad_norm()))
        engine.destroy()
    assert found[0] == found[1]
    torch.testing.assert_close(found[0][1], found[2][1], rtol=1e-5, atol=0)


def assigned(rank, world):
    """Other Parameters in the places of experts are experts, for a later engine too."""
    plain = train(rank, config(2))[:2]
    engine, *_ = deepspeed.initialize(model=Net(rank), config=config(2))
    marks = [(is_moe_param(p), getattr(p, "group_name", None)) for p in engine.module.parameters()]
    for step in range(3):
        engine.module.load_state_dict({k: v.clone() for k, v in engine.module.state_dict().items()}, assign=True)
        engine.backward(engine(batch(rank, step), rank, step != SKIPPED))
        engine.step()
    assert [(is_moe_param(p), getattr(p, "group_name", None)) for p in engine.module.parameters()] == marks
    assert (models.bits(engine.module), engine.get_global_grad_norm()) == (plain[0], plain[1][-1])
    engine.destroy()


def wrong(rank, world):
    module = nn.Linear(3, 3)
    module.weight.allreduce, module.weight.group_name = False, "ep_size_3"
    with pytest.raises(ValueError, match="parameter weight is an expert's.*'ep_size_3'.*ep_size_2"):
        deepspeed.initialize(model=module, config=config(1))
    del module.weight.group_name
    with pytest.raises(ValueError, match="parameter weight is an expert's.*has no group_name; allowed"):
        deepspeed.initialize(model=module, config=config(1))
    module = Net(rank)
    module.outer = nn.Linear(WIDTH, 3 + rank // 2)
    before = models.bits(module)
    with pytest.raises(ValueError, match="different engines: the module's parameters on rank 2 and on rank 0 differ"):
        deepspeed.initialize(model=module, config=config(1))
    assert models.bits(module) == before
    module = Net(rank)
    if rank == 2:
        del module.pairs.experts[0].bias.allreduce
    with pytest.raises(ValueError, match="rank 2 and on rank 0 differ in names, shapes, dtypes or group_name"):
        deepspeed.initialize(model=module, config=config(1))


def everything(rank, world):
    torch.set_num_threads(1)
    for part in (options, overflow, groups_and_parts, unequal, assigned, wrong):
        part(rank, world)


def test_what_users_do_with_experts(ranks):
    ranks(4, everything, timeout=120)


def test_expert_data_ranks_may_be_neighbours(ranks):
    ranks(4, data_first, env={"DATA_FIRST": "1"})


# ---- a death ----


def killed(rank, world):
    engine, *_ = deepspeed.initialize(model=Net(rank), config=config(2))
    for step in range(3):
        loss = engine(batch(rank, step), rank)
        if rank == 3 and step == 1:
            engine.module.pairs.experts[0].weight.register_hook(lambda grad: die())
        started = time.monotonic()
        try:
            engine.backward(loss)
            engine.step()
        except (deepspeed.CommError, RuntimeError) as error:
            return str(error), time.monotonic() - started
    return "no error", 0.0


def test_the_death_of_an_expert_s_rank_is_an_error_on_all_others(ranks):
    outcomes = ranks.outcomes(4, killed, timeout=40)
    for rank in range(3):
        text, seconds = outcomes[rank].value
        # The group's own number of the rank, where a group of two finds out.
        assert "died or ended" in text and ("rank 3" in text or "ranks 2, 3" in text) and seconds < 5, text


# ---- an mpu ----


class Stages:
    """Two stages of a pipeline next to each other, each on two data-parallel ranks."""

    def __init__(self):
        self.data, self.model = groups._create_model_parallel(2)
        self.rank = dist.get_rank()

    def get_data_parallel_group(self):
        return self.data

    def get_data_parallel_world_size(self):
        return 2

    def get_data_parallel_rank(self):
        return self.rank // 2

    def get_model_parallel_group(self):
        return self.model

    def get_tensor_model_parallel_world_size(self):
        return 1

    def get_tensor_model_parallel_rank(self):
        return 0

    def get_pipeline_model_parallel_world_size(self):
        return 2

    def get_pipeline_model_parallel_rank(self):
        return self.rank % 2


class Added(torch.autograd.Function):
    """A sum over the ranks that share a layer, each of whose gradients is the whole one."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        comm.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Split(nn.Module):
    """Two layers cut over two ranks (here: 0, 1; None: whole), and biases that both hold alike."""

    def __init__(self, here, group=None):
        super().__init__()
        torch.manual_seed(6)
        up, down = torch.randn(WIDTH, 8), torch.randn(8, 3)
        self.group, cut = group, slice(None) if here is None else slice(4 * here, 4 * here + 4)
        self.up, self.down = nn.Parameter(up[:, cut].clone()), nn.Parameter(down[cut].clone())
        self.up.tensor_model_parallel = self.down.model_parallel = True
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x):
        y = torch.tanh(x @ self.up) @ self.down
        return ((y if self.group is None else Added.apply(y, self.group)) + self.bias).square().mean()


def tensor_parallel(rank, world):
    layout = {"tensor_parallel": {"autotp_size": 2}}
    mpu = initialize_parallel_state_from_config(layout, "tensor")
    reference = Split(None)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        sum(reference(batch(r, step)) / 2 for r in range(2)).backward()
        norms.append(nn.utils.clip_grad_norm_(reference.parameters(), CONFIG["gradient_clipping"]).item())
        optimizer.step()
    cut, bits = slice(4 * (rank % 2), 4 * (rank % 2) + 4), []
    for stage in (0, 1, 2, 3):
        engine, _, loader, _ = deepspeed.initialize(
            model=Split(rank % 2, mpu.get_tensor_model_parallel_group()), config=config(stage, **layout), mpu=mpu,
            training_data=list(torch.arange(32.0)))
        assert (engine.world_size, engine.dp_world_size, engine.mp_world_size) == (4, 2, 2)
        assert engine.train_batch_size() == 2 * TOKENS and len(loader) == 2
        assert (engine.get_data_parallel_rank(), engine.get_model_parallel_rank()) == (rank // 2, rank % 2)
        found = []
        for step in range(3):
            engine.backward(engine(batch(rank // 2, step)))
            engine.step()
            found.append(engine.get_global_grad_norm())
        torch.testing.assert_close(found, norms, rtol=1e-5, atol=0)
        module = engine.module
        engine.destroy()
        for a, b in ((module.up, reference.up[:, cut]), (module.down, reference.down[cut]),
                     (module.bias, reference.bias)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
        bits.append((models.bits(module), found))
        # An infinite gradient in what one rank has skips the step on all four.
        engine, *_ = deepspeed.initialize(model=module, config=config(stage, "fp16", **layout), mpu=mpu)
        before = models.bits(module)
        engine.backward(engine(batch(rank // 2, 0).half()).float() * (float("inf") if rank == 3 else 1.0))
        engine.step()
        assert engine.skipped_steps == 1 and models.bits(module) == before
        engine.destroy()
    assert bits[0] == bits[1] == bits[2] == bits[3]


def stages_of_a_pipeline(rank, world):
    """Two models of different parameters, which agree on norm, clipping and skipping; a tied weight counts once."""
    mpu = Stages()
    norms = []
    for stage in (0, 1, 2, 3):
        torch.manual_seed(rank % 2)
        module = nn.Linear(WIDTH, 3) if rank % 2 else nn.Sequential(nn.Linear(WIDTH, 5), nn.Linear(5, 2))
        if rank % 2:
            module.bias.ds_pipe_replicated = True
        engine, *_ = deepspeed.initialize(model=module, config=config(stage), mpu=mpu)
        engine.backward(engine(batch(rank // 2, 0)).square().mean())
        grads = [utils.safe_get_full_grad(p) for p in module.parameters()] if stage < 2 else []
        squares = torch.tensor([sum(g.square().sum() for g in grads[:1 if rank % 2 else None])], dtype=torch.float32)
        engine.step()
        comm.all_reduce(squares)
        if stage < 2:  # each part on two ranks
            assert abs(engine.get_global_grad_norm() - (squares.item() / 2) ** 0.5) < 1e-6
        norms.append(engine.get_global_grad_norm())
        engine.destroy()
    assert norms[0] == norms[1] == norms[2] == norms[3]


def sequence_parallel(rank, world):
    """Two ranks that share a sequence bring two terms of one loss; the mean is over the two sequences."""
    mpu = initialize_parallel_state_from_config({"sequence_parallel_size": 2}, "sequence")
    for stage in (0, 1, 2, 3):
        torch.manual_seed(1)
        module = nn.Linear(WIDTH, 3)
        loss = sum(module(batch(r, 0)).square().sum() for r in range(world)) / 2
        wanted, = torch.autograd.grad(loss, module.weight)
        before = module.weight.detach().clone()
        engine, *_ = deepspeed.initialize(model=module, mpu=mpu, config=config(
            stage, sequence_parallel_size=2, gradient_clipping=0, optimizer={"type": "SGD", "params": {"lr": 1.0}}))
        assert engine.dp_world_size == 2 and engine.train_batch_size() == 2 * TOKENS
        assert dist.get_world_size(engine.get_sequence_parallel_group()) == 2
        engine.backward(engine(batch(rank, 0)).square().sum())
        engine.step()
        engine.destroy()
        torch.testing.assert_close(before - module.weight.detach(), wanted, rtol=1e-4, atol=1e-5)


def with_an_mpu(rank, world):
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    tensor_parallel(rank, world)
    sequence_parallel(rank, world)
    stages_of_a_pipeline(rank, world)


def test_zero_shards_over_an_mpus_data_ranks_and_all_ranks_agree_on_the_step(ranks):
    ranks(4, with_an_mpu, timeout=120)
