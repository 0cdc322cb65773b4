"""MoE layers whose experts are shared out over ranks: ep_size changes no result, and nobody waits for ever."""
import hashlib

import moe_cases
import pytest
import torch
import torch.distributed as dist
from moe_cases import E, M, formula
from torch import nn

import deepspeed_c as deepspeed
from deepspeed_c.moe.layer import MoE
from deepspeed_c.moe.mappings import gather_tokens
from deepspeed_c.utils import groups

SIZES = (1, 2, 4)
LAYERS = {
    "top1": {}, "top2": {"k": 2, "top2_2nd_expert_sampling": False}, "top3": {"k": 3},
    "residual": {"use_residual": True},
}


class Net(nn.Module):
    """Linear, experts, linear; weights by formula, an expert's by its number among all, wherever it is."""

    def __init__(self, ep_size, **options):
        super().__init__()
        self.first, self.last = nn.Linear(M, M), nn.Linear(M, 2)
        self.moe = MoE(M, moe_cases.expert(), num_experts=E, ep_size=ep_size, **{"drop_tokens": False, **options})
        self.moe.set_deepspeed_parallelism()
        self.fill()

    def fill(self):
        for i, p in enumerate(p for p in self.parameters() if getattr(p, "allreduce", True)):
            p.data.copy_(formula(p.shape, i))
        for number, expert in self.experts():
            for i, p in enumerate(expert.parameters()):
                p.data.copy_(formula(p.shape, 10 * number + i))

    def experts(self):
        """(number among all, module) of this rank's experts."""
        first = groups._get_expert_parallel_rank(self.moe.expert_group_name) * self.moe.num_local_experts
        return enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts, first)

    def forward(self, x):
        h, self.aux, self.counts = self.moe(torch.tanh(self.first(x)))
        return self.last(h).float().square().sum() + 0.1 * self.aux

    def whole(self, of):
        """{name: of(parameter)} of all experts of the job and of what is shared, added over the ranks that hold it."""
        found = {f"expert {n} {i}": torch.zeros_like(p, dtype=torch.float32)
                 for n in range(E) for i, p in enumerate(moe_cases.expert().parameters())}
        for number, expert in self.experts():
            for i, p in enumerate(expert.parameters()):
                found[f"expert {number} {i}"] = of(p).float()
        found.update((name, of(p).float()) for name, p in self.named_parameters() if getattr(p, "allreduce", True))
        for value in found.values():
            dist.all_reduce(value)
        return found


def grad(p):
    return torch.zeros_like(p) if p.grad is None else p.grad.clone()


def tokens(rank, n):
    return formula((n, M), 100 + 7 * rank)


def forward_backward(rank, ep_size, n_tokens, **options):
    """(loss, counts, {name: gradient of the job's loss})."""
    torch.manual_seed(1)
    net = Net(ep_size, **options)
    loss = net(tokens(rank, n_tokens))
    loss.backward()
    return loss.item(), net.counts.tolist(), net.whole(grad)


def digest(value):
    """What is equal where all bits are."""
    if isinstance(value, dict):
        value = b"".join(v.contiguous().view(torch.uint8).numpy().tobytes() for v in value.values())
    return hashlib.sha256(value if isinstance(value, bytes) else str(value).encode()).hexdigest()


def furthest(one, other):
    """The largest relative difference of any of two dicts' tensors."""
    return max(((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1e-3)).item() for name in one)


# ---- the layer, without an engine ----


def layers_on_ranks(rank, world):
    """{what: result}; ranks have different tokens, and different numbers of them."""
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    found = {}
    for name, options in LAYERS.items():
        reference = forward_backward(rank, 1, 3 + rank, **options)
        for size in SIZES[1:]:
            loss, counts, grads = forward_backward(rank, size, 3 + rank, **options)
            again = forward_backward(rank, size, 3 + rank, **options)
            found[name, size] = {"loss": abs(loss - reference[0]) / abs(reference[0]), "counts": counts == reference[1],
                                 "grads": furthest(reference[2], grads), "again": digest(grads) == digest(again[2])}
    found["empty"] = empty_handed(rank)
    found["some"] = with_gradients_on_some(rank)
    found["tensor"] = over_tensor_ranks(rank)
    found["tensor engines"] = engines_over_tensor_ranks(rank)
    with pytest.raises(ValueError) as error:
        MoE(M, nn.Linear(M, M), num_experts=8, ep_size=8)
    found["error"] = str(error.value)
    return found


def with_gradients_on_some(rank):
    """[largest difference of gradients from a layer on one rank] where the gate is frozen and only rank 0's tokens
    want a gradient: the others' come back to it all the same."""
    found = []
    for size in SIZES:
        net = Net(size)
        net.moe.deepspeed_moe.gate.requires_grad_(False)
        net.first.requires_grad_(rank == 0)
        net(tokens(rank, 4)).backward()
        found.append(net.whole(grad))
    return [furthest(found[0], other) for other in found[1:]]


def empty_handed(rank):
    """Losses and whether gradients are finite: a rank without tokens; all tokens to one expert;
    capacities that differ between ranks; capacity 0."""
    found = {}
    for size in SIZES:
        cases = {
            "no tokens on rank 1": (Net(size), tokens(rank, 0 if rank == 1 else 4)),
            "one expert": (Net(size, k=2, top2_2nd_expert_sampling=False), tokens(rank, 4)),
            "other batch sizes": (Net(size, drop_tokens=True, capacity_factor=4.0), tokens(rank, 3 + rank)),
            "capacity 0": (Net(size, drop_tokens=True, capacity_factor=0.0, min_capacity=0), tokens(rank, 4)),
        }
        cases["one expert"][0].moe.deepspeed_moe.gate.wg.weight.data[2] = 50.0
        for name, (net, x) in cases.items():
            loss = net(x)
            loss.backward()
            grads = net.whole(grad)
            found[name, size] = loss.item(), all(g.isfinite().all() for g in grads.values()), net.counts.tolist()
    return found


class Mpu:
    """Two tensor-parallel pairs, 0 1 and 2 3, each with data of its own."""

    def __init__(self):
        tensor = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        data = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        rank = dist.get_rank()
        self.tensor, self.data = tensor[rank // 2], data[rank % 2]

    def get_tensor_model_parallel_group(self):
        return self.tensor

    get_model_parallel_group = get_tensor_model_parallel_group

    def get_tensor_model_parallel_rank(self):
        return dist.get_rank(self.tensor)

    def get_tensor_model_parallel_world_size(self):
        return 2

    def get_data_parallel_group(self):
        return self.data

    def get_data_parallel_rank(self):
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self):
        return 2


class OverTensorRanks(torch.autograd.Function):
    """Sums over the tensor-parallel ranks, in the forward pass or in the backward pass."""

    @staticmethod
    def forward(ctx, x, is_forward):
        ctx.is_forward = is_forward
        return OverTensorRanks.summed(x) if is_forward else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone() if ctx.is_forward else OverTensorRanks.summed(grad), None

    @staticmethod
    def summed(x):
        x = x.contiguous().clone()
        deepspeed.comm.all_reduce(x, group=groups.get_tensor_model_parallel_group())
        return x


class CutExpert(nn.Module):
    """tanh(x up) down, with this tensor rank's half of the 6 features in between."""

    def __init__(self):
        super().__init__()
        half = slice(3 * groups.get_tensor_model_parallel_rank(), 3 * groups.get_tensor_model_parallel_rank() + 3)
        self.up = nn.Parameter(formula((6, M), 1)[half].clone())
        self.down = nn.Parameter(formula((M, 6), 2)[:, half].clone())

    def forward(self, x):
        x = OverTensorRanks.apply(x, False)
        return OverTensorRanks.apply(torch.tanh(x @ self.up.T) @ self.down.T, True)


class WholeExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(formula((6, M), 1)), nn.Parameter(formula((M, 6), 2))

    def forward(self, x):
        return torch.tanh(x @ self.up.T) @ self.down.T


def over_tensor_ranks(rank):
    """{(k, ep_size, cut): largest differences of output, input's and gate's gradient, experts' gradients summed over
    the ranks that hold them} from a layer on one rank, where pairs of ranks hold the same tokens."""
    found = {}
    for k in (1, 2):
        expected = tensor_case(rank, k, MoE(M, WholeExpert(), num_experts=2, k=k, min_capacity=4, **CHOSEN), None)
        groups.mpu = Mpu()
        for ep_size, cut in ((1, False), (2, False), (1, True), (2, True)):
            forget_groups()  # one name, several layouts
            moe = MoE(M, CutExpert() if cut else WholeExpert(), num_experts=2, ep_size=ep_size, k=k, min_capacity=3,
                      enable_expert_tensor_parallelism=cut, **CHOSEN)
            moe.set_deepspeed_parallelism()
            got = tensor_case(rank, k, moe, cut)
            found[k, ep_size, cut] = [(a - b).abs().max().item() for a, b in zip(expected, got, strict=True)]
        once_only()
        groups.mpu = None
        forget_groups()
    return found


def once_only():
    """A gradient's gradient would lack what lies on the other ranks."""
    x = torch.ones(2, requires_grad=True)
    found, = torch.autograd.grad(gather_tokens(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found.sum().backward()


def forget_groups():
    groups._made().experts.clear()
    groups._made().cut.clear()


# Three places at least: four, where two ranks share them out.
CHOSEN = {"capacity_factor": 0.5, "use_rts": False, "top2_2nd_expert_sampling": False}


def tensor_case(rank, k, moe, cut):
    """cut: None where each pair of ranks computes the same, alone."""
    moe.deepspeed_moe.gate.wg.weight.data.copy_(formula((2, M), 3))
    x = formula((7, M), 100 + rank // 2).requires_grad_()
    out, aux, _ = moe(x)
    (out * formula(out.shape, 5)).sum().add(aux).backward()
    n_local = moe.num_local_experts
    first = groups._get_expert_parallel_rank(moe.expert_group_name) * n_local if moe.ep_size > 1 else 0
    up = torch.zeros(2, 6, M)
    for i, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts, first):
        rows = slice(3 * (rank % 2), 3 * (rank % 2) + 3) if cut else slice(6)
        up[i, rows] = grad(expert.up) * (0.5 if cut is None else 1)
    dist.all_reduce(up)
    return out.detach(), x.grad, grad(moe.deepspeed_moe.gate.wg.weight), up


class Shared(nn.Module):
    """A layer of two experts by formula; `cut` over tensor ranks, or whole."""

    def __init__(self, ep_size, cut):
        super().__init__()
        self.moe = MoE(M, CutExpert() if cut else WholeExpert(), num_experts=2, ep_size=ep_size, k=2,
                       enable_expert_tensor_parallelism=cut, **CHOSEN)
        layer = self.moe.deepspeed_moe
        layer.gate.wg.weight.data.copy_(formula((2, M), 3))
        first = 0
        if ep_size > 1:
            self.moe.set_deepspeed_parallelism()
            first = groups._get_expert_parallel_rank(self.moe.expert_group_name)
        half = slice(3 * groups.get_tensor_model_parallel_rank(), 3 * groups.get_tensor_model_parallel_rank() + 3)
        for i, expert in enumerate(layer.experts.deepspeed_experts, first):
            expert.up.data.copy_(formula((6, M), 20 + i)[half if cut else slice(6)])
            expert.down.data.copy_(formula((M, 6), 30 + i)[:, half if cut else slice(6)])
            expert.up.tensor_model_parallel = expert.down.tensor_model_parallel = cut

    def forward(self, x):
        out, aux, _ = self.moe(x)
        return out.square().sum() + aux

    def values(self, cut):
        """[gate, expert's down matrix, ...], of all experts and of whole matrices."""
        layer = self.moe.deepspeed_moe
        down, n = torch.zeros(2, M, 6), torch.zeros(2, M, 6)
        first = groups._get_expert_parallel_rank(self.moe.expert_group_name) if self.moe.ep_size > 1 else 0
        for i, expert in enumerate(layer.experts.deepspeed_experts, first):
            place = slice(3 * (dist.get_rank() % 2), 3 * (dist.get_rank() % 2) + 3) if cut else slice(6)
            down[i, :, place] = expert.down.detach()
            n[i, :, place] = 1
        dist.all_reduce(down)
        dist.all_reduce(n)
        return layer.gate.wg.weight.detach(), down / n


def engines_over_tensor_ranks(rank):
    """{(ep_size, cut, stage): differences of values and norms from a process that has both pairs' tokens}."""
    whole, norms, found = Shared(1, False), [], {}
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)
    for step in range(2):
        optimizer.zero_grad()
        sum(whole(tokens(2 * step + pair, 4)) / 2 for pair in range(2)).backward()
        norms.append(nn.utils.clip_grad_norm_(whole.parameters(), 1.0).item())
        optimizer.step()
    expected = *whole.values(False), torch.tensor(norms)
    mpu = Mpu()
    for ep_size, cut in ((1, False), (2, False), (1, True), (2, True)):
        forget_groups()
        for stage in (0, 1, 2):
            groups.mpu = mpu
            engine, *_ = deepspeed.initialize(model=Shared(ep_size, cut), mpu=mpu, config={
                "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "gradient_clipping": 1.0,
                "optimizer": {"type": "SGD", "params": {"lr": 0.05}}})
            norms = []
            for step in range(2):
                engine.backward(engine(tokens(2 * step + rank // 2, 4)))
                engine.step()
                norms.append(engine.get_global_grad_norm())
            got = *engine.module.values(cut), torch.tensor(norms)
            found[ep_size, cut, stage] = [(a - b).abs().max().item() for a, b in zip(expected, got, strict=True)]
            engine.destroy()
    found["both"] = both_kinds(rank, mpu)
    uneven(rank, mpu)
    with pytest.raises(ValueError, match="see 2 tensor-parallel ranks.*this engine has 1"):  # without the mpu
        deepspeed.initialize(model=Shared(1, False), config={
            "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.05}}})
    groups.mpu = None
    forget_groups()
    return found


def uneven(rank, mpu):
    """Tensor ranks with different numbers of parameters that both freeze the same one of their experts."""
    forget_groups()
    extra = {"extra": nn.Linear(2, 2)} if rank % 2 else {}
    engine, *_ = deepspeed.initialize(model=nn.ModuleDict({**extra, "layer": Shared(1, False)}), mpu=mpu, config={
        "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.05}}})
    layer = engine.module["layer"]
    expert = layer.moe.deepspeed_moe.experts.deepspeed_experts[0]
    expert.up.requires_grad_(False)
    before = expert.up.clone(), expert.down.clone()
    engine.backward(layer(tokens(rank // 2, 4)))
    engine.step()
    assert torch.equal(expert.up, before[0]) and not torch.equal(expert.down, before[1])
    engine.destroy()


class Both(nn.Module):
    """A layer whose experts are cut over tensor ranks, one whose tokens are shared out over them; whole: neither."""

    def __init__(self, whole):
        super().__init__()
        self.first, self.second = Shared(1, not whole), Shared(1 if whole else 2, False)

    def forward(self, x):
        y, aux, _ = self.first.moe(x)
        out, more, _ = self.second.moe(torch.tanh(x + y))
        return out.square().sum() + aux + more


def both_kinds(rank, mpu):
    """Relative difference of the norm."""
    groups.mpu = None
    whole = Both(True)
    sum(whole(tokens(pair, 4)) / 2 for pair in range(2)).backward()
    expected = nn.utils.clip_grad_norm_(whole.parameters(), 1.0).item()
    forget_groups()
    groups.mpu = mpu
    engine, *_ = deepspeed.initialize(model=Both(False), mpu=mpu, config={
        "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.05}}})
    engine.backward(engine(tokens(rank // 2, 4)))
    engine.step()
    engine.destroy()
    return abs(engine.get_global_grad_norm() - expected) / expected


@pytest.fixture(scope="module")
def layers(ranks):
    return ranks(4, layers_on_ranks, timeout=120)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", SIZES[1:])
def test_the_number_of_ranks_that_share_experts_changes_nothing_but_rounding(layers, name, size):
    for found in layers:
        assert found[name, size]["loss"] < 1e-6 and found[name, size]["counts"]
        assert found[name, size]["grads"] < 1e-5
        assert found[name, size]["again"], "a second run gave other bits"


def test_ranks_without_tokens_experts_without_tokens_and_capacity_zero_neither_hang_nor_give_nan(layers):
    for found in layers:
        for (name, size), (loss, finite, counts) in found["empty"].items():
            assert finite and loss == loss, (name, size)
            assert loss == pytest.approx(found["empty"][name, 1][0], rel=1e-5)
            assert counts == found["empty"][name, 1][2]
    assert layers[1]["empty"]["no tokens on rank 1", 2][2] == [0] * E


def test_all_ranks_exchange_gradients_where_one_wants_them(layers):
    assert max(max(found["some"]) for found in layers) < 1e-5


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("cut", [False, True])
def test_tensor_ranks_share_tokens_or_experts_and_change_nothing(layers, k, ep_size, cut):
    for found in layers:
        assert max(found["tensor"][k, ep_size, cut]) < 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("cut", [False, True])
def test_an_engine_over_tensor_ranks_that_share_tokens_or_experts_steps_as_one_process(layers, stage, ep_size, cut):
    for found in layers:
        assert max(found["tensor engines"][ep_size, cut, stage]) < 1e-5


def test_one_model_may_have_layers_that_are_cut_over_tensor_ranks_and_others(layers):
    assert all(found["tensor engines"]["both"] < 1e-5 for found in layers)


def test_more_expert_ranks_than_ranks_is_an_error_with_the_numbers(layers):
    assert all("ep_size is 8 and there are 4 ranks" in found["error"] for found in layers)


# ---- with an engine ----


def trained(rank, ep_size, stage, dtype="fp32", optimizer="SGD", n_steps=3, **options):
    """{name: value} of all parameters after some steps, and the losses."""
    torch.manual_seed(1)
    net = Net(ep_size, **options)
    config = {
        "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": optimizer, "params": {"lr": 0.05}}, "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16", "initial_scale_power": 8},
    }
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    losses = []
    for step in range(n_steps):
        loss = engine(tokens(rank + 10 * step, 4).to(low))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    norm = engine.get_global_grad_norm()
    engine.destroy()
    n_holders = net.whole(torch.ones_like)
    values = {name: value / n_holders[name] for name, value in net.whole(lambda p: p.detach().clone()).items()}
    return values, losses, norm


RUNS = [("fp32", 2), ("fp32", 1), ("fp32", 4), ("bf16", 2), ("fp16", 2)]


def engines_on_ranks(rank, world):
    """{what: result} of training with ZeRO 0 to 3 over expert groups."""
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    found = {}
    for name in ("top2", "residual"):
        base = trained(rank, 1, 0, **LAYERS[name])
        for size in SIZES[1:]:
            values, losses, norm = trained(rank, size, 1, **LAYERS[name])
            found[name, size] = {"values": furthest(base[0], values), "norm": abs(norm - base[2]) / base[2],
                                 "loss": max(abs(a - b) / abs(a) for a, b in zip(base[1], losses))}
    for dtype, size in RUNS:
        stages = (0, 1, 2, 3, 3) if (dtype, size) == RUNS[0] else (0, 1, 2, 3)
        results = [trained(rank, size, stage, dtype, "Adam", 2, use_residual=True) for stage in stages]
        found[dtype, size] = [(digest(values), losses, norm) for values, losses, norm in results]
    return found


@pytest.fixture(scope="module")
def engines(ranks):
    return ranks(4, engines_on_ranks, timeout=240)


@pytest.mark.parametrize("name", ["top2", "residual"])
@pytest.mark.parametrize("size", SIZES[1:])
def test_training_gives_the_same_parameters_and_norm_for_every_ep_size(engines, name, size):
    for found in engines:
        assert found[name, size]["values"] < 1e-4 and found[name, size]["norm"] < 1e-5
        assert found[name, size]["loss"] < 1e-5


@pytest.mark.parametrize("dtype, size", RUNS)
def test_stages_and_repetition_change_no_bit(engines, dtype, size):
    for found in engines:
        assert len(set(map(str, found[dtype, size]))) == 1
        assert all(loss == loss for loss in found[dtype, size][0][1])
