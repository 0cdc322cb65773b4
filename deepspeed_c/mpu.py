"""What a Megatron-style object (`initialize(mpu=...)`) says about this rank, whatever it calls its methods.

Asked once, when it is handed over. Invariant: data_ranks and model_ranks meet in this rank only, and their sizes
multiply to the number of all ranks.
"""
from dataclasses import dataclass, field

import torch.distributed as dist

from . import rank_groups

# What is asked -> the methods that may answer, the first that is there.
_NAMES = {
    "tensor size": ("get_tensor_model_parallel_world_size", "get_slice_parallel_world_size",
                    "get_model_parallel_world_size"),
    "tensor rank": ("get_tensor_model_parallel_rank", "get_slice_parallel_rank", "get_model_parallel_rank"),
    "tensor group": ("get_tensor_model_parallel_group", "get_slice_parallel_group"),
    "pipe size": ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size"),
    "pipe rank": ("get_pipeline_model_parallel_rank", "get_pipe_parallel_rank"),
    "model group": ("get_model_parallel_group",),
    "data size": ("get_data_parallel_world_size",),
    "data rank": ("get_data_parallel_rank",),
    "data group": ("get_data_parallel_group",),
    "sequence size": ("get_sequence_parallel_world_size",),
    "context size": ("get_context_parallel_world_size",),
    "copies group": ("get_sequence_data_parallel_group", "get_sequence_and_data_parallel_group"),
    "expert size": ("get_expert_model_parallel_world_size",),
    "expert tensor size": ("get_expert_tensor_parallel_world_size",),
}


def ask(mpu, what, otherwise=None):
    """The answer to one of the questions above; `otherwise` where no method has it."""
    for name in _NAMES[what]:
        method = getattr(mpu, name, None)
        if method is not None:
            return method()
    return otherwise


@dataclass(frozen=True)
class MpuLayout:
    """This rank among all ranks. Lists are of global ranks, ascending."""

    data_ranks: tuple  # those that hold the same parameters: over data, and parts of a sequence or context
    n_data: int  # those of them with different data: what a batch is shared over
    data_rank: int  # which of the n_data this rank is
    model_ranks: tuple  # those that together hold one model: tensor- and pipeline-parallel
    tensor_size: int = 1
    tensor_rank: int = 0
    pipe_size: int = 1
    pipe_rank: int = 0
    sizes: dict = field(default_factory=dict)  # the configuration's keys for what is known of the layout


def mpu_layout(mpu):
    """The MpuLayout of a Megatron-style object; of None that of all ranks parallel over data.

    The object is a module or an instance with get_{data,model}_parallel_{group,world_size,rank} and, where there are
    such ranks, their tensor_model, pipeline_model, sequence, sequence_data and context kin, by DeepSpeed's or
    Megatron's names. ValueError with the numbers where what it says does not fit together.
    """
    rank_groups.world_group()
    world, rank = dist.get_world_size(), dist.get_rank()
    if mpu is None:
        return MpuLayout(tuple(range(world)), world, rank, (rank,))
    tensor, pipe = ask(mpu, "tensor size", 1), ask(mpu, "pipe size", 1)
    within = ask(mpu, "sequence size", 1) * ask(mpu, "context size", 1)
    model_ranks = _model_ranks(mpu, tensor, pipe, rank)
    data_ranks = _data_ranks(mpu, len(model_ranks), within, world)
    n_data = ask(mpu, "data size") or len(data_ranks) // within
    if len(data_ranks) * len(model_ranks) != world or set(data_ranks) & set(model_ranks) != {rank}:
        raise ValueError(f"the mpu has data ranks {_brief(data_ranks)} and model ranks {_brief(model_ranks)} for rank "
                         f"{rank}; they must meet in it only, and their numbers multiply to {world} ranks")
    if n_data * within != len(data_ranks):
        raise ValueError(f"the mpu has {n_data} ranks over data and {within} over sequence and context, and a group of "
                         f"{len(data_ranks)} for both")
    data_rank = ask(mpu, "data rank", data_ranks.index(rank) // within)
    return MpuLayout(data_ranks, n_data, data_rank, model_ranks, tensor, ask(mpu, "tensor rank", 0), pipe,
                     ask(mpu, "pipe rank", 0), _sizes(mpu))


def _model_ranks(mpu, tensor, pipe, rank):
    group = ask(mpu, "model group") if tensor * pipe > 1 else None
    if group is None and pipe == 1 and tensor > 1:
        group = ask(mpu, "tensor group")
    ranks = (rank,) if group is None else _ranks(group)
    if len(ranks) != tensor * pipe:
        raise ValueError(f"the mpu has {tensor} tensor-parallel x {pipe} pipeline-parallel ranks and a model-parallel "
                         f"group of {len(ranks)}: get_model_parallel_group() must have both kinds")
    return ranks


def _data_ranks(mpu, n_model, within, world):
    group = ask(mpu, "copies group")
    if group is None and within == 1:
        group = ask(mpu, "data group")
    if group is not None:
        return _ranks(group)
    if n_model > 1:
        raise ValueError("the mpu has model-parallel ranks and no "
                         f"get_{'data' if within == 1 else 'sequence_data'}_parallel_group()")
    return tuple(range(world))


def _sizes(mpu):
    asked = {"tensor_model_parallel_size": "tensor size", "pipeline_model_parallel_size": "pipe size",
             "sequence_parallel_size": "sequence size", "context_parallel_size": "context size",
             "expert_model_parallel_size": "expert size", "expert_tensor_parallel_size": "expert tensor size"}
    found = {key: ask(mpu, what) for key, what in asked.items()}
    return {key: size for key, size in found.items() if size is not None}


def _ranks(group):
    return tuple(dist.get_process_group_ranks(group))


def _brief(ranks):
    return f"{list(ranks[:8])}{'...' if len(ranks) > 8 else ''}"
