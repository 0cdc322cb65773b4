"""A checkpoint's weights as one state dict, of either format, and files of them for any other program.

Decides which stored tensor is a parameter's value (its fp32 master where there is one) and how weights are cut into
files. Invariant: no more is in memory than one chunk of a safetensors file or one file of torch's, and a file under its
final name is whole.
"""
import json
import os
import re
import struct
from collections import OrderedDict

import torch

from .._core import CheckpointError
from ..aside import made_aside
from .contents import row_major, same_order

_CHUNK = 1 << 22  # elements
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20,
          "GIB": 2**30, "TIB": 2**40}
_SAFE = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


class StoredWeight:
    """A weight that is read when it is asked for. Attributes: name, shape (torch.Size), dtype (what it is read as)."""

    def __init__(self, source, tensor, dtype):
        self._source, self._tensor = source, tensor
        self.name, self.shape = tensor.name, torch.Size(tensor.shape)
        self.dtype = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype

    def numel(self):
        """Elements."""
        return self.shape.numel()

    @property
    def nbytes(self):
        """Bytes."""
        return self.numel() * self.dtype.itemsize

    def contiguous(self):
        """The weight as a tensor on the CPU, checked against the checkpoint's checksums. CheckpointError, OSError."""
        stored = torch.empty(self.numel(), dtype=self._tensor.dtype)
        if len(stored):
            self._source.read(*self._tensor.key, 0, len(stored), stored)
        return stored.as_strided(self.shape, self._tensor.stride).contiguous().to(self.dtype)

    def chunks(self):
        """The same in parts, one dimension each."""
        if not same_order(self.shape, self._tensor.stride, row_major(self.shape)):
            yield self.contiguous().view(-1)
            return
        for begin in range(0, self.numel(), _CHUNK):
            values = torch.empty(min(_CHUNK, self.numel() - begin), dtype=self._tensor.dtype)
            self._source.read(*self._tensor.key, begin, len(values), values)
            yield values.to(self.dtype)


def weights_of(source, dtype=torch.float32, exclude_frozen=False):
    """OrderedDict {name: StoredWeight} of a source's parameters and buffers; names of a tied parameter have the same.

    dtype: of what is floating; None as it is stored. NotImplementedError where tensor- or pipeline-parallel ranks have
    parts of the model.
    """
    places = {place for kind, _, place in source.tensors if kind in ("model", "master", "buffer")}
    if len(places) > 1:
        raise NotImplementedError(f"{source.folder} is of {len(places)} tensor- or pipeline-parallel parts: joining "
                                  "them is not yet")
    found, tensors = OrderedDict(), source.tensors
    trained = any(tensor.group >= 0 for tensor in tensors.values())
    for kind in ("buffer", "model", "master"):
        for (of, name, place), tensor in tensors.items():
            own = tensors.get(("model", name, place))
            frozen = kind == "model" and trained and tensor.group < 0 and tensor.numel
            needless = kind == "master" and (own is None or dtype in (None, own.dtype))  # none: nobody knows its name
            if of == kind and not (exclude_frozen and frozen) and not needless:
                found[name] = StoredWeight(source, tensor, dtype)
    for name, kept in (source.sections.get("tied") or {}).items():
        if kept in found:
            found[name] = found[kept]
    if not found:
        raise CheckpointError(f"{source.folder} has no weights")
    return found


def size_of(text):
    """Bytes of "5GB", "500MB", 1000; None stays. ValueError."""
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise ValueError(f"max_shard_size is {text!r}; allowed: a number with one of {', '.join(filter(None, _UNITS))}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def cut(weights, limit):
    """[[name]]: which weights go to which file, in order. limit: bytes of a file (a larger weight is one alone), None:
    all in one. Names of one weight stay together."""
    found, size, where = [[]], 0, {}
    for name, weight in weights.items():
        if id(weight) in where:
            found[where[id(weight)]].append(name)
            continue
        if found[-1] and limit is not None and size + weight.nbytes > limit:
            found.append([])
            size = 0
        found[-1].append(name)
        where[id(weight)] = len(found) - 1
        size += weight.nbytes
    return found


def export(weights, folder, safetensors, limit):
    """Writes weights into `folder`: model.safetensors or pytorch_model.bin, or several and an index. Returns the names.

    limit: bytes of a file, or None. OSError; NotImplementedError for a dtype that safetensors has not.
    """
    os.makedirs(folder, exist_ok=True)
    whole_name = "model.safetensors" if safetensors else "pytorch_model.bin"
    stem, dot, ending = whole_name.partition(".")
    parts = cut(weights, limit)
    names = [whole_name] if len(parts) == 1 else [
        f"{stem}-{i + 1:05d}-of-{len(parts):05d}{dot}{ending}" for i in range(len(parts))]
    for name, part in zip(names, parts):
        chosen = OrderedDict((each, weights[each]) for each in part)
        with made_aside(os.path.join(folder, name)) as path:
            (_write_safetensors if safetensors else _write_torch)(chosen, path)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(weights[each].nbytes for part in parts for each in part)},
                 "weight_map": {each: name for name, part in zip(names, parts) for each in part}}
        with made_aside(os.path.join(folder, f"{whole_name}.index.json")) as path, open(path, "w") as file:
            json.dump(index, file, indent=2)
        names.append(f"{whole_name}.index.json")
    return names


def _write_torch(weights, path):
    tensors = {}
    for weight in weights.values():
        if id(weight) not in tensors:
            tensors[id(weight)] = weight.contiguous()
    torch.save(OrderedDict((name, tensors[id(weight)]) for name, weight in weights.items()), path)


def _write_safetensors(weights, path):
    """Larger dtypes first, so that every tensor is aligned to its own; each name has its data."""
    order = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        weight = weights[name]
        if weight.dtype not in _SAFE:
            raise NotImplementedError(f"{name} is {weight.dtype}: not yet in a safetensors file")
        header[name] = {"dtype": _SAFE[weight.dtype], "shape": list(weight.shape),
                        "data_offsets": [at, at + weight.nbytes]}
        at += weight.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for values in weights[name].chunks():
                file.write(values.contiguous().view(torch.uint8).numpy())
