"""Communication in torch.distributed's shape, over the C communicators where they can.

collectives.py and messages.py have the operations, logger.py the log of them, work.py the handle of asynchronous ones;
here is who is who, and what there is. docs/comm.md says what runs where.
"""
import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ReduceOp, is_available, is_initialized, new_group

from .. import _paths, mpi
from ..accelerator import get_accelerator
from ..distributed import destroy_process_group, init_distributed
from ..mpi import in_aml, in_aws_sm, in_dlts
from ..utils.timer import SynchronizedWallClockTimer
from .collectives import (
    all_gather,
    all_gather_coalesced,
    all_gather_into_tensor,
    all_reduce,
    all_reduce_coalesced,
    all_to_all,
    all_to_all_single,
    allgather_fn,
    barrier,
    broadcast,
    gather,
    inference_all_reduce,
    monitored_barrier,
    reduce,
    reduce_scatter,
    reduce_scatter_fn,
    reduce_scatter_tensor,
    scatter,
)
from .logger import (
    configure,
    get_caller_func,
    get_comm_operation_count,
    get_debug_log_name,
    get_default_args,
    get_logged_comm_ops,
    get_msg_size_from_args,
    get_tensor_kwarg,
    get_tensor_position,
    has_comm_data,
    log_summary,
    reset_log,
    timed_op,
)
from .messages import (
    P2POp,
    all_gather_object,
    batch_isend_irecv,
    broadcast_object_list,
    gather_object,
    irecv,
    isend,
    recv,
    scatter_object_list,
    send,
)

timers = SynchronizedWallClockTimer()

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


def initialize_mesh_device(mesh_shape, mesh_dim_names):
    """torch's DeviceMesh of all ranks. Collective."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(get_accelerator().device_name(), mesh_shape, mesh_dim_names=mesh_dim_names)


# ---- what there is ----


def has_all_gather_into_tensor():
    """True: it is ours."""
    return True


def has_reduce_scatter_tensor():
    """True: it is ours."""
    return True


def has_all_reduce_coalesced():
    """True: it is ours."""
    return True


def has_coalescing_manager():
    """Whether this torch.distributed has one."""
    return hasattr(dist.distributed_c10d, "_coalescing_manager")


# ---- environments ----


def mpi_discovery(distributed_port=29500, verbose=True):
    """Exports RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from mpirun's variables; mpi.py has the rules.
    init_distributed does so by itself."""
    mpi.discover(distributed_port, verbose)


def patch_aml_env_for_torch_nccl_backend(master_port=mpi.AML_PORT, verbose=True):
    """The same in a job of Azure Machine Learning."""
    mpi.patch_aml(master_port, verbose)


def patch_aws_sm_env_for_torch_nccl_backend(verbose=True):
    """The same in a job of Amazon SageMaker."""
    mpi.patch_aws_sm(verbose)


# What has no meaning here: an error that says why, never silence.
_ABSENT = {
    "enable_symm_mem_for_group": "symmetric memory is CUDA's, and CUDA is not yet; ranks of one machine share memory "
                                 "without being asked",
    "init_deepspeed_backend": "there are no back ends of DeepSpeed's own (mpi, ccl) to start; init_distributed() opens "
                              "the communicators",
    "set_backend": "there is nothing to set: shared memory or torch.distributed is chosen by where the ranks are, or "
                   "by DSC_COMM_BACKEND",
}


def _absent(name, why):
    def call(*args, **kwargs):
        raise NotImplementedError(f"deepspeed_c.comm.{name}(): {why}")
    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Not there: {why}."
    return call


globals().update((name, _absent(name, why)) for name, why in _ABSENT.items())

__all__ = [
    "P2POp", "ReduceOp", "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "allgather_fn", "barrier",
    "batch_isend_irecv", "broadcast", "broadcast_object_list", "configure", "destroy_process_group", "gather",
    "gather_object", "get_accelerator", "get_all_ranks_from_group", "get_caller_func", "get_comm_operation_count",
    "get_debug_log_name", "get_default_args", "get_global_rank", "get_local_rank", "get_local_rank_from_launcher",
    "get_logged_comm_ops", "get_msg_size_from_args", "get_rank", "get_tensor_kwarg", "get_tensor_position",
    "get_world_group", "get_world_rank_from_launcher", "get_world_size", "get_world_size_from_launcher",
    "has_all_gather_into_tensor", "has_all_reduce_coalesced", "has_coalescing_manager", "has_comm_data",
    "has_reduce_scatter_tensor", "in_aml", "in_aws_sm", "in_dlts", "inference_all_reduce", "init_distributed",
    "initialize_mesh_device", "irecv", "is_available", "is_initialized", "isend", "log_summary", "monitored_barrier",
    "new_group", "recv", "reduce", "reduce_scatter", "reduce_scatter_fn", "reduce_scatter_tensor", "reset_log",
    "scatter", "scatter_object_list", "send", "timed_op", "timedelta", "timers", "mpi_discovery",
    "patch_aml_env_for_torch_nccl_backend", "patch_aws_sm_env_for_torch_nccl_backend", *_ABSENT,
]
__getattr__, __dir__ = _paths.attributes(__name__)
