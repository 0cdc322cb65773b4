"""safe_get_* and safe_set_*: masters, gradients and optimizer states by parameter, whatever the ZeRO stage.

"full" is the whole parameter in its own shape, the same on all ranks that hold it (an expert's are fewer); those that
read are collective, because ranks hold parts, and at stage 3 those that write too. "local" is the part that this rank
steps, one dimension, None where it has none. fp32 always. A parameter that no engine trains, because it was frozen for
example, gives None, or ValueError where something is to be set.
"""
import weakref

import torch

from .. import _paths
from ..model import flat
from ..offload_states import GRADIENTS, MASTERS, STATES
from ..runtime.zero.partition_parameters import GatheredParameters
from ..whole import whole

__all__ = ["safe_get_full_fp32_param", "safe_get_full_grad", "safe_get_full_optimizer_state",
           "safe_get_local_fp32_param", "safe_get_local_grad", "safe_get_local_optimizer_state",
           "safe_set_full_fp32_param", "safe_set_full_grad", "safe_set_full_optimizer_state",
           "safe_set_local_fp32_param", "safe_set_local_grad", "safe_set_local_optimizer_state",
           "safe_update_full_grad_vectorized"]

__getattr__, __dir__ = _paths.attributes(__name__)

# Which engine trains a parameter, by id: a parameter itself must stay picklable.
_PLACES = {}


def claim(engine, params):
    """Says that `engine` trains params; an earlier engine over the same ones no longer does. Returns what
    release() takes."""
    owner = weakref.ref(engine)
    places = {id(p): (owner, weakref.ref(p), i) for i, p in enumerate(params)}
    _PLACES.update(places)
    return places


def release(places):
    """Undoes claim()."""
    for key, place in places.items():
        if _PLACES.get(key) is place:
            del _PLACES[key]
    places.clear()


def _place(param):
    """(engine, index), or None."""
    owner, same, index = _PLACES.get(id(param), (None, None, None))
    engine = owner() if owner is not None and same() is param else None
    return None if engine is None or engine._core is None else (engine, index)


def _must(param, call):
    place = _place(param)
    if place is None:
        raise ValueError(f"{call}: no engine trains this parameter {tuple(whole(param).shape)}")
    return place


def _shaped(param, values):
    """Flat values, in storage order, in the parameter's shape and order."""
    out = torch.empty_like(whole(param), dtype=torch.float32, requires_grad=False)
    flat(out).copy_(values)
    return out


def _flat(param, value, call, shape=None):
    """A value as contiguous fp32 in storage order."""
    shape = whole(param).shape if shape is None else shape
    value = torch.as_tensor(value).detach()
    if value.shape != shape:
        raise ValueError(f"{call}: value has shape {tuple(value.shape)}; allowed: {tuple(shape)}")
    if len(shape) == 1:
        return value.to(torch.float32).contiguous()
    return flat(torch.empty_like(whole(param), dtype=torch.float32, requires_grad=False).copy_(value))


# ---- parts ----


def _state(engine, index, key, call):
    """This rank's fragment of a state, None where it has none of this parameter's elements."""
    fragment = engine._run.states_of(index).get(key)
    if fragment is None and engine._core.part(index)[1]:
        have = ", ".join(engine.optimizer.state_names or engine._run.states_of(index)) or "none"
        raise ValueError(f"{call}: optim_state_key is {key!r}; allowed: {have} (a state that the first step makes is "
                         "not there before)")
    return fragment


def _part(engine, index, key, call):
    """This rank's part of the master (key None) or of a state, flat, over the memory itself; None where it has none.
    An fp32 parameter is its own master."""
    held = engine._run.master_of(index) if key is None else _state(engine, index, key, call)
    if engine._core.part(index)[1] == 0:
        return None
    if held is None:
        return engine._run.values_of(index)
    return held.detach() if held.dim() == 1 else flat(held)


def _share(engine, index, values, call):
    """Each rank's part of a flat parameter goes to all ranks that hold it, in place. Collective; at stage 0 all have
    all."""
    comm = engine._comms[index]
    if comm.size == 1 or engine.zero_optimization_stage() == 0:
        return
    for rank in range(comm.size):
        begin, n = engine._core.part(index, rank)
        if n:
            comm.broadcast(values[begin:begin + n], rank, call)


def _needed(key):
    return MASTERS if key is None else STATES


def _get_full(param, key, call):
    """All ranks' parts together. Collective."""
    engine, index = _place(param)
    engine._refuse_offloaded(call, _needed(key))
    core, comm = engine._core, engine._comms[index]
    values = torch.zeros(whole(param).numel(), dtype=torch.float32)
    mine = problem = None
    try:
        mine = _part(engine, index, key, call)
    except ValueError as error:
        problem = error
    if key is not None:  # a rank without elements of this parameter cannot know the names
        fine = torch.tensor([problem is None], dtype=torch.int32)
        comm.all_reduce(fine, "min", call)
        if not fine:
            raise problem or ValueError(f"{call}: optim_state_key is {key!r}, which another rank does not have")
    if mine is not None:
        begin, n = core.part(index)
        values[begin:begin + n] = mine
    _share(engine, index, values, call)
    return _shaped(param, values)


def _set_full(param, key, value, call):
    engine, index = _must(param, call)
    engine._refuse_offloaded(call, _needed(key))
    engine._let_change()
    values = _flat(param, value, call)
    begin, n = engine._core.part(index)
    if key is None:
        with GatheredParameters([param], modifier_rank=0), torch.no_grad():
            flat(param).copy_(values)
    if n:
        _part(engine, index, key, call).copy_(values[begin:begin + n])


def _get_local(param, key, call):
    place = _place(param)
    if place is None:
        return None
    place[0]._refuse_offloaded(call, _needed(key))
    part = _part(*place, key, call)
    return None if part is None else part.to(torch.float32, copy=True)


def _set_local(param, key, value, call):
    engine, index = _must(param, call)
    engine._refuse_offloaded(call, _needed(key))
    n = engine._core.part(index)[1]
    if n == 0:
        raise ValueError(f"{call}: this rank steps no element of this parameter")
    values = _flat(param, value, call, (n,))
    engine._let_change()
    _part(engine, index, key, call).copy_(values)
    if key is None:
        engine._run.values_of(index).copy_(values)


# ---- the interface ----


def safe_get_full_fp32_param(param):
    """The fp32 values of a parameter, in its shape. Collective; None where no engine trains it."""
    return None if _place(param) is None else _get_full(param, None, "safe_get_full_fp32_param")


def safe_set_full_fp32_param(param, value):
    """Replaces the parameter and its fp32 master on this rank; call it on all ranks with the same value."""
    _set_full(param, None, value, "safe_set_full_fp32_param")


def safe_get_full_optimizer_state(param, optim_state_key):
    """An optimizer state ("exp_avg", ...) in the parameter's shape. Collective; None where no engine trains it."""
    if _place(param) is None:
        return None
    return _get_full(param, optim_state_key, "safe_get_full_optimizer_state")


def safe_set_full_optimizer_state(param, value, optim_state_key):
    """Replaces an optimizer state; call it on all ranks with the same value."""
    _set_full(param, optim_state_key, value, "safe_set_full_optimizer_state")


def safe_get_full_grad(param):
    """The gradient that a step would use now: averaged over the ranks, unscaled, before clipping; in the
    parameter's shape. Collective; None where no engine trains it."""
    place = _place(param)
    if place is None:
        return None
    engine, index = place
    engine._refuse_offloaded("safe_get_full_grad", GRADIENTS)
    values = torch.zeros(whole(param).numel(), dtype=torch.float32)
    engine._core.get_grad(index, values)
    return _shaped(param, values)


def safe_set_full_grad(param, value):
    """Replaces that gradient. Collective, the same value on all ranks."""
    engine, index = _must(param, "safe_set_full_grad")
    engine._refuse_offloaded("safe_set_full_grad", GRADIENTS)
    values = _flat(param, value, "safe_set_full_grad")
    factor = engine._core.set_grad(index, values)
    if factor:
        with GatheredParameters([param]):  # torch compares shapes
            param.grad = _shaped(param, values * factor).to(param.dtype)
    elif param.grad is not None:
        param.grad = None
    engine._scaled = True


def safe_get_local_fp32_param(param):
    """This rank's part of the fp32 values, one dimension."""
    return _get_local(param, None, "safe_get_local_fp32_param")


def safe_set_local_fp32_param(param, value):
    """Replaces this rank's part; other ranks see it in their parameter after the next step."""
    _set_local(param, None, value, "safe_set_local_fp32_param")


def safe_get_local_optimizer_state(param, optim_state_key):
    """This rank's part of an optimizer state, one dimension."""
    return _get_local(param, optim_state_key, "safe_get_local_optimizer_state")


def safe_set_local_optimizer_state(param, value, optim_state_key):
    """Replaces this rank's part of an optimizer state."""
    _set_local(param, optim_state_key, value, "safe_set_local_optimizer_state")


def safe_get_local_grad(param):
    """This rank's part of safe_get_full_grad, one dimension. Collective."""
    place = _place(param)
    if place is None:
        return None
    engine, index = place
    begin, n = engine._core.part(index)
    full = _flat(param, safe_get_full_grad(param), "safe_get_local_grad")
    return full[begin:begin + n].clone() if n else None


def safe_set_local_grad(param, value):
    """Replaces this rank's part of the gradient; the others keep theirs. Collective: a rank without a part passes
    None."""
    engine, index = _must(param, "safe_set_local_grad")
    begin, n = engine._core.part(index)
    if n:
        value = _flat(param, value, "safe_set_local_grad", (n,))
    values = _flat(param, safe_get_full_grad(param), "safe_set_local_grad").contiguous()
    if n:
        values[begin:begin + n] = value
    _share(engine, index, values, "safe_set_local_grad")
    safe_set_full_grad(param, _shaped(param, values))


def safe_update_full_grad_vectorized(param_list, update_func):
    """For each parameter, replaces its full gradient g by update_func(g, parameter). Collective."""
    for param in param_list:
        grad = safe_get_full_grad(param)
        if grad is not None:
            safe_set_full_grad(param, update_func(grad, param))
