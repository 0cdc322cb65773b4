"""Ranks that fail together, and small data of all ranks at the first: what saving and loading are coordinated by."""
import json

import torch

from .. import _core


def together(comm, problem, call):
    """Returns where no rank has a problem (an exception, or None). Else raises on every rank: its own, or a
    CheckpointError with the first failed rank's text. Collective."""
    fine = torch.zeros(comm.size, dtype=torch.int32)
    comm.all_gather(fine, torch.tensor([problem is None], dtype=torch.int32), call)
    if fine.all():
        return
    first = int((fine == 0).nonzero()[0])
    text = broadcast_bytes(comm, b"" if problem is None else f"{type(problem).__name__}: {problem}".encode(), first,
                           call)
    raise problem or _core.CheckpointError(f"{call}: rank {first} failed: {text.decode(errors='replace')}")


def broadcast_bytes(comm, data, root, call):
    """The root's bytes, on every rank. Collective."""
    n = torch.tensor([len(data)], dtype=torch.int64)
    comm.broadcast(n, root, call)
    held = torch.zeros(int(n), dtype=torch.uint8)
    if comm.rank == root and data:
        held.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if n:
        comm.broadcast(held, root, call)
    return held.numpy().tobytes()


def gather_json(comm, value, call):
    """Every rank's value, by rank, on rank 0; None on the others. Collective."""
    data = json.dumps(value).encode()
    sizes = torch.zeros(comm.size, dtype=torch.int64)
    comm.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64), call)
    most = int(sizes.max())
    mine = torch.zeros(most, dtype=torch.uint8)
    mine[:len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = torch.zeros(comm.size * most, dtype=torch.uint8) if comm.rank == 0 else None
    comm.gather(rows, mine, 0, call)
    if comm.rank:
        return None
    return [json.loads(rows[r * most:r * most + int(n)].numpy().tobytes()) for r, n in enumerate(sizes)]
