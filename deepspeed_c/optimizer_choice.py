"""Which optimizer an engine has: the caller's object, or one that the configuration names; and who runs it.

A class that is not here, an option that the core lacks, and a subclass are run by torch on this rank's elements. At
stages above 0 that needs `zero_allow_untested_optimizer`, unless the class is known to treat each element alone.
"""
import difflib
import inspect
import types

import torch

from . import _core
from .ops.adagrad import DeepSpeedCPUAdagrad
from .ops.adam import DeepSpeedCPUAdam, FusedAdam
from .ops.lamb import FusedLamb
from .ops.lion import DeepSpeedCPULion, FusedLion
from .utils.logging import logger

OURS = (FusedAdam, DeepSpeedCPUAdam, FusedLion, DeepSpeedCPULion, FusedLamb, DeepSpeedCPUAdagrad)
# Exact classes of torch that the core runs; the options that it has not, by the value that it has.
_TORCHS = {torch.optim.Adam: "adam", torch.optim.AdamW: "adam", torch.optim.SGD: "sgd", torch.optim.Adagrad: "adagrad"}
_LACKS = ("amsgrad", "maximize", "capturable", "differentiable")
_ELEMENT_WISE = {getattr(torch.optim, name) for name in (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")}

# optimizer.type in lower case -> class.
_NAMED = {"adam": FusedAdam, "adamw": FusedAdam, "lion": FusedLion, "lamb": FusedLamb, "sgd": torch.optim.SGD,
          "adagrad": torch.optim.Adagrad}
_NOT_YET = ("onebitadam", "zerooneadam", "onebitlamb", "muon", "muadam", "muadamw", "musgd")
# Accepted beside a class's own keywords where they mean what it does anyway: {name: the value, None for any}.
_ACCEPTED = {"torch_adam": None, "fp32_optimizer_states": True, "maximize": False, "foreach": None, "fused": None,
             "capturable": False, "differentiable": False, "amsgrad": False, "set_grad_none": None}


def _check_value(key, value, default):
    """ValueError where an optimizer parameter is not of its default's kind: a flag, two numbers, a number."""
    def is_number(x):
        return isinstance(x, (int, float)) and not isinstance(x, bool)

    if isinstance(default, bool):
        fits, allowed = isinstance(value, (bool, int)), "true or false"
    elif isinstance(default, tuple):
        fits = isinstance(value, (list, tuple)) and len(value) == len(default) and all(map(is_number, value))
        allowed = "two numbers"
    else:
        fits, allowed = is_number(value) or isinstance(value, torch.Tensor), "a number"
    if default is not None and not fits:
        raise ValueError(f"optimizer.params.{key} is {value!r}; allowed: {allowed}")


def _class_of(name, params):
    lower = name.lower()
    if lower in _NOT_YET:
        raise NotImplementedError(f"optimizer.type is {name!r}: not yet")
    if lower in ("adam", "adamw") and params.get("torch_adam"):
        decoupled = lower == "adamw" or params.get("adam_w_mode", True)
        return torch.optim.AdamW if decoupled else torch.optim.Adam
    if lower in _NAMED:
        return _NAMED[lower]
    torchs = {n: c for n, c in vars(torch.optim).items() if isinstance(c, type)
              and issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer}
    if name in torchs:
        return torchs[name]
    known = {n.lower(): n for n in ("Adam", "AdamW", "Lion", "Lamb", *torchs) if n.lower() not in _NOT_YET}
    near = difflib.get_close_matches(lower, known, 1)
    raise ValueError(f"optimizer.type is {name!r}; allowed: {', '.join(known.values())} (names of torch.optim as they "
                     "are written there)" + (f"; did you mean {known[near[0]]}?" if near else ""))


def _keywords(name, cls, params):
    """The constructor's keywords that optimizer.params give; every wrong one is named."""
    known = {key: p.default for key, p in list(inspect.signature(cls.__init__).parameters.items())[2:]}
    if cls is FusedAdam and name.lower() == "adamw":
        params = {**params, "adam_w_mode": True}
    accepted = _ACCEPTED if cls in OURS else {"torch_adam": None, "adam_w_mode": None}
    keywords = {}
    for key, value in params.items():
        if key == "max_grad_norm" and value:
            raise ValueError("optimizer.params.max_grad_norm: use gradient_clipping at the top level instead")
        if cls in OURS and accepted.get(key) is not None and value != accepted[key]:
            raise NotImplementedError(f"optimizer.params.{key} is {value!r}: not yet with {name}; allowed: "
                                      f"{accepted[key]!r}" + ("; \"torch_adam\": true has torch run it"
                                                              if name.lower() in ("adam", "adamw") else ""))
        if key in known:
            _check_value(key, value, known[key])
            keywords[key] = tuple(value) if isinstance(value, list) else value
        elif key not in accepted and key != "max_grad_norm":
            near = difflib.get_close_matches(key, [*known, *accepted], 1)
            raise ValueError(f"optimizer.params.{key} is unknown for {name}; allowed: {', '.join(known)}"
                             + (f"; did you mean {near[0]}?" if near else ""))
    return keywords


def _construct(cls, groups, keywords):
    """cls(groups, **keywords) without the import of torch._dynamo (0.9 s) that torch's add_param_group begins with."""
    optimizer = cls.__new__(cls)
    if cls not in OURS:
        optimizer.add_param_group = types.MethodType(torch.optim.Optimizer.add_param_group.__wrapped__, optimizer)
    optimizer.__init__(groups, **keywords)
    optimizer.__dict__.pop("add_param_group", None)
    return optimizer


def check(name, params):
    """(class, its keywords) of ``optimizer.type`` and ``optimizer.params``; ValueError or NotImplementedError names
    what is wrong."""
    cls = _class_of(name, params)
    return cls, _keywords(name, cls, params)


def by_name(name, params, groups):
    """The optimizer that ``optimizer.type`` and ``optimizer.params`` name, over groups (dicts with "params")."""
    cls, keywords = check(name, params)
    if not groups:
        raise ValueError("there is nothing to train: no parameter in model_parameters requires a gradient")
    return _construct(cls, groups, keywords)


def given(optimizer, parameters):
    """The caller's optimizer, or what the caller's callable makes of `parameters` (a list)."""
    if not isinstance(optimizer, torch.optim.Optimizer) and callable(optimizer):
        optimizer = optimizer(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; allowed: a torch.optim.Optimizer, or a callable "
                        "that takes parameters and returns one")
    for i, group in enumerate(optimizer.param_groups):
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f"optimizer.param_groups[{i}] is no dict with a 'params' key")
    return optimizer


def _steps_agree(optimizer):
    """Whether the parameters of each group have taken equally many steps: the core counts by group."""
    for group in optimizer.param_groups:
        steps = {float(optimizer.state[p].get("step", 0)) if p in optimizer.state else 0.0
                 for p in group["params"] if p.requires_grad}
        if len(steps) > 1:
            return False
    return True


def lacking(group, i):
    """NotImplementedError where parameter group i has an option that the core has not."""
    for key in _LACKS:
        if group.get(key):
            raise NotImplementedError(f"parameter group {i}: {key} is {group[key]!r}: not yet; allowed: False")


def _not_in_core(optimizer):
    """Why torch has to run it, None where the core does."""
    cls = type(optimizer)
    if cls not in OURS and cls not in _TORCHS:
        return f"{cls.__module__}.{cls.__qualname__} is none of the core's"
    for i, group in enumerate(optimizer.param_groups):
        if cls in OURS:
            lacking(group, i)
        for key in _LACKS:
            if group.get(key):
                return f"parameter group {i} has {key}={group[key]!r}"
    return None if _steps_agree(optimizer) else "parameters of one group have taken different numbers of steps"


def kind_of(optimizer, stage, allow_untested):
    """(kind, whole): the core's name of the rule, "foreign" where torch runs it, and whether parameters stay whole.

    ValueError for an optimizer that cannot run, or not at this stage.
    """
    reason, cls = _not_in_core(optimizer), type(optimizer)
    if reason is None:
        kind = optimizer.kind if cls in OURS else _TORCHS[cls]
        for i, group in enumerate(optimizer.param_groups):
            _core.check_group(kind, group, i)
        return kind, False
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{cls.__name__}.step needs a closure, which evaluates the model again inside the step; that "
                         "cannot work here, where gradients are reduced between ranks first")
    logger.debug("torch runs the optimizer: %s", reason)
    if stage > 0 and cls not in _ELEMENT_WISE and not allow_untested:
        raise ValueError(f"{cls.__name__} with zero_optimization.stage {stage}: set zero_allow_untested_optimizer to "
                         "true (parameters then stay whole), or use stage 0; allowed without it: "
                         f"{', '.join(sorted(c.__name__ for c in _ELEMENT_WISE))} of torch.optim, and those of "
                         "deepspeed_c.ops")
    return "foreign", cls not in _ELEMENT_WISE  # at stage 0 too, so that all stages lay elements out alike
