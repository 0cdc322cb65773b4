"""The optimizer that initialize() returns, and the base of those whose rule is in the C core.

Both are ordinary Python classes: whatever a script or a schedule writes into ``param_groups`` is what the next step
reads. The arithmetic and its states are in C.
"""
import weakref
from collections import OrderedDict

import torch

from .offload_states import MASTERS, STATES

_HOOKS = ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")


class CoreOptimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose rule is one of the core's.

    Given to initialize(), it is run by the engine: step() is then the engine's. Without an engine, step() updates
    CPU parameters in place from their .grad (fp32, bf16 or fp16); its states are fp32 tensors in ``state``.
    Subclasses set: kind (the core's name of the rule), state_names (of its states, in the core's order).
    """

    kind = None
    state_names = ()

    def __init__(self, params, defaults):
        super().__init__(params, defaults)
        self._engine = self._stepper = None

    def add_param_group(self, param_group):
        if self.__dict__.get("_engine") is not None:
            raise _late_group(self._engine(), param_group)
        # torch's own would import torch._dynamo (0.9 s) first.
        torch.optim.Optimizer.add_param_group.__wrapped__(self, param_group)

    def step(self, closure=None):
        """One step. closure: reevaluates the model first, with gradients enabled; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = None if self._engine is None else self._engine()
        if engine is not None:
            engine.optimizer.step()
            return loss
        if self._stepper is None:
            from .ops.stepping import Stepping
            self._stepper = Stepping(self)
        for hook in list(self._optimizer_step_pre_hooks.values()):
            hook(self, (), {})
        self._stepper.step()
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, (), {})
        return loss

    step.hooked = True  # torch would wrap it in a profiler range, which imports torch._dynamo

    def zero_grad(self, set_to_none=True):
        """Drops the gradients of all parameters in param_groups."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def load_state_dict(self, state_dict):
        """As torch's, but states keep their dtype: torch would round fp32 states to the parameter's."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for number, saved in state_dict["state"].items():
            for name in self.state_names:
                if name in saved:
                    self.state[params[number]][name] = saved[name].clone()

    def bind(self, engine):
        """From here on `engine` runs this optimizer."""
        self._engine = weakref.ref(engine)

    def __getstate__(self):
        return {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}

    def __setstate__(self, state):
        self._engine = self._stepper = None
        super().__setstate__(state)


def _late_group(engine, group):
    params = group.get("params", ()) if isinstance(group, dict) else ()
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    names = {id(p): name for name, p in engine.module.named_parameters()} if engine is not None else {}
    named = ", ".join(names.get(id(p), f"a tensor {tuple(p.shape)}") for p in params[:3]) or "no parameters"
    return NotImplementedError(f"add_param_group({named}) after initialize is not yet: the core has laid out its "
                               "memory; pass all groups to initialize, and freeze by requires_grad_(False) afterwards "
                               "what is to train later")


class DestroyedEngine:
    """What a DeepSpeedOptimizer has in the place of an engine that was destroyed: answers without it, and errors."""

    _core = None

    def __init__(self, engine):
        self._last_step_skipped = engine._last_step_skipped

    def loss_scale(self):
        """As a destroyed engine says."""
        return 1.0

    def __getattr__(self, name):
        raise RuntimeError("the optimizer's engine was destroyed: its states and masters are gone; call initialize "
                           "again")


class DeepSpeedOptimizer(torch.optim.Optimizer):
    """What initialize() returns second: the engine's optimizer step with the contract of a torch optimizer.

    param_groups, state and defaults are those of ``optimizer``, the plain object that it drives. torch's constructor
    is not called: it would import torch._dynamo. Methods only read attributes of self, so that they also work where
    self is a wrapper that looks up what it lacks here, or where the class was replaced by a subclass.
    """

    def __init__(self, engine, optimizer):
        self._engine = engine
        self._plain = optimizer
        for hooks in _HOOKS:
            setattr(self, f"_optimizer_{hooks}_hooks", OrderedDict())
        self._warned_capturable_if_run_uncaptured = True

    @property
    def optimizer(self):
        """The plain optimizer: the caller's object, or what the configuration named."""
        return self._plain

    @property
    def param_groups(self):
        """The live list of group dicts."""
        return self._plain.param_groups

    @param_groups.setter
    def param_groups(self, groups):
        self._plain.param_groups = groups

    @property
    def state(self):
        """parameter -> {name: tensor}: this rank's part of the states, over the core's own memory."""
        return self._plain.state

    @state.setter
    def state(self, value):
        self._plain.state = value

    @property
    def defaults(self):
        """Options of groups that say nothing."""
        return self._plain.defaults

    @property
    def state_names(self):
        """torch's names of the states that the core keeps, in its order."""
        return self._engine._run.state_names

    @property
    def overflow(self):
        """Whether the last step was skipped because of a non-finite gradient."""
        return self._engine._last_step_skipped

    @property
    def loss_scale(self):
        """The loss scale of the next backward pass (1.0 unless fp16)."""
        return self._engine.loss_scale()

    cur_scale = loss_scale

    @property
    def parameter_offload(self):
        """The object that fetches sharded parameters (ZeRO stage 3)."""
        shards = getattr(self._engine, "_shards", None)
        if shards is None:
            raise AttributeError("parameter_offload: parameters are sharded at ZeRO stage 3 only")
        return shards

    def step(self, closure=None):
        """Applies the accumulated gradients; the engine's counters advance. Returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._engine._apply_gradients()
        return loss

    step.hooked = True  # torch would wrap it in a profiler range; the core's own time is in its counters

    def run_hooks(self, when):
        """Calls what register_step_pre_hook ("pre") or register_step_post_hook ("post") was given, here and on the
        plain optimizer."""
        for owner in (self._engine.basic_optimizer, self._engine.optimizer):
            if self._engine._run.runs_hooks or owner is not self._engine.basic_optimizer:
                for hook in list(getattr(owner, f"_optimizer_step_{when}_hooks").values()):
                    hook(owner, (), {})

    def zero_grad(self, set_to_none=True):
        """Drops the gradients of all parameters in param_groups, as engine.zero_grad()."""
        for group in self._plain.param_groups:
            for p in group["params"]:
                p.grad = None
        if self._engine._core is not None:
            self._engine._core.drop_sums()

    def backward(self, loss, retain_graph=False):
        """As engine.backward(loss, scale_wrt_gas=False)."""
        self._engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    def add_param_group(self, param_group):
        raise _late_group(self._engine, param_group)

    def state_dict(self):
        """This rank's part: references to states and fp32 masters (nothing is copied), group options, loss scale.
        Loading it with the same number of ranks, stage and model restores every bit."""
        self._engine._refuse_offloaded("state_dict", MASTERS | STATES)
        for hook in list(self._optimizer_state_dict_pre_hooks.values()):
            hook(self)
        result = self._engine._run.state_dict()
        for hook in list(self._optimizer_state_dict_post_hooks.values()):
            result = hook(self, result) or result
        return result

    def load_state_dict(self, state_dict):
        """Takes what state_dict() gave, on the same rank of as many ranks. The module's own values are the module's to
        load. ValueError where it does not fit; nothing has changed then."""
        self._engine._refuse_offloaded("load_state_dict", MASTERS | STATES)
        self._engine._let_change()
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            state_dict = hook(self, state_dict) or state_dict
        self._engine._run.load_state_dict(state_dict)
        for hook in list(self._optimizer_load_state_dict_post_hooks.values()):
            hook(self)

    def __reduce_ex__(self, protocol):
        raise TypeError("a DeepSpeedOptimizer cannot be pickled or copied: its memory belongs to an engine; save "
                        "state_dict() instead")

    def __repr__(self):
        return f"{type(self).__name__}({self._plain!r})"
