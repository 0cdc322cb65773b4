"""torch process groups by their members: one for each set of ranks, whoever asks.

torch makes a group on all ranks together, members or not, and pairs the calls by their order. Invariant: every rank
asks for the same lists in the same order, so all of them know which groups there are already.
"""
import weakref
import zlib

import torch.distributed as dist

from . import distributed

_made = weakref.WeakKeyDictionary()  # the default group -> {(ranks, time-out, back end): group, None outside it}


def make(partition, timeout=None, backend=None):
    """This rank's group of a partition of all ranks. Collective over all ranks.

    partition: lists of ascending global ranks, every rank in exactly one of them; equal on all ranks.
    timeout: a timedelta; None: init_distributed's. backend: None, or a back end of torch by name.
    A list of all ranks is torch.distributed's default group, unless another back end is asked for. RuntimeError before
    init_distributed, and for a group that was made and destroyed; CommError on all ranks where they ask for different
    groups.
    """
    world = world_group()
    if len(partition) == 1 and backend in (None, dist.get_backend()):
        return world
    known, own = _made.setdefault(world, {}), dist.get_rank()
    timeout = timeout or distributed._comm_timeout(world)
    keys = [(tuple(ranks), timeout, backend) for ranks in partition]
    new = [key for key in keys if key not in known]
    if new:
        agree = _label(new)
        distributed.world_comm().barrier(agree)
        for key in new:
            group = dist.new_group(list(key[0]), timeout=timeout, backend=backend)
            known[key] = group if own in key[0] else None
        # A rank whose groups are there must not go on to its end, which may be the end of the store, too soon.
        distributed.world_comm().barrier(agree)
    return _alive(next(known[key] for key in keys if own in key[0]), timeout)


def _label(keys):
    """What is new, in so few letters that the communicator compares them: torch would wait for groups that differ."""
    return f"{len(keys)} groups like {str(list(keys[0][0]))[:24]} #{zlib.crc32(repr(keys).encode()):08x}"


def world_group():
    """torch.distributed's default group; RuntimeError before there is one."""
    if not dist.is_initialized():
        raise RuntimeError("there are no groups yet: call deepspeed.init_distributed() first")
    return dist.group.WORLD


def hold(group):
    """What to keep of a group: None for the default group, which must go when it is destroyed."""
    return None if group is dist.group.WORLD else group


def held(kept):
    """The group of which hold() made this."""
    return world_group() if kept is None else kept


def _alive(group, timeout):
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        raise RuntimeError(f"the group {group.group_name} was destroyed; a group is made once, for all who use the "
                           f"same ranks and time-out ({timeout})") from None
    return group
