"""Files as DeepSpeed names and pickles them: read without running a pickle, written without importing DeepSpeed.

Decides which classes of DeepSpeed's a file may name. Invariant: reading makes tensors, plain values and the four
classes below, nothing else; what is written under their names is what DeepSpeed's own classes of these names take.
"""
import os
import pickle
import re
import struct
import types
import zipfile
import zlib
from enum import IntEnum
from typing import NamedTuple

import torch

from .._core import CheckpointError

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<place>\d{2,})_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?P<bf16>bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<place>\d{2,})_optim_states\.pt")
EXPERT_FILE = re.compile(r"layer_(?P<layer>\d+)_expert_(?P<expert>\d+)_mp_rank_(?P<place>\d{2,})_model_states\.pt")
_HEADER, _LENGTHS = struct.Struct("<4s5H3I2H"), 4  # before a record; the last two: lengths of name and extra bytes
_DESCRIBED = 8  # flag: after the record its sum stands again, with a mark
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
EXPERT_OPTIMIZER_FILE = re.compile(r"expp_rank_(?P<rank>\d+)_mp_rank_(?P<place>\d{2,})_optim_states\.pt")


def model_file(place, rank=None):
    """Name of the file with the module's values; rank: data-parallel rank at stage 3, else None."""
    return f"{'' if rank is None else f'zero_pp_rank_{rank}_'}mp_rank_{place:02d}_model_states.pt"


def optimizer_file(place, rank, bf16):
    """Name of a rank's file with its part of masters and states."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_{place:02d}_optim_states.pt"


def expert_file(place, layer, expert):
    """Name of the file of one expert; layer: number of the layer among those that have experts."""
    return f"layer_{layer}_expert_{expert}_mp_rank_{place:02d}_model_states.pt"


def expert_optimizer_file(place, rank):
    """Name of the file with what the optimizer has at stage 0 where there are experts; rank: among those that share the
    experts out."""
    return f"expp_rank_{rank}_mp_rank_{place:02d}_optim_states.pt"


class ZeroStageEnum(IntEnum):
    """A ZeRO stage."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


class _Plain:
    """A class that is its attributes."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"


class LossScaler(_Plain):
    """A static scale: cur_scale, dynamic."""


class DynamicLossScaler(_Plain):
    """A dynamic scale; attributes as in runtime.fp16.loss_scaler."""


class fragment_address(_Plain):  # noqa: N801 - the name in the files
    """Where a rank keeps its part of a parameter: numel, start."""


# The names under which DeepSpeed's files know these.
_HOMES = {"runtime.zero.config": (ZeroStageEnum,), "runtime.fp16.loss_scaler": (LossScaler, DynamicLossScaler),
          "utils.tensor_fragment": (fragment_address,)}
for _home, _classes in _HOMES.items():
    for _class in _classes:
        _class.__module__ = f"deepspeed.{_home}"
_CLASSES = tuple(_class for _classes in _HOMES.values() for _class in _classes)


def load(path):
    """What torch.save wrote to `path`: tensors on the CPU, over the file itself, read as they are touched.

    CheckpointError for a file that is damaged or holds other classes than weights_only loading and the four above
    allow; OSError where it cannot be opened.
    """
    try:
        with torch.serialization.safe_globals(list(_CLASSES)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_first_line(error)}; allowed: tensors, plain values, and what "
                              "torch.serialization.add_safe_globals() names") from None
    except OSError:
        raise
    except Exception as error:  # a damaged file may end in any
        raise CheckpointError(f"{path} is no whole file of torch.save: {_first_line(error)}") from None


def _first_line(error):
    """What an error of torch says; of a class that is not allowed, which one."""
    text = str(error)
    named = re.search(r"Unsupported (?:global|class)[^.]*?GLOBAL ([\w.]+)", text) or re.search(r"GLOBAL ([\w.]+)", text)
    return f"it holds {named[1]}, which is not read" if named else text.strip().split("\n")[0]


class Checksums:
    """The sums of a file of torch.save, that its directory keeps of each of its records: one per tensor's storage.

    CheckpointError where anything else in the file is not as it was written, or a record is not where it should be.
    """

    def __init__(self, path):
        self.path = path
        self._checked = set()
        with open(path, "rb") as file:
            try:
                self._known = _sums_of(zipfile.ZipFile(file), file)
            except (*_BROKEN_ZIP, OSError) as error:  # a place outside the file is an OSError
                raise CheckpointError(f"{path} is damaged, or no zip file of torch.save: {error}") from None

    def check(self, tensor, name):
        """CheckpointError unless the storage behind a tensor is one of the file's, as it was written."""
        storage = tensor.untyped_storage()
        where = storage.data_ptr(), storage.nbytes()
        if storage.nbytes() == 0 or where in self._checked:
            return
        bytes_ = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        if (storage.nbytes(), zlib.crc32(bytes_)) not in self._known:
            raise CheckpointError(f"{self.path}: {name} is damaged: its checksum is not the one that the file gives")
        self._checked.add(where)


def _sums_of(archive, file):
    """{(bytes, sum)} of the records of tensors; the others are read. BadZipFile for a record that is elsewhere."""
    found = set()
    for info in archive.infolist():
        with archive.open(info) as record:  # which compares its name
            if "/data/" not in info.filename:
                record.read()
                continue
        found.add((info.file_size, info.CRC))
        file.seek(info.header_offset + _HEADER.size - _LENGTHS)
        lengths = sum(struct.unpack("<HH", file.read(_LENGTHS)))
        file.seek(info.header_offset + _HEADER.size + lengths + info.compress_size)
        if info.flag_bits & _DESCRIBED and file.read(4) != b"PK\x07\x08":
            raise zipfile.BadZipFile(f"record {info.filename} does not end where it should")
    return found


def verify(path):
    """CheckpointError where a record of a file of torch.save is not as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except _BROKEN_ZIP as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if damaged is not None:
        raise CheckpointError(f"{path}: record {damaged} is damaged: its checksum is not the one that the file gives")


class File:
    """One file of torch.save in a folder, read when it is first asked for. value: a dict."""

    def __init__(self, folder, name):
        self.path = os.path.join(folder, name)
        self._value = self._sums = None

    @property
    def value(self):
        if self._value is None:
            self._sums = Checksums(self.path)
            self._value = load(self.path)
            if not isinstance(self._value, dict):
                raise CheckpointError(f"{self.path} holds a {type(self._value).__name__}, not a checkpoint")
        return self._value

    def get(self, *keys):
        """What stands under the first key, in that under the next, and so on; CheckpointError where one is missing."""
        value = self.value
        for i, key in enumerate(keys):
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                raise CheckpointError(f"{self.path}: {'.'.join(map(str, keys[:i + 1]))} is missing") from None
        return value

    def check(self, values, name):
        """CheckpointError unless the storage behind these values is as it was written."""
        self._sums.check(values, name)


class Piece(NamedTuple):
    """Elements of a tensor, from number `begin` on. values: one dimension. file: where they lie. origin: what they were
    copied from, if they were. checked: compared with the file's checksum already."""

    begin: int
    values: torch.Tensor
    file: File
    origin: torch.Tensor = None
    checked: bool = False

    def check(self, name):
        """CheckpointError unless these elements are as they were written."""
        if not self.checked:
            self.file.check(self.values if self.origin is None else self.origin, name)


class _Pickler(pickle._Pickler):
    """Writes the classes above by name without looking for their modules."""

    def save_global(self, obj, name=None):
        if obj in _CLASSES:
            self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__qualname__}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    def reducer_override(self, obj):
        """A stage is its number; the others go by their attributes."""
        return (ZeroStageEnum, (int(obj),)) if type(obj) is ZeroStageEnum else NotImplemented


# What torch.save asks of a pickle module.
_PICKLE = types.SimpleNamespace(Pickler=_Pickler, __name__="pickle")


def dump(value, path):
    """torch.save(value, path), through to the disk. OSError where the file cannot be written."""
    with open(path, "wb") as file:
        torch.save(value, file, pickle_module=_PICKLE)
        file.flush()
        os.fsync(file.fileno())
