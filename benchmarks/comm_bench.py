"""Medians of the collectives in C on N ranks of this machine, with gloo's beside them on request.

    python benchmarks/comm_bench.py [--ranks 2] [--gloo] [--rounds 3]

Figures are microseconds per call on rank 0: the least of the rounds' medians, because other loads only add. Sizes
are of the whole buffer for all_reduce and broadcast, of the input for reduce_scatter, of one rank's part for
all_gather. docs/comm.md quotes a run.
"""
import argparse
import multiprocessing
import socket
import statistics
import time

import torch
import torch.distributed as dist

from deepspeed_c import _core

SIZES = [4 << 10, 64 << 10, 1 << 20, 4 << 20, 64 << 20]


def median_us(call, barrier, n_calls):
    for _ in range(3):
        call()
    barrier()
    times = []
    for _ in range(n_calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def calls_of(comm, n_bytes, gloo):
    """Name and function of each collective on fp32 buffers of n_bytes."""
    n, world = n_bytes // 4, dist.get_world_size() if gloo else comm.size
    x, y = torch.zeros(n), torch.zeros(n)
    part, whole = torch.zeros(n // world), torch.zeros(n * world)
    if gloo:
        return [("all_reduce", lambda: dist.all_reduce(x)), ("broadcast", lambda: dist.broadcast(x, 0)),
                ("reduce_scatter", lambda: dist.reduce_scatter_tensor(part, y)),
                ("all_gather", lambda: dist.all_gather_into_tensor(whole, y))]
    return [("all_reduce", lambda: comm.all_reduce(x)), ("broadcast", lambda: comm.broadcast(x)),
            ("reduce_scatter", lambda: comm.reduce_scatter(part, y)), ("all_gather", lambda: comm.all_gather(whole, y))]


def run_rank(rank, size, rounds, gloo, port, pipe, address, token, listener=None):
    torch.set_num_threads(1)
    comm = _core.Comm.shm(listener, address, token, rank, size, 60.0)
    if gloo:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    barrier = dist.barrier if gloo else comm.barrier
    found = {}
    for _ in range(rounds):
        cases = [("barrier", 0, barrier)]
        for n_bytes in SIZES:
            cases += [(name, n_bytes, call) for name, call in calls_of(comm, n_bytes, gloo)]
        for name, n_bytes, call in cases:
            us = median_us(call, barrier, 500 if n_bytes <= 64 << 10 else 50 if n_bytes <= 4 << 20 else 8)
            found[name, n_bytes] = min(us, found.get((name, n_bytes), us))
    barrier()
    if rank == 0:
        pipe.send(found)
    if gloo:
        dist.destroy_process_group()


def measure(size, rounds, gloo):
    context = multiprocessing.get_context("fork")  # nothing has run in torch yet
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listener, address, token = _core.Comm.listen()
    receive, send = context.Pipe(False)
    ranks = [context.Process(target=run_rank, args=(r, size, rounds, gloo, port, send, address, token,
                                                    listener if r == 0 else None)) for r in range(size)]
    for process in ranks:
        process.start()
    found = receive.recv()
    for process in ranks:
        process.join()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gloo", action="store_true")
    args = parser.parse_args()
    ours = measure(args.ranks, args.rounds, False)
    gloo = measure(args.ranks, 1, True) if args.gloo else {}
    print(f"{'collective':16}{'KiB':>8}{'us':>12}{'GB/s':>8}" + (f"{'gloo us':>12}" if gloo else ""))
    for (name, n_bytes), us in ours.items():
        rate = f"{n_bytes / us / 1e3:8.2f}" if n_bytes else " " * 8
        print(f"{name:16}{n_bytes >> 10:8}{us:12.2f}{rate}" + (f"{gloo[name, n_bytes]:12.0f}" if gloo else ""))


if __name__ == "__main__":
    main()
