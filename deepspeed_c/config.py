"""Explains a configuration: `python -m deepspeed_c.config FILE [--world-size N]`.

Prints every setting that the file gives or that follows from it, with the value in effect and where it comes from; or
all errors and warnings at once. What is read and what is allowed is the core's (`csrc/config*.c`); this only shows it.
Exit code: 0 where the configuration can train, 1 where it cannot, 2 where the options or the file are at fault.
"""
import argparse
import inspect
import json
import re
import signal
import sys
from collections import namedtuple

from . import _core

# value: in effect. origin: where it comes from. key: the row of _core.config_keys().
Setting = namedtuple("Setting", "path value origin is_default key")

_SIZES = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}\[\]]')


def explain(config, world_size=1, lines=None):
    """The list of Setting of a _core.Config, in the table's order: one for each key that is no section, and for each
    parameter of the optimizer and the schedule.

    lines: {path as written: line of the file}, for the origins. ValueError for what check_constructors() finds.
    """
    settings, lines = [], lines or {}
    for key in _core.config_keys():
        path = key["path"]
        if key["type"] == "section" or "[]" in path:
            continue
        if path in _CHECKS and config.get(path.replace("params", "type")) is not None:
            settings += _parameters(config, key, lines)
        else:
            settings.append(Setting(path, config.get(path), *_origin(config, key, world_size, lines), key))
    return settings


def lines_of(text):
    """{dotted path as written: line, from 1} of each key of JSON text; keys in lists have [] in their path."""
    found, open_paths, path, line, done = {}, [""], "", 1, 0
    for token in _TOKEN.finditer(text):
        line, done = line + text.count("\n", done, token.start()), token.start()
        string, colon = token.groups()
        if colon:
            key = json.loads(string).replace(".", "\0")  # a name with a dot is not a path
            path = ".".join(filter(None, (open_paths[-1], key)))
            found.setdefault(path, line)
        elif token[0] == "{":
            open_paths.append(path)
        elif token[0] == "[":
            path += ".[]"
            open_paths.append(path)
        elif token[0] in "}]":
            open_paths.pop()
            path = open_paths[-1]
    return found


def check_constructors(config):
    """Errors, as sentences, that only the classes named by optimizer.type and scheduler.type can tell: each is made
    once, over a parameter of its own. config: anything with get(path)."""
    errors = []
    for attempt in _try_optimizer, _try_schedule:
        try:
            attempt(config)
        except (ValueError, TypeError, NotImplementedError) as error:
            errors.append(str(error))
    return errors


def _optimizer(name, params):
    import torch

    from .optimizer_choice import by_name
    return by_name(name, params, [{"params": [torch.nn.Parameter(torch.zeros(1))]}])


def _try_optimizer(config):
    name = config.get("optimizer.type")
    if name is not None:
        from .optimizer_choice import kind_of
        kind_of(_optimizer(name, config.get("optimizer.params") or {}), config.get("zero_optimization.stage") or 0,
                config.get("zero_allow_untested_optimizer"))


def _try_schedule(config):
    name, params = config.get("scheduler.type"), config.get("scheduler.params") or {}
    if name is None:
        return
    from .runtime import lr_schedules
    lr_schedules.check(name, params)
    # A list has a value for each parameter group, and how many there are only the script knows.
    if not any(isinstance(value, list) for key, value in params.items() if key != "milestones"):
        lr_schedules.create(name, _optimizer("Adam", {}), params)


class _Written:
    """The get(path) of a configuration that the core refuses: what is written there."""

    def __init__(self, text):
        try:
            self._tree = json.loads(text)
        except ValueError:
            self._tree = {}

    def get(self, path):
        at = self._tree
        for name in path.split("."):
            at = at.get(name) if isinstance(at, dict) else None
        fits = isinstance(at, _KINDS[path])
        return at if fits and at != "auto" else None


_KINDS = {"optimizer.type": str, "optimizer.params": dict, "scheduler.type": str, "scheduler.params": dict,
          "zero_optimization.stage": int, "zero_allow_untested_optimizer": bool}


def _check_optimizer(name, params):
    from .optimizer_choice import check  # imports torch
    return check(name, params)


def _check_schedule(name, params):
    from .runtime.lr_schedules import check
    return check(name, params), params


# Path of a class's parameters -> function(name, params): (class, keywords), or an error.
_CHECKS = {"optimizer.params": _check_optimizer, "scheduler.params": _check_schedule}


def _parameters(config, key, lines):
    """A Setting for each parameter of the class that a section names."""
    path = key["path"]
    name, given = config.get(path.replace("params", "type")), config.get(path) or {}
    cls, keywords = _CHECKS[path](name, given)
    defaults = {parameter.name: parameter.default for parameter in inspect.signature(cls).parameters.values()
                if parameter.default is not parameter.empty}
    found = {parameter: (value, _place(f"{path}.{parameter}", f"{config.origin(path)[0]}.{parameter}", lines), False)
             for parameter, value in given.items()}
    for parameter, value in keywords.items():
        found.setdefault(parameter, (value, f"follows from {name}", False))
    for parameter, value in defaults.items():
        found.setdefault(parameter, (value, f"default of {cls.__name__}", True))
    return [Setting(f"{path}.{parameter}", *row, key) for parameter, row in found.items()]


def _origin(config, key, world_size, lines):
    """(where the value comes from, whether nothing says other than the table)."""
    path = key["path"]
    written, how = config.origin(path) or (None, None)
    place = _place(path, written, lines) if written else ""
    if how == "given":
        effect = f"; no effect: {key['help']}" if key["status"] == "no effect" else ""
        return place + effect, False
    value, marked = config.get(path), {"auto": '"auto"', "null": "null"}.get(how)
    said = f" ({marked} at {place})" if marked else ""
    if path in _SIZES:
        return _size_origin(config, path, world_size) + said, False
    if value != key["default"]:
        return "follows from other keys" + said, False
    return "default" + said, not marked


def _place(path, written, lines):
    """Where a key stands, and under which other name."""
    place = f"line {lines[written]}" if written in lines else "given"
    return place + (f", as {written}" if written != path else "")


def _size_origin(config, path, world_size):
    batch, micro, steps = _SIZES
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    if path == steps and not (config.given(batch) and config.given(micro)):
        return "1, because nothing says more"
    formula = {batch: f"{micro} * {steps} * {ranks}", micro: f"{batch} / {steps} / {ranks}",
               steps: f"{batch} / {micro} / {ranks}"}
    return formula[path]


def _shown(value, n_most=44):
    text = json.dumps(value, default=str).replace("Infinity", "inf")
    return text if len(text) <= n_most else text[:n_most - 3] + "..."


def _table(rows):
    """Lines of columns that are as wide as their widest cell; the last is as long as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [" ".join([*(cell.ljust(width + 1) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows]


def _show_settings(settings, with_effects):
    rows = [("key", "value", "from")]
    rows += [(s.path, _shown(s.value), s.origin + (f"; {s.key['help']}" if with_effects else "")) for s in settings]
    print("\n".join(_table(rows)))


def _show_keys():
    rows = [("key", "type", "default", "status", "allowed: effect")]
    rows += [(key["path"], key["type"], _shown(key["default"], 24), key["status"], f"{key['allowed']}: {key['help']}")
             for key in _core.config_keys() if key["type"] != "section"]
    print("\n".join(_table(rows)))


def _parser():
    parser = argparse.ArgumentParser(prog="python -m deepspeed_c.config", description="Explains a configuration.")
    parser.add_argument("file", nargs="?", help="a JSON file, or - for standard input")
    parser.add_argument("--world-size", "--world_size", type=int, default=1, metavar="N",
                        help="ranks that share a batch (1)")
    parser.add_argument("--mpu", action="store_true",
                        help="the script passes an mpu, so sizes of other than data ranks may be anything")
    parser.add_argument("--all", action="store_true", help="defaults too")
    parser.add_argument("--effects", action="store_true", help="what each key does, behind where it comes from")
    parser.add_argument("--keys", action="store_true", help="list every key instead")
    return parser


def _read(parser, name):
    if name is None:
        parser.error("give a file, or --keys")
    try:
        if name == "-":
            return sys.stdin.read()
        with open(name, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{name}: {error}")


def main(arguments=None):
    """Runs a command line (default: this process's); returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.keys:
        _show_keys()
        return 0
    if options.world_size < 1:
        parser.error(f"--world-size is {options.world_size}; allowed: >= 1")
    text = _read(parser, options.file)
    try:
        source = text if options.file == "-" else options.file
        config = _core.Config(source, options.world_size, {} if options.mpu else None)
        errors, warnings = check_constructors(config), config.warnings
    except _core.DeepSpeedConfigError as error:
        errors, warnings = [str(error), *check_constructors(_Written(text))], getattr(error, "warnings", [])
    for kind, sentences in ("error", errors), ("warning", warnings):
        for sentence in sentences:
            print(f"{kind}: {sentence}", file=sys.stderr)
    if errors:
        return 1
    settings = explain(config, options.world_size, lines_of(text))
    _show_settings([s for s in settings if options.all or not s.is_default], options.effects)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no fault
    sys.exit(main())
