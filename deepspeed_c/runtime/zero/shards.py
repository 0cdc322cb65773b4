"""ZeRO stage 3 of one engine: places the module's parameters, decides which stay gathered, hooks modules up.

DeepSpeed calls this object an optimizer's ``parameter_offload``, and hands it out as the optimizer where there is none.
Invariant: after release() every parameter that no later engine took is an ordinary one again, without hooks; where the
engine never started, what was sharded before is as it was.
"""
import contextlib
import logging
import weakref

import torch

from ... import _core
from ...model import is_dense
from ...utils import leaf_modules
from ...utils.logging import log_dist
from ...whole import whole
from . import fetch
from .homes import Homes
from .parameter import (
    OUTSIDE,
    empty,
    forget,
    give_private_back,
    is_zero,
    make_again,
    make_ordinary,
    state_of,
    take_private,
    unique,
    write_error,
)

_ZERO = "zero_optimization."
_STAGE3 = "zero_optimization.stage3_"
# Mixtures of experts whose ranks route differently, as DeepSpeed marks them by itself.
_DEFAULT_LEAVES = ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")


class Shards:
    """The sharded parameters of a module.

    module: the engine's. everything: {name: Parameter}. reduction: says which ranks share a parameter out. dtype: the
    model's, None to keep each parameter's. Collective. Attributes: module, forward_hooks (the handles of the modules'
    hooks), backward_hooks (none: they hang on graphs), param_coordinator.
    """

    def __init__(self, module, everything, reduction, dtype, config):
        self.module = module
        self._config = config
        self._params = list(everything.values())
        self._mark = weakref.ref(self)
        self._before = []  # of what was sharded already, until started()
        self.forward_hooks, self.backward_hooks, self._units = [], [], []
        self._persistent, self._homes = [], []
        try:
            self._place(everything, reduction, dtype)
            self._mark_leaves()
            self._persist(everything)
            self._register_deepspeed_module(module)
        except BaseException:
            self.release()
            raise
        module.ds_external_parameters = fetch.External(module)

    @property
    def param_coordinator(self):
        """What clients ask whether the recorded order of fetches still holds."""
        return self

    def is_invalid_trace(self):
        """Whether the recorded order of fetches is void: never, a record that does not fit is made anew by itself."""
        return False

    def _invalidate_trace(self):
        """Nothing to do, see is_invalid_trace()."""

    # ---- placing ----

    def _place(self, everything, reduction, dtype):
        homes = Homes(self._config)
        meta = [child for child in self.module.modules() if any(p.is_meta for p in child.parameters(recurse=False))]
        for name, p in everything.items():
            wanted = dtype if dtype is not None and p.is_floating_point() else p.dtype
            comm = reduction.comms[reduction.index(p)]
            if is_zero(p):
                self._before.append(_Before(p))
            if is_zero(p) and p.ds_home.comm is comm and p.dtype == wanted:
                forget(p)
                p.ds_home.hand_over(p, homes)
            else:
                if is_zero(p):
                    p.ds_home.remove(p)
                prepare(p, wanted)
                homes.of(comm).add(p)
            p.ds_name, p.ds_owner = name, self._mark
        homes.settle()
        for child in meta:
            materialize(child)

    def _mark_leaves(self):
        for key, mark in (("classes", leaf_modules.set_z3_leaf_modules),
                          ("names", leaf_modules.set_z3_leaf_modules_by_name),
                          ("name_suffixes", leaf_modules.set_z3_leaf_modules_by_suffix)):
            asked = self._config.get(f"{_ZERO}leaf_module.{key}")
            if asked and not mark(self.module, list(asked), raise_if_not_found=False):
                log_dist(f"zero_optimization.leaf_module.{key}: no module fits {list(asked)}", ranks=[0],
                         level=logging.WARNING)
            if not asked and key == "classes":
                mark(self.module, list(_DEFAULT_LEAVES), raise_if_not_found=False)
        threshold = self._config.get(f"{_STAGE3}module_granularity_threshold")
        if threshold > 0:
            _mark_fine(self.module, threshold)

    def _persist(self, everything):
        kept = persistent({p: p.ds_numel for p in everything.values()}, self._config)
        self._persistent = kept
        self._homes = list({id(p.ds_home): p.ds_home for p in everything.values()}.values())
        for home in self._homes:
            home.keep(tuple(p for p in kept if p.ds_home is home))

    def started(self):
        """The engine works: an earlier one does not get its parameters back."""
        self._before = []

    # ---- hooks ----

    def _register_deepspeed_module(self, module, count=None):
        """Hooks up module and all below, also where hooks were taken off; DeepSpeed's name, which clients call."""
        self._remove_hooks()
        self._units = fetch.install_all(module)
        self.forward_hooks = [handle for unit in self._units for handle in unit.handles]

    _register_hooks_recursively = _register_deepspeed_module

    def _remove_hooks(self):
        for handle in self.forward_hooks:
            handle.remove()

    # ---- a step ----

    def backward(self):
        """A context around a backward pass."""
        return fetch.backward_of(self._units)

    def before_step(self):
        """RuntimeError where a parameter that is always gathered was written to since the last step."""
        for p in self._persistent:
            if p.ds_home.is_written(p):
                raise write_error(p, "all modules: it is smaller than stage3_param_persistence_threshold")

    def after_step(self):
        """New values are there. Collective."""
        for home in self._homes:
            home.after_step()
        self.note_step()

    def note_step(self):
        """A step, also one that failed, may have changed what is always gathered."""
        for p in self._persistent:
            p.ds_seen = p._version

    def bind(self, core, parameters):
        """`core` steps these model.Parameters from now on. Collective."""
        for home in self._homes:
            home.bind(core, parameters.tensors)
        parts = [p.ds_home.stepped(p) for p in parameters.tensors]
        if any(part is not None for part in parts):
            parameters.parts = parts
            core.keep_parts(parts)

    def empty(self):
        """Gives back what is gathered and not in use."""
        for home in self._homes:
            home.empty()

    def replace(self, taken):
        """[(index, old, new)]: ordinary Parameters take the places of sharded ones. Collective."""
        known = {}
        for _, old, new in taken:
            _take_over(old, new)
            known[id(old)] = new
        self._params = [known.get(id(p), p) for p in self._params]
        self._persistent = [known.get(id(p), p) for p in self._persistent]
        for unit in self._units:
            unit.replace(known)

    def release(self):
        """Every parameter that no later engine took is an ordinary one with values of its own; no hook is left on them.
        Before started() what was sharded already is as it was instead. Collective where ranks share no memory:
        CommError, after all is released, where others are gone; parameters are empty then."""
        with contextlib.suppress(RuntimeError):  # what is freed now may have been written to
            fetch.clean_up()
        self._remove_hooks()
        before, self._before, lost = self._before, [], None
        for one in before:
            try:
                one.put_back()
            except _core.CommError as error:
                lost = lost or error
        params = [p for p in self._params if is_zero(p) and p.ds_owner is self._mark]
        self._params, self._persistent, self._units, self._homes = [], [], [], []
        for p in params:
            try:
                p.ds_home.remove(p)
            except _core.CommError as error:
                lost = lost or error
                make_ordinary(p, empty(p.dtype))
        for child in self.module.modules():
            if not any(is_zero(p) for p in child.parameters()):
                fetch.uninstall(child)
                child.__dict__.pop("ds_external_parameters", None)
        if before:
            self._put_hooks_back({one.owner for one in before})
        if lost is not None:
            raise lost

    def _put_hooks_back(self, owners):
        """Those of earlier Shards, and of modules that zero.Init built."""
        for child in self.module.modules():
            fetch.attach(child)
        for shards in (owner() for owner in owners if owner is not None):
            if shards is not None:
                shards._register_deepspeed_module(shards.module)


class _Before:
    """A sharded parameter as it was before an engine took it. owner: its ds_owner."""

    def __init__(self, p):
        self._p, self._state, self.owner = p, state_of(p), p.ds_owner
        self._place = p.ds_home.place_of(p)

    def put_back(self):
        """Collective where ranks share no memory."""
        p, home = self._p, self._state["ds_home"]
        if is_zero(p):
            forget(p)
            if p.ds_full is not self._state["ds_full"]:
                p.ds_home.remove(p)
        if not is_zero(p):
            make_again(p, self._state)
        home.take_back(p, self._place)
        p.ds_name = self._state["ds_name"]
        if self._state["ds_persist"]:
            home.keep((p,))
        p.ds_owner = self.owner


def persistent(sizes, config):
    """The parameters that stay gathered: small ones, in model order, up to a total. sizes: {Parameter: elements}."""
    each, total = (config.get(f"{_STAGE3}{key}_persistence_threshold") for key in ("param", "model"))
    kept = []
    for p, n in sizes.items():
        if n <= each and n <= total:
            kept.append(p)
            total -= n
    return kept


def prepare(p, dtype):
    """An ordinary parameter in the dtype and the memory order in which it is placed."""
    if p.layout != torch.strided:
        raise ValueError(f"a parameter of layout {p.layout} is not supported; allowed: torch.strided")
    if p.dtype != dtype:
        p.data = p.data.to(dtype)
        p.grad = None
    if not is_dense(p):
        p.data = p.data.clone(memory_format=torch.contiguous_format)


def materialize(module):
    """A module made on the meta device gets the values of its reset_parameters(), on the first rank; zeros, and a line
    in the log, where it has none."""
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_meta:
            module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    if not hasattr(module, "reset_parameters"):
        log_dist(f"ZeRO stage 3: {type(module).__name__} was made on the meta device and has no reset_parameters(): "
                 "its parameters are zero until they are loaded", ranks=[0], level=logging.WARNING)
        return
    params = unique(module.parameters(recurse=False))
    take_private(params, "reset_parameters()")
    try:
        with torch.device("cpu"):
            module.reset_parameters()
    finally:
        give_private_back(params, 0)


def _mark_fine(module, threshold):
    """Marks as leaves the uppermost modules with children that have few elements for each module in them."""
    for child in module.children():
        n_modules = sum(1 for _ in child.modules())
        n_elems = sum(whole(p).numel() for p in child.parameters())
        if n_modules > 1 and 0 < n_elems <= threshold * n_modules:
            leaf_modules.set_z3_leaf_module(child, True)
        else:
            _mark_fine(child, threshold)


def _take_over(old, new):
    """An ordinary Parameter, equal on all ranks, stands where a sharded one stood: same place, its own values."""
    home, values = old.ds_home, new.data
    home.move(old, new)
    home.fetch(OUTSIDE, (new,), "a replaced parameter")
    gathered, new.data = new.data, values
    home.write((new,), 0)
    new.data = gathered  # in a graph that has new already its version must not change
    home.release((new,), "a replaced parameter")
