"""From a checkpoint into an engine, whatever the stage, the dtype and the number of ranks were.

A *Source* is anything that is read from. It has: tensors ({(kind, name, place): Tensor}), sections ({name: value for
JSON}, see contents.Contents; missing ones are as None), read(kind, name, place, begin, n, out) into a flat tensor of
the stored dtype, check(...) the same without an out, object(number), and path_of(kind, name, place) for texts.

Decides what a value is made of: a parameter is the stored one where the dtypes agree, else the rounded master; a master
is the stored one, else the stored parameter's. Invariant: prepare() reads and checks all that apply() will read, and
changes nothing.
"""
import copy
from dataclasses import dataclass

import torch

from .. import _core
from ..model import flat
from ..offload_states import MASTERS, PARAMETERS, STATES
from ..runtime.zero.parameter import is_zero
from ..utils.logging import log_dist, logger
from ..whole import whole
from .agree import together
from .contents import (
    COUNTERS,
    HERE,
    Contents,
    Tensor,
    buffers_of,
    dense_stride,
    extras_of,
    same_order,
    set_rng_state,
    world_of,
)
from .packing import unpack

_ADAMS = {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}  # the same states, also where torch runs one of them
_WEIGHTS_ALONE = "load_optimizer_states=False loads the weights alone"
_CHUNK = 1 << 22  # elements that are converted at a time


@dataclass(frozen=True)
class Options:
    """What is wanted of a checkpoint: the arguments of load_checkpoint."""

    strict: bool = True
    optimizer_states: bool = True
    schedule: bool = True
    module_only: bool = False
    custom_load_fn: object = None


def restore(engine, source, options, call="load_checkpoint"):
    """Takes what `source` has into the engine; returns the client state. Collective: where any rank finds something
    missing, damaged or of another shape, all raise, and no engine has changed."""
    problem, client = None, None
    restoring = Restoring(engine, source, options)
    try:
        restoring.prepare()
        client = restoring.value("client") or {}
    except Exception as error:
        problem = error
    together(engine._comm, problem, call)
    try:
        restoring.load_objects()
    except Exception as error:
        problem = error
    try:
        together(engine._comm, problem, call)
    except Exception:
        restoring.put_objects_back()
        raise
    restoring.apply(call)
    return client


@dataclass
class _Move:
    """Elements [begin, begin + len(out)) of a stored tensor, numbered as in memory of these strides, go to out."""

    tensor: Tensor
    stride: tuple
    begin: int
    out: torch.Tensor


class Restoring:
    """One loading. After prepare(), apply() does not fail but for what happens to the disk meanwhile."""

    def __init__(self, engine, source, options):
        self._engine, self._source, self._options = engine, source, options
        self._with_states = options.optimizer_states and not options.module_only and engine._run is not None
        self._moves = []  # into memory of the engine's
        self._buffers = []  # (buffer, value)
        self._states = []  # (number of parameter, {slot: tensor}, {name: value})
        self._missing = []
        self._by_name = self._numbers = self._undo = None

    def value(self, section):
        """A section as it was when it was saved; None where there is none."""
        return unpack(self._source.sections.get(section), lambda name: self._small("client", name),
                      self._source.object)

    def _error(self, text, key=("model", "", HERE)):
        return _core.CheckpointError(f"{self._source.path_of(*key)}: {text}")

    def _small(self, kind, name):
        known = self._source.tensors.get((kind, name, HERE))
        if known is None:
            raise self._error(f"tensor {name!r} of a section is missing", (kind, name, HERE))
        return self._read_whole(known).reshape(known.shape)

    # ---- before anything changes ----

    def prepare(self):
        """Finds, compares and checks everything. CheckpointError, ValueError."""
        engine = self._engine
        engine._refuse_offloaded("load_checkpoint", MASTERS | PARAMETERS | STATES)
        if engine._core is not None and engine._scaled and (engine.zero_optimization_stage() >= 2
                                                            or engine._core.early):
            raise RuntimeError("load_checkpoint inside an open step: gradients of it have been reduced already; call "
                               "step() first")
        self._check_world()
        contents = Contents(engine)
        self._names = contents.names
        self._parts = {part.tensor.key: part for part in contents.parts}
        self._prepare_parameters()
        self._prepare_buffers()
        if self._options.strict and self._options.custom_load_fn is None:
            self._check_names()
        for move in self._moves:
            self._check(move)
        if self._options.module_only:
            return
        self._schedule = self.value("schedule") if self._options.schedule else None
        self._loader = self.value("loader")
        self._extra = self.value("extra") or {}
        if self._with_states:
            self._prepare_groups()
            self._rng = self._own_rng()

    def _check_world(self):
        theirs, ours = self._source.sections.get("world") or {}, world_of(self._engine)
        if any(theirs.get(key, ours[key]) != ours[key] for key in ("tensor", "pipe")):
            raise ValueError(f"load_checkpoint: the checkpoint is of {theirs.get('tensor')} tensor-parallel x "
                             f"{theirs.get('pipe')} pipeline-parallel ranks, the engine has {ours['tensor']} x "
                             f"{ours['pipe']}: another layout of these is not yet")

    def _find(self, kind, name, place):
        """A stored tensor, under another name of a tied parameter too; None."""
        tensors, tied = self._source.tensors, self._source.sections.get("tied") or {}
        return tensors.get((kind, name, place)) or tensors.get((kind, tied.get(name), place))

    def _prepare_parameters(self):
        engine = self._engine
        trained = {id(p): i for i, p in enumerate(engine._params)} if engine._run is not None else {}
        for own, p in self._names.parameters.items():
            name, place, _ = self._names.of_parameter(own, p)
            low, master = (self._find(kind, name, place) for kind in ("model", "master"))
            if low is None and master is None:
                self._missing.append(name)
                continue
            for stored in (low, master):
                self._compare_shape(stored, whole(p))
            if self._options.custom_load_fn is None:
                self._prepare_values(p, name, place, low, master)
            if id(p) in trained and self._with_states:
                self._prepare_states(trained[id(p)], p, name, place, master or low)

    def _compare_shape(self, stored, t):
        if stored is not None and stored.shape != tuple(t.shape):
            raise self._error(f"{stored.kind} {stored.name} has shape {stored.shape}; the engine's has "
                              f"{tuple(t.shape)}", stored.key)

    def _prepare_values(self, p, name, place, low, master):
        """A parameter's: at stage 3 those that this rank writes, else all."""
        best = low if low is not None and low.dtype == p.dtype or master is None else master
        part, full = self._parts["model", name, place], whole(p)
        if is_zero(p):
            self._move(best, full, part.first, part.written())
        else:
            self._move(best, full, 0, part.values)

    def _prepare_states(self, i, p, name, place, value):
        run, full = self._engine._run, whole(p)
        begin, n = self._engine._core.part(i)
        if run.master_of(i) is not None and self._engine.zero_load_from_fp32_weights():
            self._move(value, full, begin, _as_run(run.master_of(i)))
        slots = {stored.kind.removeprefix("state."): stored for stored in self._slots_of(name, place)}
        scalars = self._scalars().get((name, place), {})
        if full.numel() == 0:
            return
        if n == 0:
            self._states.append((i, {} if slots else None, scalars))
        elif run.makes_states:
            self._states.append((i, {slot: self._fresh(i, full, stored) for slot, stored in slots.items()}, scalars))
        else:
            self._core_states(i, name, full, slots, scalars)

    def _slots_of(self, name, place):
        """The stored states of a parameter."""
        if self._by_name is None:
            self._by_name = {}
            for stored in self._source.tensors.values():
                if stored.kind.startswith("state."):
                    self._by_name.setdefault((stored.name, stored.place), []).append(stored)
        tied = (self._source.sections.get("tied") or {}).get(name)
        return self._by_name.get((name, place)) or self._by_name.get((tied, place), ())

    def _scalars(self):
        if self._numbers is None:
            rows = self._source.sections.get("scalars") or []
            self._numbers = {(name, tuple(place)): unpack(values, None, None) for name, place, values in rows}
        return self._numbers

    def _core_states(self, i, name, full, slots, scalars):
        """States that the core keeps: exactly those of its rule, or of SGD none."""
        run = self._engine._run
        names, begin = set(run.state_names), self._engine._core.part(i)[0]
        if not slots and run.may_lack_states:
            self._states.append((i, None, scalars))
            return
        if set(slots) != names:
            raise self._error(f"the states of {name} are {sorted(slots) or 'none'} in the checkpoint, and the engine's "
                              f"optimizer ({type(run.optimizer).__name__}) has {sorted(names)}; {_WEIGHTS_ALONE}")
        for slot, stored in slots.items():
            self._compare_shape(stored, full)
            self._move(stored, full, begin, _as_run(run.memory_of(i, slot)))
        self._states.append((i, {}, scalars))

    def _fresh(self, i, full, stored):
        """A state of an optimizer that torch runs, in new memory."""
        begin, n = self._engine._core.part(i)
        if stored.shape != tuple(full.shape):
            if n != full.numel():
                raise self._error(f"{stored.kind} {stored.name} has shape {stored.shape}, its parameter "
                                  f"{tuple(full.shape)}: on a rank that steps {n} of {full.numel()} elements it has no "
                                  "place", stored.key)
            return self._read_whole(stored).as_strided(stored.shape, stored.stride)
        values = torch.empty(n, dtype=stored.dtype)
        self._carry_out(_Move(stored, dense_stride(full), begin, values))
        return values.as_strided(full.shape, full.stride()) if n == full.numel() else values

    def _move(self, stored, full, begin, out):
        if len(out):
            self._moves.append(_Move(stored, dense_stride(full), begin, out))

    def _prepare_buffers(self):
        for own, buffer in buffers_of(self._engine.module):
            name, _ = self._names.of(own)
            stored = self._find("buffer", name, self._names.place())
            if stored is None:
                self._missing.append(name)
                continue
            self._compare_shape(stored, buffer)
            if self._options.custom_load_fn is None:
                value = self._read_whole(stored).as_strided(stored.shape, stored.stride)
                self._buffers.append((buffer, value))

    def _check_names(self):
        """Strict: the same parameters and buffers."""
        place = self._names.place()
        known = {self._names.of(name)[0] for name, _ in (
            *self._engine.module.named_parameters(remove_duplicate=False),
            *self._engine.module.named_buffers(remove_duplicate=False))}
        known |= {self._names.of_parameter(name, p)[0] for name, p in self._names.parameters.items()}
        unknown = sorted({name for kind, name, where in self._source.tensors
                          if kind in ("model", "master", "buffer") and where == place and name not in known
                          and not self._names.is_elsewhere(name)})
        if self._missing or unknown:
            why = ""
            if self._source.sections.get("frozen_excluded"):
                why = " (it was saved with exclude_frozen_parameters)"
            raise self._error(f"not in the checkpoint: {_brief(self._missing)}{why}; not in the module: "
                              f"{_brief(unknown)}; load_module_strict=False loads what both have")

    def _prepare_groups(self):
        """Options of parameter groups, checked on copies."""
        run, theirs = self._engine._run, self.value("groups") or []
        groups = run.optimizer.param_groups
        if not theirs:
            raise self._error(f"the checkpoint has no optimizer; {_WEIGHTS_ALONE}")
        if len(theirs) != len(groups):
            raise self._error(f"the checkpoint has {len(theirs)} parameter groups, the engine {len(groups)}")
        trained = {id(p): i for i, p in enumerate(self._engine._params)}
        for own, p in self._names.parameters.items() if len(groups) > 1 else ():
            i, stored = trained.get(id(p)), self._find("model", *self._names.of_parameter(own, p)[:2])
            if i is not None and stored is not None and stored.group not in (-1, run.group_of(i)):
                raise self._error(f"{stored.name} is in parameter group {stored.group} in the checkpoint and in "
                                  f"{run.group_of(i)} here", stored.key)
        kind = self._source.sections.get("optimizer")
        same = kind in (None, type(run.optimizer).__name__)
        if run.makes_states and not same and not {kind, type(run.optimizer).__name__} <= _ADAMS:
            raise self._error(f"the checkpoint has states of {kind}, the engine's optimizer is "
                              f"{type(run.optimizer).__name__}; {_WEIGHTS_ALONE}")
        self._groups = [{key: value for key, value in options.items() if same or key in group}
                        for options, group in zip(theirs, groups)]
        run.check_groups([{**group, **options} for group, options in zip(groups, self._groups)])
        run.check_scalars(self._states)

    def _own_rng(self):
        rank = str(self._engine.global_rank)
        packed = (self._source.sections.get("rng") or {}).get(rank)
        if packed is None:
            if self._source.sections.get("rng"):
                logger.info("load_checkpoint: no rank %s was there when it was saved; its random generators go on as "
                            "they are", rank)
            return None
        return unpack(packed, lambda name: self._small("rng", f"{rank}.{name}"), None)

    # ---- reading ----

    def _check(self, move):
        stored = move.tensor
        begin, n = move.begin, len(move.out)
        if not same_order(stored.shape, stored.stride, move.stride):
            begin, n = 0, stored.numel
        self._source.check(*stored.key, begin, n)

    def _read_whole(self, stored):
        values = torch.empty(stored.numel, dtype=stored.dtype)
        if stored.numel:
            self._source.read(*stored.key, 0, stored.numel, values)
        return values

    def _carry_out(self, move):
        stored, out = move.tensor, move.out
        if not same_order(stored.shape, stored.stride, move.stride):
            laid = torch.empty_strided(stored.shape, move.stride, dtype=stored.dtype)
            laid.copy_(self._read_whole(stored).as_strided(stored.shape, stored.stride))
            out.copy_(flat(laid)[move.begin:move.begin + len(out)])
        elif out.dtype == stored.dtype and out.is_cpu:
            self._source.read(*stored.key, move.begin, len(out), out)
        else:
            for at in range(0, len(out), _CHUNK):
                n = min(_CHUNK, len(out) - at)
                values = torch.empty(n, dtype=stored.dtype)
                self._source.read(*stored.key, move.begin + at, n, values)
                out[at:at + n].copy_(values)

    # ---- the change ----

    def load_objects(self):
        """What may refuse its state: the schedule. put_objects_back() undoes it."""
        engine = self._engine
        if self._options.module_only or not self._options.schedule:
            return
        schedule = engine.lr_scheduler
        if schedule is None or not hasattr(schedule, "load_state_dict"):
            return
        if not self._schedule:
            log_dist("load_checkpoint: the checkpoint has no state of a schedule; the engine's goes on as it is",
                     ranks=[0])
            return
        self._undo = copy.deepcopy(schedule.state_dict())
        try:
            schedule.load_state_dict(self._schedule["state"])
        except Exception as error:
            raise self._error(f"the engine's {type(schedule).__name__} does not take the state of a "
                              f"{self._schedule.get('class')}: {type(error).__name__}: {error}; "
                              "load_lr_scheduler_states=False leaves it as it is") from error

    def put_objects_back(self):
        """The schedule is as it was before load_objects()."""
        if self._undo is not None:
            self._engine.lr_scheduler.load_state_dict(self._undo)

    def apply(self, call):
        """Collective."""
        engine, problem = self._engine, None
        if self._options.custom_load_fn is not None:
            self._load_by_caller()
        try:
            with torch.no_grad():
                for move in self._moves:
                    self._carry_out(move)
                for buffer, value in self._buffers:
                    buffer.copy_(value)
        except Exception as error:
            problem = error
        together(engine._comm, problem, f"{call}, when everything had been checked,")
        torch.autograd.graph.increment_version(list(engine.module.parameters()))
        if engine._shards is not None:
            engine._shards.after_step()
        if engine._core is not None:
            self._finish_optimizer()
        if not self._options.module_only:
            self._finish_state()

    def _load_by_caller(self):
        state = {name: self._read_whole(stored).as_strided(stored.shape, stored.stride)
                 for (kind, name, place), stored in self._source.tensors.items()
                 if kind in ("model", "buffer") and place == self._names.place()}
        self._engine.load_module_state_dict({"module": state}, custom_load_fn=self._options.custom_load_fn,
                                            fetch_z3_params=True)

    def _finish_optimizer(self):
        engine = self._engine
        engine.zero_grad()
        engine._scaled = False
        if not self._with_states or not engine.zero_load_from_fp32_weights():
            engine._core.load_masters()
        if self._with_states:
            engine._run.adopt(self._states)
            for group, options in zip(engine.basic_optimizer.param_groups, self._groups):
                _set_options(group, options)
            theirs, ours = self.value("scaler") or {}, engine._run.scaler
            if theirs.get("dynamic") == engine.dynamic_loss_scale() and (
                    theirs["dynamic"] or theirs["scale"] == ours["scale"]):  # a scale that was set stays
                engine._run.scaler = theirs
        engine._core.mend()

    def _finish_state(self):
        engine, counters = self._engine, self._source.sections.get("counters") or {}
        for name in COUNTERS:
            setattr(engine, name, counters.get(name, getattr(engine, name)))
        engine._micro_origin = engine.micro_steps  # gradients of a step that was open are not in a checkpoint
        if self._loader is not None and engine.training_dataloader is not None:
            engine.training_dataloader.load_state_dict(self._loader)
        for name, child in extras_of(engine.module):
            if name in self._extra:
                child.set_extra_state(self._extra[name])
        if self._with_states and self._rng is not None:
            set_rng_state(self._rng)


def _as_run(t):
    return t.detach() if t.dim() == 1 else flat(t)


def _set_options(group, options):
    for key, value in options.items():
        now = group.get(key)
        if isinstance(now, torch.Tensor) and not isinstance(value, torch.Tensor):
            now.fill_(value)
        else:
            group[key] = value


def _brief(names):
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
