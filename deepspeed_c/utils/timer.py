"""Wall-clock timers: of the parts of a step (`wall_clock_breakdown`), and of samples per second.

A timer counts between start() and stop() and keeps the sum until it is read with `reset`. Times are in milliseconds.
On a device that works behind the host's back both ends wait for it; on a CPU nothing waits.
"""
import time

from .logging import print_dist

FORWARD_MICRO_TIMER = "fwd_microstep"
FORWARD_GLOBAL_TIMER = "fwd"
BACKWARD_MICRO_TIMER = "bwd_microstep"
BACKWARD_GLOBAL_TIMER = "bwd"
BACKWARD_INNER_MICRO_TIMER = "bwd_inner_microstep"
BACKWARD_INNER_GLOBAL_TIMER = "bwd_inner"
BACKWARD_REDUCE_MICRO_TIMER = "bwd_allreduce_microstep"
BACKWARD_REDUCE_GLOBAL_TIMER = "bwd_allreduce"
STEP_MICRO_TIMER = "step_microstep"
STEP_GLOBAL_TIMER = "step"


def _now(synchronize):
    if synchronize:
        from ..accelerator import get_accelerator
        get_accelerator().synchronize()
    return time.perf_counter()


class Timer:
    """One named sum of times."""

    def __init__(self, name, synchronize=False):
        self.name_ = name
        self._synchronize = synchronize
        self.started_ = False
        self._since = 0.0
        self._elapsed = 0.0  # seconds, of finished intervals
        self._n = 0  # finished intervals since reset()

    def start(self):
        """Begins an interval; RuntimeError where one has begun."""
        if self.started_:
            raise RuntimeError(f"timer {self.name_!r} has already been started")
        self._since = _now(self._synchronize)
        self.started_ = True

    def stop(self, reset=False, record=False):
        """Ends the interval and adds it, or with `reset` keeps it alone. `record` changes nothing: every interval
        counts in mean()."""
        if not self.started_:
            raise RuntimeError(f"timer {self.name_!r} is not started")
        if reset:
            self._elapsed, self._n = 0.0, 0
        self._elapsed += _now(self._synchronize) - self._since
        self._n += 1
        self.started_ = False

    def add(self, seconds):
        """Counts an interval that was measured elsewhere."""
        self._elapsed += seconds
        self._n += 1

    def reset(self):
        """Forgets all intervals, an unfinished one too."""
        self.started_ = False
        self._elapsed, self._n = 0.0, 0

    def elapsed(self, reset=True):
        """Milliseconds of all intervals, an unfinished one up to now (it goes on); `reset` starts the sum anew."""
        now = _now(self._synchronize) if self.started_ else 0.0
        total = self._elapsed + (now - self._since if self.started_ else 0.0)
        if reset:
            self._elapsed, self._n, self._since = 0.0, 0, now
        return total * 1e3

    def mean(self):
        """Mean of the finished intervals in milliseconds, 0.0 without any."""
        return self._elapsed * 1e3 / self._n if self._n else 0.0


class SynchronizedWallClockTimer:
    """Timers by name: `timers("fwd").start()`, `timers("fwd").stop()`, `timers.log(["fwd"])`."""

    def __init__(self):
        from ..accelerator import get_accelerator
        self._synchronize = not get_accelerator().use_host_timers()
        self.timers = {}

    def __call__(self, name):
        """The timer of this name, made when it is first asked for."""
        if name not in self.timers:
            self.timers[name] = Timer(name, self._synchronize)
        return self.timers[name]

    def get_timers(self):
        return self.timers

    def has_timer(self, name):
        return name in self.timers

    def line(self, names, normalizer=1.0, reset=True):
        """`time (ms) | fwd: 0.00 | ...` of those names that have a timer."""
        if not normalizer > 0:
            raise ValueError(f"normalizer must be positive, got {normalizer}")
        parts = [f"{name}: {self.timers[name].elapsed(reset) / normalizer:.2f}" for name in names
                 if name in self.timers]
        return " | ".join(["time (ms)", *parts])

    def log(self, names, normalizer=1.0, reset=True, memory_breakdown=False, ranks=None):
        """Says line() on the given ranks (rank 0), whatever the logger's level, since the user asked for it."""
        line = self.line(names, normalizer, reset)
        if memory_breakdown:
            line += " | " + self.memory_usage()
        print_dist(line, ranks=[0] if ranks is None else ranks)

    def get_mean(self, names, normalizer=1.0, reset=True):
        """{name: mean milliseconds / normalizer} of those names that have a timer."""
        if not normalizer > 0:
            raise ValueError(f"normalizer must be positive, got {normalizer}")
        means = {}
        for name in names:
            if name in self.timers:
                means[name] = self.timers[name].mean() / normalizer
                if reset:
                    self.timers[name].reset()
        return means

    @staticmethod
    def memory_usage():
        """Memory that the accelerator has allocated, and the most it had, in GB."""
        from ..accelerator import get_accelerator
        device = get_accelerator()
        return f"MemAllocated={device.memory_allocated() / 2**30:.2f}GB, " \
               f"MaxMemAllocated={device.max_memory_allocated() / 2**30:.2f}GB"


class NoopTimer:
    """What stands where timers are off: the same calls, no clock."""

    class Timer:
        def start(self):
            pass

        def stop(self, **kwargs):
            pass

        def reset(self):
            pass

        def elapsed(self, **kwargs):
            return 0.0

        def mean(self):
            return 0.0

    def __init__(self):
        self.timer = self.Timer()

    def __call__(self, name):
        return self.timer

    def get_timers(self):
        return {}

    def has_timer(self, name):
        return True

    def log(self, names, normalizer=1.0, reset=True, memory_breakdown=False, ranks=None):
        pass

    def get_mean(self, names, normalizer=1.0, reset=True):
        return {}


class ThroughputTimer:
    """Samples per second of the whole job, in the line that comes every `steps_per_output` global steps.

    start() and stop() stand around a micro-step; stop(global_step=True) ends a global step of `batch_size` samples.
    The first `start_step` global steps warm up and are not timed.
    """

    def __init__(self, batch_size, start_step=2, steps_per_output=None, monitor_memory=True, logging_fn=None):
        from ..accelerator import get_accelerator
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}")
        self._synchronize = not get_accelerator().use_host_timers()
        self.batch_size = max(1, batch_size)
        self.start_step = start_step
        self.steps_per_output = steps_per_output
        self.monitor_memory = monitor_memory
        self.logging = logging_fn or (lambda line: print_dist(line, ranks=[0]))
        self.epoch_count = 0
        self.micro_step_count = self.global_step_count = 0
        self.total_elapsed_time = 0.0  # seconds of timed micro-steps
        self.step_elapsed_time = 0.0  # of those since the last line
        self._n_since_line = 0  # timed global steps since the last line
        self._since = None

    def update_epoch_count(self):
        """Another pass over the data begins."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def start(self):
        """Begins a micro-step; one that has begun starts anew."""
        self._since = _now(self._synchronize) if self.global_step_count >= self.start_step else None

    def stop(self, global_step=False, report_speed=True):
        """Ends a micro-step, with `global_step` a global step too; says the line where one is due."""
        self.micro_step_count += 1
        if self._since is not None:
            seconds = _now(self._synchronize) - self._since
            self.total_elapsed_time += seconds
            self.step_elapsed_time += seconds
            self._since = None
        if not global_step:
            return
        self._n_since_line += self.global_step_count >= self.start_step
        self.global_step_count += 1
        if report_speed and self._is_due():
            self.logging(self.line())
            self.step_elapsed_time, self._n_since_line = 0.0, 0

    def _is_due(self):
        every = self.steps_per_output  # may be inf
        return bool(every) and self.global_step_count % every == 0 and self._n_since_line > 0

    def line(self):
        """The speed so far (running average) and since the last line (current)."""
        current = self._n_since_line * self.batch_size / self.step_elapsed_time if self.step_elapsed_time else 0.0
        line = f"epoch={self.epoch_count}/micro_step={self.micro_step_count}/global_step={self.global_step_count}, " \
               f"RunningAvgSamplesPerSec={self.avg_samples_per_sec():.6g}, CurrSamplesPerSec={current:.6g}"
        return f"{line}, {SynchronizedWallClockTimer.memory_usage()}" if self.monitor_memory else line

    def avg_samples_per_sec(self):
        """Samples per second over all timed global steps; -inf before the first, as upstream."""
        n_timed = self.global_step_count - self.start_step
        if n_timed <= 0 or not self.total_elapsed_time:
            return float("-inf")
        return n_timed * self.batch_size / self.total_elapsed_time
