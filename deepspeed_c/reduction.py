"""Over which ranks an engine reduces which gradients, and which ranks step together.

A gradient is added up over the ranks that hold the same parameter: the data-parallel ones (with those that share a
sequence), for an expert fewer of them, or, where tensor-parallel ranks take different tokens through their experts,
ranks of several tensor-parallel places. Every sum is divided by the number of data-parallel ranks, so the mean does
not depend on how many ranks share the experts out. Settings, norm and skipping are all ranks' together. Invariant:
members of a group list it at the same place, the data-parallel ranks first, so that they open its communicator
together.
"""
import hashlib

import torch
import torch.distributed as dist

from .distributed import engine_comm
from .utils import groups
from .whole import whole


def is_expert(p):
    """Whether a parameter is an expert's, as DeepSpeed marks it: its attribute `allreduce` is False."""
    return not getattr(p, "allreduce", True)


def _group_of(p):
    """An expert's group_name; None of what is no expert's."""
    return getattr(p, "group_name", None) if is_expert(p) else None


def prepare_experts(module, data_first, tensor_size):
    """Layers that share experts out make their groups of ranks, unless they have. Collective over all ranks.

    data_first: ``use_data_before_expert_parallelism`` of the configuration. tensor_size: the engine's tensor-parallel
    ranks; ValueError where the layers, which ask utils.groups, would find others."""
    layers = [child for child in module.modules() if hasattr(child, "set_deepspeed_parallelism")]
    seen = groups.get_tensor_model_parallel_world_size()
    if layers and seen != tensor_size:
        raise ValueError(f"layers with experts see {seen} tensor-parallel ranks in utils.groups (its mpu is that of "
                         f"another engine?) and this engine has {tensor_size}; pass initialize the same mpu, or set "
                         "deepspeed_c.utils.groups.mpu to None first")
    for layer in layers:
        layer.set_deepspeed_parallelism(data_first)


class Reduction:
    """The communicators of one engine. Collective over all ranks.

    layout: the MpuLayout of this rank. parameters: {name: Parameter}, all that may be asked for.
    Attributes: control (the Comm of all ranks), comms (of each reduce group: the data-parallel ranks, then one for
    each kind of experts that other ranks hold). ValueError for an expert whose group does not exist, and where
    ranks of a group have different parameters; nothing has changed then.
    """

    def __init__(self, layout, parameters):
        self._layout = layout
        self.control = engine_comm()
        self._index = {}  # group name -> place in comms
        self._over_tensor = set()  # group names whose experts lie over tensor-parallel ranks
        self.comms, self._first = [], []
        self._add(layout.data_ranks)
        self._compare(0, layout.data_ranks, "names, shapes, dtypes or group_name", [
            f"{name} {tuple(whole(p).shape)} {p.dtype} {_group_of(p)}" for name, p in parameters.items()])
        found = {}
        for name, p in parameters.items():
            if is_expert(p):
                found.setdefault(_group_of(p), name)
        for group_name in sorted(found, key=str):  # equal on ranks whose other parameters differ
            self._add_experts(found[group_name], group_name, parameters)

    def _add(self, ranks):
        """The place of these ranks in comms; experts that all data-parallel ranks hold are nothing special."""
        if self.comms and tuple(ranks) == self._layout.data_ranks:
            return 0
        self.comms.append(engine_comm(ranks))
        self._first.append(ranks[0])
        return len(self.comms) - 1

    def _add_experts(self, name, group_name, parameters):
        holders, sharers = self._ranks_of(name, group_name)
        if not {*holders, *sharers} <= set(self._layout.data_ranks):
            self._over_tensor.add(group_name)
        place = self._index[group_name] = self._add(holders)
        if not set(holders) <= set(self._layout.data_ranks):
            self._compare(place, holders, f"names, shapes, dtypes or requires_grad of {group_name}", [
                f"{place} {name} {tuple(whole(p).shape)} {p.dtype} {p.requires_grad}" for name, p in parameters.items()
                if is_expert(p) and _group_of(p) == group_name])

    def _compare(self, place, ranks, what, rows):
        """Before ranks go different ways over them."""
        comm = self.comms[place]
        digest = hashlib.blake2b("\n".join(rows).encode(), digest_size=8).digest()
        found = torch.zeros(8 * comm.size, dtype=torch.uint8)
        comm.all_gather(found, torch.tensor(list(digest), dtype=torch.uint8), "initialize")
        found = found.view(comm.size, 8).tolist()
        for rank, other in zip(ranks, found, strict=True):
            if other != found[0]:
                raise ValueError(f"ranks initialise different engines: the module's parameters on rank {rank} and on "
                                 f"rank {ranks[0]} differ in {what}")

    def _ranks_of(self, name, group_name):
        """(the ranks that hold these experts, those that share all experts out); of one pipeline stage."""
        try:
            holders, sharers = (dist.get_process_group_ranks(group(group_name)) for group in (
                groups._get_expert_data_parallel_group, groups._get_expert_parallel_group))
        except RuntimeError as error:
            raise ValueError(f"parameter {name} is an expert's (allreduce is False) with group_name {group_name!r}: "
                             f"{error}") from None
        per_stage = dist.get_world_size() // self._layout.pipe_size
        around = {*holders, *sharers, *self._layout.data_ranks}
        if not around <= set(self._layout.data_ranks) and len({rank // per_stage for rank in around}) > 1:
            raise ValueError(f"parameter {name} is an expert's of {group_name!r}, with copies on ranks {holders}, "
                             f"shared out over {sharers}, and rank {dist.get_rank()} has the data-parallel ranks "
                             f"{list(self._layout.data_ranks)}: these must be of one of {self._layout.pipe_size} "
                             f"pipeline stages of {per_stage} neighbouring ranks")
        return holders, sharers

    def index(self, p):
        """The place of a parameter's reduce group in comms."""
        return self._index[_group_of(p)] if is_expert(p) else 0

    def over_tensor(self, p):
        """Whether p is an expert's whose group shares experts out over tensor-parallel ranks too."""
        return _group_of(p) in self._over_tensor

    def counted(self, p):
        """Whether a parameter's gradient counts in the norm on this rank: what tensor-parallel ranks hold alike counts
        on the first of them, what several pipeline stages hold on one. Experts that lie over tensor-parallel ranks are
        held by their own group alone."""
        split = getattr(p, "tensor_model_parallel", False) or getattr(p, "model_parallel", False)
        split = split or _group_of(p) in self._over_tensor
        return not getattr(p, "ds_pipe_replicated", False) and bool(split or self._layout.tensor_rank == 0)

    def for_core(self):
        """What the core's Engine takes: (control, ((Comm, id), ...), what sums are divided by)."""
        return self.control, tuple(zip(self.comms, self._first)), self._layout.n_data
