"""Collectives and messages of deepspeed_c.comm against gloo and against this machine's copies, in one run.

    python benchmarks/comm.py [--ranks 2] [--rounds 5] [--sizes 0.004,1,64] [--nodes aabb]

Every figure is the least of the rounds' medians on rank 0, because other loads only add; ours and gloo take turns.
Sizes in MiB: of the whole buffer for all_reduce, reduce, broadcast and messages, of the input for reduce_scatter and
all_to_all, of one rank's part for all_gather and gather, of the output for scatter. `copies` is the time over that of
the bytes which the busiest rank must read and write, at the bandwidth of a memcpy that all ranks run at the same time,
between buffers as large as the operation's. Tensors are private memory, so what another rank needs is written to shared
memory first and read from there. --nodes: ranks with different letters pretend different machines;
DSC_COMM_BACKEND=delegate in the environment makes each rank its own node.
"""
import argparse
import multiprocessing
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist


def copied(name, n, w):
    """Bytes that a memcpy copies with as much traffic as an operation of n bytes on w ranks must have: half of what its
    busiest rank reads and writes."""
    others = n * (w - 1) / w  # of a buffer that has a part for each rank
    read, written = {
        "all_reduce": (others + n + others, others + n / w + n), "reduce_scatter": (others + n, others + n / w),
        "all_gather": (w * n, n + w * n), "broadcast": (n, n), "reduce": (w * n, n), "gather": (w * n, w * n),
        "scatter": (w * n, w * n), "all_to_all": (others + n, others + n), "send/recv": (n, n), "barrier": (0, 0)}[name]
    return (read + written) / 2


def calls_of(module, rank, world, n_bytes):
    """Name and function of each operation on fp32 buffers of n_bytes."""
    n = max(n_bytes // 4 // world * world, world)
    x, y, part, whole = torch.zeros(n), torch.zeros(n), torch.zeros(n // world), torch.zeros(n * world)
    wholes = list(whole.view(world, -1))
    first = rank == 0

    def message():
        if first:
            module.send(x, 1)
        elif rank == 1:
            module.recv(x, 0)

    return {
        "all_reduce": lambda: module.all_reduce(x), "reduce_scatter": lambda: module.reduce_scatter_tensor(part, y),
        "all_gather": lambda: module.all_gather_into_tensor(whole, x), "broadcast": lambda: module.broadcast(x, 0),
        "reduce": lambda: module.reduce(x, 0), "gather": lambda: module.gather(x, wholes if first else None, 0),
        "scatter": lambda: module.scatter(x, wholes if first else None, 0),
        "all_to_all": lambda: module.all_to_all_single(x, y), "send/recv": message,
        "copy": lambda: x.copy_(y)}


def median_us(call, barrier, n_calls):
    for _ in range(2):
        call()
    barrier()
    times = []
    for _ in range(n_calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def run_rank(rank, world, port, args, pipe):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if args.nodes:
        os.environ["DSC_COMM_NODE"] = args.nodes[rank]
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    import deepspeed_c
    from deepspeed_c import comm

    deepspeed_c.init_distributed()
    found = {}
    for _ in range(args.rounds):
        for size in args.sizes:
            n_bytes = int(size * 2**20)
            n_calls = 300 if n_bytes <= 1 << 16 else 30 if n_bytes <= 4 << 20 else 5
            for system, module in (("ours", comm), ("gloo", dist)):
                calls = calls_of(module, rank, world, n_bytes)
                for name, call in [*calls.items(), ("barrier", module.barrier)]:
                    key = system, name, n_bytes
                    us = median_us(call, comm.barrier, max(n_calls // (10 if system == "gloo" else 1), 3))
                    found[key] = min(us, found.get(key, us))
    comm.barrier()
    if rank == 0:
        pipe.send(found)
    comm.destroy_process_group()


def measure(args):
    context = multiprocessing.get_context("fork")  # nothing has run in torch yet
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    receive, send = context.Pipe(False)
    ranks = [context.Process(target=run_rank, args=(r, args.ranks, port, args, send)) for r in range(args.ranks)]
    for process in ranks:
        process.start()
    found = receive.recv()
    for process in ranks:
        process.join()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=lambda text: [float(s) for s in text.split(",")], default=[4 / 1024, 1, 64])
    parser.add_argument("--nodes", default="")
    args = parser.parse_args()
    found = measure(args)
    print(f"{'operation':16}{'KiB':>8}{'us':>12}{'gloo us':>12}{'gloo/ours':>11}{'copies':>9}")
    for (system, name, n_bytes), us in found.items():
        if system != "ours" or name == "copy":
            continue
        gloo = found["gloo", name, n_bytes]
        floor = found["ours", "copy", n_bytes] / n_bytes * copied(name, n_bytes, args.ranks)
        copies = f"{us / floor:9.2f}" if floor and n_bytes >= 1 << 20 else ""
        print(f"{name:16}{n_bytes >> 10:8}{us:12.2f}{gloo:12.0f}{gloo / us:11.1f}{copies}")


if __name__ == "__main__":
    main()
