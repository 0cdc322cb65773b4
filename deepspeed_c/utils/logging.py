"""The `DeepSpeed` logger: one line per event on stderr, warnings and above unless a script asks for more.

A function with `ranks` speaks on those global ranks only; None or [-1] means all. What a user has asked for by an
option of its own (times, progress) goes through print_dist, which the level does not silence.
"""
import functools
import logging
import os
import sys

log_levels = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR,
              "critical": logging.CRITICAL}

logger = logging.getLogger("DeepSpeed")
if not logger.handlers:
    handler = logging.StreamHandler(sys.stderr)  # stdout stays the script's own
    handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False


def _rank():
    return int(os.environ.get("RANK", 0))


def _speaks(ranks):
    return not ranks or -1 in ranks or _rank() in ranks


def _prefixed(message):
    return f"[Rank {_rank()}] {message}"


def log_dist(message, ranks=None, level=logging.INFO):
    """Logs `message` on the given ranks, with the rank in front."""
    if _speaks(ranks):
        logger.log(level, _prefixed(message))


@functools.lru_cache(None)
def _log_once(message, ranks, level):
    log_dist(message, ranks, level)


def log_dist_once(message, ranks=None, level=logging.INFO):
    """log_dist, once for each set of arguments in the life of the process."""
    _log_once(message, None if ranks is None else tuple(ranks), level)


@functools.lru_cache(None)
def warning_once(*args, **kwargs):
    """logger.warning, once for each set of arguments in the life of the process."""
    logger.warning(*args, **kwargs)


def print_dist(message, ranks=None):
    """Says `message` on the given ranks through the logger's handlers, as INFO, whatever the logger's level."""
    if _speaks(ranks):
        logger.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, _prefixed(message), (), None))


def print_rank_0(message, debug=False, force=False):
    """Logs `message` on rank 0 as DEBUG; with `debug` as INFO; with `force` whatever the logger's level."""
    if force:
        print_dist(message, ranks=[0])
    else:
        log_dist(message, ranks=[0], level=logging.INFO if debug else logging.DEBUG)


def get_log_level_from_string(log_level_str):
    """The level (int) of this name, of any case. ValueError lists the names."""
    try:
        return log_levels[log_level_str.lower()]
    except (KeyError, AttributeError):
        raise ValueError(f"log level {log_level_str!r} is not one of {', '.join(log_levels)}") from None


def set_log_level_from_string(log_level_str, custom_logger=None):
    """Sets the level of the logger (or of another one) by name, of any case. ValueError lists the names."""
    (custom_logger or logger).setLevel(get_log_level_from_string(log_level_str))


def get_current_level():
    """The level (int) that is in effect for the logger."""
    return logger.getEffectiveLevel()


def should_log_le(max_log_level_str):
    """Whether the logger's level is at most the one named: whether such lines are shown."""
    return get_current_level() <= get_log_level_from_string(max_log_level_str)
