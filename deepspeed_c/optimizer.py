"""The optimizer that initialize() returns, and the plain one inside it.

Both are ordinary Python classes over the same live list of group dicts: whatever a script or a schedule
writes into ``param_groups`` is what the next step reads. The arithmetic and its state are in C.
"""
import difflib
from collections import OrderedDict, defaultdict

import torch

ADAM_DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True,
                 "adam_w_mode": True}
SGD_DEFAULTS = {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
# Accepted where they mean what the core does anyway: {name: value that is allowed, or None for any}.
ADAM_ACCEPTED = {"amsgrad": False, "torch_adam": None, "fp32_optimizer_states": True, "set_grad_none": True,
                 "maximize": False, "foreach": None, "fused": None, "capturable": False, "differentiable": False}
SGD_ACCEPTED = {"maximize": False, "foreach": None, "fused": None, "differentiable": False}


def _check_value(key, value, default):
    """ValueError where an optimizer parameter is not of its default's kind: a flag, two numbers, a number."""
    def is_number(x):
        return isinstance(x, (int, float)) and not isinstance(x, bool)

    if isinstance(default, bool):
        fits, allowed = isinstance(value, (bool, int)), "true or false"
    elif isinstance(default, tuple):
        fits = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))
        allowed = "two numbers"
    else:
        fits, allowed = is_number(value) or isinstance(value, torch.Tensor), "a number"
    if not fits:
        raise ValueError(f"optimizer.params.{key} is {value!r}; allowed: {allowed}")


def resolve(name, params):
    """(kind, defaults) of a configured optimizer: kind is "adam" or "sgd".

    name: ``optimizer.type``, of any case. params: ``optimizer.params``. ValueError names a key that is
    unknown or has a value that is not allowed.
    """
    kind = {"adam": "adam", "adamw": "adam", "sgd": "sgd"}.get(name.lower())
    if kind is None:
        raise NotImplementedError(f"optimizer.type is {name!r}: not yet; allowed: Adam, AdamW, SGD")
    defaults = dict(ADAM_DEFAULTS if kind == "adam" else SGD_DEFAULTS)
    accepted = ADAM_ACCEPTED if kind == "adam" else SGD_ACCEPTED
    for key, value in params.items():
        if key in defaults:
            _check_value(key, value, defaults[key])
            defaults[key] = value
        elif key == "max_grad_norm":
            raise ValueError("optimizer.params.max_grad_norm: use gradient_clipping at the top level instead")
        elif key not in accepted:
            near = difflib.get_close_matches(key, [*defaults, *accepted], 1)
            raise ValueError(f"optimizer.params.{key} is unknown for {name}; allowed: {', '.join(defaults)}"
                             + (f"; did you mean {near[0]}?" if near else ""))
        elif accepted[key] is not None and value != accepted[key]:
            raise NotImplementedError(f"optimizer.params.{key} is {value!r}: not yet; allowed: {accepted[key]!r}")
    if name.lower() == "adamw":
        defaults["adam_w_mode"] = True
    return kind, defaults


def check_groups(kind, groups):
    """NotImplementedError where a parameter group asks for what the core would not do."""
    accepted = ADAM_ACCEPTED if kind == "adam" else SGD_ACCEPTED
    for i, group in enumerate(groups):
        for key, allowed in accepted.items():
            if allowed is not None and group.get(key, allowed) not in (allowed, None):
                raise NotImplementedError(f"parameter group {i}: {key} is {group[key]!r}: not yet; allowed: "
                                          f"{allowed!r}")


class CoreOptimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer in type and in param_groups; what schedules are built on.

    torch's constructor is not called: it would import torch._dynamo (0.9 s). The attributes that it
    makes are set here instead.
    """

    def __init__(self, param_groups, defaults, engine):
        self.defaults = defaults
        self.param_groups = param_groups
        self.state = defaultdict(dict)
        self._engine = engine
        for hooks in ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre",
                      "load_state_dict_post"):
            setattr(self, f"_optimizer_{hooks}_hooks", OrderedDict())
        self._warned_capturable_if_run_uncaptured = True

    def step(self, closure=None):
        """Applies the accumulated gradients. Returns the closure's loss, or None."""
        loss = None if closure is None else closure()
        self._engine._apply_gradients()
        return loss

    step.hooked = True  # torch would wrap it in a profiler range; the core's own time is in its counters

    def run_hooks(self, when):
        """Calls what register_step_pre_hook ("pre") or register_step_post_hook ("post") was given, here and on the
        other optimizer over the same groups."""
        for owner in (self._engine.basic_optimizer, self._engine.optimizer):
            for hook in list(getattr(owner, f"_optimizer_step_{when}_hooks").values()):
                hook(owner, (), {})

    def zero_grad(self, set_to_none=True):
        """Drops the gradients of all parameters in param_groups, as engine.zero_grad()."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
        if self._engine._core is not None:
            self._engine._core.drop_sums()

    def add_param_group(self, param_group):
        raise NotImplementedError("add_param_group after initialize is not yet; pass all groups to initialize")

    def state_dict(self):
        raise NotImplementedError("optimizer.state_dict() is not yet: checkpoints are not there")

    def load_state_dict(self, state_dict):
        raise NotImplementedError("optimizer.load_state_dict() is not yet: checkpoints are not there")

    def __repr__(self):
        return f"{type(self).__name__}({self.defaults})"


class DeepSpeedOptimizer(CoreOptimizer):
    """What initialize() returns second."""

    @property
    def optimizer(self):
        """The plain optimizer over the same param_groups."""
        return self._engine.basic_optimizer

    @property
    def state_names(self):
        """torch's names of the states that the core keeps, in its order."""
        return ("exp_avg", "exp_avg_sq") if self._engine._kind == "adam" else ("momentum_buffer",)

    @property
    def overflow(self):
        """Whether the last step was skipped because of a non-finite gradient."""
        return self._engine._last_step_skipped

    @property
    def loss_scale(self):
        """The loss scale of the next backward pass (1.0 unless fp16)."""
        return self._engine._core.scale

    cur_scale = loss_scale

    def backward(self, loss, retain_graph=False):
        """As engine.backward(loss, scale_wrt_gas=False)."""
        self._engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)
