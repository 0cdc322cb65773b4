"""The MoE layer: arguments, experts, equality with DeepSpeed's, and training over ranks that share experts."""
import copy
import io
import pickle

import moe_cases
import numpy as np
import pytest
import torch
from moe_cases import E, M, formula
from torch import nn
from torch.utils.checkpoint import checkpoint

import deepspeed_c as deepspeed
from deepspeed_c.moe.experts import Experts
from deepspeed_c.moe.layer import MoE

WHOLE = {"capacity_factor": 4.0, "eval_capacity_factor": 4.0}


# ---- arguments ----


@pytest.mark.parametrize("wrong, text", [
    ({"num_experts": 5, "ep_size": 2}, "num_experts is 5, which ep_size, 2, does not divide"),
    ({"num_experts": 0}, "num_experts is 0; allowed: an integer >= 1"),
    ({"num_experts": 2.0}, "num_experts is 2.0"),
    ({"num_experts": 2, "ep_size": 0}, "ep_size is 0; allowed"),
    ({"num_experts": 2, "k": 3}, "k is 3 and num_experts 2"),
    ({"min_capacity": -1}, "min_capacity is -1; allowed: a number >= 0"),
    ({"capacity_factor": float("inf")}, "capacity_factor is inf; allowed"),
    ({"eval_capacity_factor": None}, "eval_capacity_factor is None; allowed"),
    ({"noisy_gate_policy": "rsample"}, "noisy_gate_policy is 'rsample'; allowed: None, 'None', 'Jitter', 'RSample'"),
])
def test_a_wrong_argument_is_an_error_with_the_numbers(wrong, text):
    with pytest.raises(ValueError, match=text):
        MoE(M, nn.Linear(M, M), **wrong)


def test_tokens_of_another_width_or_dtype_are_an_error():
    with pytest.raises(ValueError, match=rf"tokens have shape \(6, 5\); expected: \(tokens, {M}\)"):
        MoE(M, nn.Linear(M, M))(torch.zeros(2, 3, 5))
    with pytest.raises(TypeError, match="fp64; allowed: fp32, bf16, fp16"):
        MoE(M, nn.Linear(M, M)).double()(torch.zeros(2, M, dtype=torch.float64))


def test_tutel_changes_nothing_and_says_so(caplog):
    deepspeed.logger.addHandler(caplog.handler)
    try:
        MoE(M, nn.Linear(M, M), use_tutel=True)
    finally:
        deepspeed.logger.removeHandler(caplog.handler)
    assert "use_tutel=True has no effect" in caplog.text


# ---- experts and names ----


def test_names_are_deepspeed_s():
    moe = MoE(M, nn.Linear(M, M), num_experts=2, use_residual=True)
    experts = [f"deepspeed_moe.experts.deepspeed_experts.{i}.{n}" for i in range(2) for n in ("weight", "bias")]
    assert list(moe.state_dict()) == ["deepspeed_moe.gate.wg.weight", *experts, "mlp.weight", "mlp.bias",
                                      "coefficient.weight", "coefficient.bias"]
    assert (moe.num_experts, moe.num_local_experts, moe.ep_size, moe.expert_group_name) == (2, 2, 1, "ep_size_1")


def test_experts_start_equal_with_parameters_of_their_own_and_the_given_one_is_the_residual_s():
    given = nn.Linear(M, M)
    moe = MoE(M, given, num_experts=3, use_residual=True)
    copies = list(moe.deepspeed_moe.experts.deepspeed_experts)
    assert moe.mlp is given and len({id(c.weight) for c in (given, *copies)}) == 4
    assert all(torch.equal(c.weight, given.weight) for c in copies)


def marks(module):
    return {name: (getattr(p, "allreduce", True), getattr(p, "group_name", None))
            for name, p in module.named_parameters()}


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_save])
def test_a_copy_keeps_marks_and_values_also_after_a_forward_pass(copied):
    moe = moe_cases.build(MoE, "top1 residual")
    x = formula((6, M), 1)
    expected, *_ = moe(x)
    other = copied(moe)
    assert marks(other) == marks(moe)
    assert {mark for name, mark in marks(other).items() if ".experts." in name} == {(False, "ep_size_1")}
    assert {mark for name, mark in marks(other).items() if ".experts." not in name} == {(True, None)}
    assert torch.equal(other(x)[0], expected)
    assert not {id(p) for p in moe.parameters()} & {id(p) for p in other.parameters()}


def test_a_state_dict_makes_another_layer_equal():
    moe, other = moe_cases.build(MoE, "top2"), MoE(M, moe_cases.expert(), num_experts=E, k=2, **WHOLE)
    other.load_state_dict(moe.state_dict())
    x = formula((6, M), 1)
    torch.manual_seed(3)
    expected = moe(x)[0]
    torch.manual_seed(3)
    other.deepspeed_moe.gate.top2_2nd_expert_sampling = False
    assert torch.equal(other(x)[0], expected)


class Pair(nn.Module):
    """An expert that returns a tuple, keeps a buffer and has no parameter at all."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, x):
        return x * self.factor, x.sum()


@pytest.mark.parametrize("residual", [False, True])
def test_of_a_tuple_that_an_expert_returns_the_first_item_counts(residual):
    moe = MoE(M, Pair(), num_experts=2, use_residual=residual, use_rts=False, **WHOLE)
    x = formula((5, M), 2)
    out, _, counts = moe(x)
    gate = torch.softmax(x @ moe.deepspeed_moe.gate.wg.weight.T, 1).max(1, keepdim=True).values
    expected = gate * 2 * x
    if residual:
        w = torch.softmax(moe.coefficient(x), -1)
        expected = expected * w[:, :1] + 2 * x * w[:, 1:]
    assert torch.allclose(out, expected, atol=1e-6) and counts.sum() == 5


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3), (1, 2, 1, 3)])
def test_tokens_may_come_in_any_shape(shape):
    moe = moe_cases.build(MoE, "top1")
    x = formula((6, M), 3)
    out, *_ = moe(x.reshape(*shape, M))
    assert out.shape == (*shape, M) and torch.equal(out.reshape(6, M), moe(x)[0])


def test_an_expert_may_have_another_width():
    moe = MoE(M, nn.Linear(M, 7), num_experts=2, use_rts=False, **WHOLE)
    assert moe(formula((2, 3, M), 3))[0].shape == (2, 3, 7)


def test_experts_also_take_one_tensor_and_cut_it():
    experts = Experts(nn.Linear(M, M), 3)
    for i, p in enumerate(experts.parameters()):
        p.data.copy_(formula(p.shape, i))
    x = formula((2, 3, 5, M), 4)
    whole, parts = experts(x), experts(list(x.chunk(3, dim=1)))
    assert whole.shape == x.shape and torch.equal(whole, torch.cat(parts, dim=1))


# ---- numbers ----


@pytest.mark.parametrize("case", moe_cases.CASES)
def test_outputs_and_gradients_are_deepspeed_s(case):
    """Noise included: it is drawn from torch's generator in the same order."""
    found = moe_cases.outcome(moe_cases.build(MoE, case), case)
    expected = moe_cases.recorded(case, found)
    for name, value in found.items():
        assert np.abs(value - expected[name]).max() <= 1e-5, name


@pytest.mark.parametrize("case", ["top1 dropping at random", "top2", "top1 residual"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_a_16_bit_layer_routes_alike_and_differs_by_rounding(case, dtype, tolerance):
    found = moe_cases.outcome(moe_cases.build(MoE, case).to(dtype), case, dtype)
    expected = moe_cases.recorded(case, found)
    assert (found["counts"] == expected["counts"]).all()
    for name, value in found.items():
        assert np.abs(value - expected[name]).max() <= tolerance * max(1, np.abs(expected[name]).max()), name


def test_autocast_computes_experts_low_and_the_gate_in_float32():
    moe = moe_cases.build(MoE, "top1 residual")
    x = formula((12, M), 50).requires_grad_()
    plain, aux, counts = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_aux, low_counts = moe(x)
    assert torch.equal(aux, low_aux) and torch.equal(counts, low_counts)
    assert 0 < (low - plain).abs().max() < 0.05
    low.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


def test_evaluation_draws_no_noise_and_no_graph():
    moe = MoE(M, moe_cases.expert(), num_experts=E, noisy_gate_policy="RSample", use_rts=False, **WHOLE).eval()
    x = formula((12, M), 5)
    with torch.no_grad():
        first, second = moe(x)[0], moe(x)[0]
    assert torch.equal(first, second) and not first.requires_grad
    moe.train()
    assert any(not torch.equal(moe(x)[2], moe(x)[2]) for _ in range(20))


@pytest.mark.parametrize("options", [
    {"noisy_gate_policy": "RSample", "min_capacity": 0}, {"noisy_gate_policy": "Jitter"}, {"k": 2}, {"k": 3}])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_a_layer_routes_as_the_first_time(options, reentrant):
    moe = MoE(M, moe_cases.expert(), num_experts=E, use_residual=True, **options)
    results = []
    for run in (lambda x: moe(x), lambda x: checkpoint(moe, x, use_reentrant=reentrant)):
        moe.zero_grad()
        torch.manual_seed(1)
        x = formula((12, M), 6).requires_grad_()
        out, aux, counts = run(x)
        (out.square().sum() + aux).backward()
        results.append([out.detach(), counts, x.grad, *(p.grad for p in moe.parameters())])
    for one, other in zip(*results):
        assert (one is None and other is None) or torch.equal(one, other)


# ---- nothing to do ----


def towards(moe, expert):
    """Every token chooses one expert (of positive inputs)."""
    weight = moe.deepspeed_moe.gate.wg.weight
    weight.data.zero_()
    weight.data[expert] = 5.0


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("drop", [True, False])
def test_an_expert_that_gets_no_token_has_a_gradient_of_zero(k, drop):
    moe = MoE(M, moe_cases.expert(), num_experts=E, k=k, use_residual=True, drop_tokens=drop,
              top2_2nd_expert_sampling=False)
    towards(moe, 1)
    x = formula((12, M), 6).abs().requires_grad_()
    out, aux, counts = moe(x)
    (out.square().sum() + aux).backward()
    assert counts[1] == 12 and counts.sum() == 12 * k
    for i, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
        for p in expert.parameters():
            assert p.grad is None or p.grad.isfinite().all()
            if counts[i] == 0:
                assert p.grad is None or not p.grad.any()
    assert out.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_capacity_zero_gives_zeros_and_finite_gradients(k):
    moe = MoE(M, moe_cases.expert(), num_experts=E, k=k, capacity_factor=0.0, min_capacity=0)
    x = formula((12, M), 6).requires_grad_()
    out, aux, counts = moe(x)
    (out.sum() + aux).backward()
    assert not out.any() and counts.sum() == 12 * k and aux.isfinite() and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("drop", [True, False])
def test_no_token_at_all(k, drop):
    moe = MoE(M, moe_cases.expert(), num_experts=E, k=k, min_capacity=0, use_residual=True, drop_tokens=drop)
    x = torch.zeros(0, M, requires_grad=True)
    out, aux, counts = moe(x)
    (out.sum() + aux).backward()
    assert out.shape == (0, M) and aux == 0 and not counts.any() and x.grad.shape == (0, M)
    assert all(p.grad is None or not p.grad.any() for p in moe.parameters())
