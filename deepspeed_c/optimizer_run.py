"""Running an optimizer inside the engine's step: in the core, with its states shown as tensors, or by torch, on
fragments of parameters.

A fragment is this rank's part of a parameter in fp32: the parameter's own shape where this rank steps all of it, else
one dimension, in storage order.
"""
import weakref
from contextlib import contextmanager
from itertools import chain
from operator import is_

import torch
from torch.utils.dlpack import from_dlpack

from . import _core
from .model import flat
from .optimizer_choice import lacking

_GRADIENT, _MASTER = -2, -1  # where others are numbers of optimizer states
STATE_NAMES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",), "adagrad": ("sum",)}
SCALER = ("scale", "hysteresis_left", "iter", "last_overflow")


class _Run:
    """What both ways share. Attributes: optimizer, state_names, runs_hooks (the plain optimizer's step hooks are
    called by us, not by its own step)."""

    def __init__(self, optimizer, engine, parameters):
        self.optimizer = optimizer
        self._engine = weakref.ref(engine)
        self._params, self._names, self._group_of = parameters.tensors, parameters.names, parameters.group_of
        self._fulls, self._kept = parameters.fulls, parameters.parts
        core = self._core
        self._parts = [core.part(i) for i in range(len(self._params))]
        self._masters = {i: self._held(i, _MASTER) for i in range(len(self._params))}
        self._masters = {i: m for i, m in self._masters.items() if m is not None}

    def prepare(self):
        """What may fail on this rank alone, before step()."""

    def replace(self, taken):
        """New Parameters, [(index, old, new)], stand in groups and ``state`` where the old ones stood."""
        new = {id(old): p for _, old, p in taken}
        for group in self.optimizer.param_groups:
            group["params"][:] = [new.get(id(p), p) for p in group["params"]]
        _rename(self.optimizer.state, [(old, p) for _, old, p in taken])

    def release(self):
        """Gives up what the core and the parameters' Homes have lent, so that it can be freed. What stands in the
        caller's own optimizer stays its own."""
        self._masters = {}
        self._fulls = self._kept = None

    @property
    def _core(self):
        engine = self._engine()
        if engine is None or engine._core is None:
            raise RuntimeError("the optimizer's engine was destroyed")
        return engine._core

    def _held(self, i, which):
        """A tensor over what the core holds of parameter i: a fragment; None where it holds nothing."""
        held = self._core.held(i, which)
        return None if held is None else self._shaped(i, from_dlpack(held[1]))

    def _shaped(self, i, values):
        p, (_, n) = self._fulls[i], self._parts[i]
        return values.as_strided(p.shape, p.stride()) if n == p.numel() else values

    def values_of(self, i):
        """The elements of parameter i that this rank steps, in the model's dtype: one dimension, without a copy."""
        if self._kept is not None and self._kept[i] is not None:
            return self._kept[i]
        begin, n = self._parts[i]
        return flat(self._fulls[i])[begin:begin + n]

    def _fragment_of(self, i, value):
        """This rank's fp32 fragment of a value of parameter i's shape; a value of the fragment's shape as it is."""
        p, (begin, n) = self._fulls[i], self._parts[i]
        if value.shape == p.shape:
            laid = torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(value)
            return self._shaped(i, flat(laid)[begin:begin + n])
        if value.shape == (n,):
            return value
        raise ValueError(f"a state of {self._names[i]} has shape {tuple(value.shape)}; allowed: {tuple(p.shape)} or "
                         f"{(n,)}")

    def master_of(self, i):
        """This rank's fragment of parameter i's fp32 master, over the core's memory; None where it has none."""
        return self._masters.get(i)

    def group_of(self, i):
        """Number of parameter i's group."""
        return self._group_of[i]

    @property
    def scaler(self):
        """{name: number} of the loss scaler."""
        return dict(zip(SCALER, self._core.scaler))

    @scaler.setter
    def scaler(self, state):
        self._core.scaler = tuple(state[name] for name in SCALER)

    def _numbers(self):
        """Number of each trained parameter in torch's order of state dicts: group by group."""
        index = {id(p): i for i, p in enumerate(self._params)}
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {number: index[id(p)] for number, p in enumerate(order) if id(p) in index}

    def _packed_groups(self):
        groups, start = [], 0
        for group in self.optimizer.param_groups:
            packed = {key: value for key, value in group.items() if key != "params"}
            packed["params"] = list(range(start, start + len(group["params"])))
            start += len(group["params"])
            groups.append(packed)
        return groups

    def _place(self):
        engine = self._engine()
        return {"rank": engine.global_rank, "world_size": engine.world_size,
                "stage": engine.zero_optimization_stage(), "class": type(self.optimizer).__name__}

    def state_dict(self):
        """This rank's part, by reference."""
        masters = {number: self._masters[i] for number, i in self._numbers().items() if i in self._masters}
        return {"place": self._place(), "parts": self._numbered_parts(), "state": self._packed_state(),
                "param_groups": self._packed_groups(), "masters": masters,
                "loss_scaler": self.scaler}

    def _numbered_parts(self):
        return {number: self._parts[i] for number, i in self._numbers().items()}

    def _check(self, saved):
        missing = {"place", "parts", "state", "param_groups", "masters", "loss_scaler"} - set(saved)
        if missing:
            raise ValueError(f"load_state_dict: {', '.join(sorted(missing))} missing; allowed: what state_dict() gave")
        if saved["place"] != self._place():
            raise ValueError(f"load_state_dict: saved at {saved['place']}, loaded at {self._place()}; both must be "
                             "equal")
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        own = [len(group["params"]) for group in self.optimizer.param_groups]
        if sizes != own:
            raise ValueError(f"load_state_dict: groups of {sizes} parameters were saved, here are {own}")
        numbers = self._numbers()
        masters = {number: self._masters[i].shape for number, i in numbers.items() if i in self._masters}
        self._compare("first element and number of elements", saved["parts"], self._numbered_parts())
        self._compare("masters", {number: m.shape for number, m in saved["masters"].items()}, masters)
        self._check_state(saved, numbers)

    def _compare(self, what, saved, own):
        """ValueError where two dicts by number of parameter differ."""
        for number in sorted({*saved, *own}):
            if saved.get(number) != own.get(number):
                i = self._numbers().get(number)
                name = "a parameter that is not trained" if i is None else self._names[i]
                raise ValueError(f"load_state_dict: {what} of {name}: saved {_said(saved.get(number))}, here "
                                 f"{_said(own.get(number))}; both must be equal")

    def load_state_dict(self, saved):
        self._check(saved)
        numbers = self._numbers()
        self._unpack_state(saved, numbers)
        for number, master in saved["masters"].items():
            self._masters[numbers[number]].copy_(master)
        for group, packed in zip(self.optimizer.param_groups, saved["param_groups"]):
            group.update({key: value for key, value in packed.items() if key != "params"})
        self.scaler = saved["loss_scaler"]
        self._core.mend()


class CoreRun(_Run):
    """An optimizer whose rule the core has. Its ``state`` shows the core's memory: what is written there counts."""

    runs_hooks = True
    makes_states = False

    def __init__(self, optimizer, engine, parameters, kind):
        super().__init__(optimizer, engine, parameters)
        self.state_names = getattr(optimizer, "state_names", None) or STATE_NAMES[kind]
        self._kind, self._counts = kind, kind != "sgd"  # torch's SGD shows no number of steps
        self._steps = from_dlpack(self._core.steps())
        self._shown = {}  # number of parameter -> {name: tensor}
        self._seen = None, None  # entries of ``state`` and what is in them, once it shows the core's memory
        if kind == "sgd" and any(optimizer.state.values()):
            self._core.hold_momentum()
        self._show()
        self._take_elsewhere()
        self._take()

    def release(self):
        super().release()
        engine = self._engine()
        if engine is not None and engine._made_optimizer:
            self.optimizer.state.clear()
        self._shown, self._steps, self._seen = {}, None, (None, None)

    def _show(self):
        for i in range(len(self._params)):
            tensors = {name: self._held(i, k) for k, name in enumerate(self.state_names)}
            tensors = {name: t for name, t in tensors.items() if t is not None}
            if tensors and self._counts:
                tensors = {"step": self._steps[i], **tensors}
            if tensors:
                self._shown[i] = tensors

    def _take_elsewhere(self):
        """Steps of the parameters that other ranks step count here too, and of SGD, which shows none; the states that
        this rank does not hold leave ``state``."""
        state = self.optimizer.state
        for i, p in enumerate(self._params):
            here = state.get(p, {})
            if not self._counts and here.get("momentum_buffer") is not None:
                self._steps[i] = 1
            elif self._counts and here.get("step") is not None:
                self._steps[i] = float(here["step"])
            if i not in self._shown:
                state.pop(p, None)

    def _take(self):
        """What stands in ``state`` and is not the core's memory goes into it; then ``state`` shows it again."""
        state = self.optimizer.state
        if self._is_shown(state):
            return
        for i, shown in self._shown.items():
            here = state.get(self._params[i])
            if here is None:
                state[self._params[i]] = dict(shown)
                continue
            for name, tensor in shown.items():
                value = here.get(name)
                if value is tensor:
                    continue
                if value is not None:
                    value = torch.as_tensor(value)
                    tensor.copy_(value if name == "step" else self._fragment_of(i, value))
                here[name] = tensor
        self._seen = list(state.values()), _tensors(state)

    def _is_shown(self, state):
        """Whether ``state`` holds what it held when it last was the core's: a look without hashing tensors."""
        entries, tensors = self._seen
        return _same(list(state.values()), entries) and _same(_tensors(state), tensors)

    def prepare(self):
        self._take()

    def step(self):
        """The boundary; returns the core's report."""
        report = self._core.step(self.optimizer.param_groups)
        if not self._shown:  # SGD's momentum comes with the first step that has it
            self._show()
            self._seen = None, None
            self._take()
        return report

    def _packed_state(self):
        self._take()
        return {number: dict(self._shown[i]) for number, i in self._numbers().items() if i in self._shown}

    def state_dict(self):
        return {**super().state_dict(), "steps": self._steps}

    def _check_state(self, saved, numbers):
        if saved["state"] and not self._shown:
            self._core.hold_momentum()
            self._show()
        if not saved["state"] and not self._counts:
            return  # saved before SGD's first step with momentum
        own = {number: self._shown[i] for number, i in numbers.items() if i in self._shown}
        self._compare("states", *({number: {name: tuple(t.shape) for name, t in tensors.items()}
                                   for number, tensors in each.items()} for each in (saved["state"], own)))
        if saved.get("steps") is None or saved["steps"].shape != self._steps.shape:
            raise ValueError(f"load_state_dict: steps of {len(self._params)} parameters are needed")

    def _unpack_state(self, saved, numbers):
        for number, tensors in saved["state"].items():
            for name, tensor in self._shown[numbers[number]].items():
                tensor.copy_(tensors[name])
        self._take_back()
        self._steps.copy_(saved["steps"])

    def states_of(self, i):
        """{name: fragment} of parameter i's states on this rank; what is written there counts."""
        self._take()
        return {name: t for name, t in self._shown.get(i, {}).items() if name != "step"}

    def slots_of(self, i):
        """{name: tensor} of parameter i's states that are there by now."""
        return self.states_of(i) if self._counts or self._steps[i] > 0 else {}

    def scalars_of(self, i):
        """{name: value} of parameter i's other states."""
        return {"step": self._steps[i].clone()} if self._counts else {}

    # ---- for a checkpoint's loading ----

    @property
    def may_lack_states(self):
        """Whether there is a time before the states: SGD's, before its first step with momentum."""
        return not self._counts

    def memory_of(self, i, name):
        """Where this rank's fragment of a state lies."""
        if not self._shown:
            self._core.hold_momentum()
            self._show()
            self._seen = None, None
        return self._shown[i][name]

    def check_groups(self, groups):
        """ValueError where the core cannot step by these options."""
        for i, group in enumerate(groups):
            lacking(group, i)
            _core.check_group(self._kind, group, i)

    def check_scalars(self, states):
        """CheckpointError where parameters of one group have taken different numbers of steps."""
        self._steps_by_group(states)

    def _steps_by_group(self, states):
        found = {}
        for i, slots, scalars in states:
            taken = float(scalars.get("step", 0)) if self._counts else float(slots is not None)
            first, known = found.setdefault(self._group_of[i], (i, taken))
            if known != taken:
                raise _core.CheckpointError(f"{self._names[i]} has taken {taken:g} steps and {self._names[first]}, of "
                                            f"the same parameter group, {known:g}: that is not yet with "
                                            f"{type(self.optimizer).__name__}")
        return {group: taken for group, (_, taken) in found.items()}

    def adopt(self, states):
        """What was read into memory_of() counts from now on. states: (number of parameter, {} or, where the checkpoint
        has none, None, {name: value}) for each that has elements."""
        by_group = self._steps_by_group(states)
        for i, group in enumerate(self._group_of):
            self._steps[i] = by_group.get(group, 0.0)
        self._take_back()

    def _take_back(self):
        for i, shown in self._shown.items():
            self.optimizer.state[self._params[i]] = dict(shown)
        self._seen = None, None


class ForeignRun(_Run):
    """An optimizer that torch runs. During its step, and only then, its groups hold fragments instead of parameters."""

    runs_hooks = False
    makes_states = True
    state_names = ()

    def __init__(self, optimizer, engine, parameters, kind):
        super().__init__(optimizer, engine, parameters)
        self._grads = [self._held(i, _GRADIENT) for i in range(len(self._params))]
        self._fragments = {}
        for i, p in enumerate(self._params):
            state = optimizer.state.get(p, {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == self._fulls[i].shape and name != "step":
                    state[name] = self._fragment_of(i, value)

    def release(self):
        super().release()
        self._grads, self._fragments = [], {}

    def _fragment(self, i):
        """A leaf over this rank's fp32 part of parameter i; None where it has none."""
        if self._parts[i][1] == 0 or not self._params[i].requires_grad:
            return None
        known, values = self._fragments.get(i), self._masters.get(i)
        if values is None:
            values = self._shaped(i, self.values_of(i))
        if known is None or known.data_ptr() != values.data_ptr():
            known = self._fragments[i] = torch.nn.Parameter(values)
        return known

    @contextmanager
    def _on_fragments(self):
        """Groups and ``state`` speak of fragments inside, of parameters outside."""
        optimizer, index = self.optimizer, {id(p): i for i, p in enumerate(self._params)}
        lists = [group["params"] for group in optimizer.param_groups]
        pairs = []
        try:
            for group in optimizer.param_groups:
                found = [(p, self._fragment(index[id(p)])) for p in group["params"] if id(p) in index]
                found = [(p, f) for p, f in found if f is not None]
                pairs += found
                group["params"] = [f for _, f in found]
            _rename(optimizer.state, pairs)
            yield [f for _, f in pairs]
        finally:
            _rename(optimizer.state, [(f, p) for p, f in pairs])
            for group, params in zip(optimizer.param_groups, lists):
                group["params"] = params

    def _run(self):
        with self._on_fragments() as fragments:
            for i in range(len(self._params)):
                fragment = self._fragment(i)
                if fragment is not None:
                    fragment.grad = self._grads[i]
            try:
                self.optimizer.step()
            finally:
                for fragment in fragments:
                    fragment.grad = None

    def step(self):
        """The boundary; returns the core's report."""
        return self._core.step(self.optimizer.param_groups, self._run)

    def states_of(self, i):
        """{name: fragment} of parameter i's states on this rank; what is written there counts."""
        n, full = self._parts[i][1], self._fulls[i]
        shape = full.shape if n == full.numel() else (n,)
        return {name: t for name, t in self.optimizer.state.get(self._params[i], {}).items()
                if isinstance(t, torch.Tensor) and t.shape == shape and name != "step"}

    def slots_of(self, i):
        """{name: tensor} of parameter i's states: fragments, and what is of another shape. NotImplementedError for such
        a one where this rank steps only a part."""
        n, full = self._parts[i][1], self._fulls[i]
        state = self.optimizer.state.get(self._params[i], {})
        slots = {name: t for name, t in state.items() if self._is_slot(i, t, name)}
        for name, t in slots.items():
            if n != full.numel() and t.shape != (n,):
                raise NotImplementedError(f"state {name!r} of {self._names[i]} is {tuple(t.shape)} on a rank that "
                                          f"steps {n} of {full.numel()} elements: saving it is not yet")
        return slots

    def _is_slot(self, i, value, name):
        return isinstance(value, torch.Tensor) and name != "step" and (value.dim() > 0 or self._fulls[i].dim() == 0)

    def scalars_of(self, i):
        """{name: value} of parameter i's other states."""
        return {name: value for name, value in self.optimizer.state.get(self._params[i], {}).items()
                if value is not None and not self._is_slot(i, value, name)}

    def check_groups(self, groups):
        """Nothing: the optimizer reads its options itself."""

    def check_scalars(self, states):
        """Nothing: each parameter counts its own steps."""

    def adopt(self, states):
        """These states, [(number of parameter, {slot: tensor} or None, {name: value})], take the place of all."""
        for p in self._params:
            self.optimizer.state.pop(p, None)
        for i, slots, scalars in states:
            if self._parts[i][1] and (slots or scalars):
                self.optimizer.state[self._params[i]] = {**scalars, **slots}

    def _packed_state(self):
        state = self.optimizer.state
        return {number: dict(state[self._params[i]]) for number, i in self._numbers().items()
                if self._params[i] in state}

    def _check_state(self, saved, numbers):
        for number in saved["state"]:
            if number not in numbers:
                raise ValueError(f"load_state_dict: a state of parameter number {number}, which is not trained here")

    def _unpack_state(self, saved, numbers):
        for i in numbers.values():
            self.optimizer.state.pop(self._params[i], None)
        for number, values in saved["state"].items():
            self.optimizer.state[self._params[numbers[number]]] = {
                name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _said(value):
    return "nothing" if value is None else tuple(value) if isinstance(value, torch.Size) else value


def _tensors(state):
    return list(chain.from_iterable(entry.values() for entry in state.values()))


def _same(items, others):
    return others is not None and len(items) == len(others) and all(map(is_, items, others))


def _rename(state, pairs):
    for old, new in pairs:
        if old in state:
            state[new] = state.pop(old)
