"""Checkpoints in this project's own format (docs/checkpoint.md): one safetensors file per rank, and manifest.json.

Which bytes lie where is the core's (csrc/shard.c, csrc/manifest.c); here an engine's parts become keys, and a manifest
a source to load from.
"""
import io
import json
import os
import pickle
import re

import torch

from .. import _core
from ..aside import made_aside
from ..utils.logging import logger
from .agree import broadcast_bytes, gather_json, together
from .contents import Contents, Tensor
from .save import Bar, Saving

MANIFEST, OBJECTS = "manifest.json", "objects.pt"
DTYPES = {torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64", torch.complex64: "C64", torch.float32: "F32",
          torch.int32: "I32", torch.uint32: "U32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int16: "I16",
          torch.uint16: "U16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
          torch.uint8: "U8", torch.bool: "BOOL"}
_HELD_BY_SCRIPTS = ("model", "buffer")
_TORCHS = {name: dtype for dtype, name in DTYPES.items()}


def save(engine, aside, client_state, save_latest, exclude_frozen):
    """Saves into an Aside. Collective. Returns the Saving that is under way with checkpoint.async, else None."""
    comm, behind = engine._comm, engine._config.get("checkpoint.async")
    lazily = behind and len(aside.ranks) == comm.size  # over a folder that all ranks see
    problem = writer = told = contents = objects = None
    try:
        contents = Contents(engine, client_state, exclude_frozen)
        writer, rows = writer_of(os.path.join(aside.path, file_of(comm.rank)), contents.parts, lazily)
        objects = _packed_objects(contents)
        if lazily:
            writer.start()
        else:
            _write_file(comm, writer, contents, behind)
            told = *table_of(contents.parts, rows, writer), contents.own
    except Exception as error:
        problem = error
    together(comm, problem, "save_checkpoint")
    if lazily:
        return _behind(aside, writer, contents, objects, rows, save_latest)
    text, objects = _shared_files(comm, contents, objects, gather_json(comm, told, "save_checkpoint"))

    def complete():
        _publish(aside, text, objects, save_latest)

    if behind:
        return Saving(aside, writer, [file_of(rank) for rank in aside.ranks], complete)
    try:
        if aside.leads:
            complete()
    except Exception as error:
        problem = error
    together(comm, problem, "save_checkpoint")
    return None


def _write_file(comm, writer, contents, behind):
    bar = Bar(comm, sum(part.n * part.tensor.dtype.itemsize for part in contents.parts))
    try:
        writer.write(behind, bar)
    finally:
        bar.close()


def _behind(aside, writer, contents, objects, rows, save_latest):
    """The Saving of files whose threads have started. What each rank has to tell goes through a small file, so that
    ranks need not meet while training goes on."""
    names = [f"{file_of(rank)}.told" for rank in aside.ranks]

    def tell():
        told = *table_of(contents.parts, rows, writer), contents.own
        with made_aside(os.path.join(aside.path, names[aside.comm.rank])) as path, open(path, "w") as file:
            json.dump(told, file)

    def complete():
        everyone = []
        for name in names:
            path = os.path.join(aside.path, name)
            with open(path, "rb") as file:
                everyone.append(json.loads(file.read()))
            os.unlink(path)
        _publish(aside, _text_of(contents, objects, everyone), objects, save_latest)

    return Saving(aside, writer, names, complete, tell)


def _publish(aside, text, objects, save_latest):
    """On who leads, when all files are there."""
    if objects:
        aside.write(OBJECTS, objects)
    aside.write(MANIFEST, text)
    aside.publish(save_latest)


def _packed_objects(contents):
    """The bytes of objects.pt; none where there is to be no such file."""
    if not contents.objects:
        return b""
    file = io.BytesIO()
    torch.save(contents.objects, file)
    _warn_of_classes(file.getvalue())
    return file.getvalue()


def _text_of(contents, objects, everyone):
    """The text of manifest.json, on rank 0. everyone: what each rank has told: bytes and checksum of its file, table,
    own sections."""
    sections = dict(contents.sections)
    sections["scalars"] = [row for *_, own in everyone for row in own["scalars"]]
    sections["rng"] = {rank: state for *_, own in everyone for rank, state in own["rng"].items()}
    return manifest_of([told[:3] for told in everyone], sections, objects).text()


def _shared_files(comm, contents, objects, everyone):
    """(the text of manifest.json, rank 0's objects), on every rank. Collective."""
    text, problem = b"", None
    try:
        if comm.rank == 0:
            text = _text_of(contents, objects, everyone)
    except Exception as error:
        problem = error
    together(comm, problem, "save_checkpoint")
    return tuple(broadcast_bytes(comm, data, 0, "save_checkpoint") for data in (text, objects))


def _warn_of_classes(objects):
    """Says at once what will not load."""
    refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(objects)))
    if refused:
        logger.warning("client_state, or the schedule, holds values of %s: load_checkpoint takes them only after "
                       "torch.serialization.add_safe_globals() with these", ", ".join(refused))


def file_of(rank):
    """The name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def writer_of(path, parts, copied=False):
    """(a ShardWriter for what a rank writes, [(key, Part)] in the order of parts). copied: parameters and buffers are,
    because a script may change them before the next step. NotImplementedError for a dtype that the format has not."""
    writer, rows = _core.ShardWriter(path, torch.get_num_threads()), []
    for part in parts:
        tensor = part.tensor
        if tensor.dtype not in DTYPES:
            raise NotImplementedError(f"{tensor.kind} {tensor.name} is {str(tensor.dtype).removeprefix('torch.')}: "
                                      "saving that is not yet")
        if part.n == 0:
            continue
        key, shape = f"{tensor.kind}/{tensor.name}", tensor.shape
        if part.n != tensor.numel or not _is_row_major(tensor):
            key, shape = f"{key}@{part.first}", (part.n,)
        values = part.written()
        writer.add(key, DTYPES[tensor.dtype], shape, values.clone() if copied and tensor.kind in _HELD_BY_SCRIPTS
                   else values)
        rows.append((key, part))
    return writer, rows


def _is_row_major(tensor):
    run = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride)):
        if size != 1 and stride != run:
            return False
        run *= size
    return True


def table_of(parts, rows, writer):
    """What a rank's file has, as JSON: (bytes, checksum of the header, [row]) with rows of kind, name, place, dtype,
    shape, stride, group, offset, first element, elements, checksums."""
    at = {key: (offset, crcs) for key, offset, _, crcs in writer.pieces()}
    table = []
    for key, part in rows:
        offset, crcs = at[key]
        table.append([*_described(part.tensor), offset, part.first, part.n, crcs])
    # A tensor without elements is in no file, only in the table.
    table += [[*_described(part.tensor), 0, 0, 0, []] for part in parts if part.tensor.numel == 0]
    return writer.n_bytes, writer.header_crc, table


def _described(tensor):
    return (tensor.kind, tensor.name, tensor.place, DTYPES[tensor.dtype], tensor.shape, tensor.stride, tensor.group)


def manifest_of(tables, sections, objects):
    """The Manifest of all ranks' tables, by rank. sections: {name: value for JSON}. objects: the bytes of objects.pt,
    none where there is no such file."""
    manifest, pieces, known = _core.Manifest(), {}, {}
    for name, value in sections.items():
        manifest.set(name, json.dumps(value))
    for rank, (n_bytes, crc, table) in enumerate(tables):
        file = manifest.add_file(file_of(rank), n_bytes, crc)
        for kind, name, place, dtype, shape, stride, group, offset, begin, n, crcs in table:
            key = kind, name, tuple(place)
            described = dtype, tuple(shape), tuple(stride), group
            if known.setdefault(key, described) != described:
                raise _core.CheckpointError(f"{kind} {name} is {described} on rank {rank} and {known[key]} on another")
            pieces.setdefault(key, [])
            if n:
                pieces[key].append((file, offset, begin, n, crcs))
    for key, described in known.items():
        manifest.add_tensor(*key, *described, sorted(pieces[key], key=lambda piece: piece[2]))
    if objects:
        manifest.add_file(OBJECTS, len(objects), _core.crc32c(objects))
    return manifest


class NativeSource:
    """A checkpoint's folder to load from; see restore.py for what a source is. CheckpointError, OSError."""

    def __init__(self, folder):
        self.folder = folder
        path = os.path.join(folder, MANIFEST)
        with open(path, "rb") as file:
            self.manifest = _core.Manifest.parse(file.read(), path)
        self.tensors = {}
        for kind, name, place, dtype, shape, stride, group in self.manifest.tensors():
            tensor = Tensor(kind, name, tuple(place), _TORCHS[dtype], tuple(shape), tuple(stride), group)
            self.tensors[tensor.key] = tensor
        self.sections = _Sections(self.manifest)
        self._reader = self.manifest.open(folder)
        self.read, self.check, self.verify = self._reader.read, self._reader.check, self._reader.verify
        self._objects = None

    def file_names(self):
        """Of all files but the manifest."""
        return [name for name, *_ in self.manifest.files()]

    def object(self, number):
        """What is neither JSON nor a tensor, loaded as weights_only allows."""
        if self._objects is None:
            path = os.path.join(self.folder, OBJECTS)
            with open(path, "rb") as file:
                data = file.read()
            known = {name: (n_bytes, crc) for name, n_bytes, crc, _ in self.manifest.files()}
            if known.get(OBJECTS) != (len(data), _core.crc32c(data)):
                raise _core.CheckpointError(f"{path}: damaged: its {len(data)} bytes are not those that were written")
            try:
                self._objects = torch.load(io.BytesIO(data), weights_only=True)
            except pickle.UnpicklingError as error:
                found = re.search(r"(?:GLOBAL|class) (\S+)", str(error))
                raise _core.CheckpointError(
                    f"{path}: a value of client_state, or of the schedule, is of {found[1] if found else 'a class'}, "
                    "which loading without executing code does not allow; torch.serialization.add_safe_globals() takes "
                    "classes that are to be allowed") from error
        return self._objects[number]

    def verify(self, progress=None):
        """CheckpointError where any byte of any file is not as it was written. progress(bytes so far) is called now and
        then."""
        self._reader.verify(progress)

    def load_path(self, engine):
        """What load_checkpoint returns as the path."""
        return self.folder

    def path_of(self, kind, name, place):
        """The manifest's path: the reader's own errors name files."""
        return os.path.join(self.folder, MANIFEST)


class _Sections:
    """The manifest's sections, each parsed when it is asked for."""

    def __init__(self, manifest):
        self._manifest, self._known = manifest, {}

    def get(self, name, default=None):
        """A section's value."""
        if name not in self._known:
            text = self._manifest.section(name)
            self._known[name] = default if text is None else json.loads(text)
        return self._known[name]
