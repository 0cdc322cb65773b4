"""Which module needs which sharded parameters, and when: hooks on modules that fetch before and release after.

A unit is a module with the parameters that are fetched for it: its own, those of other modules that it was seen to
use (external), or, for a leaf module, its whole subtree. Forward: a pre-hook fetches, a hook releases. Backward: a
hook on the graph's nodes that made the outputs fetches; what it fetched is released when that backward pass ends, or,
where a home asks for it (early), when the pass comes to another module's node that is older than the forward was.
Autograd runs, of the nodes of a device that are ready, the newest first, and a node is newer than those that it hands
gradients to: so by then all that the forward made has run. Invariant: every fetch is released once, also where a
forward raises; what torch does not tell, a backward pass that raised and a forward that was interrupted, the next
forward cleans up after.
"""
import functools
import itertools
import sys
import weakref
from collections.abc import Mapping

import torch

from ...utils.leaf_modules import z3_leaf_module
from .parameter import OUTSIDE, ZeroParameter, ZeroParamStatus, by_home, is_zero

_age = torch.autograd._get_sequence_nr  # of the node that this thread makes next
_current_task = torch._C._current_graph_task_id
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # of who is told what autograd saves
_queue_callback = torch.autograd.Variable._execution_engine.queue_callback

_UNITS = weakref.WeakKeyDictionary()  # module -> Unit
_EXTERNAL = weakref.WeakKeyDictionary()  # module -> {id: Parameter}, as register_external_parameter was told
_active = []  # units whose module's forward runs now, the innermost last
_holds = {}  # number of a backward pass -> _Hold
_whole = None  # the _Hold of an engine.backward() that holds all units
_numbers = itertools.count()
_events = weakref.WeakKeyDictionary()  # module -> its number, also where its hooks are put back: a recorded order stays


class Unit:
    """A module's parameters, as its hooks fetch them. Attributes: label, module (weak), params, ran (in a forward
    with gradients), again (its backward made a graph, whose own backward no output shows), hidden."""

    def __init__(self, label="", module=None, params=()):
        self.label = label
        self.params = tuple(params)
        self._module = None if module is None else weakref.ref(module)
        self._event = 2 * (next(_numbers) if module is None else _number(module))
        self._calls = []  # a _Call for each forward that runs now
        self.ran = self.again = False
        self.hidden = {}  # unit -> None, in an order that ranks share: their backward comes with this one's
        self._group()

    def _group(self):
        self.groups = by_home(self.params)
        self.early = any(home.early for home, _ in self.groups)

    def add(self, p):
        """p, of another module, is fetched for this one too from now on."""
        if any(p is q for q in self.params):
            return
        if self._calls:
            for home, mine in by_home((p,)):
                home.fetch(self._event, mine, self.label)
        self.params += (p,)
        p.ds_external = True
        self._group()
        module = self._module and self._module()  # a copy's unit has none
        if module is not None:
            _EXTERNAL.setdefault(module, {})[id(p)] = p

    def replace(self, known):
        """Other Parameters, {id of the earlier: Parameter}, stand where earlier ones stood."""
        self.params = tuple(known.get(id(p), p) for p in self.params)
        self._group()

    def enter(self, module, args):
        """Before the module's forward."""
        _end_interrupted()
        if _holds and not _active:
            clean_up()
        if not self._calls:
            self._fetch(self._event)
        self._calls.append(_Call(sys._getframe(1)))
        _active.append(self)

    def leave(self, module, args, output):
        """After it, also where it raised (then with no output, as of one that returns None). What a checkpoint
        recomputes in a backward pass it compares at the end, and finds parameters themselves among it."""
        _end_interrupted(self)
        if not _active or _active[-1] is not self:
            return  # another hook raised before enter() was called, or enter() itself did
        _active.pop()
        if output is not None or sys.exc_info()[1] is None:
            self._watch(output)
        try:
            if _current_task() != -1 and _top_hooks(True) is not None:
                _current_hold().take(self, self._calls[-1].start, OUTSIDE)
        finally:
            self._end()

    def _end(self):
        self._calls.pop()
        if not self._calls:
            _release(self.groups, self.label)

    def end_interrupted(self):
        """Ends the innermost forward if it was interrupted; whether it was."""
        if self._calls[-1].runs():
            return False
        _active.pop()
        self._end()
        return True

    def _watch(self, output):
        """Looks where backward will come in, and whether a parameter itself is handed out. Where no tensor shows, the
        module around this one speaks for it, or the backward pass that recomputes it."""
        graph, seen = torch.is_grad_enabled(), False
        self.ran |= graph
        for t in _tensors(output):
            seen = True
            if graph and t.grad_fn is not None:
                t.grad_fn.register_prehook(functools.partial(self._before_backward, t.grad_fn._sequence_nr(),
                                                             self._calls[-1].start))
            if isinstance(t, ZeroParameter) and _active:
                _active[-1].add(t)
        if graph and not seen and _active:
            _active[-1].hidden[self] = None
        elif graph and not seen and _current_task() != -1:
            _current_hold().take(self, 0)

    def _before_backward(self, age, start, grads):
        """Gradients of an output are here: the backward of a forward that began at `start` follows."""
        self.again |= torch.is_grad_enabled()
        if _whole is not None and self in _whole.units:
            return
        hold = _current_hold()
        hold.reach(age, self)
        hold.take(self, min(age, start))

    def fetch_backward(self, event=None):
        self._fetch(self._event + 1 if event is None else event)

    def _fetch(self, event):
        """All or nothing."""
        done = []
        try:
            for home, params in self.groups:
                home.fetch(event, params, self.label)
                done.append((home, params))
        except BaseException:
            _release(done, self.label)
            raise

    def __deepcopy__(self, memo):
        return Unit()  # a copied module has ordinary parameters, and nothing to fetch

    def __reduce__(self):
        return Unit, ()


class _Call:
    """A forward. start: the age of the first node that it can have made. frame: of torch's function around it."""

    __slots__ = ("start", "_frame")

    def __init__(self, frame):
        self.start, self._frame = _age(), frame

    def runs(self):
        """Whether the forward has not ended: Python refuses to clear a frame that is in use."""
        try:
            self._frame.clear()
        except RuntimeError:
            return True
        return False


def _end_interrupted(last=None):
    """Ends the innermost forwards, up to the last one, whose end torch did not tell: an exception that is no Exception
    (KeyboardInterrupt) passes its hooks by."""
    while _active and _active[-1] is not last and _active[-1].end_interrupted():
        pass


def _number(module):
    if module not in _events:
        _events[module] = next(_numbers)
    return _events[module]


class _Hold:
    """What was fetched in one backward pass."""

    def __init__(self, task=None):
        self.task = task
        self.units = {}  # Unit -> its groups when they were fetched
        self._starts = {}  # of units that are released early -> the age of the oldest node that may need them

    def take(self, unit, start, event=None):
        """Fetches a unit's parameters, once, for nodes that are not older than start. event: None: its backward's."""
        if unit in self.units and start >= self._starts.get(unit, 0):
            return
        if unit not in self.units:
            unit.fetch_backward(event)
            self.units[unit] = unit.groups
        if unit.early:
            self._starts[unit] = min(start, self._starts.get(unit, start))
        for other in unit.hidden:
            self.take(other, start)

    def reach(self, age, unit):
        """The pass has come to a node of unit: what only newer ones needed is released."""
        for other in [other for other, start in self._starts.items() if start > age and other is not unit]:
            del self._starts[other]
            _release(self.units.pop(other), other.label)

    def end(self):
        """The backward pass is over."""
        _holds.pop(self.task, None)
        units, self.units, self._starts = self.units, {}, {}
        error = None
        for unit, groups in units.items():
            try:
                _release(groups, unit.label)
            except RuntimeError as e:
                error = e
        if error is not None:
            raise error


def _current_hold():
    """The _Hold of the backward pass that runs now."""
    task = _current_task()
    hold = _holds.get(task)
    if hold is None:
        hold = _holds[task] = _Hold(task)
        _queue_callback(hold.end)
    return hold


def _release(groups, label):
    error = None
    for home, params in groups:
        try:
            home.release(params, label)
        except RuntimeError as e:
            error = e
    if error is not None:
        raise error


def clean_up():
    """Forwards that were interrupted and backward passes that raised have left what they fetched: they end, unless a
    backward pass is running."""
    _end_interrupted()
    if _current_task() == -1:
        for hold in list(_holds.values()):
            hold.end()


_PLAIN = (str, bytes, int, float, type, torch.nn.Module, torch.dtype, torch.device)
_LIMIT = 10_000  # objects of one output that are looked into


def _tensors(output):
    """The tensors in what a module returned: in containers and in the attributes of objects, but not of modules."""
    if isinstance(output, torch.Tensor):
        yield output
        return
    stack, seen = [output], set()
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif item is not None and not isinstance(item, _PLAIN) and id(item) not in seen and len(seen) < _LIMIT:
            seen.add(id(item))
            if isinstance(item, Mapping):
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, set)):
                stack.extend(item)
            elif hasattr(item, "__dict__") and not callable(item):
                stack.extend(vars(item).values())


class Slots(dict):
    """A module's _parameters: a released parameter that is read while another module's forward runs is fetched for
    that module, then and from then on."""

    def __getitem__(self, name):
        p = dict.__getitem__(self, name)
        if _active and isinstance(p, ZeroParameter) and p.ds_status is ZeroParamStatus.NOT_AVAILABLE:
            _active[-1].add(p)
        return p


def backward_of(units):
    """A context around a backward pass in which every one of these units that has run stays fetched, so that gradients
    reach parameters on ways that no output shows."""
    return _Whole(units)


class _Whole:
    def __init__(self, units):
        self._units = units

    def __enter__(self):
        global _whole
        if _whole is None:
            self._hold = _whole = _Hold()
            for unit in self._units:
                if unit.ran and (unit.again or not unit.early):
                    _whole.take(unit, 0)

    def __exit__(self, *exc):
        global _whole
        if _whole is getattr(self, "_hold", None):
            _whole = None
            self._hold.end()
        return False


def register_external_parameter(module, parameter):
    """Tells ZeRO-3 that `module` uses a parameter of another module in its forward: it is fetched with its own.
    Ordinary parameters need no telling, until initialize() makes them sharded."""
    if not isinstance(parameter, torch.nn.Parameter):
        raise RuntimeError(f"register_external_parameter: {type(parameter).__name__}; allowed: a torch.nn.Parameter")
    _EXTERNAL.setdefault(module, {})[id(parameter)] = parameter
    if is_zero(parameter):
        if module not in _UNITS:
            install(module, [], type(module).__name__)
        _UNITS[module].add(parameter)


def unregister_external_parameter(module, parameter):
    """Undoes register_external_parameter. RuntimeError where it was not told."""
    if id(parameter) not in _EXTERNAL.get(module, {}):
        raise RuntimeError("unregister_external_parameter: this parameter is not registered for this module")
    del _EXTERNAL[module][id(parameter)]
    unit = _UNITS.get(module)
    if unit is not None:
        unit.params = tuple(p for p in unit.params if p is not parameter)
        unit._group()


def external_of(module):
    """[(number, Parameter), ...] of what module uses of others'."""
    return list(_EXTERNAL.get(module, {}).items())


class External:
    """``module.ds_external_parameters``."""

    def __init__(self, module=None):
        self._module = None if module is None else weakref.ref(module)

    def __call__(self):
        module = None if self._module is None else self._module()
        return [] if module is None else external_of(module)

    def __deepcopy__(self, memo):
        return External()

    def __reduce__(self):
        return External, ()


# ---- installing ----


def install(module, params, label):
    """Hooks a module up to fetch params. Returns (unit, hook handles); an earlier unit's hooks are the caller's to
    remove."""
    unit = Unit(label, module, params)
    for p in _EXTERNAL.get(module, {}).values():
        if is_zero(p) and not p.ds_persist:
            unit.add(p)
    _UNITS[module] = unit
    module.ds_external_parameters = External(module)
    unit.handles = [module.register_forward_pre_hook(unit.enter, prepend=True),
                    module.register_forward_hook(unit.leave, always_call=True)]
    return unit


def uninstall(module):
    """Takes a module's hooks off and makes its _parameters an ordinary dict."""
    unit = _UNITS.pop(module, None)
    if unit is not None:
        for handle in unit.handles:
            handle.remove()
    if type(module._parameters) is Slots:
        module.__dict__["_parameters"] = dict(module._parameters)


def attach(module):
    """A module that was built under Init: it works before initialize(), and where it is attached later."""
    wanted = [p for p in module.parameters(recurse=False) if is_zero(p) and not p.ds_persist]
    uninstall(module)
    if wanted:
        install(module, wanted, f"a module of class {type(module).__name__}")
        module.__dict__["_parameters"] = Slots(module._parameters)


def install_all(module, prefix=""):
    """Units for every module that has released parameters, of its own or below, and runs; returns them."""
    units = []
    _walk(module, prefix, units, set())
    return units


def _walk(module, name, units, seen):
    if module in seen:
        return
    seen.add(module)
    leaf = z3_leaf_module(module)
    own = [p for p in (module.parameters() if leaf else module.parameters(recurse=False)) if is_zero(p)]
    uninstall(module)
    wanted = [p for p in own if not p.ds_persist]
    if wanted or _runs(module) and any(is_zero(p) and not p.ds_persist for p in module.parameters()):
        units.append(install(module, wanted, _label(module, name)))
    if wanted:
        for child in module.modules() if leaf else (module,):
            if child._parameters and type(child._parameters) is not Slots:
                child.__dict__["_parameters"] = Slots(child._parameters)
    for p in own:
        vars(p).pop("ds_z3_leaf_module", None)
    if leaf:
        for p in own:
            p.ds_z3_leaf_module = module
        for child in module.modules():
            if child is not module:
                uninstall_hooks(child)
        return
    for key, child in module.named_children():
        _walk(child, f"{name}.{key}" if name else key, units, seen)


def uninstall_hooks(module):
    """Takes a module's hooks off: its leaf fetches for it."""
    unit = _UNITS.pop(module, None)
    if unit is not None:
        for handle in unit.handles:
            handle.remove()


def _runs(module):
    """Whether a module has a forward of its own, which may read parameters of those below."""
    return "forward" in vars(module) or type(module).forward is not torch.nn.Module.forward


def _label(module, name):
    return f"module {name or '(the model)'} ({type(module).__name__})"
