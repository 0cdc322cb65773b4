"""Timers, with a clock that the test moves: sums, lines, speed."""
import logging

import pytest

from deepspeed_c.utils import timer
from deepspeed_c.utils.logging import logger


@pytest.fixture
def clock(monkeypatch):
    """A clock in seconds; `clock.now += 1` is how time passes."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(timer.time, "perf_counter", lambda: Clock.now)
    return Clock


@pytest.fixture
def lines():
    """What the logger's handlers were given."""
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def spend(one, clock, seconds):
    one.start()
    clock.now += seconds
    one.stop()


def test_a_timer_must_be_started_once_before_it_is_stopped():
    one = timer.SynchronizedWallClockTimer()("fwd")
    with pytest.raises(RuntimeError, match="'fwd' is not started"):
        one.stop()
    one.start()
    with pytest.raises(RuntimeError, match="'fwd' has already been started"):
        one.start()


def test_elapsed_is_the_sum_in_milliseconds_until_it_is_reset(clock):
    one = timer.SynchronizedWallClockTimer()("fwd")
    spend(one, clock, 0.25), spend(one, clock, 0.5)
    assert (one.elapsed(reset=False), one.mean()) == (750.0, 375.0)
    assert one.elapsed() == 750.0 and one.elapsed() == one.mean() == 0.0
    spend(one, clock, 1)
    one.start(), one.stop(reset=True)
    assert one.elapsed() == 0.0


def test_elapsed_of_a_running_timer_counts_up_to_now_and_goes_on(clock):
    one = timer.SynchronizedWallClockTimer()("fwd")
    one.start()
    clock.now += 1
    assert one.elapsed() == 1000.0
    clock.now += 2
    one.stop()
    assert one.elapsed() == 2000.0


def test_the_line_has_the_named_timers_in_order_and_no_others(clock, lines):
    timers = timer.SynchronizedWallClockTimer()
    spend(timers("fwd"), clock, 0.0125), spend(timers("step"), clock, 1), spend(timers("bwd"), clock, 3)
    timers.log(["bwd", "fwd", "absent"], normalizer=2)
    timers.log(["step"], ranks=[1])
    assert lines == ["[Rank 0] time (ms) | bwd: 1500.00 | fwd: 6.25"]
    assert timers("fwd").elapsed() == 0 and set(timers.get_timers()) == {"fwd", "step", "bwd"}
    with pytest.raises(ValueError, match="normalizer must be positive, got 0"):
        timers.log(["fwd"], normalizer=0)


def test_means_are_per_interval(clock):
    timers = timer.SynchronizedWallClockTimer()
    spend(timers("fwd"), clock, 1), spend(timers("fwd"), clock, 2)
    assert timers.get_mean(["fwd", "bwd"], normalizer=3) == {"fwd": 500.0}
    assert timers.get_mean(["fwd"]) == {"fwd": 0.0}


def test_speed_counts_whole_steps_after_the_warm_up(clock, lines):
    speed = timer.ThroughputTimer(batch_size=8, start_step=1, steps_per_output=2, monitor_memory=False)
    speed.update_epoch_count()
    for seconds in (100, 1, 2, 2):  # the first step is the warm-up
        for is_boundary in (False, True):
            speed.start()
            clock.now += seconds / 2
            speed.stop(global_step=is_boundary)
    assert lines == [
        "[Rank 0] epoch=1/micro_step=4/global_step=2, RunningAvgSamplesPerSec=8, CurrSamplesPerSec=8",
        "[Rank 0] epoch=1/micro_step=8/global_step=4, RunningAvgSamplesPerSec=4.8, CurrSamplesPerSec=4",
    ]
    assert speed.avg_samples_per_sec() == 24 / 5


def test_speed_is_unknown_before_the_first_timed_step_and_no_line_comes_at_inf(clock, lines):
    speed = timer.ThroughputTimer(batch_size=8, steps_per_output=float("inf"))
    assert speed.avg_samples_per_sec() == float("-inf")
    for _ in range(5):
        speed.start(), speed.stop(global_step=True)
    assert lines == []
