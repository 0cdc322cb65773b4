"""What stands in DeepSpeed's files, for one tensor- and pipeline-parallel part of a model.

Decides which numbers of which file are which parameter's value, master or state. Invariant: a form that is not known is
an error that names the file; nothing of an optimizer is left out silently.
"""
import math

import torch

from .._core import CheckpointError
from ..model import flat, is_dense
from .contents import Tensor, dense_stride, row_major
from .deepspeed_files import DynamicLossScaler, Piece
from .deepspeed_layout import spans_of_group, spans_of_subgroup
from .packing import pack

_EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."
OWN_KEY = "deepspeed_c"  # key of what this engine adds to a file with the module's values
_OF_ZERO = "optimizer_state_dict"  # key of everything in an optimizer's file, and of torch's part there at stage 3
_NOT_OPTIONS = ("params", "name", "moe", "step")  # in a parameter group: this model's, and states


class Place:
    """source: the DeepSpeedSource that gets the tensors. number: of the place, in the files' names. models:
    {data-parallel rank: File}, of stage 3, else {None: File}."""

    def __init__(self, source, number, models):
        self.source, self.number, self.models = source, number, models
        self.sharded = None not in models
        self.file = models[min(models) if self.sharded else None]
        self.state = self.file.value
        self.module = self.file.get("module")
        if self.module is None:
            raise NotImplementedError(f"{self.file.path} has no module, so it is of a pipeline: not yet")
        n_tensor = int(self.state.get("mp_world_size") or 1)
        self.place = number % n_tensor, number // n_tensor
        self.shapes = self.state.get("param_shapes")
        self.tied = dict(self.state.get("shared_params") or {})
        self.experts = source.expert_files(number)
        config = self.state.get("ds_config") or {}
        self.optimizers = source.optimizer_files(number, bool((config.get("bf16") or {}).get("enabled")))

    def add(self):
        """Everything of this place."""
        self._add_module()
        if self.sharded:
            self._add_stage_3()
        elif self.shapes is None:
            self._add_unsharded()
        else:
            self._add_stage_1_or_2()
        self.source.sections.setdefault("tied", self.tied)

    # ---- the module ----

    def _add_module(self):
        """Buffers; parameters, where they are whole; other names of parameters."""
        buffers, seen, extra = set(self.state.get("buffer_names") or ()), {}, {}
        for file, values in ((self.file, self.module), *((file, file.value) for _, file in self.experts)):
            for name, value in values.items():
                if not isinstance(value, torch.Tensor):
                    extra[name.removesuffix("_extra_state").removesuffix(".")] = value
                    continue
                same = (value.data_ptr(), value.dtype, value.shape) if value.numel() else name
                if name not in buffers and seen.setdefault(same, name) != name:
                    self.tied[name] = seen[same]
                elif name not in self.tied and (name in buffers or not self.sharded):
                    self._add_whole("buffer" if name in buffers else "model", name, value, file)
        if "extra" not in self.source.sections:
            self.source.sections["extra"] = self.source.packed(extra, self.file, "extra state")

    def _add_whole(self, kind, name, value, file, group=-1):
        dense = is_dense(value)
        tensor = Tensor(kind, name, self.place, value.dtype, tuple(value.shape),
                        dense_stride(value) if dense else row_major(value.shape), group)
        values = flat(value) if dense else value.detach().contiguous().view(-1)
        self.source.add(tensor, [Piece(0, values, file, value)])

    # ---- what trained parameters have ----

    def _add_trained(self, group, shapes, spans, held, weights, slots):
        """Masters and states of parameters that lie in `spans`.

        held: [File] of the ranks that hold them. weights, slots: of each rank its fp32 numbers, and {name: state}.
        """
        runs, numbers = _sort_out(slots, held)
        for name, shape in shapes.items():
            own = self.source.tensors.get(("model", name, self.place))
            if own is not None:
                self.source.regroup(own, group)
            if own is None or own.dtype != torch.float32:
                self._add_spans("master", name, shape, group, spans[name], held, weights)
            for slot, values in runs.items():
                self._add_spans(f"state.{slot}", name, shape, group, spans[name], held, values)
            if numbers:
                self.source.sections["scalars"].append([name, self.place, pack(numbers, {}, [])])

    def _add_spans(self, kind, name, shape, group, spans, held, values, dtype=None):
        """dtype: what reading rounds to; None: as it lies there."""
        if spans and spans[-1].rank >= len(held):
            raise CheckpointError(f"{held[0].path}: the parts of group {group} are too short for {name}")
        tensor = Tensor(kind, name, self.place, dtype or values[0].dtype, tuple(shape), row_major(shape), group)
        self.source.add(tensor, [Piece(span.begin, values[span.rank].detach()[span.offset:span.offset + span.n],
                                        held[span.rank]) for span in spans], dtype not in (None, torch.float32))

    def _add_common(self, options, scaler):
        """What an optimizer keeps beside tensors."""
        groups = [{key: value for key, value in group.items() if key not in _NOT_OPTIONS} for group in options]
        self.source.sections.update(groups=self.source.packed(groups, self.file, "param_groups"), scaler=scaler)

    def _ranks(self):
        """The optimizer's files of all data-parallel ranks in order, [] where there are none; CheckpointError where
        one is missing."""
        if not self.optimizers:
            return []
        n = int(self.state.get("dp_world_size") or len(self.optimizers))
        missing = [rank for rank in range(n) if rank not in self.optimizers]
        if missing:
            there = next(iter(self.optimizers.values())).path
            raise CheckpointError(f"{self.source.folder}: there are {n} data-parallel ranks, and the file of rank "
                                  f"{missing[0]} is missing ({there} is there)")
        return [self.optimizers[rank] for rank in range(n)]

    # ---- stages 1 and 2 ----

    def _add_stage_1_or_2(self):
        ranks = self._ranks()
        if not ranks:
            return
        states = [file.get(_OF_ZERO) for file in ranks]
        if isinstance(ranks[0].get(_OF_ZERO, "base_optimizer_state"), list):
            raise NotImplementedError(f"{ranks[0].path} is an elastic checkpoint (zero_optimization.elastic_checkpoint)"
                                      ": not yet")
        options = ranks[0].get(_OF_ZERO, "base_optimizer_state", "param_groups")
        for g, shapes in enumerate(self.shapes):
            for numbers, rename in self._holders(len(ranks), options[g]):
                held = [ranks[rank] for rank in numbers]
                self._add_group(g, {rename(name): shape for name, shape in shapes.items()}, held)
        self._add_common(options, _scaler(states[0].get("loss_scaler")))

    def _holders(self, n_ranks, options):
        """[(ranks that hold a group, what the names of its parameters become)]: one, of experts one per part of them.
        """
        if not options.get("moe"):
            return [(range(n_ranks), str)]
        n = min(int(str(options["name"]).rpartition("_")[2]), n_ranks)  # "ep_size_2"
        data_first = (self.state.get("ds_config") or {}).get("use_data_before_expert_parallelism")
        return [(range(e * (n_ranks // n), (e + 1) * (n_ranks // n)) if data_first else range(e, n_ranks, n),
                 self._rename(e, n)) for e in range(n)]

    def _counts(self):
        """{prefix: number of experts} of each layer that has some."""
        counts = {}
        for _, file in self.experts:
            prefix = next(iter(file.value)).partition(_EXPERTS)[0]
            counts[prefix] = counts.get(prefix, 0) + 1
        return counts

    def _rename(self, sharer, n_sharers):
        """A function from the name that an expert's parameter has on the sharer-th of n_sharers ranks to the one among
        all."""
        counts = self._counts()

        def rename(name):
            prefix, _, rest = name.partition(_EXPERTS)
            number, dot, rest = rest.partition(".")
            if prefix not in counts or not number.isdigit():
                return name
            return f"{prefix}{_EXPERTS}{sharer * (counts[prefix] // n_sharers) + int(number)}{dot}{rest}"

        return rename

    def _add_group(self, g, shapes, held):
        states = [file.get(_OF_ZERO) for file in held]
        weights = [file.get(_OF_ZERO, "single_partition_of_fp32_groups", g) for file in held]
        slots = []
        for file in held:
            base = file.get(_OF_ZERO, "base_optimizer_state")
            options = base["param_groups"][g]
            slot = dict(base["state"].get(options["params"][0], {}))
            if slot and "step" in options:
                slot.setdefault("step", options["step"])
            slots.append(slot)
        padded = "zero_stage" not in states[0]  # saved by the optimizer for bf16 alone, which keeps the zeros
        part = len(weights[0]) + (0 if padded else int(held[0].get(_OF_ZERO, "group_paddings", g)))
        gaps = states[0].get("param_alignment_paddings")
        spans = spans_of_group(shapes, part, gaps[g] if gaps else None)
        self._add_trained(g, shapes, spans, held, weights, slots)

    # ---- stage 3 ----

    def _add_stage_3(self):
        held = [self.models[rank] for rank in sorted(self.models)]
        for name, shape in (self.state.get("frozen_param_shapes") or {}).items():
            values = [file.get("frozen_param_fragments", name).view(-1) for file in held]
            self._add_spans("model", name, shape, -1, spans_of_subgroup({name: shape}, len(held))[name], held, values)
        ranks = self._ranks()
        if ranks and len(held) != len(ranks):
            raise CheckpointError(f"{self.source.folder}: {len(ranks)} data-parallel ranks have written "
                                  f"{ranks[0].path}, and {len(held)} {held[0].path}")
        if not ranks:
            return
        inner = [file.get(_OF_ZERO, _OF_ZERO) for file in ranks]
        group_of = {number: g for g, group in enumerate(inner[0]["param_groups"]) for number in group["params"]}
        for k, shapes in enumerate(self.shapes or ()):
            weights = [file.get(_OF_ZERO, "fp32_flat_groups", k) for file in ranks]
            spans, g = spans_of_subgroup(shapes, len(ranks)), group_of.get(k, 0)
            for name, shape in shapes.items():
                dtype = self.module[name].dtype if name in self.module else torch.float32
                self._add_spans("model", name, shape, g, spans[name], ranks, weights, dtype)
            self._add_trained(g, shapes, spans, ranks, weights, [each["state"].get(k, {}) for each in inner])
        self._add_common(inner[0]["param_groups"], _scaler(ranks[0].get(_OF_ZERO).get("loss_scaler")))

    # ---- stage 0 ----

    def _add_unsharded(self):
        experts = self.source.expert_optimizers(self.number)
        for e, file in enumerate(experts):
            self._add_whole_optimizer(file, file.get("optimizer"), e, len(experts))
        if not experts:
            self._add_whole_optimizer(self.file, self.state.get("optimizer"), 0, 1)

    def _add_whole_optimizer(self, file, state, sharer, n_sharers):
        """The file of the sharer-th of n_sharers ranks that share experts out; the first's has what is no expert's."""
        if state is None:
            return
        inner = state.get(_OF_ZERO, state)
        if "state" not in inner or "param_groups" not in inner:
            raise CheckpointError(f"{file.path}: optimizer has neither state nor param_groups")
        flat, apart = state.get("fp32_groups_flat"), state.get("fp32_groups")
        n_params = [len(part) for part in apart] if apart is not None else [
            len(group["params"]) for group in inner["param_groups"]]
        rename = self._rename(sharer, n_sharers)
        for g, names in enumerate(self._names(n_params, flat, n_sharers)):
            names, numbers = [rename(name) for name in names], inner["param_groups"][g]["params"]
            chosen = [name for name in names if sharer == 0 or _EXPERTS in name]
            if flat is not None and chosen:
                models = [self.source.tensors.get(("model", name, self.place)) for name in names]
                shapes = {name: of.shape if of else flat[g].shape for name, of in zip(names, models)}
                n = sum(math.prod(shape) for shape in shapes.values())
                self._add_trained(g, shapes, spans_of_group(shapes, max(n, 1)), [file], [flat[g]],
                                  [inner["state"].get(numbers[0], {})])
            elif flat is None:
                for j, name in enumerate(names):
                    if name in chosen:
                        self._add_alone(file, name, g, inner["state"].get(numbers[j], {}), apart and apart[g][j])
        if sharer == 0:
            self._add_common(inner["param_groups"], _plain_scaler(state))

    def _names(self, n_params, flat, n_sharers):
        """[[name]] per group, as one of n_sharers ranks has them; numbers where nobody says names."""
        known = self.source.names
        if known is None:
            start, what = [sum(n_params[:g]) for g in range(len(n_params))], "parameter" if flat is None else "group"
            return [[f"({what} {start[g] + j})" for j in range(n)] for g, n in enumerate(n_params)]
        counts = {prefix: n // n_sharers for prefix, n in self._counts().items()}
        known = [[_with_experts(group, counts) for group in names] for names in known]
        for names in known:
            if [len(group) for group in names] == n_params or flat is not None and len(names) == len(n_params):
                return names
        raise CheckpointError(f"{self.file.path}: the optimizer has groups of {n_params} parameters, and the engine "
                              f"groups of {[len(group) for group in known[0]]}")

    def _add_alone(self, file, name, g, state, master):
        """A parameter whose states have its shape."""
        own = self.source.tensors.get(("model", name, self.place))
        if own is not None:
            self.source.regroup(own, g)
        if master is not None and (own is None or own.dtype != torch.float32):
            self._add_whole("master", name, master, file, g)
        numbers = {}
        for slot, value in state.items():
            if isinstance(value, torch.Tensor) and (value.dim() or own is not None and not own.shape and
                                                    slot != "step"):
                self._add_whole(f"state.{slot}", name, value, file, g)
            elif value is not None:
                _check(value, file, slot)
                numbers[slot] = value
        if numbers:
            self.source.sections["scalars"].append([name, self.place, pack(numbers, {}, [])])


def _check(value, file, name):
    """CheckpointError for a number that is a damaged tensor."""
    if isinstance(value, torch.Tensor):
        file.check(value, name)


def _sort_out(slots, held):
    """({name: [tensor of each rank]}, {name: number}) of a group's states. slots: of each rank, from these files."""
    runs, numbers = {}, {}
    for name, value in slots[0].items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            _check(value, held[0], name)
            numbers[name] = value
            continue
        runs[name] = [slot.get(name) for slot in slots]
        if any(not isinstance(each, torch.Tensor) or each.dim() != 1 for each in runs[name]):
            raise NotImplementedError(f"{held[0].path}: state {name} has the shape {tuple(value.shape)}, which is not "
                                      "known here")
    return runs, numbers


def _with_experts(names, counts):
    """The names that a rank has which holds counts[prefix] experts of each layer, from those of a rank that may hold
    others: expert after expert, as a module lists them."""
    found, layers = [], {}
    for name in names:
        prefix, _, rest = name.partition(_EXPERTS)
        number, dot, rest = rest.partition(".")
        if prefix not in counts or not number.isdigit():
            found.append(name)
            continue
        if prefix not in layers:
            layers[prefix] = number, []
            found.append(prefix)
        if layers[prefix][0] == number:
            layers[prefix][1].append(rest)
    return [name for each in found for name in (
        [each] if each not in layers else [f"{each}{_EXPERTS}{i}.{rest}" for i in range(counts[each])
                                           for rest in layers[each][1]])]


def _scaler(saved):
    """The loss scaler of a file as the engine knows one; None for a scale that stays."""
    if not isinstance(saved, DynamicLossScaler):
        return None
    return {"dynamic": True, "scale": saved.cur_scale, "hysteresis_left": saved.cur_hysteresis,
            "iter": saved.cur_iter, "last_overflow": saved.last_overflow_iter}


def _plain_scaler(state):
    """The same from a run without ZeRO, whose scale halves at the first overflow."""
    if not state.get("dynamic_loss_scale"):
        return None
    return {"dynamic": True, "scale": state["cur_scale"], "hysteresis_left": 1, "iter": state["cur_iter"],
            "last_overflow": state["last_overflow_iter"]}
