"""python -m deepspeed_c.checkpoint: what is in a checkpoint, whether it is whole, its weights for other programs, and
what differs between two."""
import argparse
import os
import sys

import torch

from .._core import CheckpointError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "stored": None}


def _parser():
    parser = argparse.ArgumentParser(prog="python -m deepspeed_c.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, *folders):
        found = commands.add_parser(name, help=text, description=text)
        for folder in folders:
            found.add_argument(folder, help="a folder with 'latest', or a checkpoint in it")
        found.add_argument("--tag", help="which checkpoint of the folder; without it the one that 'latest' names")
        return found

    inspect = command("inspect", "A table of contents.", "dir")
    inspect.add_argument("-v", "--verbose", action="store_true", help="a line for each tensor")
    command("verify", "Compares every checksum. Exit status 1 where something is damaged.", "dir")
    export = command("export", "Writes the weights, joined over ranks, for other programs.", "dir")
    export.add_argument("out", help="folder for the files")
    export.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of floating weights (default: %(default)s)")
    export.add_argument("--torch", action="store_true", help="files of torch.save instead of safetensors")
    export.add_argument("--max-shard-size", default="5GB", help="size of a file (default: %(default)s)")
    export.add_argument("--exclude-frozen", action="store_true", help="without parameters that are not trained")
    command("diff", "What differs between two checkpoints, of any formats. Exit status 1 where something does.", "dir",
            "other")
    return parser


def _open(folder, tag):
    """The source of a checkpoint: `folder` itself, or the one in it of that tag."""
    from .save import latest_tag, source_of

    folder = os.path.abspath(folder)
    if tag is None:
        tag = latest_tag(folder)
    if tag is None:
        folder, tag = os.path.split(folder)
    return source_of(folder, tag)


def _inspect(options):
    source = _open(options.dir, options.tag)
    print(source.folder)
    for name in ("made_by", "counters", "world", "scaler", "optimizer", "schedule"):
        value = source.sections.get(name)
        if value is not None:
            print(f"{name}: {value}")
    rows = {}
    for tensor in source.tensors.values():
        kind = rows.setdefault((tensor.kind, str(tensor.dtype).removeprefix("torch.")), [0, 0, 0])
        kind[0] += 1
        kind[1] += tensor.numel
        kind[2] += tensor.numel * tensor.dtype.itemsize
    heads = "kind", "dtype", "tensors", "elements", "bytes"
    _print_table([heads, *((*key, *row) for key, row in sorted(rows.items()))])
    if options.verbose:
        _print_table([("kind", "name", "dtype", "shape", "group"), *(
            (t.kind, t.name, str(t.dtype).removeprefix("torch."), str(list(t.shape)), t.group if t.group >= 0 else "-")
            for t in source.tensors.values())])


def _print_table(rows):
    print()
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [str(cell).rjust(width) if isinstance(cell, int) else str(cell).ljust(width)
                 for cell, width in zip(row, widths)]
        print("  ".join(cells).rstrip())


def _verify(options):
    source = _open(options.dir, options.tag)
    done = [0]

    def progress(n_bytes):
        done[0] = n_bytes

    source.verify(progress)
    print(f"{source.folder}: {done[0]} bytes are as they were written")


def _export(options):
    from .consolidated import export, size_of, weights_of

    source = _open(options.dir, options.tag)
    weights = weights_of(source, _DTYPES[options.dtype], options.exclude_frozen)
    for name in export(weights, options.out, not options.torch, size_of(options.max_shard_size)):
        print(os.path.join(options.out, name))


def _diff(options):
    from .compare import differences

    lines = 0
    for line in differences(_open(options.dir, options.tag), _open(options.other, options.tag)):
        print(line)
        lines += 1
    return bool(lines)


def main(arguments=None):
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    run = {"inspect": _inspect, "verify": _verify, "export": _export, "diff": _diff}[options.command]
    try:
        return int(bool(run(options)))
    except (CheckpointError, OSError, ValueError, NotImplementedError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
