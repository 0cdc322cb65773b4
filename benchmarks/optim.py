"""One step of each C optimizer over fp32 elements, beside torch's fused AdamW and the memory's bandwidth.

python benchmarks/optim.py [--elements N] [--rounds R] [--threads T]

The bandwidth is that of `a += b` in torch with as many threads: 12 bytes per element, nothing written that was not
read. Bytes per element are what a rule must read and write; "times" is the time over that traffic at that bandwidth.
Rounds are interleaved and the best is shown, so that a busy machine hits all alike.
"""
import argparse
import time

import torch

from deepspeed_c import _core

# name -> (rule, bytes per element, number of states, options)
RULES = {
    "AdamW": ("adam", 28, 2, {"lr": 1e-3, "weight_decay": 0.01}),
    "SGD": ("sgd", 12, 0, {"lr": 1e-3}),
    "SGD, momentum": ("sgd", 20, 1, {"lr": 1e-3, "momentum": 0.9}),
    "Adagrad": ("adagrad", 20, 1, {"lr": 1e-3}),
    "Lion": ("lion", 20, 1, {"lr": 1e-3, "weight_decay": 0.01}),
    "LAMB": ("lamb", 40, 2, {"lr": 1e-3, "weight_decay": 0.01}),
}


def jobs(n, n_threads):
    """name -> (bytes per element, call). All rules share one parameter, gradient and pair of states."""
    p = torch.nn.Parameter(torch.randn(n))
    p.grad = torch.randn(n)
    states = [torch.rand(n), torch.rand(n)]
    other = torch.zeros(n)
    found = {"a += b, torch": (12, lambda: other.add_(p.grad)),
             "AdamW, torch fused": (28, torch.optim.AdamW([p], lr=1e-3, fused=True).step)}
    for name, (rule, size, n_states, options) in RULES.items():
        stepper = _core.Stepper(rule, n_threads)
        rows = [(p, p.grad, *states[:n_states])]
        found[name] = (size, lambda s=stepper, o=options, r=rows: s.step(o, 2, r))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=50 << 20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = jobs(args.elements, args.threads)
    times = {name: [] for name in work}
    for round_number in range(args.rounds + 1):
        for name, (_, call) in work.items():
            time.sleep(0.02)  # torch's threads spin for a while after each of its operations, on our threads' cores
            start = time.perf_counter()
            call()
            if round_number:  # the first touches memory
                times[name].append(time.perf_counter() - start)
    best = {name: min(t) for name, t in times.items()}
    bandwidth = 12 * args.elements / best["a += b, torch"]
    print(f"{args.elements} elements, {args.threads} threads, best of {args.rounds}; {bandwidth / 1e9:.1f} GB/s")
    for name, (size, _) in work.items():
        least = size * args.elements / bandwidth
        print(f"{name:20s} {size:3d} bytes {1e3 * best[name]:8.2f} ms {best[name] / least:6.2f} times")


if __name__ == "__main__":
    main()
