"""Over which ranks an engine reduces which gradients, and which ranks step together.

A gradient is added up over the ranks that hold the same parameter: the data-parallel ones (with those that share a
sequence), for an expert fewer of them. Every sum is divided by the number of data-parallel ranks, so the mean does not
depend on how many ranks share the experts out. Settings, norm and skipping are all ranks' together. Invariant: members
of a group list it at the same place, the data-parallel ranks first, so that they open its communicator together.
"""
import hashlib

import torch
import torch.distributed as dist

from .distributed import engine_comm
from .utils import groups


def is_expert(p):
    """Whether a parameter is an expert's, as DeepSpeed marks it: its attribute `allreduce` is False."""
    return not getattr(p, "allreduce", True)


def prepare_experts(module, data_first):
    """Layers that share experts out make their groups of ranks, unless they have. Collective over all ranks.

    data_first: ``use_data_before_expert_parallelism`` of the configuration."""
    for child in module.modules():
        if hasattr(child, "set_deepspeed_parallelism"):
            child.set_deepspeed_parallelism(data_first)


class Reduction:
    """The communicators of one engine. Collective over all ranks.

    layout: the MpuLayout of this rank. parameters: {name: Parameter}, all that may be asked for.
    Attributes: control (the Comm of all ranks), comms (of each reduce group: the data-parallel ranks, then one for
    each kind of experts that fewer ranks hold). ValueError for an expert whose group does not exist, and where
    data-parallel ranks have different parameters; nothing has changed then.
    """

    def __init__(self, layout, parameters):
        self._layout = layout
        self.control = engine_comm()
        self._index = {}  # group name -> place in comms
        self.comms, self._first = [], []
        self._add(layout.data_ranks)
        self._compare(parameters)
        for name, p in parameters.items():
            group_name = getattr(p, "group_name", None) if is_expert(p) else None
            if is_expert(p) and group_name not in self._index:
                self._index[group_name] = self._add(self._ranks_of(name, group_name))

    def _add(self, ranks):
        """The place of these ranks in comms; experts that all data-parallel ranks hold are nothing special."""
        if self.comms and tuple(ranks) == self._layout.data_ranks:
            return 0
        self.comms.append(engine_comm(ranks))
        self._first.append(ranks[0])
        return len(self.comms) - 1

    def _compare(self, parameters):
        """Before ranks go different ways over them."""
        comm, ranks = self.comms[0], self._layout.data_ranks
        rows = [f"{name} {tuple(p.shape)} {p.dtype} {is_expert(p) and getattr(p, 'group_name', None)}"
                for name, p in parameters.items()]
        digest = hashlib.blake2b("\n".join(rows).encode(), digest_size=8).digest()
        found = torch.zeros(8 * comm.size, dtype=torch.uint8)
        comm.all_gather(found, torch.tensor(list(digest), dtype=torch.uint8), "initialize")
        found = found.view(comm.size, 8).tolist()
        for rank, other in zip(ranks, found, strict=True):
            if other != found[0]:
                raise ValueError(f"ranks initialise different engines: the module's parameters on rank {rank} and on "
                                 f"rank {ranks[0]} differ in names, shapes, dtypes or group_name")

    def _ranks_of(self, name, group_name):
        try:
            ranks = dist.get_process_group_ranks(groups._get_expert_data_parallel_group(group_name))
        except RuntimeError as error:
            raise ValueError(f"parameter {name} is an expert's (allreduce is False) with group_name {group_name!r}: "
                             f"{error}") from None
        if not set(ranks) <= set(self._layout.data_ranks):
            raise ValueError(f"parameter {name} is an expert's of {group_name!r}, with copies on ranks {ranks}, which "
                             f"are not all among the data-parallel ranks {list(self._layout.data_ranks)}")
        return ranks

    def index(self, p):
        """The place of a parameter's reduce group in comms."""
        return self._index[p.group_name] if is_expert(p) else 0

    def counted(self, p):
        """Whether a parameter's gradient counts in the norm on this rank: what tensor-parallel ranks hold alike counts
        on the first of them, what several pipeline stages hold on one."""
        split = getattr(p, "tensor_model_parallel", False) or getattr(p, "model_parallel", False)
        return not getattr(p, "ds_pipe_replicated", False) and bool(split or self._layout.tensor_rank == 0)

    def for_core(self):
        """What the core's Engine takes: (control, ((Comm, id), ...), what sums are divided by)."""
        return self.control, tuple(zip(self.comms, self._first)), self._layout.n_data
