"""Which elements of which parameters lie where in DeepSpeed's files: pure arithmetic, for reading and for writing.

At stages 1 and 2 a parameter group is one run of numbers, its parameters one after another, zeros to an even number of
elements per rank at the end, cut into as many equal parts as ranks hold it. At stage 3 every parameter is cut by
itself, and a rank's parts of the parameters of a subgroup stand one after another. Invariant: the spans of a parameter
cover its elements once, in order.
"""
import math
from typing import NamedTuple

_EVEN = 2  # a rank's part of a group is a multiple of as many elements


class Span(NamedTuple):
    """Elements [begin, begin + n) of a parameter: of rank `rank`'s numbers those from `offset` on. rank: its number
    among the ranks that hold the group."""

    rank: int
    offset: int
    begin: int
    n: int


def part_of_group(n_elems, n_ranks):
    """Elements that each rank has of a group of n_elems at stages 1 and 2."""
    return -(-n_elems // (_EVEN * n_ranks)) * _EVEN


def spans_of_group(shapes, part, gaps=None):
    """{name: [Span]} of a group at stages 1 and 2. shapes: {name: shape} in the group's order. part: elements per rank.
    gaps: elements of zeros after each parameter (parameter_alignment)."""
    spans, at = {}, 0
    for i, (name, shape) in enumerate(shapes.items()):
        n_elems, begin = math.prod(shape), 0
        found = spans[name] = []
        while begin < n_elems:
            rank, offset = divmod(at + begin, part)
            n = min(n_elems - begin, part - offset)
            found.append(Span(rank, offset, begin, n))
            begin += n
        at += n_elems + (gaps[i] if gaps else 0)
    return spans


def part_of_parameter(n_elems, n_ranks):
    """Elements, zeros at the end among them, that each rank has of one parameter at stage 3."""
    return -(-n_elems // n_ranks)


def spans_of_subgroup(shapes, n_ranks):
    """{name: [Span]} of a subgroup at stage 3."""
    spans, at = {}, 0
    for name, shape in shapes.items():
        n_elems = math.prod(shape)
        part = part_of_parameter(n_elems, n_ranks)
        spans[name] = [Span(rank, at, rank * part, min(part, n_elems - rank * part))
                       for rank in range(n_ranks) if rank * part < n_elems]
        at += part
    return spans


def subgroups(sizes, n_ranks, limit):
    """Which parameters of a group make up its subgroups at stage 3: lists of their numbers. sizes: elements of each.
    limit: zero_optimization.sub_group_size, in elements of one rank."""
    found, n = [[]], 0
    for i, size in enumerate(sizes):
        found[-1].append(i)
        n += part_of_parameter(size, n_ranks)
        if n >= limit and i + 1 < len(sizes):
            found.append([])
            n = 0
    return found
