"""What differs between two checkpoints, of any formats.

Decides what counts as equal: the same tensors with the same bits (a value that is no number equals itself), the same
counters, schedule and options. Invariant: of no tensor more than one chunk is in memory, unless its elements are
numbered in another order.
"""
import torch

from .contents import row_major, same_order

_CHUNK = 1 << 22  # elements
_SECTIONS = ("counters", "scaler", "optimizer", "groups", "schedule", "loader", "client", "config", "world")
_WHOLE = ("groups", "client", "config")  # of the other sections a format may lack entries
_NOT_COMPARED = ("rng", "client")  # kinds: what differs where nothing of the training does, and parts of sections


def differences(a, b):
    """Yields one line for each difference of two sources; none where they are equal."""
    keys = sorted({key for source in (a, b) for key in source.tensors if key[0] not in _NOT_COMPARED})
    for key in keys:
        first, second = a.tensors.get(key), b.tensors.get(key)
        text = _tensors(a, b, first, second) if first and second else \
            f"only in {a.folder if first else b.folder}"
        if text:
            where = "" if key[2] == (0, 0) else f" (tensor rank {key[2][0]}, pipeline rank {key[2][1]})"
            yield f"{key[0]} {key[1]}{where}: {text}"
    for name in _SECTIONS:
        first, second = a.sections.get(name), b.sections.get(name)
        yield from _values(name, first, second, name in _WHOLE)


def _tensors(a, b, first, second):
    for what, x, y in (("shape", first.shape, second.shape), ("dtype", first.dtype, second.dtype)):
        if x != y:
            return f"{what} {x} and {y}"
    if not same_order(first.shape, first.stride, second.stride):
        return _told(*_add((0, 0.0), _whole(a, first), _whole(b, second)), first.numel)
    found = 0, 0.0
    for begin in range(0, first.numel, _CHUNK):
        n = min(_CHUNK, first.numel - begin)
        values = []
        for source, tensor in ((a, first), (b, second)):
            values.append(torch.empty(n, dtype=tensor.dtype))
            source.read(*tensor.key, begin, n, values[-1])
        found = _add(found, *values)
    return _told(*found, first.numel)


def _whole(source, tensor):
    """All of it, numbered row by row."""
    values = torch.empty(tensor.numel, dtype=tensor.dtype)
    source.read(*tensor.key, 0, tensor.numel, values)
    if same_order(tensor.shape, tensor.stride, row_major(tensor.shape)):
        return values
    return values.as_strided(tensor.shape, tensor.stride).reshape(-1)


def _add(found, x, y):
    """(elements that differ, largest difference) with two more chunks."""
    size = x.dtype.itemsize
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(size, torch.uint8)
    different = x.view(bits) != y.view(bits)
    n = int(different.sum())
    if not n:
        return found
    gap = (x.double() - y.double()).abs() if x.is_floating_point() or not x.is_complex() else (x - y).abs()
    gap = gap.nan_to_num(nan=float("inf"))
    return found[0] + n, max(found[1], float(gap.max()))


def _told(n, most, numel):
    return f"{n} of {numel} elements differ, by at most {most:.9g}" if n else ""


def _values(name, first, second, everything):
    """Lines about two values of a section; everything: also about what only one of them has."""
    if first == second or not everything and None in (first, second):
        return
    if isinstance(first, dict) and isinstance(second, dict) and "$" not in first and "$" not in second:
        for key in sorted({*first, *second}):
            yield from _values(f"{name}.{key}", first.get(key), second.get(key), everything)
    else:
        yield f"{name}: {_short(first)} and {_short(second)}"


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
