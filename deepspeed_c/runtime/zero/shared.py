"""Parameters where ranks share memory, or one rank is alone: the machine holds each once, and a fetch is a view.

Invariant: fetching and releasing wait for nobody, so ranks may run different modules, in different order. Who is not
stepping reads only; a write shows in the parameter's version, and the release that finds it is the error.
"""
import torch
from torch.utils.dlpack import from_dlpack

from ... import _core
from ...model import flat
from .home import Home
from .parameter import make, zeros


class SharedHome(Home):
    """A Home over memory. comm: its ranks share memory, or it is one rank.

    early: whether backward shall release what it fetched for a module before it ends; here that would save nothing.
    """

    early = False
    shared = True

    def __init__(self, comm, settings=None):
        super().__init__(comm)
        self._store = _core.Store(comm, (settings or {}).get("folder"))

    def add(self, p):
        """An ordinary Parameter takes its place; the first rank's values count. Collective in order; settle() after
        the last. One on the meta device starts as zeros."""
        with torch.inference_mode(False):
            full = self._take(p)
            if self.comm.rank == 0 and full.numel() and not p.is_meta:
                full.copy_(p.data)
        make(p, self, full)

    def _take(self, p):
        if p.numel() == 0:
            return zeros(p.shape, p.dtype)
        return from_dlpack(self._store.take(p.numel(), str(p.dtype).removeprefix("torch."))).as_strided(
            p.shape, p.stride())

    def settle(self):
        """After add() of several: all ranks see the values. Collective."""
        self.comm.barrier("placing the parameters of ZeRO stage 3")

    def _bring(self, event, params, label):
        """Nothing: fetching is a change of address."""

    def _let_go(self, params):
        """Nothing either."""

    def copy(self, p):
        """A private copy of p's whole values."""
        return p.ds_full.clone(memory_format=torch.preserve_format)

    def write(self, params, rank):
        """The given rank's p.data become the values of all. Collective: nobody reads while they change."""
        self.comm.barrier(f"GatheredParameters of {params[0].ds_name} and {len(params) - 1} more")
        if self.comm.rank == rank:
            for p in params:
                if p.numel():
                    p.ds_full.copy_(p.data)
        self.comm.barrier(f"GatheredParameters of {params[0].ds_name} and {len(params) - 1} more: written")

    def held(self, p):
        """(first element, values) of what this rank reads of p: all, in memory that ranks share."""
        return 0, flat(p.ds_full)

    def part(self, p):
        """This rank's part of p, a view."""
        n = p.partition_numel()
        return flat(p.ds_full)[min(self.comm.rank * n, p.ds_numel):min((self.comm.rank + 1) * n, p.ds_numel)]

    def hand_over(self, p, homes):
        """Nothing: there are no limits here that others would replace."""

    def place_of(self, p):
        """What take_back() needs: nothing."""

    def take_back(self, p, place):
        """Nothing: p is where it was."""

    def bind(self, core, params):
        """Nothing: the core steps the memory that is here."""

    def stepped(self, p):
        """The memory that the engine steps apart from the whole: none."""

    def empty(self):
        """Gives back what is gathered and not in use: nothing is."""

    def after_step(self):
        """Nothing: new values are where they are read."""
