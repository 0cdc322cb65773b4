"""Ranges that a device's profiler shows."""
import functools

from ..accelerator import get_accelerator


def instrument_w_nvtx(func):
    """Wraps a function in a profiler range of its name; on a device without such a profiler it only calls it."""
    @functools.wraps(func)
    def wrapped(*args, **kwargs):
        get_accelerator().range_push(func.__qualname__)
        try:
            return func(*args, **kwargs)
        finally:
            get_accelerator().range_pop()
    return wrapped
