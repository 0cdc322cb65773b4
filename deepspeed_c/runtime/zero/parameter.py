"""Parameters whose memory is sharded, or shared by the ranks of a machine: what ZeRO stage 3 makes of nn.Parameters.

A parameter is *released* (its data are an empty tensor of its dtype) or *gathered* (whole). A Home (home.py) knows
where it lies and moves it between the two. Invariant: the object stays the one that the module and the optimizer hold;
only its class and its data change, and make_ordinary() undoes both.
"""
import itertools
from enum import Enum

import torch

from .construction import ORIGINALS

_ids = itertools.count()
OUTSIDE = -1  # the event of what no module fetches
_EMPTY = {}  # dtype -> the data of every released parameter


class ZeroParamStatus(Enum):
    """Whether a parameter is whole (AVAILABLE), released, or on its way."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class ZeroParamType(Enum):
    """DeepSpeed's kinds; every parameter of stage 3 is PARTITIONED."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class ZeroParameter(torch.nn.Parameter):
    """A parameter under ZeRO stage 3.

    Attributes: ds_id (int, in the order of making), ds_shape, ds_numel, ds_status, ds_persist (stays gathered), ds_name
    (for texts), ds_home (its Home), ds_full (a tensor in the full shape and memory order, for the parameter's life),
    ds_active_sub_modules (a set that clients clear; nothing depends on it), ds_external (used outside its module),
    ds_z3_leaf_module (the leaf that it is fetched with; only where there is one), ds_owner (weak: the Shards that took
    it last, or None).
    """

    ds_param_type = ZeroParamType.PARTITIONED

    def partition_numel(self):
        """Elements of one rank's part, padding included."""
        return -(-self.ds_numel // self.ds_home.comm.size)

    def aligned_size(self):
        """Elements of all parts, padding included."""
        return self.partition_numel() * self.ds_home.comm.size

    def padding_size(self):
        """Elements of padding in all parts."""
        return self.aligned_size() - self.ds_numel

    @property
    def ds_process_ranks(self):
        """How many ranks share it out."""
        return self.ds_home.comm.size

    @property
    def is_external_param(self):
        """Whether a module uses it that does not own it."""
        return self.ds_external

    @property
    def ds_tensor(self):
        """This rank's part: one dimension, in storage order, with ds_numel (partition_numel()), ds_shape and status as
        DeepSpeed's has them. Where ranks share no memory it is what this rank's engine steps: none of it, or all."""
        part = self.ds_home.part(self)
        part.ds_numel, part.ds_shape, part.status = self.partition_numel(), part.shape, self.ds_status
        return part

    def all_gather(self, param_list=None, async_op=False):
        """Makes these parameters (None: this one) whole, as private copies, until partition(). Collective."""
        params = [p for p in _listed(self, param_list) if p.ds_private == 0]
        take_private(params, "all_gather()")
        return _Done() if async_op else None

    def partition(self, param_list=None, hierarchy=0, has_been_updated=False):
        """Releases what all_gather() made whole. has_been_updated: the first rank's values are kept. Collective."""
        params = [p for p in _listed(self, param_list) if p.ds_private]
        give_private_back(params, 0 if has_been_updated else None)

    def __deepcopy__(self, memo):
        """An ordinary Parameter with the whole values."""
        copied = memo.get(id(self))
        if copied is None:
            copied = memo[id(self)] = torch.nn.Parameter(self._values(), self.requires_grad)
        return copied

    def __reduce_ex__(self, protocol):
        return _rebuild, (self._values(), self.requires_grad, self.ds_marks)

    @property
    def ds_marks(self):
        """The attributes that others gave this parameter."""
        return {key: value for key, value in vars(self).items() if key not in _OWN}

    def _values(self):
        if self.ds_status is ZeroParamStatus.AVAILABLE:
            return self.data.clone()
        return self.ds_home.copy(self)


class _Done:
    """The handle of a gather that is over."""

    def wait(self, **ignored):
        return None


def _rebuild(values, requires_grad, state):
    p = torch.nn.Parameter(values, requires_grad)
    vars(p).update(state)
    return p


def _listed(p, param_list):
    return [p] if param_list is None else [q for q in unique(param_list)]


def is_zero(p):
    """Whether p is a parameter of ZeRO stage 3."""
    return isinstance(p, ZeroParameter)


def unique(params):
    """The ZeRO parameters among `params`, each once, in the order of their making: the same on all ranks."""
    return sorted({id(p): p for p in params if is_zero(p)}.values(), key=lambda p: p.ds_id)


def empty(dtype):
    """The data of a released parameter."""
    if dtype not in _EMPTY:
        with torch.inference_mode(False):
            _EMPTY[dtype] = zeros(0, dtype)
    return _EMPTY[dtype]


def zeros(shape, dtype):
    """torch.zeros on the CPU, also inside zero.Init and torch.device, which change what torch.zeros makes."""
    return ORIGINALS["zeros"](shape, dtype=dtype, device="cpu")


def _renew(p):
    """A parameter on the meta device, or of inference mode, stays the same object and gets empty data on the CPU that
    counts its versions."""
    marks, wanted = dict(vars(p)), p.requires_grad
    with torch.inference_mode(False):
        torch.utils.swap_tensors(p, torch.nn.Parameter(zeros(0, p.dtype), wanted))
    vars(p).update(marks)


_OWN = ("ds_id", "ds_shape", "ds_numel", "ds_status", "ds_persist", "ds_name", "ds_home", "ds_full", "ds_count",
        "ds_seen", "ds_private", "ds_external", "ds_active_sub_modules", "ds_z3_leaf_module", "ds_owner")


def make(p, home, full):
    """An ordinary Parameter becomes a released ZeroParameter whose values are in `full`."""
    if p.is_meta or p.is_inference():
        _renew(p)
    p.__class__ = ZeroParameter
    p.ds_id, p.ds_shape, p.ds_numel = next(_ids), full.shape, full.numel()
    p.ds_home, p.ds_full = home, full
    p.ds_name = f"of shape {tuple(full.shape)}"
    p.ds_status, p.ds_persist, p.ds_external = ZeroParamStatus.NOT_AVAILABLE, False, False
    p.ds_count = p.ds_private = 0
    p.ds_seen = p.ds_owner = None
    p.ds_active_sub_modules = set()
    p.data = empty(full.dtype)


def make_ordinary(p, values):
    """Undoes make(): an ordinary Parameter with these values, which become its own."""
    p.__class__ = torch.nn.Parameter
    for key in _OWN:
        vars(p).pop(key, None)
    p.data = values


def state_of(p):
    """What make_again() needs."""
    return {key: vars(p)[key] for key in _OWN if key in vars(p)}


def make_again(p, state):
    """Undoes make_ordinary(): the parameter is released, and the values in its earlier place count."""
    p.__class__ = ZeroParameter
    vars(p).update(state)
    p.ds_status, p.ds_persist = ZeroParamStatus.NOT_AVAILABLE, False
    p.ds_count = p.ds_private = 0
    p.data = empty(p.ds_full.dtype)


def succeed(old, new, values):
    """`new` is the ZeroParameter that `old` was, and as gathered; `old` is an ordinary one with these values."""
    new.__class__ = ZeroParameter
    vars(new).update((key, vars(old)[key]) for key in _OWN if key in vars(old))
    new.data = old.data
    new.ds_seen = new._version
    make_ordinary(old, values)


def write_error(p, label):
    """The exception for a parameter that was found changed."""
    return RuntimeError(f"parameter {p.ds_name} was written to while it was gathered for {label}: the ranks share this "
                        "memory, and only GatheredParameters(params, modifier_rank=...) may change a parameter of ZeRO "
                        "stage 3")


def by_home(params):
    """[(home, (parameters, ...)), ...]"""
    found = {}
    for p in params:
        found.setdefault(id(p.ds_home), (p.ds_home, []))[1].append(p)
    return tuple((home, tuple(mine)) for home, mine in found.values())


def forget(p):
    """p does not stay gathered any more."""
    if p.ds_persist:
        p.ds_persist = False
        p.ds_home.release((p,), "all modules")


def fetch(params, label):
    """Makes these parameters whole, outside a module's forward. Collective where ranks share no memory."""
    for home, mine in by_home(params):
        home.fetch(OUTSIDE, mine, label)


def release(params, label):
    """Undoes fetch(). RuntimeError where one was written to."""
    for home, mine in by_home(params):
        home.release(mine, label)


def take_private(params, label):
    """Like fetch(), but what becomes whole is a private copy on every rank, to be written to."""
    fetch(params, label)
    for p in params:
        if p.ds_private == 0:
            p.data = p.ds_home.copy(p)
        p.ds_private += 1


def give_private_back(params, rank):
    """Undoes take_private(). rank: of the parameter's ranks, whose values everyone has from now on; None: they are
    dropped. Collective."""
    try:
        if rank is not None:
            for p in params:
                _check_writable(p, rank)
            for home, mine in by_home(params):
                home.write(mine, rank)
    finally:
        for p in params:
            p.ds_private -= 1
            if p.ds_private == 0:
                p.data = p.ds_full
                p.ds_home.note(p)
            elif rank is not None:
                p.data = p.ds_home.copy(p)
        release(params, "GatheredParameters")


def _check_writable(p, rank):
    if p.data.shape != p.ds_shape or p.data.dtype != p.ds_full.dtype or p.data.device != p.ds_full.device:
        raise RuntimeError(f"parameter {p.ds_name} is {tuple(p.data.shape)} {p.data.dtype} {p.data.device} at the end "
                           f"of GatheredParameters; allowed: {tuple(p.ds_shape)} {p.ds_full.dtype} {p.ds_full.device}")
    if not 0 <= rank < p.ds_home.comm.size:
        raise ValueError(f"modifier_rank is {rank}; parameter {p.ds_name} is shared by {p.ds_home.comm.size} ranks, "
                         f"allowed: 0 to {p.ds_home.comm.size - 1}")
