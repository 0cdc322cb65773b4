"""From the parts that this engine's ranks step to those that DeepSpeed's ranks write: one exchange per group and kind.

Decides which rank sends which elements. Invariant: every rank lists the parameters, and the ranges in them, in the same
order, so that what is sent in a row is received in a row.
"""
import torch

from ..model import flat
from .contents import row_major, same_order
from .deepspeed_layout import Span


class Exchange:
    """Of one group. comm: the ranks that hold it. parts: {name: [(first, n) of each rank]}, the elements that a rank
    gives. spans: {name: [Span]}, where they go. size: elements of each rank's result."""

    def __init__(self, comm, parts, spans, size):
        self._comm, self._size = comm, size
        self._sends, self._receives = [], []  # (name, first, last) in my part; (place in the result, n)
        self._to, self._from = [0] * comm.size, [0] * comm.size
        for rank in range(comm.size):
            for name, ranges in parts.items():
                for _, first, last in _common(spans[name], rank, ranges[comm.rank]):
                    self._sends.append((name, first, last))
                    self._to[rank] += last - first
                for span, first, last in _common(spans[name], comm.rank, ranges[rank]):
                    self._receives.append((span.offset + first - span.begin, last - first))
                    self._from[rank] += last - first
        self._begins = {name: ranges[comm.rank][0] for name, ranges in parts.items()}

    def run(self, values, dtype, call):
        """This rank's result, one dimension of that dtype, zeros where nothing goes. values: {name: the elements of
        this rank's part, one dimension}. Collective."""
        sent = torch.empty(sum(self._to), dtype=dtype)
        at = 0
        for name, first, last in self._sends:
            begin = self._begins[name]
            sent[at:at + last - first].copy_(values[name][first - begin:last - begin])
            at += last - first
        received = torch.empty(sum(self._from), dtype=dtype)
        self._comm.all_to_all(received, sent, self._from, self._to, call)
        result, at = torch.zeros(self._size, dtype=dtype), 0
        for place, n in self._receives:
            result[place:place + n] = received[at:at + n]
            at += n
        return result


def _common(spans, rank, part):
    """(span, first, last) of what lies in spans of that rank and in a part (first, n)."""
    for span in spans:
        first, last = max(span.begin, part[0]), min(span.begin + span.n, part[0] + part[1])
        if span.rank == rank and first < last:
            yield span, first, last


def in_logical_order(comm, tensor, part, ranges, dtype, call):
    """The elements of this rank's part of a tensor, numbered row by row as DeepSpeed does, whatever order memory has.

    tensor: the parameter's Tensor, the same on all ranks. part: of it, or of its master or a state; None where this
    rank has nothing. ranges: [(first, n) of each rank]. Collective where the parameter's memory has another order.
    """
    values = torch.empty(0, dtype=dtype)
    if part is not None:
        values = part.written()
        if not same_order(tensor.shape, part.tensor.stride, tensor.stride):  # a whole state in an order of its own
            laid = torch.empty_strided(tensor.shape, tensor.stride, dtype=values.dtype)
            values = flat(laid.copy_(part.values.as_strided(tensor.shape, part.tensor.stride)))
    if same_order(tensor.shape, tensor.stride, row_major(tensor.shape)):
        return values
    everywhere = {tensor.name: [Span(rank, 0, 0, tensor.numel) for rank in range(comm.size)]}
    exchange = Exchange(comm, {tensor.name: ranges}, everywhere, tensor.numel)
    whole = exchange.run({tensor.name: values}, dtype, call).as_strided(tensor.shape, tensor.stride)
    first, n = ranges[comm.rank]
    return whole.contiguous().view(-1)[first:first + n]
