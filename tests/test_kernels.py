"""Kernels against torch and exact arithmetic, on every tier that this machine can run."""
import math
import os
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from deepspeed_c import _core

TIERS = _core.kernel_tiers()
N = 1000 + 7


@pytest.fixture(params=TIERS)
def tier(request):
    return request.param


def f32(seed, n=N, scale=1.0):
    """Ordinary fp32 values, the same for one seed."""
    return (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)


# ---- bad arguments ----

def test_wrong_names_counts_lengths_and_item_sizes_are_value_errors():
    x, short, wide = f32(1), f32(1, 5), np.zeros(N)
    with pytest.raises(ValueError, match="no 'avx1024'"):
        _core.run_kernel("avx1024", "sum_squares", "fp32", (x,))
    with pytest.raises(ValueError, match="no kernel 'sin'"):
        _core.run_kernel("scalar", "sin", "fp32", (x,))
    with pytest.raises(ValueError, match="no variant for 'int32'"):
        _core.run_kernel("scalar", "accumulate", "int32", (x, x))
    with pytest.raises(ValueError, match="takes 2, 1 came"):
        _core.run_kernel("scalar", "accumulate", "fp32", (x,))
    with pytest.raises(ValueError, match=r"buffers\[1\].*1007 items of 4 bytes, 5 of 4"):
        _core.run_kernel("scalar", "accumulate", "fp32", (x, short))
    with pytest.raises(ValueError, match=r"buffers\[1\].*of 4 bytes"):
        _core.run_kernel("scalar", "accumulate", "fp32", (x, wide))
    with pytest.raises(ValueError, match="items of 8 bytes"):
        _core.norm_sum(x)


def test_read_only_results_and_strided_buffers_are_refused():
    x, fixed = f32(1), f32(2)
    fixed.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        _core.run_kernel("scalar", "accumulate", "fp32", (fixed, x))
    with pytest.raises((ValueError, BufferError)):
        _core.run_kernel("scalar", "sum_squares", "fp32", (x[::2],))
    _core.run_kernel("scalar", "accumulate", "fp32", (x, fixed))


def test_a_dsc_isa_that_cannot_be_followed_fails_the_import():
    code = "from deepspeed_c import _core; print(_core.kernel_tier())"

    def run(isa):
        return subprocess.run([sys.executable, "-c", code], env=dict(os.environ, DSC_ISA=isa),
                              capture_output=True, text=True, timeout=60)

    bad = run("avx1024")
    assert bad.returncode and "ValueError: DSC_ISA=avx1024: this machine and build have scalar" in bad.stderr
    for name in TIERS:
        assert run(name).stdout.strip() == name


# ---- conversions ----

def specials():
    """fp32 values over the whole range, ties, denormals, infinities and NaNs."""
    bits = np.arange(0, 1 << 32, 40503, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint32)
    ties = np.concatenate([(halves << 16) | low for low in (0, 0x7FFF, 0x8000, 0x8001)])
    return np.concatenate([bits, ties]).view(np.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_gives_torchs_bits_and_keeps_nan(tier, dtype):
    x = specials()
    got = np.empty(x.size, np.uint16)
    _core.run_kernel(tier, "from_f32", {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype], (got, x))
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(x)
    # torch's own NaNs differ between its vector and scalar loops.
    np.testing.assert_array_equal(got[number], expected[number])
    assert torch.isnan(torch.from_numpy(got[~number].view(np.int16)).view(dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_halves_widen_to_torchs_bits(tier, dtype):
    halves = np.arange(1 << 16, dtype=np.uint16)
    got = np.empty(halves.size, np.float32)
    _core.run_kernel(tier, "to_f32", {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype], (got, halves))
    expected = torch.from_numpy(halves.view(np.int16)).view(dtype).float().numpy()
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(got.view(np.uint32)[number], expected.view(np.uint32)[number])
    assert np.isnan(got[~number]).all()


@pytest.mark.parametrize("name,dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_copy_finite_agrees_with_torch_isfinite(tier, name, dtype):
    for bad in (None, math.inf, -math.inf, math.nan):
        x = torch.from_numpy(f32(3)).to(dtype)
        if bad is not None:
            x[N - 3] = bad
        raw = x.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy()
        copy = np.empty_like(raw)
        assert _core.run_kernel(tier, "copy_finite", name, (copy, raw)) == bool(torch.isfinite(x).all())
        assert _core.run_kernel(tier, "is_finite", name, (raw,)) == bool(torch.isfinite(x).all())
        np.testing.assert_array_equal(copy, raw)


# ---- accumulation, combination ----

@pytest.mark.parametrize("name,dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_accumulation_in_fp32_is_torchs_bit_for_bit(tier, name, dtype):
    total = np.full(N, np.nan, np.float32)
    expected = torch.zeros(N)
    for step in range(4):
        x = torch.from_numpy(f32(step)).to(dtype)
        raw = (x if dtype == torch.float32 else x.view(torch.int16)).numpy()
        _core.run_kernel(tier, "accumulate", name, (total, raw), first=step == 0)
        expected += x.float()
    np.testing.assert_array_equal(total.view(np.uint32), expected.numpy().view(np.uint32))


@pytest.mark.parametrize("op,torch_op", [("sum", torch.add), ("prod", torch.mul), ("min", torch.minimum),
                                         ("max", torch.maximum)])
@pytest.mark.parametrize("name,dtype", [("fp32", np.float32), ("fp64", np.float64), ("int32", np.int32),
                                        ("int64", np.int64)])
def test_combination_is_torchs_bit_for_bit(tier, op, torch_op, name, dtype):
    a, b = (f32(seed, scale=1e4).astype(dtype) for seed in (1, 2))
    if np.issubdtype(dtype, np.integer):
        a[:3], b[:3] = np.iinfo(dtype).max, (1, -1, 7)
    else:
        a[:3], b[:3] = (np.nan, 1, np.inf), (1, np.nan, -np.inf)
    expected = torch_op(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    _core.run_kernel(tier, op, name, (a, b))
    np.testing.assert_array_equal(a, expected)


# ---- rows ----

@pytest.mark.parametrize("first", [True, False])
def test_weighted_sums_are_torchs_bit_for_bit(tier, first):
    acc, x = f32(1), f32(2)
    product = torch.from_numpy(x) * 0.37
    expected = product if first else torch.from_numpy(acc) + product
    _core.run_kernel(tier, "add_weighted", "fp32", (acc, x), weight=0.37, first=first)
    np.testing.assert_array_equal(acc.view(np.uint32), expected.numpy().view(np.uint32))


def test_softmax_is_torchs_to_rounding(tier):
    x, out = f32(3, scale=5.0), np.empty(N, np.float32)
    _core.run_kernel(tier, "softmax", "fp32", (out, x))
    torch.testing.assert_close(torch.from_numpy(out), torch.softmax(torch.from_numpy(x), 0), rtol=1e-6, atol=1e-12)


# ---- norm ----

def test_sum_of_squares_agrees_with_torch_and_with_every_tier():
    for n in (0, 1, 15, 16, 17, 1023, 100003):
        x = f32(n, n, 3.0)
        sums = {_core.run_kernel(name, "sum_squares", "fp32", (x,)) for name in TIERS}
        assert len(sums) == 1
        expected = torch.linalg.vector_norm(torch.from_numpy(x).double()).item() ** 2
        assert sums.pop() == pytest.approx(expected, rel=1e-13, abs=0)


def rounded(exact):
    """A Fraction rounded once to double."""
    return exact.numerator / exact.denominator


@pytest.mark.parametrize("seed", range(5))
def test_norm_sum_is_the_exact_sum_rounded_once_in_any_order(seed):
    rng = random.Random(seed)
    parts = [math.ldexp(rng.random() + 0.5, rng.randrange(-245, 260)) for _ in range(500)]
    near = [math.ldexp(rng.random() + 0.5, rng.randrange(-3, 3)) for _ in range(500)]
    for values in (parts, near, parts + near, [1.0, 2.0 ** -53, 2.0 ** -298], [1.0, 2.0 ** -53]):
        exact = rounded(sum(map(Fraction, values)))
        for _ in range(5):
            rng.shuffle(values)
            assert _core.norm_sum(np.array(values)) == exact


def test_norm_sum_of_squares_of_all_scales_of_floats_is_exact():
    x = specials()
    x = x[np.isfinite(x)][::37].astype(np.float64)
    exact = rounded(sum(Fraction(value) ** 2 for value in x.tolist()))
    assert _core.norm_sum(x * x) == exact


def test_norm_sum_of_bad_parts_is_nan():
    for bad in (math.nan, math.inf, -1.0):
        assert math.isnan(_core.norm_sum(np.array([1.0, bad])))
    assert _core.norm_sum(np.array([])) == 0.0


def test_clip_factor_is_that_of_clip_grad_norm():
    for norm in (0.1, 0.9999989, 1.0, 1.5, 3e8):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        p.grad = torch.full((1,), norm, dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        assert _core.clip_factor(norm, 1.0) * norm == pytest.approx(p.grad.item(), rel=1e-15)
    assert _core.clip_factor(5.0, 0.0) == 1.0


# ---- optimizers ----

def adam_hyper(step, lr, betas, eps, decay, decoupled):
    """The factors that csrc/optim.c prepares, in double."""
    c1, c2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    return {"grad_scale": 1.0, "step_size": lr / c1, "beta1": betas[0], "one_minus_beta1": 1 - betas[0],
            "beta2": betas[1], "one_minus_beta2": 1 - betas[1], "inv_sqrt_c2": 1 / math.sqrt(c2), "eps": eps,
            "decay": lr * decay if decoupled else decay, "decoupled": decoupled}


def assert_near(got, expected):
    """1e-6 of the largest element: the parameters that a step touches are of order one."""
    scale = np.abs(expected).max()
    assert np.abs(got.astype(np.float64) - expected).max() <= 1e-6 * scale


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_100_adam_steps_are_torchs(tier, cls, decay):
    lr, betas, eps = 1e-3, (0.9, 0.99), 1e-8
    p, m, v = f32(1), np.zeros(N, np.float32), np.zeros(N, np.float32)
    peer = torch.nn.Parameter(torch.from_numpy(p.astype(np.float64)))
    optimizer = cls([peer], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    for step in range(1, 101):
        grad = f32(step + 10)
        _core.run_kernel(tier, "adam", "fp32", (p, m, v, grad),
                         **adam_hyper(step, lr, betas, eps, decay, cls is torch.optim.AdamW))
        peer.grad = torch.from_numpy(grad.astype(np.float64))
        optimizer.step()
    state = optimizer.state[peer]
    assert_near(p, peer.detach().numpy())
    assert_near(m, state["exp_avg"].numpy())
    assert_near(v, state["exp_avg_sq"].numpy())


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum,dampening,nesterov", [(0, 0, False), (0.9, 0, False), (0.9, 0.3, False),
                                                         (0.9, 0, True)])
def test_100_sgd_steps_are_torchs(tier, momentum, dampening, nesterov, decay):
    p, buf = f32(1), np.full(N, np.nan, np.float32)
    peer = torch.nn.Parameter(torch.from_numpy(p.astype(np.float64)))
    optimizer = torch.optim.SGD([peer], lr=0.01, momentum=momentum, dampening=dampening, nesterov=nesterov,
                                weight_decay=decay)
    for step in range(100):
        grad = f32(step + 10)
        _core.run_kernel(tier, "sgd", "fp32", (p, buf, grad), lr=0.01, momentum=momentum, weight_decay=decay,
                         one_minus_dampening=1 - dampening, nesterov=nesterov, first=step == 0)
        peer.grad = torch.from_numpy(grad.astype(np.float64))
        optimizer.step()
    assert_near(p, peer.detach().numpy())


@pytest.mark.parametrize("decay,lr_decay", [(0.0, 0.0), (0.01, 0.0), (0.01, 0.1)])
def test_100_adagrad_steps_are_torchs(tier, decay, lr_decay):
    p, total = f32(1), np.full(N, 0.25, np.float32)
    peer = torch.nn.Parameter(torch.from_numpy(p.astype(np.float64)))
    optimizer = torch.optim.Adagrad([peer], lr=0.01, lr_decay=lr_decay, weight_decay=decay,
                                    initial_accumulator_value=0.25)
    for step in range(100):
        grad = f32(step + 10)
        _core.run_kernel(tier, "adagrad", "fp32", (p, total, grad), step_size=0.01 / (1 + step * lr_decay),
                         weight_decay=decay, eps=1e-10)
        peer.grad = torch.from_numpy(grad.astype(np.float64))
        optimizer.step()
    assert_near(p, peer.detach().numpy())
    assert_near(total, optimizer.state[peer]["sum"].numpy())


def test_100_steps_of_the_other_adagrad_rule_follow_its_formula(tier):
    p, total = f32(1), np.zeros(N, np.float32)
    q, v = p.astype(np.float64), np.zeros(N)
    for step in range(100):
        grad = f32(step + 10)
        _core.run_kernel(tier, "adagrad", "fp32", (p, total, grad), step_size=0.01, weight_decay=0.1, eps=1e-10,
                         raw_numerator=True)
        v += (grad + 0.1 * q) ** 2
        q -= 0.01 * grad / (np.sqrt(v) + 1e-10)
    assert_near(p, q)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_100_lion_steps_follow_the_published_formula(tier, decay):
    p, m, lr, (beta1, beta2) = f32(1), np.zeros(N, np.float32), 0.01, (0.9, 0.99)
    q, m64 = p.astype(np.float64), np.zeros(N)
    for step in range(100):
        grad = f32(step + 10)
        grad[:5] = 0  # u is 0 there: only the decay moves the parameter
        _core.run_kernel(tier, "lion", "fp32", (p, m, grad), lr=lr, beta1=beta1, beta2=beta2, one_minus_beta1=1 - beta1,
                         one_minus_beta2=1 - beta2, decay=lr * decay)
        q = q * (1 - lr * decay) - lr * np.sign(beta1 * m64 + (1 - beta1) * grad)
        m64 = beta2 * m64 + (1 - beta2) * grad
    assert_near(p, q)
    assert_near(m, m64)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("inside", [False, True])
def test_100_lamb_steps_follow_the_published_formula(tier, decay, inside):
    lr, (beta1, beta2), eps = 0.01, (0.9, 0.999), 1e-6
    p, m, v = f32(1), np.zeros(N, np.float32), np.zeros(N, np.float32)
    q, m64, v64 = p.astype(np.float64), np.zeros(N), np.zeros(N)
    rule = {"beta1": beta1, "beta2": beta2, "one_minus_beta1": 1 - beta1, "one_minus_beta2": 1 - beta2, "eps": eps,
            "decay": decay, "eps_inside": inside}
    for step in range(1, 101):
        grad = f32(step + 10)
        squares = _core.run_kernel(tier, "lamb_moments", "fp32", (m, v, p, grad), **rule)
        assert squares[0] == _core.run_kernel(tier, "sum_squares", "fp32", (p,))
        norms = [math.sqrt(x) for x in squares]
        size = lr * math.sqrt(1 - beta2 ** step) / (1 - beta1 ** step)
        _core.run_kernel(tier, "lamb_step", "fp32", (p, m, v), step=size * min(max(norms[0] / norms[1], 0.01), 10.0),
                         **rule)
        m64 = beta1 * m64 + (1 - beta1) * grad
        v64 = beta2 * v64 + (1 - beta2) * grad.astype(np.float64) ** 2
        direction = m64 / (np.sqrt(v64 + eps) if inside else np.sqrt(v64) + eps) + decay * q
        q -= size * min(max(np.linalg.norm(q) / np.linalg.norm(direction), 0.01), 10.0) * direction
    assert_near(p, q)


def test_a_caller_that_flushes_denormals_gets_the_same_bits(tier):
    x = (np.arange(1, N + 1, dtype=np.uint32)).view(np.float32)  # all denormal
    expected, got = np.zeros(N, np.float32), np.zeros(N, np.float32)
    _core.run_kernel(tier, "accumulate", "fp32", (expected, x))
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        _core.run_kernel(tier, "accumulate", "fp32", (got, x))
        flushing = (torch.tensor([1e-40]) * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert flushing
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert expected.any()
