"""Groups of ranks by what is parallel, as DeepSpeed names them.

Without an mpu all ranks are parallel over data, and sizes of other kinds are 1. With one (`initialize(mpu=...)` sets
`mpu` here) data and model groups are its own. Expert groups are made here, named ep_size_N after the number of ranks
that share the experts of a MoE layer; which ranks they hold is decided in csrc/topo.c.
"""
import os
import weakref
from dataclasses import dataclass, field

import torch.distributed as dist

from .. import rank_groups
from .._core import Grid, lay_out_experts
from ..accelerator import get_accelerator
from ..mpu import ask, mpu_layout

__all__ = ["get_accelerator", "initialize"]

mpu = None  # what initialize(mpu=...) was given, a Megatron-style object


class DeprecatedException(Exception):
    """A function that DeepSpeed has taken away."""


def initialize(ep_size=1, mpu=None):
    """Taken away upstream: MoE layers make their groups themselves."""
    raise DeprecatedException("groups.initialize() is gone, as in DeepSpeed: a MoE layer takes ep_size itself")


@dataclass
class _Made:
    """What was made over one default group."""

    experts: dict = field(default_factory=dict)  # name -> (expert-parallel group, expert-data group), held
    expert_tensor_size: int = 1  # of the groups made last
    cut: set = field(default_factory=set)  # names of groups of experts that are cut over tensor-parallel ranks
    zero_param: tuple = None  # the group of _create_zero_param_parallel_group, alone
    tensor_size: int = None  # set_tensor_model_parallel_world_size
    tensor_rank: int = None


_by_world = weakref.WeakKeyDictionary()  # the default group -> its _Made


def _made():
    return _by_world.setdefault(rank_groups.world_group(), _Made())


def _ranks(group):
    return dist.get_process_group_ranks(group)


# ---- over data, sequence, model ----

def _get_data_parallel_group():
    """The ranks with different data: the mpu's group, or all ranks. RuntimeError before init_distributed."""
    return ask(mpu, "data group") or rank_groups.world_group()


def _get_data_parallel_world_size():
    return dist.get_world_size(_get_data_parallel_group())


def _get_data_parallel_rank():
    return dist.get_rank(_get_data_parallel_group())


def _get_data_parallel_group_ranks():
    """The group's global ranks, in its order."""
    return _ranks(_get_data_parallel_group())


def _get_broadcast_src_rank():
    """The global rank whose values the others start with."""
    return _ranks(_get_sequence_data_parallel_group())[0]


def _get_sequence_data_parallel_group():
    """The ranks that hold the same parameters: over data, sequence and context."""
    return ask(mpu, "copies group") or _get_data_parallel_group()


def _get_sequence_data_parallel_world_size():
    return dist.get_world_size(_get_sequence_data_parallel_group())


def _get_sequence_data_parallel_rank():
    return dist.get_rank(_get_sequence_data_parallel_group())


def _get_sequence_parallel_group():
    """The ranks that share a sequence; RuntimeError without an mpu that has such a group."""
    return _of_mpu("get_sequence_parallel_group", "sequence_parallel_size")


def _get_sequence_parallel_world_size():
    """1 without an mpu that knows better."""
    return ask(mpu, "sequence size", 1)


def _get_sequence_parallel_rank():
    """0 without an mpu that knows better."""
    return mpu.get_sequence_parallel_rank() if hasattr(mpu, "get_sequence_parallel_rank") else 0


def get_model_parallel_group():
    """The tensor- and pipeline-parallel ranks; RuntimeError without an mpu."""
    return _of_mpu("get_model_parallel_group", "tensor_model_parallel_size")


def get_tensor_model_parallel_group():
    """The ranks that share layers; RuntimeError without an mpu."""
    group = ask(mpu, "tensor group")
    return _of_mpu("get_tensor_model_parallel_group", "tensor_model_parallel_size") if group is None else group


def _of_mpu(method, key):
    if not hasattr(mpu, method):
        kind = method.removeprefix("get_").removesuffix("_group").replace("_", " ")
        raise RuntimeError(f"there is no {kind} group: pass an mpu that has one to initialize, such as "
                           f"initialize_parallel_state_from_config with {key} makes")
    return getattr(mpu, method)()


def get_tensor_model_parallel_world_size():
    """The ranks that share layers: what was set, the mpu's number, or 1."""
    size = _made().tensor_size if dist.is_initialized() else None
    return ask(mpu, "tensor size", 1) if size is None else size


def get_tensor_model_parallel_rank():
    """This rank's number among them: what was set, the mpu's, or 0."""
    rank = _made().tensor_rank if dist.is_initialized() else None
    return ask(mpu, "tensor rank", 0) if rank is None else rank


def get_tensor_model_parallel_src_rank():
    """The global rank of the first of the ranks that share layers with this one."""
    group = ask(mpu, "tensor group")
    return dist.get_rank(rank_groups.world_group()) if group is None else _ranks(group)[0]


def set_tensor_model_parallel_world_size(world_size):
    """What get_tensor_model_parallel_world_size says from now on; None: what is."""
    _made().tensor_size = world_size


def set_tensor_model_parallel_rank(rank):
    """What get_tensor_model_parallel_rank says from now on; None: what is."""
    _made().tensor_rank = rank


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank
get_model_parallel_world_size = _get_model_parallel_world_size = get_tensor_model_parallel_world_size
get_model_parallel_rank = get_tensor_model_parallel_rank


def _create_model_parallel(model_parallel_size_):
    """(data group, model group) of this rank where neighbours share a model. Collective over all ranks.

    ValueError where the size does not divide the number of ranks.
    """
    grid = lay_out_experts(dist.get_world_size(rank_groups.world_group()), 1, tensor=model_parallel_size_)
    return rank_groups.make(grid.groups(["dp"])), rank_groups.make(grid.groups(["tp"]))


# ---- over experts ----

def _create_expert_and_data_parallel(expert_parallel_size_, mp_size=None, pp_size=None, mp_mode="tp",
                                     use_data_before_expert_parallel_=False, folding_spec=None):
    """Makes the groups named ep_size_N where all ranks of a pipeline stage are parallel over data. Collective.

    Experts are spread over N neighbouring ranks and repeated (E + D), or with use_data_before_expert_parallel_ over N
    ranks that are P / N apart (P ranks of a stage). pp_size: pipeline stages, None is 1. mp_mode "sp": mp_size ranks
    share a sequence, which changes no group. ValueError where N does not divide P, and where groups of this name
    exist with other ranks; asking twice for the same is fine. AutoEP's tensor parallelism and folding are not there.
    """
    if folding_spec is not None or (mp_size or 1) > 1 and mp_mode != "sp":
        raise NotImplementedError("_create_expert_and_data_parallel: AutoEP (folding_spec, and mp_size with mp_mode "
                                  f"'tp') is not there yet; got mp_size={mp_size}, mp_mode={mp_mode!r}")
    world = dist.get_world_size(rank_groups.world_group())
    _make_experts(expert_parallel_size_, *_expert_partitions(world, expert_parallel_size_, 1, pp_size or 1,
                                                             use_data_before_expert_parallel_))


def _create_expert_data_and_model_parallel(expert_parallel_size_, mpu, use_data_before_expert_parallel_=False):
    """Makes the groups named ep_size_N among the mpu's data ranks of each model-parallel place. Collective.

    N neighbours in the order of the ranks that hold the same parameters share experts, or with
    use_data_before_expert_parallel_ N that are equally far apart. ValueError as _create_expert_and_data_parallel, and
    for an mpu whose ranks are in another order than tensor, data, pipeline (fastest first), unless it is a
    ParallelState.
    """
    n, data_first, layout = expert_parallel_size_, use_data_before_expert_parallel_, mpu_layout(mpu)
    if len(layout.data_ranks) % n:
        raise ValueError(f"ep_size {n} does not divide the {len(layout.data_ranks)} ranks over data of the mpu")
    grid = getattr(mpu, "grid", None)
    if isinstance(grid, Grid):
        copies, apart = ["dp", "cp", "sp"], len(layout.data_ranks) // n
        experts = grid.groups(copies, *((n, True) if data_first else (apart, False)))
        data = grid.groups(copies, *((n, False) if data_first else (apart, True)))
    else:
        world = dist.get_world_size()
        experts, data = _expert_partitions(world, n, layout.tensor_size, layout.pipe_size, data_first)
        own = [next(ranks for ranks in partition if dist.get_rank() in ranks) for partition in (experts, data)]
        if not set().union(*own) <= set(layout.data_ranks):
            raise ValueError(f"experts over ranks {own[0]} with copies on {own[1]} would leave the mpu's data ranks "
                             f"{list(layout.data_ranks)}: an mpu must have its tensor ranks next to each other and its "
                             "pipeline stages farthest apart")
    _make_experts(n, experts, data)
    made = _made()
    made.expert_tensor_size = layout.tensor_size
    if layout.tensor_size > 1:
        made.cut.add(f"ep_size_{n}")


def _expert_partitions(world, size, tensor, pipe, data_first):
    """(expert-parallel groups, expert-data groups), all of them, as lists of ranks."""
    grid = lay_out_experts(world, size, tensor, pipe, data_first)
    return grid.groups(["ep"]), grid.groups(["dp"])


def _make_experts(size, experts, data):
    made, name = _made().experts, f"ep_size_{size}"
    found = rank_groups.make(experts), rank_groups.make(data)
    if name in made and _expert_groups(name) != found:
        old = [_ranks(group) for group in _expert_groups(name)]
        raise ValueError(f"{name} exists over ranks {old[0]} with copies on {old[1]}; it cannot be over "
                         f"{_ranks(found[0])} with copies on {_ranks(found[1])} too")
    made[name] = tuple(map(rank_groups.hold, found))


def _get_expert_parallel_ranks(world_size, tensor_parallel_size_, expert_parallel_size_, pipeline_parallel_size_=1,
                               use_data_before_expert_parallel_=False):
    """(expert-parallel groups, expert-data groups) of a world as lists of ranks; makes nothing. By pipeline stage, then
    tensor-parallel rank, then first rank."""
    t, per_stage = tensor_parallel_size_, world_size // pipeline_parallel_size_
    return tuple(sorted(groups, key=lambda ranks: (ranks[0] // per_stage, ranks[0] % t, ranks[0]))
                 for groups in _expert_partitions(world_size, expert_parallel_size_, t, pipeline_parallel_size_,
                                                  use_data_before_expert_parallel_))


def _expert_groups(group_name):
    made = _made().experts
    if group_name not in made:
        raise RuntimeError(f"there are no expert groups {group_name!r}; there are: {', '.join(made) or 'none'}. A MoE "
                           "layer makes them, or _create_expert_and_data_parallel(ep_size)")
    return tuple(map(rank_groups.held, made[group_name]))


def _get_expert_parallel_group(group_name):
    """The ranks that share the experts; RuntimeError where nobody made groups of this name."""
    return _expert_groups(group_name)[0]


def _get_expert_data_parallel_group(group_name):
    """The ranks that hold the same experts; RuntimeError where nobody made groups of this name."""
    return _expert_groups(group_name)[1]


def _get_expert_parallel_group_dict():
    """{name: expert-parallel group}."""
    return {name: _get_expert_parallel_group(name) for name in _made().experts}


def _get_expert_data_parallel_group_dict():
    """{name: expert-data group}."""
    return {name: _get_expert_data_parallel_group(name) for name in _made().experts}


def _get_expert_parallel_group_ranks(group_name):
    return _ranks(_get_expert_parallel_group(group_name))


def _get_expert_data_parallel_group_ranks(group_name):
    return _ranks(_get_expert_data_parallel_group(group_name))


def _get_expert_parallel_world_size(group_name):
    return dist.get_world_size(_get_expert_parallel_group(group_name))


def _get_expert_data_parallel_world_size(group_name):
    return dist.get_world_size(_get_expert_data_parallel_group(group_name))


def _get_expert_parallel_rank(group_name):
    return dist.get_rank(_get_expert_parallel_group(group_name))


def _get_expert_data_parallel_rank(group_name):
    return dist.get_rank(_get_expert_data_parallel_group(group_name))


def _get_expert_parallel_src_rank(group_name):
    """The global rank of the first of the ranks that share the experts."""
    return _get_expert_parallel_group_ranks(group_name)[0]


def _get_expert_broadcast_src_rank(group_name):
    """The global rank whose experts the others that hold the same start with."""
    return _get_expert_data_parallel_group_ranks(group_name)[0]


def _get_max_expert_size():
    """The largest N of the groups ep_size_N; None where there are none."""
    return max((dist.get_world_size(group) for group in _get_expert_parallel_group_dict().values()), default=None)


def _get_max_expert_size_name():
    """The name of the largest groups."""
    return f"ep_size_{_get_max_expert_size()}"


def _get_max_expert_parallel_group():
    """The largest expert-parallel group of this rank."""
    return _get_expert_parallel_group(_get_max_expert_size_name())


def _get_expert_model_parallel_world_size():
    """The tensor-parallel ranks that experts were last made for."""
    return _made().expert_tensor_size if dist.is_initialized() else 1


def _are_cut(group_name):
    """Whether experts of these groups are cut over tensor-parallel ranks: made with an mpu that has such ranks."""
    return dist.is_initialized() and group_name in _made().cut


# ---- ZeRO ----

def _create_zero_param_parallel_group(group_size):
    """Makes groups of group_size neighbours that share out a secondary copy of the parameters. Collective, once.

    ValueError where the size does not divide the number of ranks.
    """
    made = _made()
    if made.zero_param is not None:
        raise RuntimeError("the ZeRO parameter groups exist already, of "
                           f"{_get_zero_param_intra_parallel_group_world_size()} ranks")
    grid = lay_out_experts(dist.get_world_size(), group_size)
    made.zero_param = (rank_groups.hold(rank_groups.make(grid.groups(["ep"]))),)


def _get_zero_param_intra_parallel_group():
    """The group that shares out a secondary copy of the parameters: None, as without zero_hpz_partition_size."""
    made = _made().zero_param if dist.is_initialized() else None
    return made and rank_groups.held(*made)


def _zero_param_group():
    group = _get_zero_param_intra_parallel_group()
    if group is None:
        raise RuntimeError("there are no ZeRO parameter groups: _create_zero_param_parallel_group(size) makes them")
    return group


def _get_zero_param_intra_parallel_group_ranks():
    return _ranks(_zero_param_group())


def _get_zero_param_intra_parallel_group_world_size():
    return dist.get_world_size(_zero_param_group())


def _get_zero_param_intra_parallel_rank_in_mygroup():
    return dist.get_rank(_zero_param_group())


def _get_local_all_to_all_group():
    """{"local_<node>": the ranks of a machine, "global_<place>": those at its place of every machine}, this rank's own
    two. Collective over all ranks; LOCAL_WORLD_SIZE says how many ranks a machine has (without: all)."""
    world = dist.get_world_size(rank_groups.world_group())
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or world)
    grid = lay_out_experts(world, local)
    place, node = grid.coordinates(dist.get_rank())[1:3]
    return {f"local_{node}": rank_groups.make(grid.groups(["ep"])),
            f"global_{place}": rank_groups.make(grid.groups(["dp"]))}
