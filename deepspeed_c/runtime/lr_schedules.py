"""Learning-rate schedules over anything with `param_groups`.

The rate at an index is a pure function in C (`csrc/lr.c`); these classes only hold the index and write the rate into
the groups. An index i is the number of the optimizer step, from 0; -1 is construction.
"""
import argparse
import difflib
import inspect
import math

from deepspeed_c import _core
from deepspeed_c.utils.logging import logger

__all__ = ["VALID_LR_SCHEDULES", "LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR",
           "add_tuning_arguments", "advance", "create", "get_config_from_args", "get_lr_from_config"]


class _Schedule:
    """Index, per-group rates, state. A subclass gives `_rate(group_index, i)` and calls `_start()` last."""

    def __init__(self, optimizer, last_batch_iteration):
        self.optimizer = _with_groups(optimizer)
        self.last_batch_iteration = last_batch_iteration

    def _start(self):
        """Writes the first rate, and so checks every parameter, unless the schedule resumes at a later index."""
        rates = self.get_lr()
        if self.last_batch_iteration == -1:
            self._write(rates)

    def get_lr(self):
        """The rates (float, one per group) at the present index; writes nothing."""
        return [self._rate(k, self.last_batch_iteration) for k in range(len(self.optimizer.param_groups))]

    def get_last_lr(self):
        """The rates (float, one per group) that were last written; AssertionError before the first."""
        if getattr(self, "_last_lr", None) is None:
            raise AssertionError("need to call step() first")
        return list(self._last_lr)

    def step(self, last_batch_iteration=None):
        """Goes to the next index, or to the one given, and writes its rates into the groups."""
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._write(self.get_lr())

    def state_dict(self):
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, sd):
        """Restores the index; the rates in the groups stay until the next step()."""
        self.last_batch_iteration = sd["last_batch_iteration"]

    def _rate(self, group_index, i):
        raise NotImplementedError

    def _write(self, rates):
        for group, rate in zip(self.optimizer.param_groups, rates):
            # A tensor rate may be captured by a compiled step: its identity has to stay.
            if hasattr(group["lr"], "fill_"):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates

    def _per_group(self, name, value):
        """One finite float per group from a number or a list of them."""
        n_groups = len(self.optimizer.param_groups)
        values = [float(v) for v in (value if isinstance(value, (list, tuple)) else [value] * n_groups)]
        if len(values) != n_groups:
            raise ValueError(f"expected {n_groups} value for {name}, got {len(values)}: {value}")
        for v in values:
            _finite(name, v)
        return values


class _Warmup(_Schedule):
    """A schedule that begins with a warm-up of `warmup_num_steps`."""

    def __init__(self, optimizer, warmup_num_steps, warmup_type, last_batch_iteration):
        super().__init__(optimizer, last_batch_iteration)
        self.warmup_num_steps = _positive_int("warmup_num_steps", warmup_num_steps)
        if warmup_type not in ("log", "linear"):
            logger.warning("%s: warmup_type %r is not one of 'log', 'linear'; 'log' is used",
                           type(self).__name__, warmup_type)
            warmup_type = "log"
        self.warmup_type = warmup_type

    def _check_total(self, total_num_steps):
        if isinstance(total_num_steps, float) and total_num_steps.is_integer():
            total_num_steps = int(total_num_steps)  # 1e5 is how JSON files write it
        total_num_steps = _positive_int("total_num_steps", total_num_steps)
        if total_num_steps < self.warmup_num_steps:
            logger.warning("%s: total_num_steps %d is less than warmup_num_steps %d", type(self).__name__,
                           total_num_steps, self.warmup_num_steps)
        return total_num_steps


class WarmupLR(_Warmup):
    """Rises from `warmup_min_lr` to `warmup_max_lr` in `warmup_num_steps` (at least 2) steps, then stays.

    With w steps, i counted from 0: lr = min + (max - min) * ln(i + 1) / ln(w) for `warmup_type` "log", i / w for
    "linear". `warmup_max_lr` None means each group's own rate at construction. Rates may be lists, one per group.
    """

    _kind = "WarmupLR"
    total_num_steps = 0

    def __init__(self, optimizer, warmup_min_lr=0.0, warmup_max_lr=None, warmup_num_steps=1000, warmup_type="log",
                 last_batch_iteration=-1):
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.min_lrs = self._per_group("warmup_min_lr", warmup_min_lr)
        self.max_lrs = self._per_group("warmup_max_lr", warmup_max_lr)
        self._start()

    def _rate(self, group_index, i):
        return _core.lr_at(self._kind, self.warmup_type, self.warmup_num_steps, self.total_num_steps,
                           self.min_lrs[group_index], self.max_lrs[group_index], i)


class WarmupDecayLR(WarmupLR):
    """WarmupLR, then a straight line to 0 at `total_num_steps` T: max * (T - i) / (T - w) above the minimum."""

    _kind = "WarmupDecayLR"

    def __init__(self, optimizer, total_num_steps, warmup_min_lr=0.0, warmup_max_lr=0.001, warmup_num_steps=1000,
                 warmup_type="log", last_batch_iteration=-1):
        self.warmup_num_steps = _positive_int("warmup_num_steps", warmup_num_steps)
        self.total_num_steps = self._check_total(total_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)


class WarmupCosineLR(_Warmup):
    """Each group's rate at construction times a ratio: from `warmup_min_ratio` to 1, then a cosine to `cos_min_ratio`.

    After the warm-up of w steps, with p = min(1, (i - w + 1) / (T - w)): ratio = c + (1 - c) * (1 + cos(pi p)) / 2.
    The rate is 0 until the first step().
    """

    def __init__(self, optimizer, total_num_steps, warmup_min_ratio=0.0, warmup_num_steps=1000, cos_min_ratio=0.0001,
                 warmup_type="log", last_batch_iteration=-1):
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.total_num_steps = self._check_total(total_num_steps)
        self.warmup_min_ratio = float(warmup_min_ratio)
        self.cos_min_ratio = float(cos_min_ratio)
        self.org_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._start()

    def _rate(self, group_index, i):
        return _core.lr_at("WarmupCosineLR", self.warmup_type, self.warmup_num_steps, self.total_num_steps,
                           self.warmup_min_ratio, self.cos_min_ratio, i, self.org_lrs[group_index])


class OneCycle(_Schedule):
    """One cycle of the rate from `cycle_min_lr` to `cycle_max_lr` and back, then a decay below the minimum.

    With b = i + 1 and a cycle of T = first + second steps: up in a straight line for b <= first, down after it, in
    stairs of that many levels where a stair count is positive. From i = T on, d = (i - T + 1) / decay_step_size and
    lr = min / (1 + decay_lr_rate * d); without a decay_step_size it stays at the minimum.
    `cycle_momentum` moves the first of `betas` the other way, from `cycle_max_mom` to `cycle_min_mom` and back, then to
    max * (1 + decay_mom_rate * d); the second is 0.99 from construction on. At construction the first is cycle_min_mom.
    Rates and momenta may be lists, one per group.
    """

    _BETA2 = 0.99

    def __init__(self, optimizer, cycle_min_lr, cycle_max_lr, decay_lr_rate=0.0, cycle_first_step_size=2000,
                 cycle_second_step_size=None, cycle_first_stair_count=0, cycle_second_stair_count=None,
                 decay_step_size=0, cycle_momentum=True, cycle_min_mom=0.8, cycle_max_mom=0.9, decay_mom_rate=0.0,
                 last_batch_iteration=-1):
        super().__init__(optimizer, last_batch_iteration)
        if cycle_second_step_size is None:
            cycle_second_step_size = cycle_first_step_size
        if cycle_second_stair_count is None:
            cycle_second_stair_count = cycle_first_stair_count
        self._cycle = (float(cycle_first_step_size), float(cycle_second_step_size), int(cycle_first_stair_count),
                       int(cycle_second_stair_count), float(decay_step_size))
        self.min_lrs = self._per_group("cycle_min_lr", cycle_min_lr)
        self.max_lrs = self._per_group("cycle_max_lr", cycle_max_lr)
        self.decay_lr_rate = _finite("decay_lr_rate", decay_lr_rate)
        if self.decay_lr_rate < 0:
            raise ValueError(f"decay_lr_rate must not be negative, got {decay_lr_rate}")
        self.min_moms = self._per_group("cycle_min_mom", cycle_min_mom)
        self.max_moms = self._per_group("cycle_max_mom", cycle_max_mom)
        self.decay_mom_rate = _finite("decay_mom_rate", decay_mom_rate)
        self.cycle_momentum = bool(cycle_momentum)
        if self.cycle_momentum and not all("betas" in group for group in self.optimizer.param_groups):
            logger.warning("OneCycle: cycle_momentum is off, because %s has no betas",
                           type(getattr(optimizer, "optimizer", optimizer)).__name__)
            self.cycle_momentum = False
        self._start()
        if self.cycle_momentum and last_batch_iteration == -1:
            self._write_betas(self.min_moms)

    def get_mom(self):
        """The betas (pair of floats, one per group) at the present index; None where momentum does not cycle."""
        if not self.cycle_momentum:
            return None
        return [(_core.one_cycle(*self._cycle, low, high, self.decay_mom_rate, self.last_batch_iteration, True),
                 self._BETA2) for low, high in zip(self.min_moms, self.max_moms)]

    def step(self, last_batch_iteration=None):
        """Goes to the next index, or to the one given, and writes its rates and betas into the groups."""
        super().step(last_batch_iteration)
        if self.cycle_momentum:
            self._write_betas([first for first, _ in self.get_mom()])

    def _rate(self, group_index, i):
        return _core.one_cycle(*self._cycle, self.min_lrs[group_index], self.max_lrs[group_index], self.decay_lr_rate,
                               i)

    def _write_betas(self, moms):
        for group, mom in zip(self.optimizer.param_groups, moms):
            group["betas"] = (mom, self._BETA2)


class LRRangeTest(_Schedule):
    """Rises without end, to find the rate at which training breaks: lr = min * (1 + step_rate * (i + 1) / step_size).

    `lr_range_test_staircase` takes the whole part of (i + 1) / step_size. The minimum may be a list, one per group.
    """

    def __init__(self, optimizer, lr_range_test_min_lr=1e-3, lr_range_test_step_size=2000, lr_range_test_step_rate=1.0,
                 lr_range_test_staircase=False, last_batch_iteration=-1):
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = self._per_group("lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = _positive_int("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = _finite("lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = bool(lr_range_test_staircase)
        self._start()

    def _rate(self, group_index, i):
        return _core.range_test(self.min_lr[group_index], self.step_size, self.step_rate, self.staircase, i)


_SCHEDULES = {cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)}
VALID_LR_SCHEDULES = list(_SCHEDULES)

# Parameters of torch's classes that no JSON value can be.
_NOT_JSON = {"lr_lambda": "a function", "schedulers": "scheduler objects"}


# ---- by name, from the configuration ----

def create(name, optimizer, params=None):
    """The schedule that the configuration's `scheduler.type` and `scheduler.params` ask for.

    `name` is one of VALID_LR_SCHEDULES or a class of torch.optim.lr_scheduler, case-sensitive. ValueError names what
    is unknown or missing and what is allowed.
    """
    params = dict(params or {})
    return check(name, params)(optimizer, **params)


def check(name, params):
    """The class that `scheduler.type` names, which takes these parameters; ValueError as create()."""
    cls = _find(name)
    _check_params(name, cls, params)
    return cls


def _find(name):
    if name in _SCHEDULES:
        return _SCHEDULES[name]
    from torch.optim import lr_scheduler
    theirs = [key for key, cls in vars(lr_scheduler).items() if inspect.isclass(cls)
              and issubclass(cls, lr_scheduler.LRScheduler) and key not in ("LRScheduler", "_LRScheduler")]
    if name in theirs:
        return getattr(lr_scheduler, name)
    known = {key.lower(): key for key in [*theirs, *VALID_LR_SCHEDULES]}
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean {known[near[0]]!r}?" if near else ""
    raise ValueError(f"scheduler.type {name!r} is not one of {', '.join(VALID_LR_SCHEDULES)} or a class of "
                     f"torch.optim.lr_scheduler.{hint}")


def _check_params(name, cls, params):
    accepted = inspect.signature(cls).parameters
    for key in accepted.keys() & _NOT_JSON.keys():
        raise ValueError(f"scheduler.type {name!r} needs {_NOT_JSON[key]} ({key}), which a configuration cannot hold; "
                         f"pass initialize(lr_scheduler=lambda optimizer: {name}(...)) instead")
    accepted = {key: parameter for key, parameter in accepted.items() if key != "optimizer"}
    for key in params:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"scheduler.params.{key} is not a parameter of {name} "
                             f"(those are {', '.join(accepted)}){hint}")
    for key, parameter in accepted.items():
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD \
                and key not in params:
            raise ValueError(f"scheduler.params.{key} is required by {name} and missing")


def advance(scheduler, lr_kwargs, train_batch_size):
    """Steps a schedule of any class after an optimizer step.

    `lr_kwargs` (a dict, or None) are step()'s keywords. Where step() needs an argument that they do not give, it is
    the number of samples, which is what schedules of Megatron's kind count; a schedule that needs `metrics` is a
    ValueError instead.
    """
    kwargs = lr_kwargs or {}
    known = getattr(type(scheduler), "step", None) in _NEED_NOTHING
    missing = [] if known else _missing(scheduler.step, kwargs)
    if "metrics" in missing:
        raise ValueError(f"{type(scheduler).__name__} needs a value to watch: "
                         'engine.step(lr_kwargs={"metrics": loss})')
    if missing:
        scheduler.step(train_batch_size)
    else:
        scheduler.step(**kwargs)


# step() of these needs no argument: no look at a signature in each training step.
_NEED_NOTHING = {cls.step for cls in _SCHEDULES.values()}


def _missing(function, kwargs):
    """Required positional parameters of `function` that `kwargs` leaves out; [] where it has no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.default is p.empty and p.name not in kwargs
            and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


# ---- by name, from the command line ----

def add_tuning_arguments(parser):
    """Adds --lr_schedule and an option for each parameter of each schedule to an argparse parser; returns it.

    An option that is not given is None: the schedule's own default holds.
    """
    group = parser.add_argument_group("Convergence Tuning", "Convergence tuning configurations")
    group.add_argument("--lr_schedule", type=str, default=None, help=", ".join(VALID_LR_SCHEDULES))
    for key, owners in _tuning_parameters().items():
        kind = _kind_of(key)
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        group.add_argument(f"--{key}", default=None, help=", ".join(owners), **options)
    return parser


def parse_arguments():
    """This process's command line by add_tuning_arguments: (namespace, words that are not among its options)."""
    return add_tuning_arguments(argparse.ArgumentParser()).parse_known_args()


def override_params(args, params):
    """Puts every schedule parameter that stands in the namespace `args` into the dict `params`."""
    for key in _tuning_parameters():
        if getattr(args, key, None) is not None:
            params[key] = getattr(args, key)


def get_config_from_args(args):
    """({"type": ..., "params": {...}} for the configuration's `scheduler`, None), or (None, why not)."""
    name = getattr(args, "lr_schedule", None)
    if name is None:
        return None, "--lr_schedule not specified on command line"
    if name not in _SCHEDULES:
        return None, f"{name} is not supported LR schedule"
    given = {}
    override_params(args, given)
    params = {key: value for key, value in given.items() if name in _tuning_parameters()[key]}
    return {"type": name, "params": params}, None


def get_lr_from_config(config):
    """(the rate that a `scheduler` section is about, ""), or (None, why not)."""
    for key in ("type", "params"):
        if key not in config:
            return None, f"LR schedule {key} not defined in config"
    name, params = config["type"], config["params"]
    if name not in _SCHEDULES:
        return None, f"{name} is not a valid LR schedule"
    key = {"LRRangeTest": "lr_range_test_min_lr", "OneCycle": "cycle_max_lr"}.get(name, "warmup_max_lr")
    if key not in params:
        return None, f"{key} not defined in config"
    return params[key], ""


def _tuning_parameters():
    """{parameter: names of the schedules that have it}."""
    found = {}
    for name, cls in _SCHEDULES.items():
        for key in inspect.signature(cls).parameters:
            if key not in ("optimizer", "last_batch_iteration"):
                found.setdefault(key, []).append(name)
    return found


def _kind_of(key):
    if key in ("cycle_momentum", "lr_range_test_staircase"):
        return bool
    if key == "warmup_type":
        return str
    return float if key.endswith(("_lr", "_mom", "_rate", "_ratio")) else int


# ---- arguments ----

def _with_groups(optimizer):
    """`optimizer`, or the one inside it, whose list `param_groups` a schedule writes to."""
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(getattr(candidate, "param_groups", None), list):
            return candidate
    raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer or DeepSpeedOptimizer: "
                    "it has no list `param_groups`")


def _positive_int(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value}")
    return value


def _finite(name, value):
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
