"""Groups of ranks, by what is parallel: over data, all ranks of torch.distributed's default group, and nothing else.

Sizes and ranks of the other kinds are those of a group of one; asking for such a group, or for anything about experts,
is an error that says what is not there.
"""
import torch.distributed as dist

from ..accelerator import get_accelerator

__all__ = ["get_accelerator", "initialize"]


class DeprecatedException(Exception):
    """A function that DeepSpeed has taken away."""


def initialize(ep_size=1, mpu=None):
    """Taken away upstream: MoE layers make their groups themselves."""
    raise DeprecatedException("groups.initialize() is gone, as in DeepSpeed: a MoE layer takes ep_size itself")


# ---- over data ----

def _get_data_parallel_group():
    """torch.distributed's default group; RuntimeError before init_distributed."""
    if not dist.is_initialized():
        raise RuntimeError("there are no groups yet: call deepspeed.init_distributed() first")
    return dist.group.WORLD


def _get_data_parallel_world_size():
    return dist.get_world_size(_get_data_parallel_group())


def _get_data_parallel_rank():
    return dist.get_rank(_get_data_parallel_group())


def _get_data_parallel_group_ranks():
    """The group's global ranks, in its order."""
    return dist.get_process_group_ranks(_get_data_parallel_group())


def _get_broadcast_src_rank():
    """The global rank whose values the others start with."""
    return _get_data_parallel_group_ranks()[0]


get_data_parallel_group = _get_sequence_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_sequence_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_sequence_data_parallel_rank = _get_data_parallel_rank


# ---- groups of one ----

def _size_of_one():
    """1: every rank is alone."""
    return 1


def _rank_in_one():
    """0: the rank in a group of one."""
    return 0


_get_sequence_parallel_world_size = _get_model_parallel_world_size = get_model_parallel_world_size = _size_of_one
get_tensor_model_parallel_world_size = _get_expert_model_parallel_world_size = _size_of_one
_get_sequence_parallel_rank = get_model_parallel_rank = get_tensor_model_parallel_rank = _rank_in_one


def get_tensor_model_parallel_src_rank():
    """The global rank of the first rank of this one's tensor-parallel group: itself."""
    return _get_data_parallel_rank()


def set_tensor_model_parallel_world_size(world_size):
    """Accepts 1; NotImplementedError for more."""
    if world_size != 1:
        raise NotImplementedError(f"a tensor-parallel world of {world_size}: tensor parallelism is not yet; allowed: 1")


def set_tensor_model_parallel_rank(rank):
    """Accepts 0; NotImplementedError for more."""
    if rank != 0:
        raise NotImplementedError(f"tensor-parallel rank {rank}: tensor parallelism is not yet; allowed: 0")


def _get_zero_param_intra_parallel_group():
    """The group that shares out a secondary copy of the parameters: None, as without zero_hpz_partition_size."""
    return None


# ---- what is not there ----

def _not_yet(name, what):
    def getter(*args, **kwargs):
        raise NotImplementedError(f"groups.{name}() is not yet: {what} is not there")
    getter.__name__ = getter.__qualname__ = name
    getter.__doc__ = f"Not there yet: {what}."
    return getter


_LATER = {
    "sequence parallelism": ["_get_sequence_parallel_group"],
    "tensor parallelism": ["_create_model_parallel", "get_model_parallel_group", "get_tensor_model_parallel_group"],
    "ZeRO stage 3": [
        "_create_zero_param_parallel_group", "_get_zero_param_intra_parallel_group_ranks",
        "_get_zero_param_intra_parallel_group_world_size", "_get_zero_param_intra_parallel_rank_in_mygroup"],
    "mixture of experts": [
        "_create_expert_and_data_parallel", "_create_expert_data_and_model_parallel", "_get_expert_broadcast_src_rank",
        "_get_expert_data_parallel_group", "_get_expert_data_parallel_group_dict",
        "_get_expert_data_parallel_group_ranks", "_get_expert_data_parallel_rank",
        "_get_expert_data_parallel_world_size", "_get_expert_parallel_group", "_get_expert_parallel_group_dict",
        "_get_expert_parallel_group_ranks", "_get_expert_parallel_rank", "_get_expert_parallel_ranks",
        "_get_expert_parallel_src_rank", "_get_expert_parallel_world_size", "_get_local_all_to_all_group",
        "_get_max_expert_parallel_group", "_get_max_expert_size", "_get_max_expert_size_name"],
}
for _what, _names in _LATER.items():
    for _name in _names:
        globals()[_name] = _not_yet(_name, _what)
del _what, _names, _name
