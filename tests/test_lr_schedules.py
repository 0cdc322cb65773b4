"""Schedules in Python: arguments, what is written where, resuming. The formulas' own tests are tests/c/test_lr.c."""
import argparse
import functools
import logging
import math
import types
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

import deepspeed_c
from deepspeed_c import _core
from deepspeed_c.runtime import lr_schedules
from deepspeed_c.runtime.lr_schedules import (
    VALID_LR_SCHEDULES,
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)
from deepspeed_c.utils.logging import logger


def make_optimizer(n_groups=1, lr=0.1):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr * (k + 1)} for k in range(n_groups)]
    return torch.optim.SGD(groups, lr=lr)


def make_adam(n_groups=1):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(n_groups)]
    return torch.optim.AdamW(groups, lr=0.1)


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def follow(schedule, n_steps):
    seen = rates(schedule.optimizer)
    for _ in range(n_steps):
        schedule.step()
        seen += rates(schedule.optimizer)
    return seen


@pytest.mark.parametrize("make, error, text", [
    (lambda: WarmupLR(5), TypeError, "int is not a torch.optim.Optimizer"),
    (lambda: WarmupLR(make_optimizer(), warmup_num_steps=0), ValueError, "warmup_num_steps must be a positive integer"),
    (lambda: WarmupLR(make_optimizer(), warmup_num_steps=2.5), ValueError, "got 2.5"),
    (lambda: WarmupLR(make_optimizer(), warmup_num_steps=True), ValueError, "got True"),
    (lambda: WarmupLR(make_optimizer(), warmup_max_lr=float("nan")), ValueError, "warmup_max_lr must be finite"),
    (lambda: WarmupLR(make_optimizer(2), warmup_max_lr=[1, 2, 3]), ValueError,
     "expected 2 value for warmup_max_lr, got 3"),
    (lambda: WarmupLR(make_optimizer(2), warmup_min_lr=[1]), ValueError, "expected 2 value for warmup_min_lr, got 1"),
    (lambda: WarmupDecayLR(make_optimizer(), 0), ValueError, "total_num_steps must be a positive integer, got 0"),
    (lambda: WarmupCosineLR(make_optimizer(), 10.5), ValueError, "got 10.5"),
    (lambda: OneCycle(make_adam(), 0.1, 0.2, cycle_first_step_size=0), ValueError, "cycle_first_step_size must be"),
    (lambda: OneCycle(make_adam(), 0.1, 0.2, cycle_second_step_size=-1), ValueError, "cycle_second_step_size must be"),
    (lambda: OneCycle(make_adam(), 0.1, 0.2, decay_step_size=-1), ValueError, "decay_step_size must be"),
    (lambda: OneCycle(make_adam(), 0.1, 0.2, decay_lr_rate=-1), ValueError, "decay_lr_rate must not be negative"),
    (lambda: OneCycle(make_adam(), 0.1, [0.2, 0.3]), ValueError, "expected 1 value for cycle_max_lr, got 2"),
    (lambda: OneCycle(make_adam(), float("nan"), 1), ValueError, "cycle_min_lr must be finite, got nan"),
    (lambda: OneCycle(make_adam(), 0.1, 0.2, cycle_max_mom=[1, 2]), ValueError, "expected 1 value for cycle_max_mom"),
    (lambda: LRRangeTest(make_optimizer(), lr_range_test_step_size=0), ValueError,
     "lr_range_test_step_size must be a positive integer, got 0"),
    (lambda: LRRangeTest(make_optimizer(), lr_range_test_step_size=1.5), ValueError, "got 1.5"),
    (lambda: LRRangeTest(make_optimizer(), lr_range_test_step_rate=float("inf")), ValueError, "rate must be finite"),
    (lambda: LRRangeTest(make_optimizer(2), [1, 2, 3]), ValueError, "expected 2 value for lr_range_test_min_lr, got 3"),
])
def test_bad_arguments_are_named(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_bad_arguments_change_no_group():
    optimizer = make_optimizer(2)
    with pytest.raises(ValueError):
        WarmupLR(optimizer, warmup_max_lr=[0.5, float("inf")], warmup_num_steps=4)
    assert rates(optimizer) == [0.1, 0.2]


@pytest.mark.parametrize("name, params, text", [
    ("WarmpLR", {}, "Did you mean 'WarmupLR'"),
    ("warmuplr", {}, "not one of LRRangeTest, OneCycle.*Did you mean 'WarmupLR'"),
    ("steplr", {"step_size": 3}, "Did you mean 'StepLR'"),
    (None, {}, "scheduler.type None"),
    ("LRScheduler", {}, "not one of"),
    ("WarmupLR", {"warmup_steps": 3}, "scheduler.params.warmup_steps is not a parameter of WarmupLR"),
    ("WarmupLR", {"warmup_num_step": 3}, "did you mean 'warmup_num_steps'"),
    ("WarmupDecayLR", {"warmup_num_steps": 3}, "scheduler.params.total_num_steps is required by WarmupDecayLR"),
    ("OneCycle", {"cycle_min_lr": 3}, "scheduler.params.cycle_max_lr is required by OneCycle"),
    ("StepLR", {}, "scheduler.params.step_size is required by StepLR"),
    ("StepLR", {"step_sise": 1}, "did you mean 'step_size'"),
    ("LambdaLR", {}, "needs a function .lr_lambda., which a configuration cannot hold; pass initialize"),
    ("MultiplicativeLR", {"lr_lambda": "x"}, "needs a function"),
    ("ChainedScheduler", {}, "needs scheduler objects"),
    ("SequentialLR", {}, "needs scheduler objects"),
])
def test_create_names_what_is_unknown_or_missing(name, params, text):
    with pytest.raises(ValueError, match=text):
        lr_schedules.create(name, make_optimizer(), params)


def test_valid_schedules_are_the_documented_names():
    assert sorted(VALID_LR_SCHEDULES) == sorted(
        ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])


def test_unknown_warmup_type_warns_and_is_log(caplog):
    with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
        odd = WarmupLR(make_optimizer(), warmup_num_steps=4, warmup_type="cubic")
    assert "cubic" in caplog.text
    assert follow(odd, 5) == follow(WarmupLR(make_optimizer(), warmup_num_steps=4), 5)


def test_total_below_warmup_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
        WarmupDecayLR(make_optimizer(), total_num_steps=3, warmup_num_steps=10)
    assert "total_num_steps 3 is less than warmup_num_steps 10" in caplog.text


@pytest.mark.parametrize("make, expected", [
    (lambda o: WarmupLR(o, warmup_num_steps=4, warmup_max_lr=1.0), [0, 0, .5, np.log(3) / np.log(4), 1, 1]),
    (lambda o: WarmupLR(o, warmup_num_steps=4, warmup_max_lr=1.0, warmup_type="linear"), [0, 0, .25, .5, .75, 1, 1]),
    (lambda o: WarmupLR(o, warmup_num_steps=2), [0, 0, .1, .1]),
    (lambda o: WarmupDecayLR(o, 8, warmup_num_steps=4, warmup_max_lr=1.0),
     [0, 0, .5, np.log(3) / np.log(4), 1, 1, .75, .5, .25, 0, 0]),
    (lambda o: WarmupDecayLR(o, 8.0, warmup_num_steps=4), [0, 0, .0005, .001 * np.log(3) / np.log(4), .001]),
    (lambda o: WarmupCosineLR(o, 8, warmup_num_steps=4, warmup_type="linear"),
     [0, 0, .025, .05, .075, .08535680352542145, .050005, .014653196474578559, 1e-5, 1e-5]),
])
def test_rates_from_construction_on(make, expected):
    assert follow(make(make_optimizer()), len(expected) - 1) == pytest.approx(expected, rel=1e-14, abs=1e-18)


def test_each_group_has_its_own_maximum_and_list_arguments_are_per_group():
    optimizer = make_optimizer(2)
    assert follow(WarmupLR(optimizer, warmup_num_steps=2), 2)[-2:] == [0.1, 0.2]
    schedule = WarmupLR(optimizer, warmup_min_lr=[1, 2], warmup_max_lr=[3, 4], warmup_num_steps=2)
    assert rates(optimizer) == [1, 2]
    schedule.step(1)
    assert rates(optimizer) == [3, 4] == schedule.get_last_lr()


def test_tensor_rate_is_filled_in_place():
    optimizer = make_optimizer()
    held = optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    schedule = WarmupLR(optimizer, warmup_num_steps=4)
    schedule.step(), schedule.step()
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.25 == schedule.get_last_lr()[0]


def test_last_rate_before_the_first_step_of_a_resumed_schedule_says_what_to_do():
    optimizer = make_optimizer()
    schedule = WarmupLR(optimizer, warmup_max_lr=1.0, warmup_num_steps=4, last_batch_iteration=3)
    assert rates(optimizer) == [0.1]
    with pytest.raises(AssertionError, match="need to call step"):
        schedule.get_last_lr()
    schedule.step()
    assert schedule.get_last_lr() == [1.0] == rates(optimizer)


def test_resumed_schedule_continues_and_loading_writes_nothing():
    optimizer, resumed_optimizer = make_optimizer(), make_optimizer()
    schedule = WarmupDecayLR(optimizer, 20, warmup_num_steps=5)
    follow(schedule, 7)
    resumed = WarmupDecayLR(resumed_optimizer, 20, warmup_num_steps=5)
    resumed.load_state_dict(schedule.state_dict())
    assert schedule.state_dict() == {"last_batch_iteration": 6}
    assert rates(resumed_optimizer) == [0.0]
    schedule.step(), resumed.step()
    assert rates(resumed_optimizer) == rates(optimizer) != [0.0]


def test_anything_with_a_list_of_param_groups_is_an_optimizer():
    wrapper = types.SimpleNamespace(param_groups=[{"lr": 0.3}])
    schedule = lr_schedules.create("WarmupLR", wrapper, {"warmup_num_steps": 2})
    schedule.step(5)
    assert wrapper.param_groups[0]["lr"] == 0.3


def test_create_makes_torch_schedules_too():
    schedule = lr_schedules.create("StepLR", make_optimizer(), {"step_size": 3})
    assert isinstance(schedule, torch.optim.lr_scheduler.StepLR)


def warmup(kind, w, i, share):
    """The ramp of the published formulas at index i, or `share()` after it."""
    w = max(2, w)
    if i < w:
        return math.log(i + 1) / math.log(w) if kind == "log" else i / w
    return share(w)


def warmup_rate(i, low, high, w, kind):
    return low if i < 0 else low + (high - low) * warmup(kind, w, i, lambda w: 1)


def decay_rate(i, total, low, high, w, kind):
    return low if i < 0 else low + (high - low) * warmup(kind, w, i, lambda w: max(0, (total - i) / max(1, total - w)))


def cosine_rate(i, base, total, r0, w, c, kind):
    if i < 0:
        return 0.0
    if i < max(2, w):
        return base * (r0 + (1 - r0) * warmup(kind, w, i, None))
    p = min(1, (i - max(2, w) + 1) / max(1, total - max(2, w)))
    return base * max(0, c + (1 - c) * (1 + math.cos(math.pi * p)) / 2)


def one_cycle(i, low, high, first, second, n1, n2, decay_step, rate, momentum=False):
    """In fractions, from the phase of the cycle: what the floor of a stair sees is exact."""
    first, second, b = Fraction(first), Fraction(second), i + 1
    total = first + second
    if i < total:
        x, rho = Fraction(b) / total % 1, first / total
        s = x / rho if x <= rho else (x - 1) / (rho - 1)
        n = n1 if x <= rho else n2
        if n > 0:
            s = Fraction(math.floor(b % total * n / first if x <= rho else (total - b % total) * n / second), n)
        return high - (high - low) * float(s) if momentum else low + (high - low) * float(s)
    d = float((i - total + 1) / Fraction(decay_step)) if decay_step else 0.0
    return high * (1 + rate * d) if momentum else low / (1 + rate * d)


def range_rate(i, low, size, rate, stairs):
    return low * (1 + rate * (math.floor((i + 1) / size) if stairs else (i + 1) / size))


CYCLES = [dict(first=7, second=5, n1=0, n2=0, decay_step=0, rate=0.0),
          dict(first=7, second=5, n1=0, n2=0, decay_step=3, rate=0.25),
          dict(first=10, second=100, n1=3, n2=7, decay_step=10, rate=0.5),
          dict(first=100, second=1, n1=100, n2=-1, decay_step=0.5, rate=0.0),
          dict(first=1, second=0, n1=0, n2=2, decay_step=1, rate=1e-3),
          dict(first=2.5, second=30.25, n1=4, n2=0, decay_step=7, rate=2.0)]


def cycle_of(optimizer, low, high, case, **more):
    return OneCycle(optimizer, low, high, decay_lr_rate=case["rate"], cycle_first_step_size=case["first"],
                    cycle_second_step_size=case["second"], cycle_first_stair_count=case["n1"],
                    cycle_second_stair_count=case["n2"], decay_step_size=case["decay_step"], **more)


FORMULAS = [
    *[(lambda o, w=w, kind=kind: WarmupLR(o, 0.01, 0.2, w, kind),
       lambda i, w=w, kind=kind: warmup_rate(i, .01, .2, w, kind))
      for w in (1, 2, 3, 50) for kind in ("log", "linear")],
    *[(lambda o, w=w, kind=kind: WarmupDecayLR(o, 210, 0.01, 0.2, w, kind),
       lambda i, w=w, kind=kind: decay_rate(i, 210, .01, .2, w, kind))
      for w in (1, 50, 210, 250) for kind in ("log", "linear")],
    *[(lambda o, w=w, kind=kind: WarmupCosineLR(o, 210, 0.1, w, 0.02, kind),
       lambda i, w=w, kind=kind: cosine_rate(i, 0.1, 210, 0.1, w, 0.02, kind))
      for w in (1, 50, 210, 250) for kind in ("log", "linear")],
    *[(lambda o, case=case: cycle_of(o, 0.01, 0.2, case, cycle_momentum=False),
       lambda i, case=case: one_cycle(i, 0.01, 0.2, **case)) for case in CYCLES],
    *[(lambda o, size=size, stairs=stairs: LRRangeTest(o, 0.02, size, 0.7, stairs),
       lambda i, size=size, stairs=stairs: range_rate(i, 0.02, size, 0.7, stairs))
      for size in (1, 13) for stairs in (False, True)],
]


@pytest.mark.parametrize("make, formula", FORMULAS)
def test_every_schedule_follows_its_formula_for_300_steps(make, formula):
    schedule = make(make_optimizer())
    expected = [formula(i) for i in range(-1, 300)]
    assert follow(schedule, 300) == pytest.approx(expected, rel=1e-13, abs=1e-17)


@pytest.mark.parametrize("case", CYCLES)
def test_momentum_cycles_against_the_rate_and_beta2_is_forced(case):
    optimizer = make_adam(2)
    schedule = cycle_of(optimizer, 0.01, 0.2, case, cycle_min_mom=[0.7, 0.8], cycle_max_mom=0.9, decay_mom_rate=0.3)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.7, 0.99), (0.8, 0.99)]
    for i in range(300):
        schedule.step()
        expected = [one_cycle(i, low, 0.9, **{**case, "rate": 0.3}, momentum=True) for low in (0.7, 0.8)]
        seen = [group["betas"] for group in optimizer.param_groups]
        assert [beta for beta, _ in seen] == pytest.approx(expected, rel=1e-13)
        assert [beta for _, beta in seen] == [0.99, 0.99] and schedule.get_mom() == seen


def test_without_betas_momentum_does_not_cycle_and_a_warning_says_so(caplog):
    optimizer = make_optimizer()
    logger.propagate = True
    try:
        with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
            schedule = OneCycle(optimizer, 0.1, 0.2)
    finally:
        logger.propagate = False
    schedule.step()
    assert "cycle_momentum is off" in caplog.text
    assert schedule.get_mom() is None and "betas" not in optimizer.param_groups[0]


def test_momentum_stays_the_users_when_it_does_not_cycle():
    optimizer = make_adam()
    schedule = OneCycle(optimizer, 0.1, 0.2, cycle_momentum=False)
    schedule.step()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999) and schedule.get_mom() is None


@pytest.mark.parametrize("make", [
    lambda o, **k: WarmupLR(o, warmup_num_steps=30, **k),
    lambda o, **k: WarmupDecayLR(o, 90, warmup_num_steps=30, **k),
    lambda o, **k: WarmupCosineLR(o, 90, warmup_num_steps=30, **k),
    lambda o, **k: OneCycle(o, 0.1, 0.2, 0.5, 20, 10, 5, decay_step_size=3, decay_mom_rate=0.1, **k),
    lambda o, **k: LRRangeTest(o, 0.1, 7, **k),
])
def test_every_schedule_resumes_from_its_state_or_its_index(make):
    straight, loaded, started = make_adam(), make_adam(), make_adam()
    schedule = make(straight)
    follow(schedule, 17)
    resumed = make(loaded)
    resumed.load_state_dict(schedule.state_dict())
    by_index = make(started, last_batch_iteration=16)
    assert rates(started) == [0.1] and started.param_groups[0]["betas"] == (0.9, 0.999)
    for _ in range(40):
        schedule.step(), resumed.step(), by_index.step()
        for optimizer in (loaded, started):
            assert rates(optimizer) == rates(straight)
            assert optimizer.param_groups[0]["betas"] == straight.param_groups[0]["betas"]
    assert schedule.state_dict() == by_index.state_dict() == {"last_batch_iteration": 56}


def test_a_schedule_of_a_wrapper_without_groups_writes_to_the_optimizer_inside():
    inside = make_optimizer()
    schedule = WarmupLR(types.SimpleNamespace(optimizer=inside), warmup_max_lr=0.7, warmup_num_steps=2)
    schedule.step(5)
    assert rates(inside) == [0.7]


# ---- in the engine ----

def start(scheduler, optimizer="Adam", **more):
    module = torch.nn.Linear(3, 1)
    settings = {"train_batch_size": 2, "optimizer": {"type": optimizer, "params": {"lr": 0.1}}, "scheduler": scheduler}
    return deepspeed_c.initialize(model=module, model_parameters=module.parameters(), config={**settings, **more})


def run(engine, value=1.0, **step):
    engine.backward(engine(torch.full((2, 3), value)).sum())
    engine.step(**step)


def test_a_torch_schedule_by_name_steps_with_the_optimizer():
    engine, optimizer, _, schedule = start({"type": "StepLR", "params": {"step_size": 2, "gamma": 0.5}})
    assert isinstance(schedule, torch.optim.lr_scheduler.StepLR) and schedule.optimizer is optimizer
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a schedule that steps before its optimizer
        for _ in range(4):
            run(engine)
            seen += engine.get_lr()
    assert seen == [0.1, 0.05, 0.05, 0.025]


@pytest.mark.parametrize("name, params", [
    ("ExponentialLR", {"gamma": 0.9}), ("MultiStepLR", {"milestones": [2, 4]}), ("ConstantLR", {}), ("LinearLR", {}),
    ("CosineAnnealingLR", {"T_max": 5}), ("CosineAnnealingWarmRestarts", {"T_0": 3}), ("PolynomialLR", {}),
    ("OneCycleLR", {"max_lr": 1.0, "total_steps": 20}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 3}),
])
def test_torch_schedules_give_the_rates_and_betas_they_give_in_plain_torch(name, params):
    engine, optimizer, _, _ = start({"type": name, "params": params})
    plain = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = getattr(torch.optim.lr_scheduler, name)(plain, **params)
    for _ in range(8):
        run(engine)
        plain.step(), schedule.step()
        assert engine.get_lr() == rates(plain) and engine.get_mom() == [tuple(plain.param_groups[0]["betas"])]


def test_reduce_on_plateau_is_told_through_lr_kwargs_and_says_so_when_it_is_not():
    engine, _, _, _ = start({"type": "ReduceLROnPlateau", "params": {"patience": 0, "factor": 0.5}})
    seen = []
    for metrics in (1.0, 0.5, 2.0):
        run(engine, lr_kwargs={"metrics": metrics})
        seen += engine.get_lr()
    assert seen == [0.1, 0.1, 0.05]
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs a value to watch: engine.step.lr_kwargs="):
        run(engine)


def test_a_schedule_whose_step_needs_an_increment_gets_the_batch_size():
    class Samples:
        n = 0

        def step(self, increment):
            self.n += increment

    engine = start({})[0]
    engine.lr_scheduler = Samples()
    run(engine), run(engine)
    assert engine.lr_scheduler.n == 4


@pytest.mark.parametrize("make", [WarmupLR, functools.partial(WarmupDecayLR, total_num_steps=9),
                                  functools.partial(WarmupCosineLR, total_num_steps=9),
                                  functools.partial(OneCycle, cycle_min_lr=0.1, cycle_max_lr=0.5), LRRangeTest])
def test_a_wrapper_without_groups_of_its_own_stands_for_the_optimizer_inside(make):
    inner, plain = (torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.25) for _ in range(2))
    wrapped, direct = make(types.SimpleNamespace(optimizer=inner)), make(plain)
    for _ in range(3):
        wrapped.step(), direct.step()
        assert inner.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_a_schedule_can_be_any_object_with_step():
    engine, seen = start({})[0], []
    engine.lr_scheduler = types.SimpleNamespace(step=lambda: seen.append("stepped"))
    run(engine)
    assert seen == ["stepped"]


def test_a_type_error_inside_a_schedule_is_not_taken_for_a_missing_argument():
    class Broken:
        def step(self, increment=None):
            if increment is None:
                raise TypeError("a fault of the script's own")

    engine = start({})[0]
    engine.lr_scheduler = Broken()
    with pytest.raises(TypeError, match="of the script's own"):
        run(engine)


def test_a_skipped_step_does_not_move_the_schedule():
    engine = start({"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}, fp32={"check_grad_overflow": True})[0]
    for value, expected in ((1.0, 0.05), (float("inf"), 0.05), (1.0, 0.025)):
        run(engine, value)
        assert engine.get_lr() == [expected]


def test_one_cycle_moves_the_betas_that_the_core_steps_with():
    params = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.2, "cycle_first_step_size": 3, "cycle_second_step_size": 2}
    engine, optimizer, _, _ = start({"type": "OneCycle", "params": params})
    plain_module = torch.nn.Linear(3, 1)
    plain_module.load_state_dict(engine.module.state_dict())
    plain = torch.optim.AdamW(plain_module.parameters(), weight_decay=0.0)
    schedule = OneCycle(plain, **params)
    assert engine.get_mom() == [(0.8, 0.99)]
    for _ in range(8):
        run(engine)
        plain.zero_grad()
        plain_module(torch.ones(2, 3)).sum().backward()
        torch.nn.utils.clip_grad_norm_(plain_module.parameters(), 1.0)
        plain.step(), schedule.step()
        assert engine.get_mom() == [plain.param_groups[0]["betas"]] and engine.get_lr() == rates(plain)
    torch.testing.assert_close(engine.module.weight, plain_module.weight, rtol=1e-5, atol=1e-6)


def cycle_on_ranks(rank, world, stage):
    torch.manual_seed(3)
    params = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.2, "cycle_first_step_size": 3, "cycle_second_step_size": 2}
    engine = start({"type": "OneCycle", "params": params}, "AdamW", train_batch_size=2 * world,
                   zero_optimization={"stage": stage})[0]
    for _ in range(6):
        run(engine)
    return engine.get_lr(), engine.get_mom(), [p.tolist() for p in engine.module.parameters()]


def test_a_schedule_moves_alike_on_every_rank_and_stage(ranks):
    results = [outcome for stage in (0, 2) for outcome in ranks(2, cycle_on_ranks, stage)]
    assert results[0][:2] == ([0.01], [(0.9, 0.99)]) and all(result == results[0] for result in results)


def test_parameters_of_a_schedule_are_checked_by_initialize():
    with pytest.raises(ValueError, match="scheduler.params.step_size is required by StepLR"):
        start({"type": "StepLR"})
    with pytest.raises(ValueError, match="scheduler.type 'warmupLR' is not one of.*Did you mean 'WarmupLR'"):
        start({"type": "warmupLR"})
    module = torch.nn.Linear(3, 1)
    with pytest.raises(TypeError, match="lr_scheduler is int; allowed: an object with step"):
        deepspeed_c.initialize(model=module, config={"train_batch_size": 2, "optimizer": {"type": "SGD"}},
                               lr_scheduler=5)


# ---- from the command line ----

def test_tuning_arguments_make_a_configuration():
    parser = lr_schedules.add_tuning_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--lr_schedule", "OneCycle", "--cycle_min_lr", "0.1", "--cycle_max_lr", "1",
                              "--cycle_first_stair_count", "3", "--no-cycle_momentum", "--warmup_num_steps", "7"])
    config, problem = lr_schedules.get_config_from_args(args)
    assert problem is None
    assert config == {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0,
                                                     "cycle_first_stair_count": 3, "cycle_momentum": False}}
    assert lr_schedules.get_lr_from_config(config) == (1.0, "")
    lr_schedules.create(config["type"], make_adam(), config["params"])


def test_tuning_arguments_that_name_no_schedule_say_why():
    parser = lr_schedules.add_tuning_arguments(argparse.ArgumentParser())
    assert lr_schedules.get_config_from_args(parser.parse_args([])) == (
        None, "--lr_schedule not specified on command line")
    assert lr_schedules.get_config_from_args(parser.parse_args(["--lr_schedule", "Cosine"]))[1] == \
        "Cosine is not supported LR schedule"
    assert lr_schedules.get_lr_from_config({"params": {}}) == (None, "LR schedule type not defined in config")
    assert lr_schedules.get_lr_from_config({"type": "WarmupLR"}) == (None, "LR schedule params not defined in config")
    assert lr_schedules.get_lr_from_config({"type": "X", "params": {}}) == (None, "X is not a valid LR schedule")
    assert lr_schedules.get_lr_from_config({"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 2}}) == (2, "")


def test_table_equals_rates_one_by_one():
    table = _core.lr_table("WarmupCosineLR", "log", 7, 30, 0.1, 0.01, -1, 50, 0.3)
    assert table.dtype == np.float64 and table.shape == (50,)
    assert table.tolist() == [_core.lr_at("WarmupCosineLR", "log", 7, 30, 0.1, 0.01, i, 0.3) for i in range(-1, 49)]
    assert _core.lr_table("WarmupLR", "log", 7, 0, 0, 1, 0, 0).shape == (0,)


@pytest.mark.parametrize("call, error", [
    (lambda: _core.lr_at("Warmup", "log", 7, 0, 0, 1, 0), "schedule 'Warmup' is not one of"),
    (lambda: _core.lr_at("WarmupLR", "square", 7, 0, 0, 1, 0), "ramp 'square' is not one of"),
    (lambda: _core.lr_table("WarmupLR", "log", 7, 0, 0, 1, 0, -1), "count must not be negative"),
    (lambda: _core.lr_table("WarmupLR", "log", 7, 0, 0, 1, 2**63 - 1, 5), "does not fit"),
    (lambda: _core.one_cycle(0, 1, 0, 0, 0, 0, 1, 0, 0), "cycle_first_step_size"),
    (lambda: _core.range_test(0.1, 0, 1, False, 0), "n_step must be positive"),
])
def test_core_functions_refuse_bad_arguments(call, error):
    with pytest.raises(ValueError, match=error):
        call()
