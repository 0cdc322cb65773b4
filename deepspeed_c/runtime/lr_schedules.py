"""Learning-rate schedules over anything with `param_groups`.

The rate at an index is a pure function in C (`csrc/lr.c`); these classes only hold the index and write the rate into
the groups. An index i is the number of the optimizer step, from 0; -1 is construction.
"""
import difflib
import inspect
import logging

from deepspeed_c import _core

__all__ = ["VALID_LR_SCHEDULES", "LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR", "create"]

logger = logging.getLogger("DeepSpeed")


class _Schedule:
    """Index, per-group rates, state. A subclass gives `_rate(group_index, i)`."""

    def __init__(self, optimizer, warmup_num_steps, warmup_type, last_batch_iteration):
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer or DeepSpeedOptimizer: "
                            "it has no list `param_groups`")
        self.optimizer = optimizer
        self.warmup_num_steps = _positive_int("warmup_num_steps", warmup_num_steps)
        if warmup_type not in ("log", "linear"):
            logger.warning("%s: warmup_type %r is not one of 'log', 'linear'; 'log' is used",
                           type(self).__name__, warmup_type)
            warmup_type = "log"
        self.warmup_type = warmup_type
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
        assert getattr(self, "_last_lr", None) is not None, "need to call step() first"
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
        """One float per group from a number or a list of them."""
        n_groups = len(self.optimizer.param_groups)
        if not isinstance(value, (list, tuple)):
            return [float(value)] * n_groups
        if len(value) != n_groups:
            raise ValueError(f"expected {n_groups} value for {name}, got {len(value)}: {value}")
        return [float(v) for v in value]

    def _check_total(self, total_num_steps):
        if isinstance(total_num_steps, float) and total_num_steps.is_integer():
            total_num_steps = int(total_num_steps)  # 1e5 is how JSON files write it
        total_num_steps = _positive_int("total_num_steps", total_num_steps)
        if total_num_steps < self.warmup_num_steps:
            logger.warning("%s: total_num_steps %d is less than warmup_num_steps %d", type(self).__name__,
                           total_num_steps, self.warmup_num_steps)
        return total_num_steps


class WarmupLR(_Schedule):
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
            warmup_max_lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.min_lrs = self._per_group("min_lr", warmup_min_lr)
        self.max_lrs = self._per_group("max_lr", warmup_max_lr)
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


class WarmupCosineLR(_Schedule):
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
        self.org_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._start()

    def _rate(self, group_index, i):
        return _core.lr_at("WarmupCosineLR", self.warmup_type, self.warmup_num_steps, self.total_num_steps,
                           self.warmup_min_ratio, self.cos_min_ratio, i, self.org_lrs[group_index])


class OneCycle:
    """Not yet."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("the schedule OneCycle is not there yet; WarmupLR, WarmupDecayLR and WarmupCosineLR "
                                  "are")


class LRRangeTest:
    """Not yet."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("the schedule LRRangeTest is not there yet; WarmupLR, WarmupDecayLR and "
                                  "WarmupCosineLR are")


_SCHEDULES = {cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)}
VALID_LR_SCHEDULES = list(_SCHEDULES)


def create(name, optimizer, params=None):
    """The schedule that the configuration's `scheduler.type` and `scheduler.params` ask for.

    `name` is one of VALID_LR_SCHEDULES or a class of torch.optim.lr_scheduler, case-sensitive. ValueError names what
    is unknown or missing and what is allowed.
    """
    cls = _SCHEDULES.get(name) or _torch_schedule(name)
    params = dict(params or {})
    if not issubclass(cls, (OneCycle, LRRangeTest)):
        _check_params(name, cls, params)
    return cls(optimizer, **params)


def _torch_schedule(name):
    from torch.optim import lr_scheduler
    cls = getattr(lr_scheduler, name, None) if isinstance(name, str) else None
    if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler) and cls is not lr_scheduler.LRScheduler:
        return cls
    near = difflib.get_close_matches(str(name), VALID_LR_SCHEDULES, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"scheduler.type {name!r} is not one of {', '.join(VALID_LR_SCHEDULES)} or a class of "
                     f"torch.optim.lr_scheduler.{hint}")


def _check_params(name, cls, params):
    accepted = dict(list(inspect.signature(cls).parameters.items())[1:])  # the first is the optimizer
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


def _positive_int(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value}")
    return value
