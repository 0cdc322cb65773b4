"""What an engine has that a checkpoint keeps, seen from one rank: its part of every tensor, and everything else.

A tensor is known by (kind, name, place). Its elements are numbered in the order of its memory, so that a part is a run
of numbers. kind: "model" (parameters in their dtype), "master" (their fp32 values where the dtype is another), "state."
and a slot's name (optimizer states), "buffer", "client" (tensors inside other sections), "rng". place: which
tensor- and pipeline-parallel part of the model it is of, two numbers; (0, 0) where there is one. Invariant: over all
ranks the parts that ranks write cover every tensor once.
"""
import importlib
import sys
from dataclasses import dataclass

import torch

from .. import __version__
from ..model import every, flat, is_dense
from ..reduction import is_expert
from ..runtime.zero.parameter import is_zero
from ..utils import groups as rank_groups
from ..whole import whole
from .packing import pack

HERE = (0, 0)  # the place of what is the whole job's
_OPTIONS_OF_A_MODEL = ("params", "param_names", "name", "moe")  # in a parameter group: not for another model's groups


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint. shape, stride: tuples, a dense order of the elements. group: number of the parameter
    group that trains it (of a parameter, its master and its states), else -1."""

    kind: str
    name: str
    place: tuple
    dtype: torch.dtype
    shape: tuple
    stride: tuple
    group: int = -1

    @property
    def key(self):
        """(kind, name, place)"""
        return self.kind, self.name, self.place

    @property
    def numel(self):
        """Elements."""
        return torch.Size(self.shape).numel()


@dataclass
class Part:
    """What a rank holds of a Tensor: elements [begin, begin + len(values)), one dimension, over the memory itself. It
    writes the elements [first, first + n) of them."""

    tensor: Tensor
    begin: int
    values: torch.Tensor
    first: int
    n: int

    def written(self):
        """The elements that this rank writes, without a copy."""
        return self.values[self.first - self.begin:self.first - self.begin + self.n]


def dense_stride(t):
    """The strides of a dense tensor, with those that address nothing (of size 1) set as torch would."""
    if t.is_contiguous():
        return row_major(t.shape)
    stride, run = [0] * t.dim(), 1
    for i in reversed(sorted(range(t.dim()), key=lambda i: (t.shape[i] == 1, -t.stride(i), i))):
        stride[i] = run
        run *= t.shape[i]
    return tuple(stride)


def row_major(shape):
    """The strides of a contiguous tensor."""
    stride, run = [], 1
    for size in reversed(shape):
        stride.append(run)
        run *= max(size, 1)
    return tuple(reversed(stride))


def same_order(shape, a, b):
    """Whether two dense strides number the elements of a shape alike."""
    return all(i == j for i, j, size in zip(a, b, shape) if size != 1) or 0 in shape


class Names:
    """Where each parameter and buffer of an engine's module stands in a checkpoint.

    Experts have the number that they have among all ranks': the n-th expert of a rank that holds k of them, the r-th
    of those that share them out, is number r * k + n.
    """

    def __init__(self, engine):
        self._engine, self._reduction, self._layout = engine, engine._reduction, engine._layout
        self.parameters = every(engine.module, engine._params)  # {name in the module: Parameter}
        self.expert_layers = []  # (prefix, the first one's number, all, group_name of who shares them out or "")
        mixtures = sys.modules.get("deepspeed_c.moe.sharded_moe")
        for name, child in engine.module.named_modules() if mixtures else ():
            if isinstance(child, mixtures.MOELayer):
                n, sharers = child.num_local_experts, child.ep_group_name if child.ep_size > 1 else ""
                first = n * _rank_among_sharers(sharers) if sharers else 0
                prefix = f"{name}.experts.deepspeed_experts.".lstrip(".")
                self.expert_layers.append((prefix, first, n * child.ep_size, sharers))

    def of(self, name):
        """(the name in a checkpoint, the group_name of the ranks that share its experts out: "" where one rank has all,
        None where it is no expert's)."""
        for prefix, first, _, sharers in self.expert_layers:
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and number.isdigit():
                return f"{prefix}{first + int(number)}{dot}{rest}", sharers
        return name, None

    def is_elsewhere(self, name):
        """Whether a name in a checkpoint is of an expert that other ranks have."""
        for prefix, _, total, sharers in self.expert_layers:
            number = name.removeprefix(prefix).partition(".")[0]
            if sharers and name.startswith(prefix) and number.isdigit() and int(number) < total:
                return True
        own, mark, rank = name.rpartition("#")
        return bool(mark and rank.isdigit() and own in self.parameters and is_expert(self.parameters[own]))

    def of_parameter(self, name, p):
        """(the name in a checkpoint, its place, the Comm of the ranks that hold the same)."""
        index = self._reduction.index(p)
        full, numbered = self.of(name)
        if is_expert(p) and numbered is None:  # of a layer of the caller's own
            full = f"{name}#{_rank_among_sharers(p.group_name)}"
        return full, self.place(self._reduction.over_tensor(p)), self._reduction.comms[index]

    def place(self, over_tensor=False):
        """This rank's part of the model; over_tensor: of experts that tensor-parallel ranks share out."""
        return 0 if over_tensor else self._layout.tensor_rank, self._layout.pipe_rank

    def writes_buffer(self, group_name):
        """Whether this rank's values of a buffer (of an expert, where group_name says so) are those that count."""
        if not group_name:
            return self._layout.data_ranks[0] == self._engine.global_rank
        ranks = torch.distributed.get_process_group_ranks(rank_groups._get_expert_data_parallel_group(group_name))
        return ranks[0] == self._engine.global_rank


def _rank_among_sharers(group_name):
    try:
        group = rank_groups._get_expert_parallel_group(group_name)
    except RuntimeError:  # one rank has all
        return 0
    return torch.distributed.get_group_rank(group, torch.distributed.get_rank())


class Contents:
    """What `engine` has on this rank.

    Attributes: names (Names), parts ([Part], this rank's), sections ({name: value for JSON}, of rank 0; empty on the
    others), own ({name: value for JSON}, of this rank: "scalars" and "rng"), objects (what sections have that JSON and
    tensors have not). client_state: the caller's. exclude_frozen: without parameters that are not trained. Nothing is
    copied but what the sections say. Local.
    """

    def __init__(self, engine, client_state=None, exclude_frozen=False):
        self._engine = engine
        self.names = Names(engine)
        self.parts, self.sections, self.own, self.objects = [], {}, {}, []
        self._shared = {}  # id of a Comm -> (Comm, parts that all its ranks hold alike)
        self._add_parameters(exclude_frozen)
        self._share_out()
        self._add_buffers()
        self._add_rng()
        if engine.global_rank == 0:
            self._add_sections(client_state, exclude_frozen)

    def local(self, kind, name):
        """The Part of that kind and name; None where this rank has none."""
        return next((part for part in self.parts if (part.tensor.kind, part.tensor.name) == (kind, name)), None)

    def mine(self, tensor):
        """(first, n) of the elements of a Tensor that this rank writes."""
        part = next((part for part in self.parts if part.tensor == tensor), None)
        return (0, 0) if part is None else (part.first, part.n)

    # ---- tensors ----

    def _add_parameters(self, exclude_frozen):
        engine = self._engine
        trained = {id(p): i for i, p in enumerate(engine._params)} if engine._run is not None else {}
        scalars = []
        for name, p in self.names.parameters.items():
            i = trained.get(id(p))
            if exclude_frozen and i is None and not p.requires_grad:
                continue
            name, place, comm = self.names.of_parameter(name, p)
            group = -1 if i is None else engine._run.group_of(i)
            tensor = tensor_of("model", name, place, whole(p), group)
            begin, values = held(p)
            if i is None:
                self._add(Part(tensor, begin, values, begin, len(values)), comm, not is_zero(p) or p.ds_home.shared)
            else:
                first, n = engine._core.part(i)
                alike = engine.zero_optimization_stage() == 0
                self._add(Part(tensor, begin, values, first, n), comm, alike)
                self._add_states(i, tensor, comm, alike)
                numbers = engine._run.scalars_of(i)
                if numbers and first == 0 and n and (not alike or comm.rank == 0):
                    scalars.append([name, place, _packed_numbers(numbers, name)])
        self.own["scalars"] = scalars

    def _add_states(self, i, tensor, comm, alike):
        """The master and the states of trained parameter i."""
        run = self._engine._run
        slots = {f"state.{slot}": value for slot, value in run.slots_of(i).items()}
        if run.master_of(i) is not None:
            slots["master"] = run.master_of(i)
        first, n = self._engine._core.part(i)
        for kind, value in slots.items():
            values = value.detach()
            if n == tensor.numel and value.shape != tensor.shape or not is_dense(values):
                values = values.contiguous()
            if n == tensor.numel:  # whole here, so it may be of any shape
                own = tensor_of(kind, tensor.name, tensor.place, values, tensor.group)
                self._add(Part(own, 0, flat(values), 0, own.numel), comm, alike)
            else:
                own = Tensor(kind, tensor.name, tensor.place, value.dtype, tensor.shape, tensor.stride, tensor.group)
                self._add(Part(own, first, flat(values), first, n), comm, alike)

    def _add(self, part, comm, alike):
        """alike: all ranks of comm hold the same values of it."""
        self.parts.append(part)
        if alike:
            self._shared.setdefault(id(comm), (comm, []))[1].append(part)

    def _share_out(self):
        """Of what ranks hold alike each writes as many bytes."""
        for comm, parts in self._shared.values():
            total, at = sum(part.tensor.numel * part.tensor.dtype.itemsize for part in parts), 0
            for part in parts:
                size = part.tensor.dtype.itemsize
                edges = [min(max(-(-(total * r // comm.size - at) // size), 0), part.tensor.numel)
                         for r in (comm.rank, comm.rank + 1)]
                part.first, part.n = edges[0], edges[1] - edges[0]
                at += part.tensor.numel * size

    def _add_buffers(self):
        for name, buffer in buffers_of(self._engine.module):
            name, group_name = self.names.of(name)
            tensor = tensor_of("buffer", name, self.names.place(), buffer)
            values = buffer.detach().contiguous() if not is_dense(buffer) else buffer.detach()
            n = tensor.numel if self.names.writes_buffer(group_name) else 0
            self.parts.append(Part(tensor, 0, flat(values.cpu()), 0, n))

    def _add_small(self, kind, tensors):
        for name, value in tensors.items():
            tensor = tensor_of(kind, name, HERE, value)
            self.parts.append(Part(tensor, 0, value.flatten(), 0, tensor.numel))

    def _add_rng(self):
        rank, tensors = str(self._engine.global_rank), {}
        self.own["rng"] = {rank: pack(rng_state(), tensors, [])}
        for name in list(tensors):
            tensors[f"{rank}.{name}"] = tensors.pop(name)
        self._add_small("rng", tensors)

    # ---- sections ----

    def _add_sections(self, client_state, exclude_frozen):
        engine, tensors = self._engine, {}

        def packed(value):
            return pack(value, tensors, self.objects)

        self.sections = {
            "made_by": f"deepspeed_c {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}",
            "counters": {name: getattr(engine, name) for name in COUNTERS},
            "world": world_of(engine),
            "scaler": None if engine._run is None else packed({
                "dynamic": engine.dynamic_loss_scale(), **engine._run.scaler}),
            "optimizer": None if engine._run is None else type(engine.basic_optimizer).__name__,
            "groups": packed([] if engine._run is None else [
                {key: value for key, value in group.items() if key not in _OPTIONS_OF_A_MODEL}
                for group in engine.basic_optimizer.param_groups]),
            "schedule": packed(_schedule_of(engine)),
            "loader": packed(_cursor_of(engine)),
            "config": packed(engine.config),
            "client": packed(dict(client_state or {})),
            "modules": {name: type(child).__qualname__ for name, child in engine.module.named_modules()},
            "tied": tied_names(engine.module),
            "extra": packed({name: child.get_extra_state() for name, child in extras_of(engine.module)}),
            "frozen_excluded": bool(exclude_frozen),
        }
        self._add_small("client", tensors)


def _packed_numbers(numbers, name):
    tensors, objects = {}, []
    packed = pack(numbers, tensors, objects)
    if tensors or objects:
        raise NotImplementedError(f"the optimizer's state of {name} has {', '.join(map(repr, numbers))}, and one of "
                                  "them is neither a number nor of the parameter's shape: saving it is not yet")
    return packed


COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def tensor_of(kind, name, place, t, group=-1):
    """The Tensor that describes a dense t."""
    return Tensor(kind, name, place, t.dtype, tuple(t.shape), dense_stride(t) if is_dense(t) else row_major(t.shape),
                  group)


def held(p):
    """(first element, values) of a parameter in this rank's memory: one dimension, the memory itself."""
    return p.ds_home.held(p) if is_zero(p) else (0, flat(p))


def buffers_of(module):
    """(name, tensor) of the buffers that a state dict has, each once."""
    seen = set()
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}".lstrip("."), buffer


def extras_of(module):
    """(name, module) of those that keep something else in a state dict."""
    return [(name, child) for name, child in module.named_modules()
            if type(child).get_extra_state is not torch.nn.Module.get_extra_state]


def tied_names(module):
    """{another name of a parameter: the one that it is kept under}"""
    first, tied = {}, {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), name) != name:
            tied[name] = first[id(p)]
    return tied


def world_of(engine):
    """Who has made a checkpoint: numbers of ranks, stage, dtype."""
    layout = engine._layout
    return {"ranks": engine.world_size, "data": layout.n_data, "tensor": layout.tensor_size, "pipe": layout.pipe_size,
            "copies": len(layout.data_ranks), "stage": engine.zero_optimization_stage(),
            "dtype": engine._model_dtype()}


def rng_state():
    """The state of the random generators that a script may draw from on this rank."""
    state = {"torch": torch.get_rng_state()}
    python, numpy = (importlib.import_module(name) for name in ("random", "numpy.random"))
    version, words, gauss = python.getstate()
    state["python"] = (version, torch.tensor(words, dtype=torch.int64), gauss)
    state["numpy"] = numpy.get_state(legacy=False)
    return state


def set_rng_state(state):
    """Undoes rng_state()."""
    python, numpy = (importlib.import_module(name) for name in ("random", "numpy.random"))
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    python.setstate((version, tuple(words.tolist()), gauss))
    numpy.set_state(state["numpy"])


def _schedule_of(engine):
    schedule = engine.lr_scheduler
    if schedule is None or not hasattr(schedule, "state_dict"):
        return None
    return {"class": type(schedule).__name__, "state": schedule.state_dict()}


def _cursor_of(engine):
    """Where the engine's own loader is; None without one, and where its order is not ours."""
    try:
        return None if engine.training_dataloader is None else engine.training_dataloader.state_dict()
    except NotImplementedError:
        return None
