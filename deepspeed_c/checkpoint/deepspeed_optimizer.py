"""What an engine's optimizer has, as DeepSpeed's files hold it at each stage.

Decides which numbers a rank writes of masters and states, and the dicts around them. Invariant: all ranks go through
groups and kinds in the same order, because most of them are exchanged.
"""
from collections import OrderedDict

import torch

from ..optimizer import CoreOptimizer
from ..whole import whole
from . import deepspeed_files as files
from .deepspeed_exchange import Exchange, in_logical_order
from .deepspeed_layout import part_of_group, part_of_parameter, spans_of_group, spans_of_subgroup, subgroups
from .packing import unpack

LAYOUT_OF = "0.19.8"  # the version of DeepSpeed whose files these are like
_NATIVE = 'checkpoint.format "native" can'
_CALL = "save_checkpoint"


class OptimizerStates:
    """Of `engine`, whose Contents are given.

    ranges: {name: [(first, n) of each rank]} of the elements of parameters that ranks give. slots: {"state.<slot>" or
    "master": dtype} of all ranks. scalars: {name: packed dict} of all parameters. Attribute: groups ([{name: shape}],
    what is trained in the optimizer's order).
    """

    def __init__(self, engine, contents, ranges, slots, scalars):
        self._engine, self._ranges, self._scalars = engine, ranges, scalars
        self._has_masters = slots.pop("master", None) is not None
        self._slots = sorted(slots.items())
        self._stage = engine.zero_optimization_stage()
        self._parts = {(part.tensor.kind, part.tensor.name): part for part in contents.parts}
        trained = {id(p) for p in engine._params}
        known = {id(p): (name, *contents.names.of_parameter(name, p)) for name, p in contents.names.parameters.items()}
        names = {key: name for key, (_, name, _, _) in known.items()}
        self._own_names = {name: own for own, name, _, _ in known.values()}
        self._all_names = [[names.get(id(p)) for p in group["params"]] for group in self._options_of]
        holders = [{id(known[id(p)][3]): known[id(p)][3] for p in group["params"] if id(p) in trained}
                   for group in self._options_of]
        if any(len(comms) > 1 for comms in holders):
            raise NotImplementedError("a parameter group has experts and others: DeepSpeed's layout cannot say so; "
                                      f"{_NATIVE}, or moe.utils.configure_moe_param_groups() makes groups of their own")
        self._comms = [next(iter(comms.values()), engine._reduction.comms[0]) for comms in holders]
        self.groups = [OrderedDict((names[id(p)], tuple(whole(p).shape)) for p in group["params"]
                                   if id(p) in trained and (whole(p).numel() or self._each_alone))
                       for group in self._options_of]

    @property
    def _options_of(self):
        return self._engine.basic_optimizer.param_groups

    def check(self):
        """NotImplementedError for what this layout cannot hold: the same on all ranks that know of it."""
        if self._each_alone:
            return
        for shapes in self.groups:
            for name in shapes:
                for kind, _ in self._slots:
                    self._part(kind, name)
            if shapes:
                self._numbers(shapes)

    @property
    def _each_alone(self):
        """Whether each parameter has states of its own: at stage 0, but for FusedAdam in 16 bit, which DeepSpeed runs
        over a group as one run of numbers."""
        fused = type(self._engine.basic_optimizer).__name__ == "FusedAdam" and (
            self._engine.fp16_enabled() or self._engine.bfloat16_enabled())
        return not self._stage and not fused

    def collect(self):
        """This rank's dict for its optimizer's file; at stage 0 what the file of the module has. Collective."""
        if self._stage == 0:
            return self._unsharded()
        return self._per_parameter() if self._stage == 3 else self._per_group()

    def shapes(self):
        """[{name: shape}] as a file lists them, with the names that this rank has; None at stage 0."""
        if not self._stage:
            return None
        parts = self.groups if self._stage < 3 else [shapes for group in self._subgroups() for shapes in group]
        return [OrderedDict((self._own_names[name], torch.Size(shape)) for name, shape in shapes.items())
                for shapes in parts]

    def _subgroups(self):
        """[[{name: shape}]]: each group as stage 3 cuts it."""
        limit = self._engine.zero_sub_group_size()
        found = []
        for shapes, comm in zip(self.groups, self._comms):
            names, sizes = list(shapes), [torch.Size(shape).numel() for shape in shapes.values()]
            found.append([OrderedDict((names[i], shapes[names[i]]) for i in numbers)
                          for numbers in subgroups(sizes, comm.size, limit)])
        return found

    # ---- numbers ----

    def _part(self, kind, name):
        """This rank's Part of a parameter's, None where it has none; kind "weights": of its master, or where it needs
        none of its values."""
        of = self._parts["model", name]
        if kind == "weights":
            masters = self._has_masters and of.tensor.dtype != torch.float32 and of.tensor.numel
            return self._parts.get(("master", name)) if masters else of
        part = self._parts.get((kind, name))
        if part is None and of.n:
            raise NotImplementedError(f"parameter {name} has no state {kind.removeprefix('state.')} and others have: "
                                      f"DeepSpeed's layout cannot say so; {_NATIVE}")
        if part is not None and part.tensor.shape != of.tensor.shape:
            raise NotImplementedError(f"state {kind.removeprefix('state.')} of {name} has the shape "
                                      f"{part.tensor.shape}: DeepSpeed's layout does not know it; {_NATIVE}")
        return part

    def _gathered(self, kind, dtype, comm, shapes, spans, size):
        """The `size` numbers of a kind that this rank, one of comm, writes of some parameters. Collective."""
        parts = {name: self._part(kind, name) for name in shapes}
        if self._stage < 3 and all(part is not None and part.tensor.kind == "model" for part in parts.values()):
            result = torch.zeros(size, dtype=dtype)  # weights that are whole here
            for name, part in parts.items():
                values = _laid(part).reshape(-1)
                for span in spans[name]:
                    if span.rank == comm.rank:
                        result[span.offset:span.offset + span.n].copy_(values[span.begin:span.begin + span.n])
            return result
        ranges = {name: self._ranges[name] for name in shapes}
        values = {name: in_logical_order(comm, self._parts["model", name].tensor, part, ranges[name], dtype, _CALL)
                  for name, part in parts.items()}
        return Exchange(comm, ranges, spans, size).run(values, dtype, _CALL)

    def _states(self, comm, shapes, spans, size):
        """{name: value} of a group's states."""
        if not shapes:
            return {}
        return {**self._numbers(shapes), **{
            kind.removeprefix("state."): self._gathered(kind, dtype, comm, shapes, spans, size)
            for kind, dtype in self._slots}}

    def _numbers(self, names):
        """What states have beside tensors of their parameter's shape: one value for all of a group."""
        first = next(iter(names))
        for name in names:
            if self._scalars.get(name) != self._scalars.get(first):
                raise NotImplementedError(f"{name} has {self._scalars.get(name)} and {first}, of the same parameter "
                                          f"group, {self._scalars.get(first)}: DeepSpeed's layout cannot say so; "
                                          f"{_NATIVE}")
        return self._number(first)

    def _number(self, name):
        numbers = unpack(self._scalars.get(name, {}), None, None)
        if "step" in numbers and isinstance(self._engine.basic_optimizer, CoreOptimizer):
            numbers["step"] = int(numbers["step"])  # as DeepSpeed's own optimizers count
        return numbers

    def _options(self, numbers):
        """The groups as a state dict has them. numbers: [[number]], what stands in each."""
        return [{**{key: value for key, value in group.items() if key not in ("params", "param_names")},
                 "params": list(own)} for group, own in zip(self._options_of, numbers)]

    # ---- stages 1 to 3 ----

    def _per_group(self):
        weights, states, paddings, slices = [], {}, [], []
        for g, (shapes, comm) in enumerate(zip(self.groups, self._comms)):
            n = sum(torch.Size(shape).numel() for shape in shapes.values())
            size = part_of_group(n, comm.size)
            own = min(max(n - comm.rank * size, 0), size)
            spans = spans_of_group(shapes, max(size, 1))
            weights.append(self._gathered("weights", torch.float32, comm, shapes, spans, size)[:own].clone())
            states[g] = self._states(comm, shapes, spans, size)
            paddings.append(size - own)
            slices.append(OrderedDict(
                (self._own_names[name], files.fragment_address(numel=span.n, start=span.offset))
                for name, found in spans.items() for span in found if span.rank == comm.rank))
        return {**self._scaling(), "clip_grad": self._engine.gradient_clipping(),
                "base_optimizer_state": {"state": states, "param_groups": self._options([g] for g in states)},
                "single_partition_of_fp32_groups": weights, "zero_stage": files.ZeroStageEnum(self._stage),
                "group_paddings": paddings, "partition_count": [comm.size for comm in self._comms],
                "ds_version": LAYOUT_OF, "param_slice_mappings": slices}

    def _per_parameter(self):
        weights, states, numbers = [], {}, []
        for group, comm in zip(self._subgroups(), self._comms):
            numbers.append(range(len(weights), len(weights) + len(group)))
            for shapes in group:
                size = sum(part_of_parameter(torch.Size(shape).numel(), comm.size) for shape in shapes.values())
                spans = spans_of_subgroup(shapes, comm.size)
                states[len(weights)] = self._states(comm, shapes, spans, size)
                weights.append(self._gathered("weights", torch.float32, comm, shapes, spans, size))
        return {**self._scaling(), "zero_stage": files.ZeroStageEnum.weights,
                "partition_count": self._engine._reduction.comms[0].size,
                "optimizer_state_dict": {"state": states, "param_groups": self._options(numbers)},
                "fp32_flat_groups": weights}

    def _scaling(self):
        engine = self._engine
        if not engine.dynamic_loss_scale():
            return {"loss_scaler": files.LossScaler(cur_scale=engine.loss_scale(), dynamic=False),
                    "dynamic_loss_scale": False, "overflow": engine._last_step_skipped}
        now = engine._run.scaler
        config = {name: engine._config.get(f"fp16.{name}") for name in (
            "loss_scale_window", "min_loss_scale", "hysteresis", "consecutive_hysteresis")}
        scaler = files.DynamicLossScaler(
            cur_scale=now["scale"], cur_iter=int(now["iter"]), last_overflow_iter=int(now["last_overflow"]),
            scale_factor=2.0, scale_window=config["loss_scale_window"], min_scale=config["min_loss_scale"],
            delayed_shift=config["hysteresis"], cur_hysteresis=int(now["hysteresis_left"]),
            consecutive_hysteresis=config["consecutive_hysteresis"], raise_error_at_min_scale=True,
            dtype=torch.float16, dynamic=True)
        return {"loss_scaler": scaler, "dynamic_loss_scale": True, "overflow": engine._last_step_skipped}

    # ---- stage 0 ----

    def _unsharded(self):
        engine = self._engine
        if not (engine.fp16_enabled() or engine.bfloat16_enabled()):
            return self._each(self._all_names)
        masters = [[_laid(self._part("weights", name)).float() for name in shapes] for shapes in self.groups]
        now = engine._run.scaler
        scaling = {"dynamic_loss_scale": engine.dynamic_loss_scale(), "cur_scale": now["scale"],
                   "cur_iter": int(now["iter"])}
        if engine.dynamic_loss_scale():
            scaling.update(last_overflow_iter=int(now["last_overflow"]), scale_factor=2.0,
                           scale_window=engine._config.get("fp16.loss_scale_window"))
        if not self._each_alone:
            return {**scaling, "clip_grad": engine.gradient_clipping(), "optimizer_state_dict": self._runs(),
                    "fp32_groups_flat": [torch.cat([value.reshape(-1) for value in group]) for group in masters]}
        return {**scaling, "fp32_groups": masters, "optimizer_state_dict": self._each(map(list, self.groups))}

    def _each(self, names):
        """The state dict with states in the shapes of parameters. names: [[name]] by group."""
        states, numbers = {}, []
        for group in names:
            numbers.append(range(numbers[-1].stop if numbers else 0, (numbers[-1].stop if numbers else 0) + len(group)))
            for number, name in zip(numbers[-1], group):
                found = {kind.removeprefix("state."): _laid(self._parts[kind, name]) for kind, _ in self._slots
                         if (kind, name) in self._parts}
                if found or name in self._scalars:
                    states[number] = {**self._number(name), **found}
        return {"state": states, "param_groups": self._options(numbers)}

    def _runs(self):
        """The state dict with one run of numbers for each group."""
        states = {g: {**self._numbers(shapes), **{kind.removeprefix("state."): torch.cat(
            [_laid(self._part(kind, name)).reshape(-1) for name in shapes]) for kind, _ in self._slots}}
            for g, shapes in enumerate(self.groups)}
        return {"state": states, "param_groups": self._options([g] for g in states)}


def _laid(part):
    """A whole Part in its tensor's shape."""
    return part.values.as_strided(part.tensor.shape, part.tensor.stride)
