"""A log of collectives: how often, how large, how long, how fast (`comms_logger` in the configuration).

Durations are this rank's, from the call to its return; of asynchronous operations to the return of wait(). Bandwidths
in Gbit/s, with s bytes of a rank's tensor, n ranks and t milliseconds: algorithm = bytes * 8e-6 / t, where bytes is 2 s
for all_reduce, s n for all_gather and reduce_scatter, s elsewhere; bus = s * 8e-6 / t * 2 (n - 1) / n for all_reduce,
algorithm * (n - 1) / n for all_gather, reduce_scatter and all_to_all, algorithm elsewhere.
"""
import functools
import inspect
import sys
import time

import torch

from ..utils.logging import logger
from .work import Work

_TENSORS = ("tensor", "tensors", "input_tensor", "input_tensors", "output", "output_tensor", "input", "input_list",
            "input_tensor_list", "output_tensor_list", "tensor_list")
_COLUMNS = ("Comm. Op", "Message Size", "Count", "Total Latency(ms)", "Avg Latency(ms)", "tput_avg (Gbps)",
            "busbw_avg (Gbps)")
_STRAGGLER = ("Total comm lat(ms)", "Total straggler(ms)", "Avg comm lat(ms)", "Avg straggler(ms)")
WIDTH = 20


class CommsLogger:
    """What has been logged since the start or reset_log(). `records`: operation -> message size in bytes -> list of
    (milliseconds, algorithm bandwidth, bus bandwidth)."""

    def __init__(self):
        self.enabled = self.verbose = self.debug = False
        self.prof_all = True
        self.prof_ops = []
        self.records = {}

    def wants(self, name, prof):
        """Whether an operation is logged; `name` is its log_name."""
        return self.enabled and (prof or self.prof_all or name in self.prof_ops)

    def append(self, name, caller, size, seconds, n_ranks, kind):
        """One operation of `kind` (the function's name), logged as `name`."""
        ms = max(seconds * 1e3, 1e-9)
        algorithm, bus = bandwidths(kind, size, ms, n_ranks)
        if caller:
            name = get_debug_log_name({"log_name": name}, caller)
        self.records.setdefault(name, {}).setdefault(size, []).append((ms, algorithm, bus))
        if self.verbose:
            logger.info("comm op: %s | time (ms): %.3f | msg size: %s | algbw (Gbps): %.2f | busbw (Gbps): %.2f",
                        name, ms, _readable(size), algorithm, bus)


LOG = CommsLogger()


def bandwidths(kind, size, ms, n_ranks):
    """(algorithm, bus) in Gbit/s; the formulas stand at the head of this file."""
    rate = size * 8e-6 / ms
    share = (n_ranks - 1) / n_ranks
    if "all_reduce" in kind:
        return 2 * rate, rate * 2 * share
    if "gather" in kind and "all" in kind or "reduce_scatter" in kind:
        return rate * n_ranks, rate * n_ranks * share
    if "all_to_all" in kind:
        return rate, rate * share
    return rate, rate


def configure(deepspeed_config=None, enabled=None, prof_all=None, prof_ops=None, verbose=None, debug=None):
    """Sets the log's options. deepspeed_config: a dict with a `comms_logger` section, or an engine's configuration;
    the other arguments win over it, and None leaves an option as it is."""
    given = {"enabled": enabled, "prof_all": prof_all, "prof_ops": prof_ops, "verbose": verbose, "debug": debug}
    if isinstance(deepspeed_config, dict):
        section = deepspeed_config.get("comms_logger") or {}
        unknown = sorted(set(section) - set(given))
        if unknown:
            raise ValueError(f"comms_logger.{unknown[0]} is unknown; {', '.join(given)} are allowed")
    elif deepspeed_config is not None and hasattr(deepspeed_config, "get"):
        section = {name: deepspeed_config.get(f"comms_logger.{name}") for name in given if name != "prof_ops"}
        section["prof_ops"] = deepspeed_config.subtree("comms_logger.prof_ops") or []
    else:
        section = {}
    for name, value in given.items():
        value = section.get(name) if value is None else value
        if value is None:
            continue
        if name == "prof_ops" and not isinstance(value, (list, tuple)):
            raise TypeError(f"prof_ops is {value!r}; a list of operation names is expected")
        setattr(LOG, name, list(value) if name == "prof_ops" else bool(value))


def timed_op(func):
    """An operation that is logged: takes prof (log this call where prof_all is off), log_name and debug (shown with the
    name where the log's debug is on)."""

    @functools.wraps(func)
    def call(*args, prof=False, log_name=func.__name__, debug=None, **kwargs):
        if not LOG.enabled or not LOG.wants(log_name, prof):
            return func(*args, **kwargs)
        caller = (debug or get_caller_func(2)) if LOG.debug else None
        size, n_ranks = get_msg_size_from_args(func, *args, **kwargs), _n_ranks(func, args, kwargs)
        started = time.perf_counter()
        result = func(*args, **kwargs)

        def end():
            LOG.append(log_name, caller, size, time.perf_counter() - started, n_ranks, func.__name__)

        if isinstance(result, Work):
            result._on_end = end
        else:
            end()
        return result

    return call


def _n_ranks(func, args, kwargs):
    group = inspect.signature(func).bind_partial(*args, **kwargs).arguments.get("group")
    return max(torch.distributed.get_world_size(group), 1) if torch.distributed.is_initialized() else 1


# ---- what was logged ----


def has_comm_data():
    """Whether anything has been logged."""
    return bool(LOG.records)


def get_logged_comm_ops():
    """Names of the logged operations."""
    return list(LOG.records)


def get_comm_operation_count():
    """How many operations have been logged."""
    return sum(len(times) for sizes in LOG.records.values() for times in sizes.values())


def reset_log():
    """Forgets what has been logged."""
    LOG.records.clear()


def _trimmed_mean(values):
    """Without a tenth at each end."""
    values = sorted(values)
    cut = len(values) // 10
    values = values[cut:len(values) - cut]
    return sum(values) / len(values)


def log_summary(show_straggler=False, return_dict=False):
    """Logs a table of all operations, by size, on rank 0 as INFO of the DeepSpeed logger. Averages leave out a tenth at
    each end.

    show_straggler: adds what each operation took beyond the quickest rank's time for it; collective, and all ranks must
    have logged the same operations. return_dict: returns {operation: {size: {count, total_latency_ms, avg_latency_ms,
    tput_avg_gbps, busbw_avg_gbps[, total_straggler_ms, avg_straggler_ms]}}} of this rank, else None.
    """
    summary = {}
    for name, sizes in LOG.records.items():
        for size, times in sorted(sizes.items()):
            ms, algorithm, bus = zip(*times)
            summary.setdefault(name, {})[size] = {
                "count": len(ms), "total_latency_ms": sum(ms), "avg_latency_ms": _trimmed_mean(ms),
                "tput_avg_gbps": _trimmed_mean(algorithm), "busbw_avg_gbps": _trimmed_mean(bus)}
            if show_straggler:
                late = _beyond_the_quickest(ms)
                summary[name][size].update(total_straggler_ms=sum(late), avg_straggler_ms=_trimmed_mean(late))
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logger.info("%s", _table(summary, show_straggler))
    return summary if return_dict else None


def _beyond_the_quickest(ms):
    from ..distributed import world_comm

    least = torch.tensor(ms, dtype=torch.float64)
    world_comm().all_reduce(least, "min", "log_summary")
    return [own - quickest for own, quickest in zip(ms, least.tolist())]


def _table(summary, show_straggler):
    columns = _COLUMNS + (_STRAGGLER if show_straggler else ())
    lines = ["communication since the start or reset_log()", "".join(f"{c:<{WIDTH}}" for c in columns)]
    for name, sizes in summary.items():
        lines.append(name)
        for size, row in sizes.items():
            values = [row["total_latency_ms"], row["avg_latency_ms"], row["tput_avg_gbps"], row["busbw_avg_gbps"]]
            if show_straggler:
                values += [row["total_latency_ms"], row["total_straggler_ms"], row["avg_latency_ms"],
                           row["avg_straggler_ms"]]
            cells = ["", _readable(size), str(row["count"]), *(f"{v:.2f}" for v in values)]
            lines.append("".join(f"{c:<{WIDTH}}" for c in cells).rstrip())
    return "\n".join(lines)


def _readable(size):
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024 or unit == "GB":
            return f"{size:.2f} {unit}" if unit != "B" else f"{size} B"
        size /= 1024


# ---- about calls ----


def get_default_args(func):
    """{name: default} of a function's parameters that have one."""
    return {name: p.default for name, p in inspect.signature(func).parameters.items()
            if p.default is not inspect.Parameter.empty}


def get_tensor_position(func):
    """The place of the parameter that holds the message, -1 where there is none."""
    names = list(inspect.signature(func).parameters)
    return next((names.index(name) for name in _TENSORS if name in names), -1)


def get_tensor_kwarg(func, kwargs):
    """The message among keyword arguments, else None."""
    position = get_tensor_position(func)
    return kwargs.get(list(inspect.signature(func).parameters)[position]) if position >= 0 else None


def get_msg_size_from_args(func, *args, **kwargs):
    """Bytes of the message of a call: of one tensor, or of all in a list; 0 without one."""
    position = get_tensor_position(func)
    if position < 0:
        return 0
    value = args[position] if position < len(args) else get_tensor_kwarg(func, kwargs)
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def get_caller_func(frame=3):
    """The name of the function `frame` calls up."""
    return sys._getframe(frame).f_code.co_name


def get_debug_log_name(func_args, debug):
    """An operation's name with that of the function that called it."""
    return f"{func_args['log_name']} | [Caller Func: {debug}]"
