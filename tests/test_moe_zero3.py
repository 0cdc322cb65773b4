"""MoE layers at ZeRO stage 3: experts are sharded over the ranks that hold them, and routing that differs between ranks
neither hangs nor changes a bit."""
import torch
from moe_cases import M, formula
from test_moe_ranks import Net, digest, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import deepspeed_c as deepspeed

FORCED = {"DSC_COMM_BACKEND": "delegate"}
ZERO = {"stage3_param_persistence_threshold": 0}


class Model(Net):
    """Linear, a side branch, experts, linear. plan: how a forward goes, a letter each."""

    def __init__(self, ep_size, **options):
        super().__init__(ep_size, **options)
        self.side = nn.Linear(M, M)

    def forward(self, x, plan):
        h = torch.tanh(self.first(x))
        if "side" in plan:
            h = h + self.side(h)
        if "checkpoint" in plan:
            out, aux = checkpoint(lambda y: self.moe(y)[:2], h, use_reentrant="reentrant" in plan)
        else:
            out, aux, _ = self.moe(h)
        return aux if "balance" in plan else self.last(out).float().square().sum() + 0.1 * aux


class Sparse(nn.Module):
    """A mixture as models bring their own: an expert runs only if a token of this rank chose it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(M, 4)
        self.experts = nn.ModuleList(nn.Linear(M, M) for _ in range(4))

    def forward(self, x):
        weights, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        chosen = weights.argmax(-1)
        for number in chosen.unique().tolist():
            mine = chosen == number
            out[mine] += self.experts[number](x[mine]) * weights[mine, number, None]
        return out


class Sparsely(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.sparse = nn.Linear(M, M), Sparse()
        self.fill()

    def fill(self):
        for i, p in enumerate(self.parameters()):
            p.data.copy_(formula(p.shape, i))

    def forward(self, x, plan):
        return self.sparse(torch.tanh(self.first(x))).square().sum()


def built(stage, make, init):
    """`make()`, under zero.Init where that is asked for and the stage is 3; values by formula."""
    with deepspeed.zero.Init(config_dict_or_path={"zero_optimization": {"stage": 3, **ZERO}},
                             enabled=init and stage == 3):
        net = make()
    with deepspeed.zero.GatheredParameters(net.parameters(), modifier_rank=0):
        net.fill()
    return net


def trained(rank, stage, plans=("side",), n_tokens=(4,), gas=1, init=False, ep_size=2, sparse=False, folder=None,
            **options):
    """Digest of all parameters, losses and norm after two steps. plans, n_tokens: one for each rank, in turn. folder:
    at stage 3 parameters, masters and states lie in files there."""
    torch.manual_seed(1)
    net = built(stage, Sparsely if sparse else lambda: Model(ep_size, **options), init)
    more = {"leaf_module": {"classes": ["Sparse"]}} if sparse else {}
    if folder and stage == 3:
        more["offload_optimizer"] = more["offload_param"] = {"device": "nvme", "nvme_path": folder}
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config={
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": gas, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, **ZERO, **more}, "optimizer": {"type": "Adam", "params": {"lr": 0.05}}})
    losses = []
    for step in range(2 * gas):
        loss = engine(tokens(rank + 10 * step, n_tokens[rank % len(n_tokens)]), plans[rank % len(plans)])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        assert stage < 3 or all(p.shape == (0,) for p in net.parameters())
    if stage == 3 and not sparse:
        assert {p.ds_home.comm.size for _, expert in net.experts() for p in expert.parameters()} == {
            deepspeed.comm.get_world_size() // ep_size}
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return digest(b"".join(p.detach().numpy().tobytes() for p in net.parameters())), losses, norm


DRAWN = {"k": 2, "top2_2nd_expert_sampling": True}
SAME_MODULES = {
    "top-1, some ranks with few tokens or none": {"n_tokens": (4, 0, 1, 3)},
    "top-2, two micro-steps": {"gas": 2, **DRAWN},
    "residual, under zero.Init": {"init": True, "use_residual": True},
    "checkpoint": {"plans": ["side, checkpoint"], **DRAWN},
    "checkpoint, reentrant": {"plans": ["side, checkpoint, reentrant"], **DRAWN},
    "the balance loss alone": {"plans": ["balance"]},
    "experts of the model's own, as a leaf": {"sparse": True, "n_tokens": (4, 1)},
}
OTHER_MODULES = {
    "all ranks share": {"ep_size": 4, "plans": ["", "side"], **DRAWN},
    "branches differ": {"plans": ["side", "", "checkpoint", "side, checkpoint, reentrant"]},
}


def at_both_stages(rank, world, runs):
    """{name: [stage 2's result, stage 3's]}"""
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    return {name: [trained(rank, stage, **options) for stage in (2, 3)] for name, options in runs.items()}


def test_experts_at_stage_3_give_the_bits_of_stage_2_whatever_ranks_route_and_run(ranks, tmp_path):
    runs = {**SAME_MODULES, **OTHER_MODULES, "in files": {"folder": str(tmp_path), **DRAWN}}
    for found in ranks(4, at_both_stages, runs, timeout=120):
        assert [name for name, (expected, got) in found.items() if expected != got] == []
    assert list(tmp_path.iterdir()) == []


def test_experts_at_stage_3_give_the_bits_of_stage_2_where_ranks_share_no_memory(ranks):
    for found in ranks(2, at_both_stages, SAME_MODULES, timeout=120, env=FORCED):
        assert [name for name, (expected, got) in found.items() if expected != got] == []


def diverging(rank, world):
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    trained(rank, 3, **OTHER_MODULES["all ranks share"] | {"ep_size": 2})


def test_ranks_that_run_different_modules_and_share_no_memory_are_an_error_on_both(ranks):
    for outcome in ranks.outcomes(2, diverging, timeout=30, env=FORCED):
        assert outcome.error == "CommError" and "side" in outcome.text
