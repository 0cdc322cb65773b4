"""Leaf modules: those whose whole subtree ZeRO stage 3 fetches as one. Below stage 3 the mark changes nothing."""

_MARK = "_z3_leaf"


def z3_leaf_module(model):
    """Whether this module is marked as a leaf."""
    return getattr(model, _MARK, False)


def z3_leaf_parameter(param):
    """Whether an engine at stage 3 fetches the parameter with the leaf module that it is in."""
    return hasattr(param, "ds_z3_leaf_module")


def get_z3_leaf_modules(model):
    """All marked modules in `model`, itself included."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model, flag):
    """Marks this module, or takes the mark away."""
    setattr(model, _MARK, flag)


def set_z3_leaf_modules(model, leaf_module_classes, raise_if_not_found=True):
    """Marks all modules of the given classes, in `model` and itself, and returns them.

    leaf_module_classes: a list of classes (subclasses count), class names or fully qualified class names. ValueError
    where no module matches any of them, unless told otherwise; TypeError for anything else in the list.
    """
    return _mark_classes(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(model, leaf_module_classes, raise_if_not_found=True):
    """Takes the mark from all modules of the given classes and returns them; arguments as set_z3_leaf_modules."""
    return _mark_classes(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(model, module_names, flag=True, raise_if_not_found=True):
    """Marks (or unmarks) the modules of these names in model.named_modules() and returns them. ValueError where a name
    is not there, unless told otherwise."""
    return _mark_names(model, module_names, lambda name, wanted: name == wanted, flag, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(model, module_name_suffixes, flag=True, raise_if_not_found=True):
    """Marks (or unmarks) the modules whose names end with one of these and returns them. ValueError where one fits no
    name, unless told otherwise."""
    return _mark_names(model, module_name_suffixes, str.endswith, flag, raise_if_not_found)


def _mark_classes(model, classes, flag, raise_if_not_found):
    classes = [classes] if isinstance(classes, (str, type)) else list(classes)
    for entry in classes:
        if not isinstance(entry, (str, type)):
            raise TypeError(f"leaf_module_classes has {entry!r}; allowed: classes and names of classes")
    types = tuple(entry for entry in classes if isinstance(entry, type))
    names = {entry for entry in classes if isinstance(entry, str)}
    found = [module for module in model.modules() if isinstance(module, types) or names & _names_of(type(module))]
    if not found and raise_if_not_found:
        raise ValueError(f"no module of {type(model).__name__} is of the classes {classes}")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def _names_of(cls):
    return {cls.__name__, cls.__qualname__, f"{cls.__module__}.{cls.__qualname__}"}


def _mark_names(model, wanted, fits, flag, raise_if_not_found):
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    modules = dict(model.named_modules())
    missing = [entry for entry in wanted if not any(fits(name, entry) for name in modules)]
    if missing and raise_if_not_found:
        raise ValueError(f"no module of {type(model).__name__} is called {', '.join(map(repr, missing))}")
    found = [module for name, module in modules.items() if any(fits(name, entry) for entry in wanted)]
    for module in found:
        set_z3_leaf_module(module, flag)
    return found
