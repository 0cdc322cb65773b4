"""Forward and backward of one MoE layer, and what of it is not the experts' own arithmetic, on one rank.

    python benchmarks/moe.py --impl deepspeed_c --expert linear --tokens 4096
    python benchmarks/moe.py --impl deepspeed ...        (with DeepSpeed's environment)

The layer has width 512; `linear` is 512x512, `ffn` 512x2048x512. Rounds alternate between the whole layer, with the
loss of shared/bench/moe_bench.py, and the same experts alone on evenly split tokens, forward and backward. One line of
JSON: medians and minima in milliseconds; `rest_ms` is the median of layer minus experts, round by round.
"""
import argparse
import importlib
import json
import os
import statistics
import time

import torch
from torch import nn

WIDTH = 512


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--impl", default="deepspeed_c", choices=("deepspeed_c", "deepspeed"))
    parser.add_argument("--expert", default="linear", choices=("linear", "ffn"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--local_rank", type=int, default=0, help="set by launchers")
    return parser.parse_args()


def make_layer(args):
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    package = importlib.import_module(args.impl)
    package.init_distributed()
    MoE = importlib.import_module(args.impl + ".moe.layer").MoE
    torch.manual_seed(0)
    wide = 4 * WIDTH
    expert = (nn.Linear(WIDTH, WIDTH) if args.expert == "linear"
              else nn.Sequential(nn.Linear(WIDTH, wide), nn.ReLU(), nn.Linear(wide, WIDTH)))
    layer = MoE(hidden_size=WIDTH, expert=expert, num_experts=args.experts, ep_size=1, k=args.k, capacity_factor=1.0,
                min_capacity=4, use_rts=False)
    layer.set_deepspeed_parallelism()
    return layer.to(getattr(torch, args.dtype))


def timed(call):
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def main():
    args = arguments()
    layer = make_layer(args)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    dtype = getattr(torch, args.dtype)
    x = torch.randn(args.tokens, WIDTH, dtype=dtype, requires_grad=True)
    rows = args.tokens * args.k // args.experts
    parts = [torch.randn(rows, WIDTH, dtype=dtype, requires_grad=True) for _ in experts]
    d_parts = [torch.randn(rows, WIDTH, dtype=dtype) for _ in experts]

    def whole():
        y, l_aux, _ = layer(x)
        (y.square().mean() + 0.01 * l_aux).backward()

    def alone():
        for part in parts:
            part.grad = None
        torch.autograd.backward([expert(part) for expert, part in zip(experts, parts)], d_parts)

    rounds = [(timed(whole), timed(alone)) for _ in range(args.rounds + 2)][2:]
    layer_ms, experts_ms = [w for w, _ in rounds], [a for _, a in rounds]
    print("RESULT", json.dumps({
        "impl": args.impl, "expert": args.expert, "tokens": args.tokens, "k": args.k, "dtype": args.dtype,
        "layer_ms": round(statistics.median(layer_ms), 2), "experts_ms": round(statistics.median(experts_ms), 2),
        "rest_ms": round(statistics.median(w - a for w, a in rounds), 2),
        "layer_min": round(min(layer_ms), 2), "experts_min": round(min(experts_ms), 2)}))


if __name__ == "__main__":
    main()
