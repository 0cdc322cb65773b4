"""ParallelState: the groups of one layout of all ranks over tensor, pipeline, data, sequence, context and experts.

Which ranks form a group is decided in csrc/topo.c; groups are torch's, one per set of ranks (see ..rank_groups).
Invariant: until initialize_model_parallel every getter is an error that says what was asked for.
"""
import math
import operator
import weakref
from datetime import timedelta

import torch.distributed as dist

from .. import rank_groups
from .._core import Grid, lay_out

# Group -> (which grid, the dimensions along which its ranks differ).
_GROUPS = {
    "tensor model parallel": ("shared", "tp"),
    "pipeline model parallel": ("shared", "pp"),
    "model parallel": ("shared", "tp-pp"),
    "data parallel": ("shared", "dp"),
    "data parallel with context": ("shared", "dp-cp"),
    "context parallel": ("shared", "cp"),
    "sequence parallel": ("shared", "sp"),
    "sequence and data parallel": ("shared", "dp-cp-sp"),
    "tensor and data parallel": ("shared", "tp-dp"),
    "tensor and data parallel with context": ("shared", "tp-dp-cp"),
    "tensor and context parallel": ("shared", "tp-cp"),
    "expert model parallel": ("experts", "ep"),
    "expert tensor parallel": ("experts", "tp"),
    "expert data parallel": ("experts", "dp"),
}
# Group -> the group that num_distributed_optimizer_instances cuts into runs.
_PARTIAL = {"partial data parallel": "data parallel with context",
            "partial expert data parallel": "expert data parallel"}


class ParallelState:
    """One layout; goes into ``initialize(mpu=...)``.

    Attributes: name (of the instance, None: the default one), grid and expert_grid (the ranks as _core.Grid, None
    before initialize_model_parallel; of experts where they are laid out otherwise).
    """

    def __init__(self, name=None):
        self.name = name
        self.grid = self.expert_grid = None
        self._kept = {}  # group -> what rank_groups.hold() made of this rank's
        self._levels = []  # the same, for hierarchical_context_parallel_sizes
        self._set = {}  # "size", "rank" of tensor parallelism -> what a setter said instead
        self._virtual = None  # (interleaved stages of a rank, which of them is at work)
        self._world = lambda: None  # weak reference to the default group that the groups were made over

    def initialize_model_parallel(self, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
                                  virtual_pipeline_model_parallel_size=None, pipeline_model_parallel_comm_backend=None,
                                  context_parallel_size=1, sequence_parallel_size=1,
                                  hierarchical_context_parallel_sizes=None, expert_model_parallel_size=1,
                                  num_distributed_optimizer_instances=1, expert_tensor_parallel_size=None,
                                  distributed_timeout_minutes=30, order="tp-ep-dp-pp", create_gloo_process_groups=False,
                                  nccl_communicator_config_path=None, high_priority_stream_groups=None,
                                  data_parallel_size=None):
        """Lays the ranks out and makes the groups. Collective over all ranks, with equal arguments.

        Sizes are integers >= 1; the ranks over data are what remains. virtual_pipeline_model_parallel_size: with more
        than one pipeline stage only. pipeline_model_parallel_comm_backend: a back end of torch for the pipeline
        groups, None: the default group's. hierarchical_context_parallel_sizes: a list, whose product is
        context_parallel_size, of nested groups. expert_tensor_parallel_size: None is tensor_model_parallel_size.
        num_distributed_optimizer_instances: parts of the data ranks (with context) that have groups of their own.
        distributed_timeout_minutes: of the groups made here; the group of all ranks keeps its own. order: dimensions
        tp, ep, dp, pp, cp, sp, fastest first; cp and sp that are not in it stand right before dp.
        create_gloo_process_groups: accepted; groups of CPU ranks are gloo's. data_parallel_size: None, or what remains.

        ValueError with the numbers where sizes do not divide, TypeError for what is no size, RuntimeError before
        init_distributed and for a state that is initialised, NotImplementedError for what is NCCL's.
        """
        if self.is_initialized():
            raise RuntimeError(f"{self._called()} is initialised already; another name makes another")
        for key, value in (("nccl_communicator_config_path", nccl_communicator_config_path),
                           ("high_priority_stream_groups", high_priority_stream_groups)):
            if value is not None:
                raise NotImplementedError(f"{key} is {value!r}: not yet, because NCCL is not there; allowed: None")
        world = rank_groups.world_group()
        tensor = _size("tensor_model_parallel_size", tensor_model_parallel_size)
        grid, expert_grid = lay_out(
            dist.get_world_size(), order, tensor=tensor,
            pipe=_size("pipeline_model_parallel_size", pipeline_model_parallel_size),
            context=_size("context_parallel_size", context_parallel_size),
            sequence=_size("sequence_parallel_size", sequence_parallel_size),
            expert=_size("expert_model_parallel_size", expert_model_parallel_size),
            expert_tensor=_size("expert_tensor_parallel_size",
                                tensor if expert_tensor_parallel_size is None else expert_tensor_parallel_size),
            n_instances=_size("num_distributed_optimizer_instances", num_distributed_optimizer_instances))
        _check_data(grid, data_parallel_size)
        virtual = _virtual_stages(virtual_pipeline_model_parallel_size, grid)
        levels = _levels(grid, hierarchical_context_parallel_sizes)
        timeout = _minutes(distributed_timeout_minutes)
        # From here on nothing can fail on one rank alone.
        self._kept = _make_groups({"shared": grid, "experts": expert_grid}, int(num_distributed_optimizer_instances),
                                  timeout, pipeline_model_parallel_comm_backend)
        self._levels = [rank_groups.hold(rank_groups.make(level, timeout)) for level in levels]
        self.grid, self.expert_grid, self._virtual = grid, expert_grid, virtual
        self._world = weakref.ref(world)

    def is_initialized(self):
        """Whether there are groups: made, and over the default group that is there now."""
        return bool(self._kept) and dist.is_initialized() and self._world() is dist.group.WORLD

    def _called(self):
        return "the parallel state" if self.name is None else f"the parallel state {self.name!r}"

    def _group(self, kind):
        if not self.is_initialized():
            raise RuntimeError(f"{self._called()} has no {kind} group yet: call initialize_model_parallel() or "
                               "initialize_parallel_state_from_config() first")
        return rank_groups.held(self._kept[kind])

    # ---- groups with options; the others are derived below ----

    def get_data_parallel_group(self, with_context_parallel=False, partial_data_parallel=False):
        """The ranks with different data; with those that share a context; the part of the latter that
        num_distributed_optimizer_instances makes (ValueError without context, which it cuts too)."""
        if partial_data_parallel and not with_context_parallel:
            raise ValueError("get_data_parallel_group(partial_data_parallel=True): with_context_parallel must be true "
                             "too, because a part has ranks of both kinds")
        return self._group("partial data parallel" if partial_data_parallel else
                           "data parallel with context" if with_context_parallel else "data parallel")

    def get_tensor_and_data_parallel_group(self, with_context_parallel=False):
        """The ranks of one pipeline stage, of this place over sequence (and context, unless that is asked for)."""
        return self._group("tensor and data parallel" + " with context" * with_context_parallel)

    def get_expert_data_parallel_group(self, partial_expert_data_parallel=False):
        """The ranks that hold the same experts, or this rank's part of them."""
        return self._group("partial " * partial_expert_data_parallel + "expert data parallel")

    def get_hierarchical_context_parallel_groups(self):
        """This rank's groups of hierarchical_context_parallel_sizes, a list: the innermost first."""
        self._group("context parallel")
        return [rank_groups.held(kept) for kept in self._levels]

    # ---- ranks ----

    def get_data_parallel_group_ranks(self):
        """Global ranks."""
        return _ranks(self.get_data_parallel_group())

    def get_tensor_model_parallel_src_rank(self):
        """The global rank of the first of the ranks that share layers with this one."""
        return _ranks(self.get_tensor_model_parallel_group())[0]

    def get_tensor_model_parallel_world_size(self):
        """How many ranks share layers, or what was set."""
        return self._set.get("size") or dist.get_world_size(self.get_tensor_model_parallel_group())

    def get_tensor_model_parallel_rank(self):
        """This rank's number among the ranks that share layers, or what was set."""
        rank = self._set.get("rank")
        return dist.get_rank(self.get_tensor_model_parallel_group()) if rank is None else rank

    def set_tensor_model_parallel_world_size(self, world_size):
        """What get_tensor_model_parallel_world_size says from now on; None: what is."""
        self._set["size"] = world_size

    def set_tensor_model_parallel_rank(self, rank):
        """What get_tensor_model_parallel_rank says from now on; None: what is."""
        self._set["rank"] = rank

    def get_virtual_pipeline_model_parallel_world_size(self):
        """Interleaved stages of a rank; None without."""
        self._group("pipeline model parallel")
        return self._virtual and self._virtual[0]

    def get_virtual_pipeline_model_parallel_rank(self):
        """Which of them is at work: 0 until it is set; None without."""
        self._group("pipeline model parallel")
        return self._virtual and self._virtual[1]

    def set_virtual_pipeline_model_parallel_rank(self, rank):
        """ValueError where there is no such stage."""
        size = self.get_virtual_pipeline_model_parallel_world_size() or 0
        if rank not in range(size):
            raise ValueError(f"virtual pipeline rank {rank!r}; {self._called()} has {size} interleaved stages")
        self._virtual = (size, rank)

    # ---- experts, as utils.groups names them ----

    def _expert_name(self):
        return f"ep_size_{self.get_expert_model_parallel_world_size()}"

    def _expert(self, kind, group_name):
        if group_name not in (None, self._expert_name()):
            raise RuntimeError(f"{self._called()} has no expert groups {group_name!r}; it has: {self._expert_name()}")
        return self._group(kind)

    def _get_expert_parallel_group(self, group_name=None):
        """The ranks that share the experts; group_name: None or ep_size_N."""
        return self._expert("expert model parallel", group_name)

    def _get_expert_data_parallel_group(self, group_name=None):
        """The ranks that hold the same experts; group_name: None or ep_size_N."""
        return self._expert("expert data parallel", group_name)

    def _get_expert_parallel_src_rank(self, group_name=None):
        """The global rank of the first of the ranks that share the experts."""
        return _ranks(self._get_expert_parallel_group(group_name))[0]

    def _get_expert_broadcast_src_rank(self, group_name=None):
        """The global rank whose experts the others that hold the same start with."""
        return _ranks(self._get_expert_data_parallel_group(group_name))[0]

    def _get_expert_parallel_group_dict(self):
        """{name: expert-parallel group}."""
        return {self._expert_name(): self._get_expert_parallel_group()}

    def _get_expert_data_parallel_group_dict(self):
        """{name: expert-data group}."""
        return {self._expert_name(): self._get_expert_data_parallel_group()}

    def _get_expert_model_parallel_world_size(self):
        """The tensor-parallel ranks of an expert: utils.groups' name for get_expert_tensor_parallel_world_size."""
        return self.get_expert_tensor_parallel_world_size()

    def _get_max_expert_size(self):
        """The ranks that share the experts."""
        return self.get_expert_model_parallel_world_size()

    _get_max_expert_size_name = _expert_name

    def _get_max_expert_parallel_group(self):
        """The expert-parallel group."""
        return self._get_expert_parallel_group()


def _ranks(group):
    return dist.get_process_group_ranks(group)


# ---- arguments ----

def _size(key, value):
    """An integer; floats that are whole count, as in a configuration."""
    try:
        size = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except TypeError:
        raise TypeError(f"{key} is {value!r}; allowed: an integer >= 1") from None
    if size < 1 or isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; allowed: an integer >= 1")
    return size


def _minutes(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise ValueError(f"distributed_timeout_minutes is {value!r}; allowed: a number > 0")
    return timedelta(minutes=value)


def _along(grid, dim):
    return grid.sizes[grid.names.index(dim)]


def _check_data(grid, size):
    if size not in (None, _along(grid, "dp")):
        raise ValueError(f"data_parallel_size is {size!r}; the other sizes leave {_along(grid, 'dp')} of "
                         f"{grid.n_ranks} ranks")


def _virtual_stages(size, grid):
    if size is None:
        return None
    if _along(grid, "pp") == 1:
        raise ValueError(f"virtual_pipeline_model_parallel_size is {size!r} and pipeline_model_parallel_size 1: "
                         "interleaved stages need more than one")
    return _size("virtual_pipeline_model_parallel_size", size), 0


def _levels(grid, sizes):
    """A partition of the ranks for each level of sizes, innermost first: levels in the place of cp."""
    if sizes is None:
        return []
    key = "hierarchical_context_parallel_sizes"
    sizes = [_size(key, size) for size in sizes]
    if math.prod(sizes) != _along(grid, "cp"):
        raise ValueError(f"{key} is {sizes}, whose product is {math.prod(sizes)}; context_parallel_size is "
                         f"{_along(grid, 'cp')}")
    at = grid.names.index("cp")
    levels = [f"cp{i}" for i in range(len(sizes))]
    nested = Grid((*grid.names[:at], *levels, *grid.names[at + 1:]), (*grid.sizes[:at], *sizes, *grid.sizes[at + 1:]))
    return [nested.groups([level]) for level in levels]


def _make_groups(grids, n_parts, timeout, pipe_backend):
    """{group: what rank_groups.hold() makes of this rank's}, in one order on all ranks."""
    partitions = {kind: grids[grid].groups(dims.split("-")) for kind, (grid, dims) in _GROUPS.items()}
    for kind, whole in _PARTIAL.items():
        grid, dims = _GROUPS[whole]
        partitions[kind] = grids[grid].groups(dims.split("-"), n_parts)
    backends = {"pipeline model parallel": pipe_backend}
    return {kind: rank_groups.hold(rank_groups.make(partition, timeout, backends.get(kind)))
            for kind, partition in partitions.items()}


# ---- what is derived: for each kind a group, its size, this rank's number in it ----

_KINDS = {
    "tensor_model_parallel": "the ranks that share layers", "model_parallel": "the tensor- and pipeline-parallel ranks",
    "pipeline_model_parallel": "the ranks that hold the stages of a model",
    "context_parallel": "the ranks that share a context", "sequence_parallel": "the ranks that share a sequence",
    "sequence_and_data_parallel": "the ranks that hold the same parameters: over data, sequence and context",
    "sequence_data_parallel": "the ranks that hold the same parameters: over data, sequence and context",
    "tensor_and_context_parallel": "the ranks of one stage with the same data and part of a sequence",
    "expert_model_parallel": "the ranks that share the experts",
    "expert_tensor_parallel": "the ranks that share an expert",
    "data_parallel": "the ranks with different data", "expert_data_parallel": "the ranks that hold the same experts",
    "_expert_parallel": "the ranks that share the experts",
    "_expert_data_parallel": "the ranks that hold the same experts",
}


def _derive(kind, text):
    getter = "_get" + kind if kind.startswith("_") else f"get_{kind}"
    title = kind.replace("_", " ").replace("sequence data", "sequence and data")

    def group(self):
        return self._group(title)

    def size(self, *options, **named):
        return dist.get_world_size(getattr(self, f"{getter}_group")(*options, **named))

    def rank(self, *options, **named):
        return dist.get_rank(getattr(self, f"{getter}_group")(*options, **named))

    def ranks(self, *options, **named):
        return _ranks(getattr(self, f"{getter}_group")(*options, **named))

    derived = {"group": (group, f"{text[0].upper()}{text[1:]}."), "rank": (rank, f"This rank's number among {text}."),
               "world_size": (size, f"How many {text.removeprefix('the ')}.")}
    if kind.startswith("_"):
        derived["group_ranks"] = (ranks, f"Global ranks of {text}.")
    for what, (method, doc) in derived.items():
        name = f"{getter}_{what}"
        if name not in vars(ParallelState):  # written out above
            method.__name__, method.__qualname__, method.__doc__ = name, f"ParallelState.{name}", doc
            setattr(ParallelState, name, method)


for _kind, _text in _KINDS.items():
    _derive(_kind, _text)
del _kind, _text
