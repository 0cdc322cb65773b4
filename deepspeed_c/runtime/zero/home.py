"""What every Home does: a parameter that it brings becomes whole, and empty again when all who fetched it let it go.

Invariant: between two calls a parameter's data is ds_full exactly while ds_count is not 0, but for private copies.
"""
import torch

from .parameter import OUTSIDE, ZeroParamStatus, empty, make_ordinary, succeed, write_error


class Home:
    """The parameters of one communicator that were placed together. A kind of Home says how their values come and go:
    _bring(event, params, label) and _let_go(params), and copy(p) for a private copy of the whole."""

    def __init__(self, comm):
        self.comm = comm

    def fetch(self, event, params, label):
        """Makes params whole. Undone by release(), once for each fetch."""
        self._bring(event, params, label)
        for p in params:
            if p.ds_count == 0:
                p.data = p.ds_full
                p.ds_seen = p._version
                p.ds_status = ZeroParamStatus.AVAILABLE
            p.ds_count += 1

    def release(self, params, label):
        """Undoes one fetch(). RuntimeError, after all are released, where one was written to meanwhile."""
        written = None
        for p in params:
            p.ds_count -= 1
            if p.ds_count == 0:
                if self.is_written(p):
                    written = p
                p.data = empty(p.ds_full.dtype)
                p.ds_status = ZeroParamStatus.NOT_AVAILABLE
        self._let_go(params)
        if written is not None:
            raise write_error(written, label)

    def is_written(self, p):
        """Whether a gathered parameter's values or its storage were changed since it was fetched."""
        return p.ds_private == 0 and (p._version != p.ds_seen or p.data_ptr() != p.ds_full.data_ptr())

    def note(self, p):
        """What stands in p now is its value."""
        torch.autograd.graph.increment_version(p)
        p.ds_seen = p._version

    def keep(self, params):
        """These stay gathered from now on."""
        fresh = tuple(p for p in params if not p.ds_persist)
        for p in fresh:
            p.ds_persist = True
        if fresh:
            self.fetch(OUTSIDE, fresh, "all modules")

    def move(self, old, new):
        """`new` takes the place of `old`, which becomes an ordinary Parameter with a copy of its values. Collective
        where ranks share no memory."""
        succeed(old, new, self.copy(old))

    def remove(self, p):
        """p is an ordinary Parameter with a private copy of its values from now on. Collective where ranks share no
        memory."""
        make_ordinary(p, p.data.clone() if p.ds_private else self.copy(p))
