"""Ranks as a grid with named axes, the last one fastest, and the groups of a pipeline over it.

The arithmetic is that of csrc/topo.c (_core.Grid, whose first dimension is the fastest).
"""
from collections import namedtuple

import torch.distributed as dist

from ... import rank_groups
from ..._core import Grid

__all__ = ["PipeDataParallelTopology", "PipeModelDataParallelTopology", "PipelineParallelGrid", "ProcessTopology"]


class ProcessTopology:
    """A grid of ranks 0, 1, ... in row-major order. axes: names; dims: their sizes, one each."""

    def __init__(self, axes, dims):
        self.axes, self.dims = list(axes), list(dims)
        self.grid = Grid(self.axes[::-1], self.dims[::-1])
        self.ProcessCoord = namedtuple("ProcessCoord", self.axes)

    def __str__(self):
        return str(self.mapping)

    @property
    def mapping(self):
        """{coordinates: rank} of all ranks."""
        return {self.get_coord(rank): rank for rank in range(self.world_size())}

    def get_rank(self, **coord_kwargs):
        """The rank at these coordinates, one per axis; ValueError for an axis too few or too many, or out of range."""
        if coord_kwargs.keys() != set(self.axes):
            raise ValueError(f"get_rank() got axes {sorted(coord_kwargs)}; it needs each of {self.axes} once, and "
                             "filter_match() takes fewer")
        return self.grid.rank([coord_kwargs[axis] for axis in reversed(self.axes)])

    def get_axis_names(self):
        """The axes, the slowest first."""
        return self.axes

    def get_rank_repr(self, rank, omit_axes=("data", "pipe"), inner_sep="_", outer_sep="-"):
        """Text such as model_00: a rank's coordinates along the axes that are not left out."""
        at = self.get_coord(rank)._asdict()
        return outer_sep.join(f"{axis}{inner_sep}{at[axis]:02d}" for axis in self.axes if axis not in omit_axes)

    def get_dim(self, axis):
        """The size of an axis; 0 for one that is not there."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_coord(self, rank):
        """A rank's coordinates, a named tuple; ValueError for a rank outside the grid."""
        return self.ProcessCoord(*reversed(self.grid.coordinates(rank)))

    def get_axis_comm_lists(self, axis):
        """The groups of ranks that differ along one axis only; [] for an axis that is not there."""
        return self.grid.groups([axis]) if axis in self.axes else []

    def filter_match(self, **filter_kwargs):
        """The ranks, ascending, with these coordinates; ValueError for an axis that is not there."""
        unknown = [axis for axis in filter_kwargs if axis not in self.axes]
        if unknown:
            raise ValueError(f"filter_match() got axis {unknown[0]!r}; there are {self.axes}")
        if any(not 0 <= at < self.get_dim(axis) for axis, at in filter_kwargs.items()):
            return []
        first = self.grid.rank([filter_kwargs.get(axis, 0) for axis in reversed(self.axes)])
        return self.grid.group(first, [axis for axis in self.axes if axis not in filter_kwargs])

    def get_axis_list(self, axis, idx):
        """The ranks, ascending, that stand at idx along an axis."""
        return self.filter_match(**{axis: idx})

    def world_size(self):
        """All ranks."""
        return self.grid.n_ranks


class PipeDataParallelTopology(ProcessTopology):
    """Axes pipe, data: replicas of a stage are neighbours."""

    def __init__(self, num_pp, num_dp):
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Axes pipe, data, model: parts of a layer are neighbours."""

    def __init__(self, num_pp, num_mp, num_dp):
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])


class PipelineParallelGrid:
    """The groups of a topology with axes pipe, data and, where layers are split, model: an mpu for pipelines.

    topology: None makes one of pipe and data from the prime factors of the number of ranks, taken in turns.
    process_group: the ranks, None is all; others are not there yet. Collective over all ranks.
    ValueError where the topology has not as many ranks as there are.
    """

    def __init__(self, topology=None, process_group=None):
        if process_group not in (None, rank_groups.world_group()):
            raise NotImplementedError("PipelineParallelGrid(process_group=...): over some ranks is not yet")
        world, self.global_rank = dist.get_world_size(), dist.get_rank()
        self._topo = _default_topology(world) if topology is None else topology
        if self._topo.world_size() != world:
            raise ValueError(f"the topology has {self._topo.world_size()} ranks, and there are {world}")
        missing = {"pipe", "data"} - set(self._topo.axes)
        if missing:
            raise ValueError(f"the topology has axes {self._topo.axes}; {sorted(missing)} must be there")
        self._coord = self._topo.get_coord(self.global_rank)
        whole = [axis for axis in self._topo.axes if axis != "data"]
        along = {"pipe": ["pipe"], "data": ["data"], "slice": [a for a in ("model",) if a in whole], "model": whole}
        self._kept = {kind: rank_groups.hold(rank_groups.make(self._topo.grid.groups(axes)))
                      for kind, axes in along.items()}

    def _group(self, kind):
        return rank_groups.held(self._kept[kind])

    def topology(self):
        """The ProcessTopology."""
        return self._topo

    def get_global_rank(self):
        """This rank among all."""
        return self.global_rank

    def get_stage_id(self):
        """Which stage of the pipeline this rank holds."""
        return self._coord.pipe

    def get_data_parallel_id(self):
        """Which of the pipelines this rank is in."""
        return self._coord.data

    def stage_to_global(self, stage_id, **kwargs):
        """The rank that holds another stage of this pipeline; other coordinates by name, such as data=1."""
        return self._topo.get_rank(**{**self._coord._asdict(), **kwargs, "pipe": stage_id})

    def get_data_parallel_group_ranks(self):
        """Global ranks."""
        return dist.get_process_group_ranks(self._group("data"))


def _default_topology(world):
    sizes, turn, factor = [1, 1], 0, 2
    while world > 1:
        if factor * factor > world:
            factor = world
        if world % factor == 0:
            sizes[turn], turn, world = sizes[turn] * factor, 1 - turn, world // factor
        else:
            factor += 1
    return PipeDataParallelTopology(*sizes)


# Documented name -> (group, what it holds).
_KINDS = {
    "pipe_parallel": ("pipe", "the stages of this pipeline"), "pipeline_model_parallel": ("pipe", "the same"),
    "data_parallel": ("data", "the ranks that hold the same stage and part of its layers"),
    "model_parallel": ("model", "the ranks of this pipeline with all parts of layers"),
    "slice_parallel": ("slice", "the ranks that share this stage's layers"),
    "tensor_model_parallel": ("slice", "the same"),
}


def _derive(kind, group, text):
    def get_group(self):
        return self._group(group)

    def get_world_size(self):
        return dist.get_world_size(self._group(group))

    def get_rank(self):
        return dist.get_rank(self._group(group))

    for what, method in (("group", get_group), ("world_size", get_world_size), ("rank", get_rank)):
        method.__name__ = method.__qualname__ = f"get_{kind}_{what}"
        method.__doc__ = f"The {what.replace('_', ' ')} of {text}."
        setattr(PipelineParallelGrid, method.__name__, method)


for _kind, (_group, _text) in _KINDS.items():
    _derive(_kind, _group, _text)
del _kind, _group, _text
