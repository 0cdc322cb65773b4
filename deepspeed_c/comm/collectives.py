"""Collectives in torch.distributed's shape.

In C: groups of this machine's or of several machines' CPU tensors, of float32, bfloat16, float16, float64, int32, int64
where values are combined, and also of bool, uint8, int8, int16 where they only move. Everything else goes to
torch.distributed with the same arguments; docs/comm.md has the table. Which of the two serves depends on nothing that
may differ between ranks: a tensor that is not contiguous is copied, not sent elsewhere.
"""
import inspect

import torch
import torch.distributed as dist
from torch.autograd.graph import increment_version
from torch.distributed import ReduceOp

from ..distributed import group_comm, opened_comm, world_comm
from .logger import timed_op
from .work import Work

SUMMED = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64))
MOVED = SUMMED | {torch.bool, torch.uint8, torch.int8, torch.int16}
_OPS = {ReduceOp.SUM: "sum", ReduceOp.AVG: "avg", ReduceOp.MIN: "min", ReduceOp.MAX: "max", ReduceOp.PRODUCT: "prod"}
_SUM = ReduceOp.SUM
_WHOLE = frozenset((torch.int32, torch.int64))
COALESCED_MAX = 4 << 20  # bytes: beyond, one operation per tensor costs less than copying them together


# ---- who serves ----


def _op_name(op, dtype):
    """The C name of a ReduceOp, None where C has none."""
    if op is _SUM:  # the usual one, without pybind's hash
        return "sum"
    try:
        name = _OPS.get(op)
    except TypeError:  # a ReduceOp with a factor, which has no hash
        return None
    return None if name == "avg" and dtype in _WHOLE else name


def serves(group, dtypes, *tensors):
    """The communicator where it can do this call, else None. Equal on all ranks of a correct program."""
    for t in tensors:
        if t.dtype not in dtypes or not t.is_cpu or t.layout is not torch.strided:
            return None
    if group is None or group is dist.group.WORLD:
        return world_comm()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        return None
    return group_comm(group)


def delegate(name, *args, **kwargs):
    """torch.distributed's `name`. A synchronous call is announced to the group first, so that a rank which calls
    something else is an error on all of them instead of a hang in the back end."""
    function = getattr(dist, name)
    given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    group = given.get("group")
    if opened_comm() is not None and not given.get("async_op") and group is not dist.GroupMember.NON_GROUP_MEMBER:
        comm = group_comm(group)
        if comm is not None and comm.size > 1:
            comm.barrier(f"torch.distributed.{name}")
    return function(*args, **kwargs)


def root_of(call, group, rank, group_rank, names, default=None):
    """A root as the group's rank, given as a global rank or as the group's own."""
    if rank is None and group_rank is None:
        rank = default
    if (rank is None) == (group_rank is None):
        raise ValueError(f"{call}: exactly one of {names} and group_{names} names the rank")
    if group_rank is not None or group is None or group is dist.group.WORLD:
        return rank if group_rank is None else group_rank
    return dist.get_group_rank(group, rank)


# ---- running one operation ----


def _changed(tensor):
    """Autograd learns of the write, as of any in-place operation."""
    if not tensor.is_inference():
        increment_version(tensor)


def in_place(tensor, async_op, call):
    """call(contiguous tensor), whose result ends in `tensor`. A Work, or None."""
    if tensor.is_contiguous():
        work = call(tensor)
        _changed(tensor)
        return Work([work], [tensor]) if async_op else None
    whole = tensor.detach().contiguous()
    work = call(whole)
    if async_op:
        return Work([work], [tensor], lambda: _copy(tensor, whole))
    _copy(tensor, whole)


def _copy(tensor, value):
    with torch.no_grad():
        tensor.copy_(value)


def into_parts(tensors, whole, async_op, work):
    """Once `work` is done, the parts of `whole` go to the tensors, one behind the other. A Work, or None."""

    def finish():
        place = 0
        for t in tensors:
            n = t.numel()
            if t.data_ptr() == whole.data_ptr() + place * whole.element_size():
                _changed(t)
            else:
                _copy(t, whole[place:place + n].view(t.shape))
            place += n

    if async_op:
        return Work([work], tensors, finish)
    finish()


def _joined(tensors):
    """A flat view of all where they lie one behind the other in one storage (the chunks of a tensor), else None."""
    first = tensors[0]
    start, size, storage = first.data_ptr(), first.element_size(), first.untyped_storage().data_ptr()
    n = 0
    for t in tensors:
        if not t.is_contiguous() or t.data_ptr() != start + n * size or t.untyped_storage().data_ptr() != storage:
            return None
        n += t.numel()
    return (first.detach() if first.requires_grad else first).as_strided((n,), (1,), first.storage_offset())


def one_behind_the_other(tensors):
    """All flat in one tensor, copied where they do not lie so."""
    whole = _joined(tensors)
    return torch.cat([t.detach().reshape(-1) for t in tensors]) if whole is None else whole


def _room_for(tensors):
    """A flat tensor whose parts are the tensors, or become them in into_parts."""
    whole = _joined(tensors)
    return tensors[0].new_empty(sum(t.numel() for t in tensors)) if whole is None else whole


def _check_list(call, name, tensors, size, like_name, like):
    if len(tensors) != size:
        raise ValueError(f"{call}: {name} has {len(tensors)} tensors; one for each of {size} ranks is expected")
    for i, t in enumerate(tensors):
        if t.numel() != like.numel() or t.dtype != like.dtype:
            raise ValueError(f"{call}: {name}[{i}] is {tuple(t.shape)} {t.dtype}, {like_name} {tuple(like.shape)} "
                             f"{like.dtype}; the same number of elements and dtype is expected")


# ---- combining ----


@timed_op
def all_reduce(tensor, op=ReduceOp.SUM, group=None, async_op=False):
    """Combines `tensor` over the ranks, in rank order, in place."""
    name = _op_name(op, tensor.dtype)
    comm = serves(group, SUMMED, tensor) if name else None
    if comm is None:
        return delegate("all_reduce", tensor, op, group, async_op)
    return in_place(tensor, async_op, lambda t: comm.all_reduce(t, name, None, async_op))


@timed_op
def inference_all_reduce(tensor, op=ReduceOp.SUM, group=None, async_op=False):
    """all_reduce under the name that inference code calls."""
    return all_reduce.__wrapped__(tensor, op, group, async_op)


@timed_op
def all_reduce_coalesced(tensors, op=ReduceOp.SUM, group=None, async_op=False):
    """all_reduce of each tensor: small ones of one dtype as a single operation."""
    tensors = list(tensors)
    name = _op_name(op, tensors[0].dtype) if tensors else None
    comm = serves(group, SUMMED, *tensors) if name else None
    if comm is None:
        return delegate("all_reduce_coalesced", tensors, op, group, async_op)
    if _is_small(tensors):
        flat = one_behind_the_other(tensors)
        return into_parts(tensors, flat, async_op, comm.all_reduce(flat, name, None, async_op))
    return _all([all_reduce.__wrapped__(t, op, group, async_op) for t in tensors], async_op)


def _is_small(tensors):
    return (len({t.dtype for t in tensors}) == 1
            and sum(t.numel() * t.element_size() for t in tensors) <= COALESCED_MAX)


def _all(works, async_op):
    """Several handles as one."""
    if not async_op:
        return None

    def finish():
        for work in works:
            work.wait()

    return Work([w for work in works for w in work._works], [t for work in works for t in work.result()], finish)


@timed_op
def reduce(tensor, dst=None, op=ReduceOp.SUM, group=None, async_op=False, group_dst=None):
    """Combines `tensor` over the ranks into that of global rank dst; the others' stay as they are."""
    name = _op_name(op, tensor.dtype)
    comm = serves(group, SUMMED, tensor) if name else None
    if comm is None:
        return delegate("reduce", tensor, dst, op, group, async_op, group_dst)
    root = root_of("reduce", group, dst, group_dst, "dst")
    if comm.rank == root:
        return in_place(tensor, async_op, lambda t: comm.reduce(t, root, name, None, async_op))
    work = comm.reduce(tensor.detach().contiguous(), root, name, None, async_op)
    return Work([work], []) if async_op else None


@timed_op
def reduce_scatter_tensor(output, input, op=ReduceOp.SUM, group=None, async_op=False):
    """output: this rank's part of all ranks' `input` (as many times as long as there are ranks) combined."""
    name = _op_name(op, output.dtype)
    comm = serves(group, SUMMED, output, input) if name else None
    if comm is None:
        return delegate("reduce_scatter_tensor", output, input, op, group, async_op)
    whole = input.detach().contiguous()
    return in_place(output, async_op, lambda t: comm.reduce_scatter(t, whole, name, None, async_op))


@timed_op
def reduce_scatter_fn(output_tensor, tensor, op=ReduceOp.SUM, group=None, async_op=False):
    """reduce_scatter_tensor, in DeepSpeed's spelling."""
    return reduce_scatter_tensor.__wrapped__(output_tensor, tensor, op, group, async_op)


@timed_op
def reduce_scatter(output, input_list, op=ReduceOp.SUM, group=None, async_op=False):
    """reduce_scatter_tensor with one input tensor per rank, each shaped like `output`."""
    name = _op_name(op, output.dtype)
    comm = serves(group, SUMMED, output, *input_list) if name else None
    if comm is None:
        return delegate("reduce_scatter", output, input_list, op, group, async_op)
    _check_list("reduce_scatter", "input_list", input_list, comm.size, "output", output)
    whole = one_behind_the_other(input_list)
    return in_place(output, async_op, lambda t: comm.reduce_scatter(t, whole, name, None, async_op))


# ---- moving ----


@timed_op
def all_gather_into_tensor(output_tensor, input_tensor, group=None, async_op=False):
    """output_tensor: all ranks' `input_tensor` in rank order."""
    comm = serves(group, MOVED, output_tensor, input_tensor)
    if comm is None:
        return delegate("all_gather_into_tensor", output_tensor, input_tensor, group, async_op)
    part = input_tensor.detach().contiguous()
    return in_place(output_tensor, async_op, lambda t: comm.all_gather(t, part, None, async_op))


@timed_op
def allgather_fn(output_tensor, input_tensor, group=None, async_op=False):
    """all_gather_into_tensor, in DeepSpeed's spelling."""
    return all_gather_into_tensor.__wrapped__(output_tensor, input_tensor, group, async_op)


@timed_op
def all_gather_coalesced(output_tensors, input_tensors, group=None, async_op=False):
    """all_gather_into_tensor of each input into the output of its place; in torch.distributed the name means
    something else (a list of outputs for every rank). Small tensors of one dtype are a single operation; the handle of
    async_op is one for all."""
    if len(output_tensors) != len(input_tensors):
        raise ValueError(f"all_gather_coalesced: output_tensors has {len(output_tensors)} tensors, input_tensors "
                         f"{len(input_tensors)}; one output for each input is expected")
    pairs = list(zip(output_tensors, input_tensors))
    comm = serves(group, MOVED, *output_tensors, *input_tensors) if pairs else None
    if comm is None or not _is_small(output_tensors) or not _match(pairs, comm.size):
        return _all([all_gather_into_tensor.__wrapped__(*pair, group, async_op) for pair in pairs], async_op)
    part = one_behind_the_other(input_tensors)
    whole = part.new_empty((comm.size, part.numel()))
    work = comm.all_gather(whole, part, None, async_op)

    def finish():
        place = 0
        with torch.no_grad():
            for output, input in pairs:
                columns = whole[:, place:place + input.numel()]
                output.copy_(columns.reshape(output.shape))
                place += input.numel()

    if async_op:
        return Work([work], output_tensors, finish)
    finish()


def _match(pairs, size):
    """Sizes are right; where they are not, the operation on its own says what is wrong."""
    return all(output.numel() == size * input.numel() and output.dtype == input.dtype for output, input in pairs)


@timed_op
def all_gather(tensor_list, tensor, group=None, async_op=False):
    """Fills tensor_list, one tensor per rank, with the ranks' `tensor`."""
    comm = serves(group, MOVED, tensor, *tensor_list)
    if comm is None:
        return delegate("all_gather", tensor_list, tensor, group, async_op)
    _check_list("all_gather", "tensor_list", tensor_list, comm.size, "tensor", tensor)
    whole, part = _room_for(tensor_list), tensor.detach().contiguous()
    own = whole.data_ptr() + comm.rank * part.numel() * part.element_size()
    if part.data_ptr() != own and part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
        part = part.clone()  # another rank's place in tensor_list, which is about to be written
    work = comm.all_gather(whole, part, None, async_op)
    return into_parts(tensor_list, whole, async_op, work)


@timed_op
def broadcast(tensor, src=None, group=None, async_op=False, group_src=None):
    """Replaces `tensor` by that of global rank `src`."""
    if (src is None) == (group_src is None):
        raise ValueError("broadcast: exactly one of src and group_src names the rank that sends")
    comm = serves(group, MOVED, tensor)
    if comm is None:
        return delegate("broadcast", tensor, src, group, async_op, group_src)
    root = root_of("broadcast", group, src, group_src, "src")
    return in_place(tensor, async_op, lambda t: comm.broadcast(t, root, None, async_op))


@timed_op
def gather(tensor, gather_list=None, dst=None, group=None, async_op=False, group_dst=None):
    """Fills gather_list, one tensor per rank, on global rank dst (default 0); None elsewhere."""
    comm = serves(group, MOVED, tensor, *(gather_list or ()))
    if comm is None:
        return delegate("gather", tensor, gather_list, dst, group, async_op, group_dst)
    root = root_of("gather", group, dst, group_dst, "dst", 0)
    part, whole = tensor.detach().contiguous(), None
    if comm.rank == root:
        _check_list("gather", "gather_list", gather_list or (), comm.size, "tensor", tensor)
        whole = _room_for(gather_list)
    elif gather_list:
        raise ValueError("gather: gather_list must be None on a rank that is not dst")
    work = comm.gather(whole, part, root, None, async_op)
    return into_parts(gather_list or (), whole, async_op, work)


@timed_op
def scatter(tensor, scatter_list=None, src=None, group=None, async_op=False, group_src=None):
    """tensor: this rank's of scatter_list, which global rank src (default 0) has; None elsewhere."""
    comm = serves(group, MOVED, tensor, *(scatter_list or ()))
    if comm is None:
        return delegate("scatter", tensor, scatter_list, src, group, async_op, group_src)
    root = root_of("scatter", group, src, group_src, "src", 0)
    whole = None
    if comm.rank == root:
        _check_list("scatter", "scatter_list", scatter_list or (), comm.size, "tensor", tensor)
        whole = one_behind_the_other(scatter_list)
    elif scatter_list:
        raise ValueError("scatter: scatter_list must be None on a rank that is not src")
    return in_place(tensor, async_op, lambda t: comm.scatter(t, whole, root, None, async_op))


@timed_op
def all_to_all_single(output, tensor, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
    """Part r of output = this rank's part of rank r's tensor, along the first dimension; parts are equal, or as long as
    the splits say."""
    comm = serves(group, MOVED, output, tensor)
    if comm is None:
        return delegate("all_to_all_single", output, tensor, output_split_sizes, input_split_sizes, group, async_op)
    part = tensor.detach().contiguous()
    splits = _splits(comm, output, output_split_sizes, tensor, input_split_sizes)
    return in_place(output, async_op, lambda t: comm.all_to_all(t, part, *splits, None, async_op))


def _splits(comm, output, output_splits, tensor, input_splits):
    """Elements per rank, or (None, None) for equal parts. Whether there are splits is the same on all ranks."""
    if not output_splits and not input_splits:
        return None, None
    found = []
    for t, splits, name in ((output, output_splits, "output"), (tensor, input_splits, "input")):
        rows = t.shape[0] if t.dim() else 1
        if not splits and rows % comm.size:
            raise ValueError(f"all_to_all_single: {name} has {rows} rows, which {comm.size} ranks do not divide")
        splits = splits or [rows // comm.size] * comm.size
        if sum(splits) != rows:
            raise ValueError(f"all_to_all_single: {name}_split_sizes {list(splits)} add up to {sum(splits)}, {name} "
                             f"has {rows} rows")
        row = t.numel() // rows if rows else 0
        found.append([split * row for split in splits])
    return found


@timed_op
def all_to_all(output_tensor_list, input_tensor_list, group=None, async_op=False):
    """output_tensor_list[r] = what rank r has for this one in its input_tensor_list. Tensors may differ in size."""
    comm = serves(group, MOVED, *output_tensor_list, *input_tensor_list)
    if comm is None:
        return delegate("all_to_all", output_tensor_list, input_tensor_list, group, async_op)
    for name, tensors in (("output_tensor_list", output_tensor_list), ("input_tensor_list", input_tensor_list)):
        if len(tensors) != comm.size or len({t.dtype for t in tensors}) > 1:
            raise ValueError(f"all_to_all: {name} has {len(tensors)} tensors; one for each of {comm.size} ranks, of "
                             "one dtype, is expected")
    part = one_behind_the_other(input_tensor_list)
    whole = _room_for(output_tensor_list)
    work = comm.all_to_all(whole, part, [t.numel() for t in output_tensor_list],
                           [t.numel() for t in input_tensor_list], None, async_op)
    return into_parts(output_tensor_list, whole, async_op, work)


@timed_op
def barrier(group=None, async_op=False, device_ids=None):
    """Returns once every rank has called it. device_ids: for torch.distributed, where that serves."""
    comm = serves(group, MOVED)
    if comm is None:
        return delegate("barrier", group, async_op, device_ids)
    work = comm.barrier(None, async_op)
    return Work([work], []) if async_op else None


@timed_op
def monitored_barrier(group=None, timeout=None, wait_all_ranks=False):
    """A barrier that names ranks which do not come within the group's time-out (TimeoutError, on every rank that
    waits). timeout: a timedelta of its own, without names. wait_all_ranks changes nothing: up to four are named."""
    comm = serves(group, MOVED)
    if comm is None:
        return delegate("monitored_barrier", group, timeout, wait_all_ranks)
    if timeout is None:
        comm.barrier("monitored_barrier")
    else:
        comm.barrier("monitored_barrier", True).wait(timeout.total_seconds())
