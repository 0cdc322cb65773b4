"""What zero.Init changes in torch while a model is built, and puts back.

Every class's __init__ reports the module when the outermost one for it is over; functions that make tensors make
floating ones in one dtype; Module.apply gathers what the applied function may write. Invariant: leave() undoes
exactly what enter() did, in whatever order contexts nest.
"""
import functools

import torch

_CONSTRUCTORS = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")
_open = []  # constructions that are entered; the innermost reports modules
ORIGINALS = {name: getattr(torch, name) for name in _CONSTRUCTORS}
_NEW = ("new_tensor", "new_empty", "new_zeros", "new_ones", "new_full")


class Construction:
    """done: called with each module whose construction is over. apply: what Module.apply is meanwhile."""

    def __init__(self, done, apply):
        self._done, self._apply = done, apply
        self._building = set()  # ids of modules whose __init__ runs
        self._undo = []

    def enter(self, wrap):
        """wrap(function) -> function, around each that makes tensors."""
        _open.append(self)
        for name, function in ORIGINALS.items():
            self._set(torch, name, wrap(function))
        for name in _NEW:
            self._set(torch.Tensor, name, wrap(getattr(torch.Tensor, name)))
        self._set(torch.nn.Module, "apply", self._apply)
        self._set(torch.nn.Module, "__init_subclass__", classmethod(self._subclass_hook))
        for cls in _subclasses(torch.nn.Module):
            self._watch(cls)

    def leave(self):
        _open.remove(self)
        for owner, name, new, old in reversed(self._undo):
            if vars(owner).get(name) is new:
                if old is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, old)
        self._undo = []

    def _set(self, owner, name, new):
        self._undo.append((owner, name, new, vars(owner).get(name)))
        setattr(owner, name, new)

    def _subclass_hook(self, cls, **kwargs):
        super(torch.nn.Module, cls).__init_subclass__(**kwargs)
        self._watch(cls)

    def _watch(self, cls):
        init = vars(cls).get("__init__")
        if init is None or issubclass(cls, torch.jit.ScriptModule):
            return
        building, done = self._building, self._done

        @functools.wraps(init)
        def watched(module, *args, **kwargs):
            if id(module) in building or _open[-1] is not self:
                return init(module, *args, **kwargs)
            building.add(id(module))
            try:
                init(module, *args, **kwargs)
            finally:
                building.discard(id(module))
            done(module)

        self._set(cls, "__init__", watched)


def _subclasses(cls):
    found, stack = {}, [cls]
    while stack:
        for child in stack.pop().__subclasses__():
            if child not in found:
                found[child] = None
                stack.append(child)
    return found
