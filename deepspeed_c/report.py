"""What an engine says about itself because the configuration asks for it: times, memory, progress, state.

Decides: names, places and form of those lines (DeepSpeed's). Nothing here changes a number; where nothing is asked
for, a step pays a few attribute reads.
"""
import contextlib
import json
import sys
import weakref

from .utils.logging import print_dist

# Our name of a part -> timer of a micro-step, timer of a whole step.
_TIMERS = {"forward": ("fwd_microstep", "fwd"), "backward": ("bwd_microstep", "bwd"),
           "backward_inner": ("bwd_inner_microstep", "bwd_inner"),
           "reduction": ("bwd_allreduce_microstep", "bwd_allreduce"), "step": ("step_microstep", "step")}
_NOTHING = contextlib.nullcontext()


class StepReport:
    """Made by the engine at the end of its construction, asked in every micro-step."""

    def __init__(self, engine):
        config = engine._config
        self._engine = weakref.proxy(engine)  # no cycle: a dropped engine goes at once
        self._times = config.get("wall_clock_breakdown")
        self._memory = config.get("memory_breakdown")
        self._every = config.get("steps_per_print") if config.given("steps_per_print") else None
        self._timers = self._speed = None
        self._last = {}
        if self._times:
            from .utils.timer import SynchronizedWallClockTimer
            self._timers = SynchronizedWallClockTimer()
        if self._every:
            from .utils.timer import ThroughputTimer
            self._speed = ThroughputTimer(engine.train_batch_size(), steps_per_output=self._every)
        if config.get("dump_state"):
            self._dump()

    def timed(self, part):
        """A context around one part of a micro-step: "forward", "backward", "backward_inner", "step"."""
        if self._speed is not None and part == "forward":
            self._speed.start()
        return self._measured(part) if self._times or self._memory else _NOTHING

    @contextlib.contextmanager
    def _measured(self, part):
        self._say_memory(f"before {part}")
        timers = [self._timers(name) for name in _TIMERS[part]] if self._times else []
        for timer in timers:
            if not timer.started_:
                timer.start()
        try:
            yield
        finally:
            for timer in timers:
                timer.stop()
            self._say_memory(f"after {part}")

    def after_boundary(self, report):
        """Times that the core measured: the reduction of the step's gradients and the gathering of new values."""
        for name in _TIMERS["reduction"] if self._times else ():
            self._timers(name).add(report["reduce_s"])
        log = sys.modules.get(f"{__package__}.comm.logger")  # who has not imported it has not turned it on
        if log is not None and log.LOG.enabled and self._engine.world_size > 1:
            self._log_communication(log.LOG, report)

    def _log_communication(self, log, report):
        """Rows of the comms log, with sizes as of the collective that would do the same."""
        engine = self._engine
        n_ranks, stage = len(engine._layout.data_ranks), engine.zero_optimization_stage()
        size = sum(p.numel() * p.element_size() for p in engine._params)
        rows = [("engine.reduce_gradients", "all_reduce" if stage == 0 else "reduce_scatter", report["reduce_s"])]
        if stage > 0 and report["stepped"]:
            rows.append(("engine.gather_values", "all_gather", report["gather_s"]))
        for name, kind, seconds in rows:
            if log.wants(name, False):
                log.append(name, None, size if kind == "all_reduce" else size // n_ranks, seconds, n_ranks, kind)

    def after_step(self, boundary):
        """The lines that are due after engine.step()."""
        if self._times:
            self._timers.log([micro for micro, _ in _TIMERS.values()])
            if boundary:
                names = [whole for _, whole in _TIMERS.values()]
                self._last = {name: self._timers(name).elapsed(reset=False) for name in names}
                self._timers.log(names)
        if boundary:
            self._say_progress()
        if self._speed is not None:
            self._speed.batch_size = self._engine.train_batch_size()
            self._speed.stop(global_step=boundary)

    def snapshot(self):
        return dict(self._last)

    def _say_progress(self):
        engine, every = self._engine, self._every
        if every and engine.global_steps % every == 0:  # inf: never
            print_dist(f"step={engine.global_steps}, skipped={engine.skipped_steps}, lr={engine.get_lr()}, "
                       f"mom={engine.get_mom()}", ranks=[0])

    def _say_memory(self, where):
        if self._memory:
            from .utils.timer import SynchronizedWallClockTimer
            print_dist(f"memory {where}: {SynchronizedWallClockTimer.memory_usage()}", ranks=[0])

    def _dump(self):
        engine = self._engine
        state = {"world_size": engine.world_size, "optimizer": type(engine.basic_optimizer).__name__,
                 "parameters": len(engine._params), "elements": sum(p.numel() for p in engine._params),
                 "scheduler": type(engine.lr_scheduler).__name__, "device": str(engine.device)}
        for name, value in (*state.items(), *sorted(engine._config.to_dict().items())):
            print_dist(f"state: {name} = {json.dumps(value, default=str)}", ranks=[0])
