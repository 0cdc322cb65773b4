"""Small functions that scripts and libraries import from `deepspeed.runtime.utils`."""
import copy
import gc
import math

import torch

from ..accelerator import get_accelerator
from ..utils.logging import print_dist

__all__ = ["clip_grad_norm_", "get_global_norm", "host_memory", "move_to_device", "see_memory_usage"]


def move_to_device(item, device, criterion_func=None):
    """`item` with every tensor in it on `device`: tensors, and lists, tuples and dicts of them, nested.

    criterion_func: which values move; by default those that have a .to(). Anything else is handed on as it is.
    """
    def moves(value):
        return hasattr(value, "to") if criterion_func is None else criterion_func(value)

    if moves(item):
        return item.to(device)
    if isinstance(item, dict):
        moved = copy.copy(item)  # keeps what a subclass has beside its items
        moved.update((key, move_to_device(value, device, criterion_func)) for key, value in item.items())
        return moved
    if isinstance(item, (list, tuple)):
        values = [move_to_device(value, device, criterion_func) for value in item]
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    return item


def get_global_norm(norm_list):
    """The 2-norm over groups of gradients, from the groups' norms (numbers)."""
    return math.hypot(*norm_list)


def clip_grad_norm_(parameters, max_norm, norm_type=2, mpu=None):
    """Scales the gradients of `parameters` (one or an iterable) so that their norm is at most `max_norm`.

    Returns the norm before (a tensor of no dimensions). Every rank has whole gradients here, so nothing is summed over
    ranks; mpu: not yet.
    """
    if mpu is not None:
        raise NotImplementedError("clip_grad_norm_(mpu=...): not yet; tensor parallelism is not there")
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)


def see_memory_usage(message, force=False):
    """With `force`, says on rank 0 what the accelerator and this machine have in use; otherwise nothing."""
    if not force:
        return
    gc.collect()
    device, gib = get_accelerator(), 2 ** 30
    total, free = host_memory()
    print_dist(f"{message} | MA {device.memory_allocated() / gib:.2f} GB, "
             f"Max_MA {device.max_memory_allocated() / gib:.2f} GB | host used {(total - free) / gib:.2f} GB, "
             f"{(total - free) / total:.1%}", ranks=[0])


def host_memory():
    """(all, available) bytes of this machine's memory."""
    with open("/proc/meminfo") as lines:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
