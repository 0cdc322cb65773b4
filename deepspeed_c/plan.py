"""Tells what training a model will take before any of it is allocated:
`python -m deepspeed_c.plan --model import.path:factory --config ds.json --world-size N [--nodes M]`.

The model is made on the meta device. What is held where is the core's (`csrc/plan.c`, by the functions that the engine
allocates by); this names the model's parameters to it and shows the numbers. Exit code: 0, or 2 where an option, the
file or the model is at fault.
"""
import argparse
import importlib
import json
import os
import re
import shutil
import sys

import torch

from . import _core, optimizer_choice
from . import model as model_setup
from ._delegate import STAGING_BYTES
from .reduction import is_expert

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MOST_RANKS = 2**20
_PROBE = 64  # elements a side of what a foreign optimizer's states are measured with


class PlanError(ValueError):
    """An argument is at fault; the text names it."""


def make_model(path, keywords=None):
    """The nn.Module that ``import.path:factory`` makes, on the meta device; PlanError says what went wrong."""
    name, colon, attribute = path.partition(":")
    if not (name and colon and attribute):
        raise PlanError(f"--model is {path!r}; allowed: import.path:factory")
    try:
        found = importlib.import_module(name)
    except ImportError as error:
        raise PlanError(f"--model: module {name!r} cannot be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise PlanError(f"--model: {path.partition(':')[0]} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, torch.nn.Module):
        raise PlanError(f"--model: {path} is a {type(found).__name__}; allowed: a callable that makes an nn.Module")
    try:
        with torch.device("meta"):
            module = found(**(keywords or {}))
    except Exception as error:
        raise PlanError(f"--model: {path} raised {type(error).__name__} on the meta device: {error}") from error
    if not isinstance(module, torch.nn.Module):
        raise PlanError(f"--model: {path} returned a {type(module).__name__}; allowed: an nn.Module")
    return module


def plan(module, config, world_size, nodes=1, memory=None, zero_init=False):
    """What training `module` takes: a dict of numbers.

    module: an nn.Module, best on the meta device; it is cast as `initialize` does. config: a _core.Config over
    world_size ranks, which are parallel over data, on `nodes` machines. memory: bytes of a machine that may be used
    (default: this one's). zero_init: the module is made inside zero.Init, so no rank ever holds all of it. Keys: those
    of _core.plan, elements, memory, optimizer, rooms (see _rooms). PlanError, ValueError or NotImplementedError where
    it cannot be trained.
    """
    _check_ranks(world_size)
    if nodes < 1 or world_size % nodes:
        raise PlanError(f"--nodes is {nodes} and --world-size {world_size}; allowed: nodes with equally many ranks")
    if zero_init and config.get("zero_optimization.stage") != 3:
        raise PlanError(f"--zero-init with zero_optimization.stage {config.get('zero_optimization.stage')}; allowed: 3")
    memory = machine_memory() if memory is None else memory
    given, before = _bytes(module), {p: p.dtype for p in module.parameters()}
    model_setup.cast(module, torch.float16 if config.get("fp16.enabled") else
                     torch.bfloat16 if config.get("bf16.enabled") else None)
    optimizer, trained, said = _optimizer(module, config)
    kind, whole = optimizer_choice.kind_of(optimizer, config.get("zero_optimization.stage"),
                                           config.get("zero_allow_untested_optimizer"))
    groups, place = _groups(module, world_size, config.get("use_data_before_expert_parallelism"))
    gathered = [(0, 0)] * len(groups)
    if config.get("zero_optimization.stage") == 3:
        gathered = _gathered(module, config, [place(p) for p in module.parameters()], len(groups))
    known = {id(p) for p in trained.values()}
    frozen = [p for p in module.parameters() if id(p) not in known]
    buffers = sum(b.nbytes for b in module.buffers())
    staging = 0 if nodes == 1 else STAGING_BYTES
    found = _core.plan(
        config, kind, whole, [_described(name, p, place(p)) for name, p in trained.items()],
        tuple(group + both for group, both in zip(groups, gathered)), world_size, nodes,
        [(p.numel(), p.element_size(), place(p)) for p in frozen], buffers, buffers if zero_init else given,
        max((p.nbytes for p, dtype in before.items() if p.dtype != dtype), default=0),
        _foreign_state_bytes(config) if kind == "foreign" else 0.0,
        any(group.get("momentum") for group in optimizer.param_groups),
        (staging, staging if world_size > nodes else 0), memory)
    elements = {"trained": sum(p.numel() for p in trained.values()), "frozen": sum(p.numel() for p in frozen)}
    return {**found, "elements": elements, "memory": memory, "optimizer": said, "rooms": _rooms(found["file"], config)}


def _rooms(file, config):
    """[{folders, needed, free}] of each file system of this machine in which a node's files would be made: what they
    take, and what is free there now. file: {kind: bytes} of a node."""
    of_states = file["masters"] + file["optimizer states"]
    rooms = {}
    for section, needed in ("offload_optimizer", of_states), ("offload_param", sum(file.values()) - of_states):
        if not needed:
            continue
        folder = config.get(f"zero_optimization.{section}.nvme_path")
        there = os.path.abspath(folder)
        while not os.path.exists(there):  # initialize makes it
            there = os.path.dirname(there)
        room = rooms.setdefault(os.stat(there).st_dev,
                                {"folders": [], "needed": 0, "free": shutil.disk_usage(there).free})
        room["folders"] += [folder] * (folder not in room["folders"])
        room["needed"] += needed
    return list(rooms.values())


def _check_ranks(world_size):
    if not 1 <= world_size <= _MOST_RANKS:
        raise PlanError(f"--world-size is {world_size}; allowed: 1 to {_MOST_RANKS}")


def _bytes(module):
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def _optimizer(module, config):
    """(the optimizer, {name: Parameter} of what it trains, what to call it); Adam where the configuration has none."""
    name = config.get("optimizer.type")
    groups = model_setup.make_groups(module, None)
    if not groups:
        raise PlanError("--model: no parameter requires a gradient")
    keywords = config.subtree("optimizer.params") or {} if name else {}
    optimizer = optimizer_choice.by_name(name or "Adam", keywords, groups)
    parameters = model_setup.Parameters(module, optimizer.param_groups)
    return optimizer, dict(zip(parameters.names, parameters.tensors)), name or "Adam (the configuration has none)"


def _foreign_state_bytes(config):
    """Bytes per element that an optimizer of torch keeps, found by a step over a small parameter."""
    p = torch.nn.Parameter(torch.zeros(_PROBE, _PROBE))
    p.grad = torch.zeros_like(p)
    optimizer = optimizer_choice.by_name(config.get("optimizer.type"), config.subtree("optimizer.params") or {},
                                         [{"params": [p]}])
    optimizer.step()
    return sum(t.nbytes for t in optimizer.state[p].values() if torch.is_tensor(t) and t.dim()) / p.numel()


def _groups(module, world_size, data_first):
    """(((ranks, stride), ...) of the reduce groups, a parameter's place among them)."""
    groups, places = [(world_size, 1)], {}
    for name, p in module.named_parameters():
        group = getattr(p, "group_name", None)
        if not is_expert(p) or group in places:
            continue
        size = re.fullmatch(r"ep_size_([1-9]\d*)", group or "")
        if not size:
            raise PlanError(f"--model: parameter {name} is an expert's of group_name {group!r}; allowed: 'ep_size_N', "
                            "as MoE layers have it")
        size = int(size[1])
        if world_size % size:
            raise PlanError(f"--world-size is {world_size}, which {group} of parameter {name} does not divide")
        places[group] = len(groups) if size > 1 else 0
        if size > 1:
            groups.append((world_size // size, 1 if data_first else size))
    return tuple(groups), lambda p: places[p.group_name] if is_expert(p) else 0


def _gathered(module, config, places, n_groups):
    """For each reduce group: (elements that stay gathered at stage 3, the most others that are in use at a time: those
    of a module and of the modules around it)."""
    from .runtime.zero.shards import persistent
    from .utils.leaf_modules import z3_leaf_module

    kept = {id(p) for p in persistent({p: p.numel() for p in module.parameters()}, config)}
    place = {id(p): g for p, g in zip(module.parameters(), places)}

    def count(parameters, g, stays):
        return sum(p.numel() for p in parameters if place[id(p)] == g and (id(p) in kept) == stays)

    def in_use(child, g):
        leaf = z3_leaf_module(child)
        return count(child.parameters(recurse=leaf), g, False) + max(
            (in_use(c, g) for c in child.children() if not leaf), default=0)

    return [(count(module.parameters(), g, True), in_use(module, g)) for g in range(n_groups)]


def _described(name, p, place):
    if p.dtype not in _SHORT:
        raise PlanError(f"--model: trainable parameter {name} is {str(p.dtype).removeprefix('torch.')}; allowed: "
                        "float32, bfloat16, float16")
    return p.numel(), _SHORT[p.dtype], place


def machine_memory():
    """Bytes of memory of this machine, or of the control groups that this process runs in."""
    return _core.memory_limit() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- the command ----

def _size(text):
    """A number of bytes: 64G, 1.5T, 500000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number of bytes, with K, M, G or T for 1024 and so on")
    n_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if n_bytes > sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: at most {sys.maxsize} bytes")
    return n_bytes


def _object(text):
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a JSON object of keyword arguments")
    return value


def _parser():
    parser = argparse.ArgumentParser(prog="python -m deepspeed_c.plan",
                                     description="Tells what training a model takes, before anything is allocated.")
    parser.add_argument("--model", required=True, metavar="PATH:FACTORY", help="what makes the nn.Module")
    parser.add_argument("--kwargs", type=_object, default={}, metavar="JSON", help="keyword arguments of the factory")
    parser.add_argument("--config", required=True, metavar="FILE", help="the configuration")
    parser.add_argument("--world-size", "--world_size", type=int, required=True, metavar="N", help="ranks, all nodes'")
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="machines (1)")
    parser.add_argument("--memory", type=_size, metavar="BYTES", help="of a machine (this one's)")
    parser.add_argument("--zero-init", "--zero_init", action="store_true", help="the model is made inside zero.Init")
    parser.add_argument("--json", action="store_true", help="numbers as JSON")
    return parser


def _amount(n_bytes):
    if not n_bytes:
        return "-"
    unit = next((unit for unit in "KMG" if n_bytes < 1000 * _UNITS[unit]), "T")
    return f"{n_bytes / _UNITS[unit]:.1f} {unit}iB"


def _count(n):
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= factor:
            return f"{n / factor:.2f} {unit}"
    return str(n)


def _table(head, rows):
    head = head[:len(rows[0])]  # the last columns may have nothing to show
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
            for row in rows]


def report(found, world_size, nodes):
    """The numbers of plan() as lines of text."""
    n = found["elements"]
    yield (f"{_count(n['trained'])} trained parameters" + (f", {_count(n['frozen'])} frozen" if n["frozen"] else "")
           + f"; {world_size} rank{'s' * (world_size > 1)} on {nodes} node{'s' * (nodes > 1)}; optimizer "
           + found["optimizer"])
    yield ""
    columns = ("private", "shared", "file") if any(found["file"].values()) else ("private", "shared")
    kinds = [(kind, *(found[column][kind] for column in columns)) for kind in found["private"]]
    yield from _table(("model states and staging", "private, per rank", "shared, per node", "files, per node"),
                      [(kind, *map(_amount, sizes)) for kind, *sizes in kinds if any(sizes)])
    yield ""
    yield from _table(("peak, without activations", "private, per rank", "all ranks, per node"),
                      [(phase, _amount(own), _amount(found["node"][phase])) for phase, own in found["rank"].items()])
    yield ""
    traffic = [(what, str(row["times"]), *(_amount(row[key]) for key in ("sent", "received", "between nodes")))
               for what, row in found["traffic"].items() if row["times"]]
    if traffic:
        yield from _table(("bytes in one step", "times", "sent, per rank", "received, per rank",
                           "between nodes, per node"), traffic)
        yield ""
    for room in found["rooms"]:
        yield (f"files of a node in {', '.join(room['folders'])}: {_amount(room['needed'])}; free here: "
               f"{_amount(room['free'])}{', so initialize fails' * (room['needed'] > room['free'])}")
    total = n["trained"] + n["frozen"]
    yield (f"largest model of this shape in {_amount(found['memory'])} per node, without activations: "
           f"{_count(int(total * found['scale']))} parameters ({found['scale']:.3g} times this one)")


def main(arguments=None):
    """Runs a command line (default: this process's); returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _check_ranks(options.world_size)
        config = _core.Config(options.config, options.world_size)
        module = make_model(options.model, options.kwargs)
        found = plan(module, config, options.world_size, options.nodes, options.memory, options.zero_init)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for sentence in config.warnings:
        print(f"warning: {sentence}", file=sys.stderr)
    print(json.dumps(found, indent=1) if options.json else "\n".join(report(found, options.world_size, options.nodes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
