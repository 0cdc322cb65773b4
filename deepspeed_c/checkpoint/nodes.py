"""Checkpoints where each node has storage of its own (checkpoint.use_node_local_storage).

A node's first rank makes the folder there; each has the files of the node's ranks and the same manifest. Before a load
the nodes hand each other the files that they lack. Invariant: a file appears in a folder whole, under its name.
"""
import hashlib
import os

import torch

from .._delegate import node
from .agree import together

_CHUNK = 16 << 20  # bytes that travel at a time


class Nodes:
    """Which ranks are on one node. Collective over comm. Attributes: leader (this rank is its node's first), local (the
    ranks of its node)."""

    def __init__(self, comm):
        digest = hashlib.blake2b(node().encode(), digest_size=8).digest()
        found = torch.zeros(8 * comm.size, dtype=torch.uint8)
        comm.all_gather(found, torch.frombuffer(bytearray(digest), dtype=torch.uint8), "nodes")
        found = found.view(comm.size, 8).tolist()
        self.comm = comm
        self.local = [rank for rank, other in enumerate(found) if other == found[comm.rank]]
        self.leader = self.local[0] == comm.rank
        self.n = len({tuple(other) for other in found})

    def complete(self, folder, names, call):
        """Every node's folder has all of these files afterwards. names: the same list on every rank. Collective."""
        comm, problem = self.comm, None
        have = torch.tensor([self.leader and os.path.isfile(os.path.join(folder, name)) for name in names],
                            dtype=torch.uint8)
        everyone = torch.zeros(comm.size * len(names), dtype=torch.uint8)
        comm.all_gather(everyone, have, call)
        leads = torch.zeros(comm.size, dtype=torch.uint8)
        comm.all_gather(leads, torch.tensor([self.leader], dtype=torch.uint8), call)
        everyone = everyone.view(comm.size, len(names))
        for i, name in enumerate(names):
            holders = everyone[:, i].nonzero().flatten().tolist()
            if holders and bool((everyone[:, i] < leads).any()):
                try:
                    self._hand_out(os.path.join(folder, name), holders[0], self.leader and not have[i], call)
                except OSError as error:
                    problem = problem or error
        together(comm, problem, call)

    def _hand_out(self, path, holder, wanted, call):
        """One file, from the holder to who wants it. A rank that fails goes on taking part."""
        comm, problem = self.comm, None
        source = open(path, "rb") if comm.rank == holder else None
        target = open(path + ".part", "wb") if wanted else None
        size = torch.tensor([os.path.getsize(path) if source else 0], dtype=torch.int64)
        comm.broadcast(size, holder, call)
        for at in range(0, int(size), _CHUNK):
            chunk = torch.zeros(min(_CHUNK, int(size) - at), dtype=torch.uint8)
            if source:
                source.readinto(chunk.numpy())
            comm.broadcast(chunk, holder, call)
            try:
                if target and problem is None:
                    target.write(chunk.numpy())
            except OSError as error:
                problem = error
        for file in (source, target):
            if file:
                file.close()
        if problem is not None:
            raise problem
        if target:
            os.rename(path + ".part", path)
