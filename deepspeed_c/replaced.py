"""Other Parameters in the places of trained ones: load_state_dict(assign=True), ``module.weight = nn.Parameter(x)``.

Decides which of them take a place over, with its master and optimizer states, and which are an error. A place is the
names under which a trained parameter stands in the module. Invariant: where an error is raised nothing has changed.
"""
import torch

from .model import ALIGNMENT
from .whole import whole


class Places:
    """Where parameters stand in the module. params: the trained Parameters, a list that take_over() keeps current;
    labels: their names for texts."""

    def __init__(self, module, params, labels):
        self._module, self._params, self._labels = module, params, labels
        self._learn(self._now())

    def _now(self):
        return dict(self._module.named_parameters(remove_duplicate=False))

    def _learn(self, now):
        index = {id(p): i for i, p in enumerate(self._params)}
        self._names = [[] for _ in self._params]
        for name, p in now.items():
            if id(p) in index:
                self._names[index[id(p)]].append(name)
        self._slots = [(slots, key, item) for child in self._module.modules()
                       for slots in (child._parameters, child._modules) for key, item in slots.items()]

    def changed(self):
        """Whether a parameter or a submodule was replaced or taken away since the last look: a look-up for each."""
        return any(slots.get(key) is not item for slots, key, item in self._slots)

    def take_over(self):
        """Puts the new Parameters into params; [(index, old, new)]. A gradient and attributes (an expert's marks) of
        the old one that the new one lacks go with it, and a new one in another memory order than the old gets a
        storage in that order. ValueError where what stands in a place cannot be trained in it."""
        now = self._now()
        found = self._successors(now)
        for i, new in found:
            old = self._params[i]
            full = whole(old)
            if new.stride() != full.stride() or new.data_ptr() % ALIGNMENT:
                new.data = torch.empty_like(full, requires_grad=False).copy_(new.data)
            if new.grad is None and old.grad is not None:
                new.grad = old.grad
            for key, value in getattr(old, "ds_marks", vars(old)).items():
                vars(new).setdefault(key, value)
        taken = [(i, self._params[i], new) for i, new in found]
        for i, new in found:
            self._params[i] = new
        self._learn(now)
        return taken

    def _successors(self, now):
        standing = {id(p) for p in now.values()}
        trained = {id(p): i for i, p in enumerate(self._params)}
        found = []
        for i, old in enumerate(self._params):
            here = [now.get(name) for name in self._names[i]]
            others = {id(p): p for p in here if p is not None and p is not old}
            if id(old) in standing:
                self._check_beside(i, others.values(), trained)
            elif self._names[i]:
                found.append((i, self._successor(i, list(others.values()), trained)))
        return found

    def _check_beside(self, i, others, trained):
        """Where the old parameter still stands in some place, e.g. inside a wrapper, or under one of two tied names."""
        if any(p.requires_grad and id(p) not in trained for p in others):
            raise ValueError(f"parameter {self._labels[i]} still is in the module, and another one that requires a "
                             f"gradient stands in one of its places ({', '.join(self._names[i])}); the engine would "
                             "not train that one: tie them again, freeze it, or call initialize again")

    def _successor(self, i, others, trained):
        old, label = self._params[i], self._labels[i]
        if not others:
            raise ValueError(f"parameter {label}, which the engine trains, is not in the module any more; put it back, "
                             "or call initialize again")
        if len(others) > 1:
            raise ValueError(f"parameter {label} is another object in each of its places now "
                             f"({', '.join(self._names[i])}), which were tied at initialize; tie them again")
        new = others[0]
        if id(new) in trained:
            raise ValueError(f"parameter {label} is the same object as {self._labels[trained[id(new)]]} now; tie "
                             "parameters before initialize")
        if _said(new) != _said(whole(old)):
            raise ValueError(f"parameter {label} was replaced by one that does not fit: {_said(new)}; allowed: "
                             f"{_said(whole(old))}")
        return new


def _said(p):
    return f"{tuple(p.shape)} {p.dtype} {p.device} {p.layout}"
