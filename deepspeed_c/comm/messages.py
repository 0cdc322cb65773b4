"""Messages from one rank to another, and Python objects.

Messages run in C, over shared memory or TCP; they are numbered per pair of ranks and tag, beside the sequence of the
collectives. Objects go through torch.distributed, announced to the group like any collective.
"""
import functools
import zlib

import torch.distributed as dist

from .collectives import MOVED, _copy, delegate, in_place, serves
from .logger import timed_op
from .work import Work


def _channel(group, tag):
    """Tags of two groups never meet: the group's name is in the upper half."""
    if group is None or group is dist.group.WORLD:
        return tag & 0xFFFFFFFF
    return (zlib.crc32(group.group_name.encode()) | 1) << 32 | tag & 0xFFFFFFFF


def _comm(group, tensor):
    """The communicator of all ranks where it can send this, else None. A group's need not be open."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        return None
    comm = serves(None, MOVED, tensor)
    return comm if comm is not None and comm.backend != "self" else None


def _peer(group, rank, group_rank):
    """A global rank, None for any."""
    if group_rank is None:
        return rank
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def _outgoing(tensor, dst, group, tag, group_dst, is_async):
    comm = _comm(group, tensor)
    if comm is None:
        return None, None
    return comm, comm.send(tensor.detach().contiguous(), _peer(group, dst, group_dst), _channel(group, tag), None,
                           is_async)


@timed_op
def send(tensor, dst=None, group=None, tag=0, group_dst=None):
    """Sends `tensor` to global rank dst; returns when it may be overwritten."""
    comm, _ = _outgoing(tensor, dst, group, tag, group_dst, False)
    if comm is None:
        return dist.send(tensor, dst, group, tag, group_dst)


@timed_op
def isend(tensor, dst=None, group=None, tag=0, group_dst=None):
    """send without waiting; a handle, or None outside the group."""
    comm, work = _outgoing(tensor, dst, group, tag, group_dst, True)
    if comm is None:
        return dist.isend(tensor, dst, group, tag, group_dst)
    return Work([work], [])


def _source(group, src, group_src):
    """Whom the core shall hear: -1 for whichever rank sends first."""
    peer = _peer(group, src, group_src)
    return -1 if peer is None else peer


@timed_op
def recv(tensor, src=None, group=None, tag=0, group_src=None):
    """Receives into `tensor` from global rank src (None: from whichever sends first); returns the sender."""
    comm = _comm(group, tensor)
    if comm is None:
        return dist.recv(tensor, src, group, tag, group_src)
    whole = tensor.detach().contiguous()
    sender = comm.recv(whole, _source(group, src, group_src), _channel(group, tag))
    if whole.data_ptr() != tensor.data_ptr():
        _copy(tensor, whole)
    else:
        in_place(tensor, False, lambda t: None)
    return sender


@timed_op
def irecv(tensor, src=None, group=None, tag=0, group_src=None):
    """recv without waiting; a handle, or None outside the group."""
    comm = _comm(group, tensor)
    if comm is None:
        return dist.irecv(tensor, src, group, tag, group_src)
    source = _source(group, src, group_src)
    return in_place(tensor, True, lambda t: comm.recv(t, source, _channel(group, tag), None, True))


class P2POp:
    """One operation of batch_isend_irecv: op is isend or irecv, of this module or of torch.distributed."""

    def __init__(self, op, tensor, peer=None, group=None, tag=0, group_peer=None):
        kinds = {isend: isend, irecv: irecv, dist.isend: isend, dist.irecv: irecv}
        if op not in kinds:
            raise ValueError(f"P2POp: op is {op!r}; isend or irecv is expected")
        if (peer is None) == (group_peer is None):
            raise ValueError("P2POp: exactly one of peer and group_peer names the other rank")
        self.op, self.tensor, self.group, self.tag = kinds[op], tensor, group, tag
        self.peer = _peer(group, peer, group_peer)

    def _of_torch(self):
        return dist.P2POp(getattr(dist, self.op.__name__), self.tensor, self.peer, self.group, self.tag)


def batch_isend_irecv(p2p_op_list):
    """Starts all operations; a list of handles."""
    ops = [op if isinstance(op, P2POp) else P2POp(op.op, op.tensor, op.peer, op.group, op.tag) for op in p2p_op_list]
    if not ops:
        raise ValueError("batch_isend_irecv: at least one operation is expected")
    if any(_comm(op.group, op.tensor) is None for op in ops):
        return dist.batch_isend_irecv([op._of_torch() for op in ops])
    return [op.op(op.tensor, op.peer, op.group, op.tag) for op in ops]


def _announced(name):
    @functools.wraps(getattr(dist, name))
    def call(*args, prof=False, log_name=None, debug=None, **kwargs):
        return delegate(name, *args, **kwargs)

    return call


all_gather_object = _announced("all_gather_object")
broadcast_object_list = _announced("broadcast_object_list")
gather_object = _announced("gather_object")
scatter_object_list = _announced("scatter_object_list")
