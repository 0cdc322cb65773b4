"""Schedules in Python: arguments, what is written where, resuming. The formulas' own tests are tests/c/test_lr.c."""
import logging
import types

import numpy as np
import pytest
import torch

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


def make_optimizer(n_groups=1, lr=0.1):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr * (k + 1)} for k in range(n_groups)]
    return torch.optim.SGD(groups, lr=lr)


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
    (lambda: WarmupLR(make_optimizer(2), warmup_max_lr=[1, 2, 3]), ValueError, "expected 2 value for max_lr, got 3"),
    (lambda: WarmupLR(make_optimizer(2), warmup_min_lr=[1]), ValueError, "expected 2 value for min_lr, got 1"),
    (lambda: WarmupDecayLR(make_optimizer(), 0), ValueError, "total_num_steps must be a positive integer, got 0"),
    (lambda: WarmupCosineLR(make_optimizer(), 10.5), ValueError, "got 10.5"),
    (lambda: OneCycle(make_optimizer(), 0.1, 0.2), NotImplementedError, "OneCycle is not there yet"),
    (lambda: LRRangeTest(make_optimizer()), NotImplementedError, "LRRangeTest is not there yet"),
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
    ("warmuplr", {}, "not one of LRRangeTest, OneCycle"),
    (None, {}, "scheduler.type None"),
    ("LRScheduler", {}, "not one of"),
    ("WarmupLR", {"warmup_steps": 3}, "scheduler.params.warmup_steps is not a parameter of WarmupLR"),
    ("WarmupLR", {"warmup_num_step": 3}, "did you mean 'warmup_num_steps'"),
    ("WarmupDecayLR", {"warmup_num_steps": 3}, "scheduler.params.total_num_steps is required by WarmupDecayLR"),
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
    (lambda: _core.scaler_trace(b"", 0.0), "must be positive"),
    (lambda: _core.scaler_trace(b"", 1.0, window=0), "must be positive"),
])
def test_core_functions_refuse_bad_arguments(call, error):
    with pytest.raises(ValueError, match=error):
        call()


def test_scale_halves_after_hysteresis_and_doubles_after_a_window():
    assert _core.scaler_trace(b"\1\1\0\0\0\0", 16, window=2) == [16, 8, 8, 8, 16, 16]
    assert _core.scaler_trace(b"\1\1\0\0", 16, dynamic=False) == [16] * 4


def test_overflow_at_the_minimum_scale_says_what_to_do():
    with pytest.raises(RuntimeError, match="minimum.*min_loss_scale"):
        _core.scaler_trace(b"\1\1", 1.0, hysteresis=1)
