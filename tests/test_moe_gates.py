"""Routing of tokens to experts against a plain PyTorch reading of the published formulas, dense, with its autograd."""
import copy
import math
import os
import pickle
import resource

import pytest
import torch
from deepspeed_c._core import Router
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deepspeed_c as deepspeed
from deepspeed_c.moe.sharded_moe import MOELayer, TopKGate, _gumbel, top1gating, top2gating, topkgating

S, E, M = 60, 5, 24
EPS = torch.finfo(torch.float32).eps


def make_logits(seed=0, n_tokens=S, n_experts=E):
    """Random rows, many of them twice or more (ties between tokens), some with a value twice (ties between experts)."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(max(n_tokens * 2 // 3, 1), n_experts, generator=g) * 2
    rows[::3, 1] = rows[::3, n_experts - 1]
    rows[::4, 0] = rows[::4, 2]
    return rows[torch.randint(0, rows.shape[0], (n_tokens,), generator=g)]


# ---- the reading ----


def ranked(row):
    """Experts from the best on; the lower index where values are equal."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))


def choices(rule, k, logits, noise, used):
    found = []
    for s, row in enumerate(logits.tolist()):
        noisy = (logits[s] + noise[s]).tolist() if noise is not None else row
        if rule == "top1":
            found.append(ranked(noisy)[:1])
        elif rule == "top2":
            first = ranked(row)[0]
            found.append([first, next(e for e in ranked(noisy) if e != first)])
        else:
            found.append(ranked(row)[:k])
    return [experts if used is None or used[s] else [] for s, experts in enumerate(found)]


def places(rule, chosen, capacity, priority):
    """{(token, expert): position} of those that stay."""
    found = {}
    for e in range(E):
        firsts = [s for s, experts in enumerate(chosen) if e in experts and (rule != "top2" or experts[0] == e)]
        seconds = [s for s, experts in enumerate(chosen) if e in experts and s not in firsts]
        queue = firsts + seconds
        if priority is not None:
            kept = sorted(queue, key=lambda s: (-priority[s][e].item(), s))[:capacity]
            queue = [s for s in queue if s in kept]
        found.update(((s, e), position) for position, s in enumerate(queue[:capacity]))
    return found


def reading(rule, k, logits, capacity, noise=None, used=None, priority=None):
    """(l_aux, combine_weights, dispatch_mask, counts), all differentiable by autograd where they are."""
    n_tokens = logits.shape[0]
    gates = torch.softmax(logits, dim=1)
    chosen = choices(rule, k, logits.detach(), noise, used)
    mask = torch.zeros(n_tokens, E)
    for s, experts in enumerate(chosen):
        mask[s, experts] = 1
    priority = gates.detach() if priority == "gates" else priority
    where = places(rule, chosen, capacity, priority)
    dispatch = torch.zeros(n_tokens, E, capacity)
    for (s, e), position in where.items():
        dispatch[s, e, position] = 1
    counted = mask.clone()
    if rule == "top2":
        for s, experts in enumerate(chosen):
            counted[s, experts[1]] = 0
    me, ce = gates.mean(0), counted.mean(0)
    l_aux = (me * ce).sum() * E / (k if rule == "topk" else 1)
    kept = gates * dispatch.sum(-1)
    if rule != "top1":
        kept = kept / kept.sum(1, keepdim=True).clamp(min=EPS)
    return l_aux, kept.unsqueeze(-1) * dispatch, dispatch.bool(), mask.sum(0).long()


def capacity_of(factor, least, n_tokens=S):
    return max(math.ceil(n_tokens / E * factor), least)


CASES = {
    "top1 in order": ("top1", 1, {"use_rts": False}),
    "top1 at random": ("top1", 1, {"use_rts": True}),
    "top1 RSample": ("top1", 1, {"use_rts": False, "noisy_gate_policy": "RSample"}),
    "top1 RSample at random": ("top1", 1, {"use_rts": True, "noisy_gate_policy": "RSample"}),
    "top1 used": ("top1", 1, {"use_rts": False, "used_token": (torch.arange(S) % 3 != 0).long()}),
    "top2": ("top2", 2, {"top2_2nd_expert_sampling": False}),
    "top2 sampled": ("top2", 2, {"top2_2nd_expert_sampling": True}),
    "top3 probs": ("topk", 3, {"drop_policy": "probs"}),
    "top3 position": ("topk", 3, {"drop_policy": "position"}),
    "top1 as topk": ("topk", 1, {}),
    "all experts": ("topk", E, {"drop_policy": "probs"}),
}
FUNCTIONS = {"top1": top1gating, "top2": top2gating, "topk": topkgating}


def ours(rule, k, logits, factor, least, options):
    torch.manual_seed(7)
    args = (logits, k, factor, least) if rule == "topk" else (logits, factor, least)
    return FUNCTIONS[rule](*args, **options)


def expected(rule, k, logits, factor, least, options, capacity=None):
    torch.manual_seed(7)
    noisy = options.get("noisy_gate_policy") == "RSample" or options.get("top2_2nd_expert_sampling", rule == "top2")
    noise = _gumbel(logits) if noisy else None
    priority = None
    if rule == "top1" and options.get("use_rts", True):
        priority = torch.rand(logits.shape)
    elif rule == "topk" and options.get("drop_policy", "probs") == "probs":
        priority = "gates"
    if capacity is None:
        capacity = capacity_of(factor * k, least)
    return reading(rule, k, logits, capacity, noise, options.get("used_token"), priority)


# ---- bad arguments ----


def test_wrong_arguments_are_named():
    logits = make_logits()
    with pytest.raises(ValueError, match=r"drop_policy: 'worst'; allowed: 'probs', 'position'"):
        topkgating(logits, 3, 1.0, 4, drop_policy="worst")
    with pytest.raises(ValueError, match="noisy_gate_policy 'Loud'"):
        top1gating(logits, 1.0, 4, noisy_gate_policy="Loud")
    with pytest.raises(ValueError, match="k = 6 of 5 experts"):
        topkgating(logits, 6, 1.0, 4)
    with pytest.raises(ValueError, match="k = 2 of 1 experts"):
        top2gating(logits[:, :1], 1.0, 4)
    with pytest.raises(ValueError, match=r"shape \(60,\); expected: \(tokens, experts\)"):
        top2gating(logits[:, 0], 1.0, 4)
    with pytest.raises(NotImplementedError, match="use_tutel"):
        top1gating(logits, 1.0, 4, use_tutel=True)
    with pytest.raises(ValueError, match="k = -1 of 5 experts"):
        topkgating(logits, -1, 1.0, 4)
    for factor, least in ((math.nan, 4), (math.inf, 4), (-1.0, -1)):
        with pytest.raises(ValueError, match=f"capacity factor {factor}, min_capacity {least}; allowed: finite, and"):
            top2gating(logits, factor, least)
    with pytest.raises(ValueError, match="chooses among 5 experts, and there are 4: 4 on each of 1 ranks"):
        MOELayer(TopKGate(M, 5), Parts([nn.Identity()] * 4), "ep_size_1", 1, 4)(torch.zeros(8, M))
    with pytest.raises(ValueError, match="5 experts gave 4 outputs"):
        MOELayer(TopKGate(M, 5), Parts([nn.Identity()] * 4), "ep_size_1", 1, 5)(torch.zeros(8, M))
    with pytest.raises(ValueError, match="k = 9 of num_experts = 4"):
        TopKGate(M, 4, 9)
    with pytest.raises(TypeError, match=r"float64|fp64"):
        TopKGate(M, 4)(torch.zeros(8, M, dtype=torch.float64))


def test_the_core_refuses_tensors_that_do_not_fit():
    router, x, weight = Router(1), torch.zeros(4, M), torch.zeros(3, M)
    with pytest.raises(ValueError, match="logits has 8 elements of fp32, expected: 12 of fp32"):
        router.logits(x, weight, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="x has 7 columns and weight 24"):
        router.logits(torch.zeros(4, 7), weight, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="x is not contiguous"):
        router.logits(torch.zeros(M, 4).t(), weight, torch.zeros(4, 3))
    with pytest.raises(TypeError, match="weight must be a tensor"):
        router.logits(x, None, torch.zeros(4, 3))
    slots, entries = torch.zeros(4, 1, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    with pytest.raises(ValueError, match="2 parts for 3 experts"):
        router.dispatch(3, 2, x, slots, entries, [x, x])
    with pytest.raises(ValueError, match="part 0 has 96 elements"):
        router.dispatch(3, 2, x, slots, entries, [x, x, x])
    with pytest.raises(ValueError, match="entries has 6 elements of int32, expected: 3221225472"):
        router.dispatch(3, 1 << 30, x, slots, entries, [x, x, x])


# ---- gates ----


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_values_positions_and_drops_are_those_of_the_formulas(name, factor):
    rule, k, options = CASES[name]
    for seed in range(2):
        logits = make_logits(seed)
        l_aux, weights, mask, counts = ours(rule, k, logits, factor, 2, options)
        ref_l_aux, ref_weights, ref_mask, ref_counts = expected(rule, k, logits, factor, 2, options)
        assert torch.equal(mask, ref_mask) and torch.equal(counts, ref_counts)
        assert counts.dtype == torch.int64 and mask.dtype == torch.bool
        torch.testing.assert_close(weights, ref_weights, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(l_aux, ref_l_aux, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_formulas(name):
    rule, k, options = CASES[name]
    for factor in (0.4, 2.0):
        found = []
        for gating in (ours, expected):
            logits = make_logits(3).requires_grad_()
            l_aux, weights, *_ = gating(rule, k, logits, factor, 2, options)
            upstream = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
            (3 * l_aux + (weights * upstream).sum()).backward()
            found.append(logits.grad)
        torch.testing.assert_close(*found, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["l_aux", "weights"])
def test_either_result_alone_has_its_gradient(which):
    grads = []
    for gating in (ours, expected):
        logits = make_logits(4).requires_grad_()
        l_aux, weights, *_ = gating("top2", 2, logits, 1.0, 2, {"top2_2nd_expert_sampling": False})
        (l_aux if which == "l_aux" else weights).square().sum().backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_without_drops_every_choice_has_a_place(name):
    rule, k, options = CASES[name]
    logits = make_logits(5)
    _, weights, mask, counts = ours(rule, k, logits, 0.1, 0, {**options, "drop_tokens": False})
    assert weights.shape[2] == counts.max() and mask.sum() == counts.sum()
    *_, ref_mask, ref_counts = expected(rule, k, logits, 0.1, 0, options, capacity=int(counts.max()))
    assert torch.equal(mask, ref_mask) and torch.equal(counts, ref_counts)


@pytest.mark.parametrize("name", CASES)
def test_sparse_routes_say_the_same_as_dense_ones(name):
    rule, k, options = CASES[name]
    logits = make_logits(6)
    _, weights, mask, _ = ours(rule, k, logits, 0.6, 1, options)
    _, capacity, n_experts, experts, positions, sparse, _ = ours(rule, k, logits, 0.6, 1,
                                                                 {**options, "sparse_routes": True})
    assert (int(capacity), n_experts, experts.shape) == (weights.shape[2], E, (k, S))
    rebuilt, there = torch.zeros_like(weights), torch.zeros_like(mask)
    for j, s in (experts >= 0).nonzero().tolist():
        rebuilt[s, experts[j, s], positions[j, s]] = sparse[j, s]
        there[s, experts[j, s], positions[j, s]] = True
    assert torch.equal(rebuilt, weights) and torch.equal(there, mask)
    assert not positions[experts < 0].any() and not sparse[experts < 0].any()


def test_choices_of_deepspeed_with_the_same_seed():
    """Recorded from DeepSpeed 0.19.8: torch.manual_seed(0), randn(12, 4), then seed 1, capacity factor 1, minimum 2."""
    torch.manual_seed(0)
    logits = torch.randn(12, 4)
    torch.manual_seed(1)
    l_aux, capacity, _, experts, positions, weights, counts = top1gating(logits, 1.0, 2, sparse_routes=True)
    assert experts.tolist() == [[2, 0, 2, 1, 3, 3, 0, 1, 3, 2, -1, 1]]
    assert positions.tolist() == [[0, 0, 1, 0, 0, 1, 1, 1, 2, 2, 0, 2]]
    assert counts.tolist() == [2, 4, 3, 3] and capacity == 3 and round(float(l_aux), 4) == 1.0147
    torch.manual_seed(1)
    *_, experts, positions, weights, counts = top2gating(logits, 1.0, 2, sparse_routes=True)
    assert experts.tolist() == [[2, 0, 2, 1, 3, 3, 0, 1, 3, 2, 1, 1], [3, 1, 0, 2, 2, 0, 3, 3, 0, 0, -1, -1]]
    assert positions.tolist() == [[0, 0, 1, 0, 0, 1, 1, 1, 2, 2, 2, 3], [3, 4, 2, 3, 4, 3, 4, 5, 4, 5, 0, 0]]
    torch.testing.assert_close(weights[0, :4], torch.tensor([0.5457, 0.5391, 0.5069, 0.5302]), rtol=0, atol=1e-4)
    l_aux, _, _, experts, positions, weights, _ = topkgating(logits, 3, 1.0, 2, sparse_routes=True)
    assert experts.tolist()[2] == [0, 2, 3, -1, -1, -1, 2, 2, 2, 0, 0, -1]
    assert positions.tolist()[1] == [0, 0, 2, 3, 4, 3, 4, 5, 3, 6, 7, 8] and round(float(l_aux), 4) == 0.9811


def test_noise_is_torchs_gumbel_and_the_generator_moves_on_as_far():
    logits = make_logits()
    gumbel = torch.distributions.Gumbel(torch.tensor(0.0), torch.tensor(1.0))
    torch.manual_seed(11)
    noise, uniform, after = gumbel.rsample(logits.shape), torch.rand(logits.shape), torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(_gumbel(logits), noise)
    torch.manual_seed(11)
    top1gating(logits, 1.0, 4, noisy_gate_policy="RSample")
    assert torch.equal(torch.rand(3), after)
    assert uniform.shape == logits.shape


@pytest.mark.parametrize("rule, k", [("top1", 1), ("top2", 2), ("topk", 3)])
def test_no_token_no_place_an_idle_expert_and_nan_are_no_accident(rule, k):
    def run(logits, least=0, factor=1.0):
        logits = logits.requires_grad_()
        l_aux, weights, mask, counts = ours(rule, k, logits, factor, least, {})
        (l_aux + weights.sum()).backward()
        return l_aux, weights, mask, counts, logits.grad

    l_aux, weights, *_ = run(torch.zeros(0, E))
    assert l_aux == 0 and weights.shape == (0, E, 0)
    assert run(torch.zeros(0, E), least=3)[1].shape == (0, E, 3)
    l_aux, weights, mask, counts, grad = run(make_logits(), factor=0.0)  # capacity 0
    assert weights.shape == (S, E, 0) and counts.sum() == S * k and torch.isfinite(grad).all()
    idle = make_logits()
    idle[:, 4] = -math.inf
    l_aux, weights, mask, counts, grad = run(idle)
    assert counts[4] == 0 and not mask[:, 4].any()
    assert torch.isfinite(weights).all() and torch.isfinite(grad).all() and torch.isfinite(l_aux)
    assert run(make_logits(), least=100)[1].shape == (S, E, 100)  # more places than tokens
    broken = make_logits()
    broken[3] = math.nan
    mask, counts = run(broken)[2:4]
    assert counts.sum() == S * k
    huge = make_logits() * 1e30
    assert torch.isfinite(run(huge)[1]).all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_threads_change_no_bit(k):
    logits = make_logits(8, 3000)
    results = []
    before = torch.get_num_threads()
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        torch.manual_seed(2)
        gate = TopKGate(M, E, k=k, min_capacity=0)
        x = torch.randn(3000, M, requires_grad=True)
        routes = gate(x, as_routes=True)
        (routes.weights.square().sum() + routes.l_aux + routes.tokens.square().sum()).backward()
        torch.manual_seed(2)
        results.append([*FUNCTIONS[("top1", "top2", "topk")[k - 1]](*((logits, k) if k == 3 else (logits,)), 0.7, 0),
                        routes.weights, routes.slots, x.grad, gate.wg.weight.grad])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


# ---- the layer ----


class Parts(nn.Module):
    """Experts as moe.experts.Experts: called with a list."""

    takes_parts = True

    def __init__(self, modules):
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(modules)

    def forward(self, parts):
        return [expert(part) for expert, part in zip(self.deepspeed_experts, parts)]


class Whole(Parts):
    """Experts that take all places in one tensor."""

    takes_parts = False

    def forward(self, places):
        parts = places.chunk(len(self.deepspeed_experts), dim=1)
        return torch.cat([expert(part) for expert, part in zip(self.deepspeed_experts, parts)], dim=1)


def make_layer(kind=Parts, n_experts=E, seed=5, **options):
    torch.manual_seed(seed)
    gate = TopKGate(M, n_experts, min_capacity=2, **options)
    experts = kind([nn.Sequential(nn.Linear(M, 2 * M), nn.GELU(), nn.Linear(2 * M, M)) for _ in range(n_experts)])
    return MOELayer(gate, experts, "ep_size_1", 1, n_experts)


def dense_layer(layer, x, routes):
    """The same layer as einsums over the dense tensors of one gating."""
    l_aux, weights, mask, _ = routes
    tokens = x.reshape(-1, M)
    inputs = torch.einsum("sec,sm->ecm", mask.to(tokens.dtype), tokens)
    outputs = torch.stack([e(p) for e, p in zip(layer.experts.deepspeed_experts, inputs)])
    return torch.einsum("sec,ecm->sm", weights.to(outputs.dtype), outputs).reshape(x.shape), l_aux


@pytest.mark.parametrize("kind", [Parts, Whole])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_layer_is_the_einsums_over_dense_routes_with_their_gradients(kind, k):
    results = []
    for dense in (False, True):
        layer = make_layer(kind, k=k, capacity_factor=0.8, use_rts=False, top2_2nd_expert_sampling=False)
        x = torch.randn(4, S // 4, M, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if dense:
            # The reading's own softmax and drops, from logits that autograd follows.
            logits = x.reshape(-1, M) @ layer.gate.wg.weight.t()
            rule = ("top1", "top2", "topk")[k - 1]
            y, l_aux = dense_layer(layer, x, reading(rule, k, logits, capacity_of(0.8 * k, 2),
                                                     priority="gates" if k == 3 else None))
        else:
            y = layer(x)
            l_aux = layer.l_aux
            assert layer.exp_counts.sum() == S * k
        (y.square().sum() + 5 * l_aux).backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_types_stay_and_sums_are_in_float32(dtype, tolerance):
    layer = make_layer(k=2, top2_2nd_expert_sampling=False)
    x = torch.randn(S, M).to(dtype)
    wide = copy.deepcopy(layer)
    layer.to(dtype)
    wide.gate.wg.weight.data.copy_(layer.gate.wg.weight)
    results = []
    for module, tokens in ((layer, x), (wide, x.float())):
        tokens = tokens.clone().requires_grad_()
        y = module(tokens)
        y.square().sum().backward()
        assert y.dtype == tokens.dtype and module.gate.wg.weight.grad.dtype == module.gate.wg.weight.dtype
        assert module.l_aux.dtype == torch.float32
        results.append([y, tokens.grad, module.gate.wg.weight.grad])
    for a, b in zip(*results):
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))


def test_autocast_leaves_logits_in_float32_and_the_input_dtype_comes_back():
    layer = make_layer(k=1, use_rts=False)
    x = torch.randn(S, M, requires_grad=True)
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain, rtol=0.05, atol=0.02)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_gates_are_float32_with_any_default_dtype():
    layer, x = make_layer(k=1, noisy_gate_policy="RSample"), torch.randn(S, M)
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        torch.manual_seed(8)
        try:
            found.append((layer(x), layer.l_aux, layer.exp_counts))
        finally:
            torch.set_default_dtype(torch.float32)
    for result in found[1:]:
        assert all(map(torch.equal, result, found[0]))


def test_jitter_touches_the_gate_only_and_in_training_only():
    layer = make_layer(k=1, use_rts=False, noisy_gate_policy="Jitter", capacity_factor=4.0, eval_capacity_factor=4.0)
    x = torch.randn(S, M, requires_grad=True)
    torch.manual_seed(3)
    factors = torch.distributions.Uniform(torch.tensor(0.99), torch.tensor(1.01)).rsample(x.shape)
    torch.manual_seed(3)
    routes = layer.gate(x, as_routes=True)
    logits = (x * factors) @ layer.gate.wg.weight.t()
    torch.testing.assert_close(routes.weights[:, 0], torch.softmax(logits, 1).max(1).values)
    grads = torch.autograd.grad(routes.weights.sum(), x)[0], torch.autograd.grad(
        torch.softmax(logits, 1).max(1).values.sum(), x)[0]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert routes.tokens is x
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_evaluation_has_its_own_capacity_and_no_noise():
    gate = TopKGate(M, E, k=1, capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=0,
                    noisy_gate_policy="RSample")
    x = torch.randn(S, M)
    assert gate(x)[1].shape[2] == S // E
    gate.eval()
    assert gate(x)[1].shape[2] == 2 * S // E and torch.equal(gate(x)[3], gate(x)[3])


def test_a_layer_without_gradients_copies_and_pickles():
    layer = make_layer(k=2, top2_2nd_expert_sampling=False)
    x = torch.randn(S, M, requires_grad=True)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    with torch.inference_mode():
        assert torch.equal(layer(x.detach()), y)
    layer.experts.requires_grad_(False)
    layer(x.detach()).sum().backward()  # the gate alone
    assert layer.gate.wg.weight.grad.abs().sum() > 0


class Bytes(TorchDispatchMode):
    """Bytes of every tensor that an operation makes, and of the largest."""

    total = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                n = t.numel() * t.element_size()
                self.total, self.largest = self.total + n, max(self.largest, n)
        return out


@pytest.mark.parametrize("k", [1, 2, 3])
def test_memory_is_linear_in_tokens(k):
    def bytes_for(n_tokens, n_experts=64):
        gate = TopKGate(8, n_experts, k=k, min_capacity=0)
        layer = MOELayer(gate, Parts([nn.Identity() for _ in range(n_experts)]), "ep_size_1", 1, n_experts)
        x = torch.randn(n_tokens, 8, requires_grad=True)
        with Bytes() as mode:
            layer(x).sum().backward()
        return mode.total, mode.largest

    small, large = bytes_for(512), bytes_for(4096)
    assert large[0] < 8.2 * small[0]
    assert large[1] <= 4096 * 64 * 4  # the logits; a dense S x E x C would be 64 k times as much


@pytest.mark.skipif("DSC_EXPECT_CORE" in os.environ, reason="an instrumented build has an allocator of its own")
@pytest.mark.skipif(any(n.startswith(("MALLOC_", "GLIBC_TUNABLES")) for n in os.environ), reason="malloc has orders")
def test_a_warm_layer_faults_no_pages_in():
    layer, x = make_layer(use_rts=False), torch.randn(40000, M, requires_grad=True)
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        layer(x).square().mean().backward()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults[2:]) < 1000, faults  # ten tensors of 4 MB and more, a thousand pages each


# ---- several ranks ----


def give_and_take(rank, world):
    deepspeed.init_distributed()
    group = torch.distributed.group.WORLD
    torch.manual_seed(20)
    whole = make_layer(n_experts=4, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)
    mine = copy.deepcopy(whole)
    n_local = 4 // world
    mine = MOELayer(mine.gate, Parts(mine.experts.deepspeed_experts[rank * n_local:(rank + 1) * n_local]), "ep_size_2",
                    world, n_local)
    mine._set_ep_group(group)
    found = []
    for n_tokens in (S, 7 * rank):  # in the second round one rank has no token at all
        x = torch.randn(n_tokens, M, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        other = x.detach().clone().requires_grad_()
        (mine(x).square().sum() + mine.l_aux).backward()
        (whole(other).square().sum() + whole.l_aux).backward()
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
        found.append(int(mine.exp_counts.max()))
    for p in whole.experts.parameters():
        torch.distributed.all_reduce(p.grad)
    ours, theirs = ([p.grad for e in experts for p in e.parameters()] for experts in (
        mine.experts.deepspeed_experts, whole.experts.deepspeed_experts[rank * n_local:(rank + 1) * n_local]))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    logits = make_logits(rank)
    capacity = top1gating(logits, 1.0, 2, drop_tokens=False, ep_group=group, use_rts=False)[1].shape[2]
    return capacity, int(top1gating(logits, 1.0, 2, drop_tokens=False, use_rts=False)[3].max())


def test_experts_of_other_ranks_answer_as_if_they_were_here(ranks):
    results = ranks(2, give_and_take)
    largest = max(own for _, own in results)
    assert [capacity for capacity, _ in results] == [largest, largest]
