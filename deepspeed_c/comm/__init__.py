"""Collectives in torch.distributed's shape, over the C communicator where it can, torch.distributed elsewhere.

In C: all_reduce, reduce_scatter, all_gather, broadcast and barrier of all ranks, synchronous, on CPU tensors of
float32, bfloat16, float16, float64, int32, int64. Everything else (other groups, devices, dtypes, operations and
async_op=True) goes to torch.distributed with the same arguments; docs/comm.md has the table. Which of the two serves
depends on nothing that may differ between ranks: a tensor that is not contiguous is copied, not sent elsewhere.
"""
import functools
import inspect
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.autograd.graph import increment_version
from torch.distributed import (
    P2POp,
    ReduceOp,
    batch_isend_irecv,
    irecv,
    is_available,
    is_initialized,
    isend,
    new_group,
    recv,
    send,
)

from .. import _paths
from ..accelerator import get_accelerator
from ..distributed import destroy_process_group, init_distributed, opened_comm, world_comm

__getattr__, __dir__ = _paths.attributes(__name__)
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64))
_OPS = {ReduceOp.SUM: "sum", ReduceOp.AVG: "avg", ReduceOp.MIN: "min", ReduceOp.MAX: "max", ReduceOp.PRODUCT: "prod"}
_SUM = ReduceOp.SUM
_WHOLE = frozenset((torch.int32, torch.int64))


def _op_name(op, dtype):
    """The C name of a ReduceOp, None where C has none."""
    if op is _SUM:  # the usual one, without pybind's hash
        return "sum"
    try:
        name = _OPS.get(op)
    except TypeError:  # a ReduceOp with a factor, which has no hash
        return None
    return None if name == "avg" and dtype in _WHOLE else name


def _serves(group, async_op, *tensors):
    """The communicator where it can do this call, else None. Equal on all ranks of a correct program."""
    if async_op or (group is not None and group is not dist.group.WORLD):
        return None
    for t in tensors:
        if t.dtype not in _DTYPES or not t.is_cpu or t.layout is not torch.strided:
            return None
    return world_comm()


def _refuse_profile(profile):
    """DeepSpeed's logging arguments are taken; asking for the log is an error until there is one."""
    unknown = sorted(set(profile) - {"prof", "log_name", "debug"})
    if unknown:
        raise TypeError(f"unexpected argument {unknown[0]!r}")
    if profile.get("prof"):
        raise NotImplementedError("prof=True: the log of communication is not yet")


def _changed(tensor):
    """Autograd learns of the write, as of any in-place operation."""
    if not tensor.is_inference():
        increment_version(tensor)


def _in_place(tensor, call):
    """call(contiguous tensor), whose result ends in `tensor`."""
    if tensor.is_contiguous():
        call(tensor)
        _changed(tensor)
    else:
        with torch.no_grad():
            whole = tensor.contiguous()
            call(whole)
            tensor.copy_(whole)


def _delegate(name, *args, **kwargs):
    """torch.distributed's `name`. A synchronous call on the world is announced to all ranks first, so that a rank
    which calls something else is an error on all of them instead of a hang in the back end."""
    function = getattr(dist, name)
    comm = opened_comm()
    if comm is not None and comm.size > 1:
        given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
        if not given.get("async_op") and given.get("group") in (None, dist.group.WORLD):
            comm.barrier(f"torch.distributed.{name}")
    return function(*args, **kwargs)


# ---- collectives ----


def all_reduce(tensor, op=ReduceOp.SUM, group=None, async_op=False, **profile):
    """Combines `tensor` over the ranks, in rank order, in place."""
    if profile:
        _refuse_profile(profile)
    name = _op_name(op, tensor.dtype)
    comm = _serves(group, async_op, tensor) if name else None
    if comm is None:
        return _delegate("all_reduce", tensor, op, group, async_op)
    _in_place(tensor, lambda t: comm.all_reduce(t, name))


def inference_all_reduce(tensor, op=ReduceOp.SUM, group=None, async_op=False, **profile):
    """all_reduce under the name that inference code calls."""
    return all_reduce(tensor, op, group, async_op, **profile)


def reduce_scatter_tensor(output, input, op=ReduceOp.SUM, group=None, async_op=False, **profile):
    """output: this rank's part of all ranks' `input` (world size times as long) combined."""
    if profile:
        _refuse_profile(profile)
    name = _op_name(op, output.dtype)
    comm = _serves(group, async_op, output, input) if name else None
    if comm is None:
        return _delegate("reduce_scatter_tensor", output, input, op, group, async_op)
    whole = input.detach().contiguous()
    _in_place(output, lambda t: comm.reduce_scatter(t, whole, name))


def reduce_scatter_fn(output_tensor, tensor, op=ReduceOp.SUM, group=None, async_op=False, prof=False, debug=None):
    """reduce_scatter_tensor, in DeepSpeed's spelling."""
    return reduce_scatter_tensor(output_tensor, tensor, op, group, async_op, prof=prof, debug=debug)


def reduce_scatter(output, input_list, op=ReduceOp.SUM, group=None, async_op=False, **profile):
    """reduce_scatter_tensor with one input tensor per rank, each shaped like `output`."""
    if profile:
        _refuse_profile(profile)
    name = _op_name(op, output.dtype)
    comm = _serves(group, async_op, output, *input_list) if name else None
    if comm is None:
        return _delegate("reduce_scatter", output, input_list, op, group, async_op)
    _check_list("reduce_scatter", "input_list", input_list, comm.size, "output", output)
    whole = torch.cat([t.detach().reshape(-1) for t in input_list])
    _in_place(output, lambda t: comm.reduce_scatter(t, whole, name))


def all_gather_into_tensor(output_tensor, input_tensor, group=None, async_op=False, **profile):
    """output_tensor: all ranks' `input_tensor` in rank order."""
    if profile:
        _refuse_profile(profile)
    comm = _serves(group, async_op, output_tensor, input_tensor)
    if comm is None:
        return _delegate("all_gather_into_tensor", output_tensor, input_tensor, group, async_op)
    part = input_tensor.detach().contiguous()
    _in_place(output_tensor, lambda t: comm.all_gather(t, part))


def allgather_fn(output_tensor, input_tensor, group=None, async_op=False, debug=None):
    """all_gather_into_tensor, in DeepSpeed's spelling."""
    return all_gather_into_tensor(output_tensor, input_tensor, group, async_op, debug=debug)


class _Works:
    """The handles of several operations as one."""

    def __init__(self, works):
        self._works = works

    def wait(self):
        for work in self._works:
            work.wait()

    def is_completed(self):
        return all(work.is_completed() for work in self._works)


def all_gather_coalesced(output_tensors, input_tensors, group=None, async_op=False, **profile):
    """all_gather_into_tensor of each input into the output of its place; in torch.distributed the name means
    something else (a list of outputs for every rank). async_op: one handle for all."""
    if profile:
        _refuse_profile(profile)
    if len(output_tensors) != len(input_tensors):
        raise ValueError(f"all_gather_coalesced: output_tensors has {len(output_tensors)} tensors, input_tensors "
                         f"{len(input_tensors)}; one output for each input is expected")
    works = [all_gather_into_tensor(output, input, group, async_op)
             for output, input in zip(output_tensors, input_tensors)]
    return _Works(works) if async_op else None


def all_gather(tensor_list, tensor, group=None, async_op=False, **profile):
    """Fills tensor_list, one tensor per rank, with the ranks' `tensor`."""
    if profile:
        _refuse_profile(profile)
    comm = _serves(group, async_op, tensor, *tensor_list)
    if comm is None:
        return _delegate("all_gather", tensor_list, tensor, group, async_op)
    _check_list("all_gather", "tensor_list", tensor_list, comm.size, "tensor", tensor)
    whole = tensor.new_empty((comm.size, tensor.numel()))
    comm.all_gather(whole, tensor.detach().contiguous())
    with torch.no_grad():
        for out, part in zip(tensor_list, whole):
            out.copy_(part.view(out.shape))


def broadcast(tensor, src=None, group=None, async_op=False, group_src=None, **profile):
    """Replaces `tensor` by that of global rank `src`."""
    if profile:
        _refuse_profile(profile)
    if (src is None) == (group_src is None):
        raise ValueError("broadcast: exactly one of src and group_src names the rank that sends")
    comm = _serves(group, async_op, tensor)
    if comm is None:
        return _delegate("broadcast", tensor, src, group, async_op, group_src)
    root = group_src if src is None else src
    _in_place(tensor, lambda t: comm.broadcast(t, root))


def barrier(group=None, async_op=False, device_ids=None, **profile):
    """Returns once every rank has called it. device_ids: for torch.distributed, where that serves."""
    if profile:
        _refuse_profile(profile)
    comm = _serves(group, async_op)
    if comm is None:
        return _delegate("barrier", group, async_op, device_ids)
    comm.barrier()


def _check_list(call, name, tensors, size, like_name, like):
    if len(tensors) != size:
        raise ValueError(f"{call}: {name} has {len(tensors)} tensors; one for each of {size} ranks is expected")
    for i, t in enumerate(tensors):
        if t.numel() != like.numel() or t.dtype != like.dtype:
            raise ValueError(f"{call}: {name}[{i}] is {tuple(t.shape)} {t.dtype}, {like_name} {tuple(like.shape)} "
                             f"{like.dtype}; the same number of elements and dtype is expected")


# ---- who is who ----


def get_rank(group=None):
    """This process's rank in the group, -1 outside it."""
    return dist.get_rank(group)


def get_world_size(group=None):
    """How many ranks the group has, -1 outside it."""
    return dist.get_world_size(group)


def get_local_rank():
    """The rank on this machine, from the launcher; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _from_launcher(name, mpi_name, default):
    return int(os.environ.get(name) or os.environ.get(mpi_name) or default)


def get_world_rank_from_launcher():
    """The rank that the launcher or Open MPI gave this process, else 0; before init_distributed too."""
    return _from_launcher("RANK", "OMPI_COMM_WORLD_RANK", 0)


def get_world_size_from_launcher():
    """The number of ranks that the launcher or Open MPI started, else 1."""
    return _from_launcher("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", 1)


def get_local_rank_from_launcher():
    """The rank on this machine that the launcher or Open MPI gave, else 0."""
    return _from_launcher("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", 0)


def get_world_group():
    """torch.distributed's default group."""
    return dist.group.WORLD


def get_global_rank(group=None, group_rank=0):
    """The global rank of a group's member."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_all_ranks_from_group(group=None):
    """Global ranks of a group's members, in the group's order."""
    return dist.get_process_group_ranks(dist.group.WORLD if group is None else group)


# ---- what there is ----


def has_all_gather_into_tensor():
    """True: it is ours."""
    return True


def has_reduce_scatter_tensor():
    """True: it is ours."""
    return True


def has_all_reduce_coalesced():
    """Whether this torch.distributed has it."""
    return hasattr(dist, "all_reduce_coalesced")


def has_coalescing_manager():
    """Whether this torch.distributed has one."""
    return hasattr(dist.distributed_c10d, "_coalescing_manager")


# The rest of the documented surface: an error that says so, never silence.
_NOT_YET = (
    "configure", "enable_symm_mem_for_group", "get_caller_func", "get_comm_operation_count", "get_debug_log_name",
    "get_default_args", "get_logged_comm_ops", "get_msg_size_from_args", "get_tensor_kwarg", "get_tensor_position",
    "has_comm_data", "in_aml", "in_aws_sm", "in_dlts", "init_deepspeed_backend", "initialize_mesh_device",
    "log_summary", "mpi_discovery", "patch_aml_env_for_torch_nccl_backend", "patch_aws_sm_env_for_torch_nccl_backend",
    "reset_log", "set_backend", "timed_op", "timers",
)


def _not_yet(name):
    def call(*args, **kwargs):
        raise NotImplementedError(f"deepspeed_c.comm.{name}() is not yet")
    call.__name__ = call.__qualname__ = name
    call.__doc__ = "Not there yet."
    return call


globals().update((name, _not_yet(name)) for name in _NOT_YET)


# ---- torch.distributed's, announced on the world ----


def _announced(name):
    @functools.wraps(getattr(dist, name))
    def call(*args, prof=False, log_name=None, debug=None, **kwargs):
        _refuse_profile({"prof": prof})
        return _delegate(name, *args, **kwargs)
    return call


all_gather_object = _announced("all_gather_object")
all_reduce_coalesced = _announced("all_reduce_coalesced")
all_to_all = _announced("all_to_all")
all_to_all_single = _announced("all_to_all_single")
broadcast_object_list = _announced("broadcast_object_list")
gather = _announced("gather")
gather_object = _announced("gather_object")
monitored_barrier = _announced("monitored_barrier")
reduce = _announced("reduce")
scatter = _announced("scatter")
scatter_object_list = _announced("scatter_object_list")

__all__ = [
    "P2POp", "ReduceOp", "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "allgather_fn", "barrier",
    "batch_isend_irecv", "broadcast", "broadcast_object_list", "destroy_process_group", "gather", "gather_object",
    "get_accelerator", "get_all_ranks_from_group", "get_global_rank", "get_local_rank",
    "get_local_rank_from_launcher", "get_rank", "get_world_group", "get_world_rank_from_launcher", "get_world_size",
    "get_world_size_from_launcher", "has_all_gather_into_tensor", "has_all_reduce_coalesced",
    "has_coalescing_manager", "has_reduce_scatter_tensor", "inference_all_reduce", "init_distributed", "irecv",
    "is_available", "is_initialized", "isend", "monitored_barrier", "new_group", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_fn", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "timedelta", *_NOT_YET,
]
