"""Bandwidth of every kernel and tier on one thread, beside memcpy and torch's fused AdamW in the same run.

python benchmarks/kernel_bench.py [--elements N] [--rounds R] [--tier NAME]

GB/s counts the bytes that an operation must read and write (docs/kernels.md); a written line that is read
by the machine first counts once, as in memcpy's figure. Rounds of all operations are interleaved and the
best round is shown, so that a busy machine hits all alike.
"""
import argparse
import time

import numpy as np
import torch

from deepspeed_c import _core

ADAM = {"grad_scale": 0.5, "step_size": 1e-3, "beta1": 0.9, "one_minus_beta1": 0.1, "beta2": 0.999,
        "one_minus_beta2": 1e-3, "inv_sqrt_c2": 1.0, "eps": 1e-8, "decay": 1e-5, "decoupled": True}
SGD = {"grad_scale": 0.5, "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}


def seconds(call):
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def torch_adamw(arrays):
    """A step of torch's fused AdamW over the same memory."""
    p = torch.nn.Parameter(torch.from_numpy(arrays["p"]))
    p.grad = torch.from_numpy(arrays["grad"])
    return torch.optim.AdamW([p], lr=1e-3, fused=True).step


def operations(tier, a):
    """(name, bytes per element, call) of every kernel that the engine's step is made of."""
    def op(name, dtype, *buffers, **hyper):
        return lambda: _core.run_kernel(tier, name, dtype, buffers, **hyper)

    p, m, v, grad, half, other = (a[k] for k in ("p", "m", "v", "grad", "half", "other"))
    yield "copy_finite fp32", 8, op("copy_finite", "fp32", m, grad)
    yield "copy_finite bf16", 4, op("copy_finite", "bf16", other, half)
    yield "is_finite fp32", 4, op("is_finite", "fp32", grad)
    yield "accumulate fp32", 12, op("accumulate", "fp32", m, grad)
    yield "accumulate fp32 first", 8, op("accumulate", "fp32", m, grad, first=True)
    yield "accumulate bf16", 10, op("accumulate", "bf16", m, half)
    yield "accumulate fp16", 10, op("accumulate", "fp16", m, half)
    yield "to_f32 bf16", 6, op("to_f32", "bf16", m, half)
    yield "to_f32 fp16", 6, op("to_f32", "fp16", m, half)
    yield "from_f32 bf16", 6, op("from_f32", "bf16", other, grad)
    yield "from_f32 fp16", 6, op("from_f32", "fp16", other, grad)
    yield "sum_squares", 4, op("sum_squares", "fp32", grad)
    yield "max fp32", 12, op("max", "fp32", m, grad)
    yield "adam", 28, op("adam", "fp32", p, m, v, grad, **ADAM)
    yield "sgd", 12, op("sgd", "fp32", p, m, grad, grad_scale=0.5, lr=1e-3)
    yield "sgd momentum", 20, op("sgd", "fp32", p, m, grad, **SGD)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=25 << 20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tier", choices=_core.kernel_tiers(), action="append", help="default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n = args.elements
    rng = np.random.default_rng(1)
    arrays = {name: rng.standard_normal(n, dtype=np.float32) for name in ("p", "m", "grad")}
    arrays["v"] = np.square(arrays["m"])
    arrays["half"] = arrays["grad"].astype(np.float16).view(np.uint16)
    arrays["other"] = np.zeros(n, np.uint16)
    # Halves that are read as bf16 stay finite: their exponent field is below the top.
    jobs = {("", "memcpy fp32"): (8, lambda: np.copyto(arrays["m"], arrays["grad"])),
            ("", "torch AdamW fused"): (28, torch_adamw(arrays))}
    tiers = args.tier or _core.kernel_tiers()
    for tier in tiers:
        jobs.update({(tier, name): (size, call) for name, size, call in operations(tier, arrays)})
    best = {}
    for _ in range(args.rounds):
        for key, (_, call) in jobs.items():
            best[key] = min(best.get(key, float("inf")), seconds(call))
    print(f"{n} elements, best of {args.rounds}, GB/s (bytes per element)")
    for (tier, name), (size, _) in jobs.items():
        if not tier:
            print(f"{name:24s} {size:3d}  {size * n / best[tier, name] / 1e9:8.1f}")
    print(f"{'':28s}" + "".join(f"{tier:>10s}" for tier in tiers))
    for name, size, _ in operations(tiers[0], arrays):
        row = "".join(f"{size * n / best[tier, name] / 1e9:10.1f}" for tier in tiers)
        print(f"{name:24s} {size:3d} {row}")


if __name__ == "__main__":
    main()
