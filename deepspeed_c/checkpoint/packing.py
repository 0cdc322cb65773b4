"""Python values as JSON: what a checkpoint says beside its large tensors.

What JSON has stands as it is. Everything else is an object with the key "$", which says how to read it: tuples, dicts
with other keys, sets, argparse's namespaces, numbers that are not finite or too long, bytes, texts that UTF-8 has not
or with a zero in them, numpy's numbers. Tensors and arrays go to a list beside, other objects to another one, and the
JSON has their numbers. Invariant: unpack(pack(x)) equals x, types included, and no text from a file makes anything but
values.
"""
import argparse
import base64
import importlib
import math
from collections import OrderedDict

import torch

_SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset}
_ANY_TEXT = "utf-8", "surrogatepass"
_MOST = 2**53  # integers up to here are the same in every reader of JSON
_SCALARS = {torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16,
            torch.int8, torch.uint8, torch.bool}
_STORED = {*_SCALARS, torch.complex64}


def pack(value, tensors, objects):
    """value as what json.dumps takes. tensors: dict that gets {name: CPU tensor, contiguous}; objects: list that gets
    what is neither JSON nor a tensor. RecursionError where value holds itself."""
    return _Packer(tensors, objects).pack(value)


class _Packer:
    def __init__(self, tensors, objects):
        self.tensors, self.objects = tensors, objects

    def pack(self, value):
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return value if _is_plain(value) else {"$": "text", "value": _base64(value.encode(*_ANY_TEXT))}
        if kind is int:
            return value if -_MOST <= value <= _MOST else {"$": "int", "value": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$": "float", "value": str(value)}
        if kind is list:
            return [self.pack(item) for item in value]
        if kind is dict and all(type(key) is str and _is_plain(key) for key in value) and "$" not in value:
            return {key: self.pack(item) for key, item in value.items()}
        return self._tagged(kind, value)

    def _tagged(self, kind, value):
        if kind in _SEQUENCES.values():
            return {"$": kind.__name__, "value": [self.pack(item) for item in value]}
        if kind is argparse.Namespace:
            return {"$": "namespace", "value": self.pack(dict(vars(value)))}
        if kind in (dict, OrderedDict):
            rows = [[self.pack(key), self.pack(item)] for key, item in value.items()]
            return {"$": "dict" if kind is dict else "ordered", "value": rows}
        if kind is bytes:
            return {"$": "bytes", "value": _base64(value)}
        if kind is torch.dtype:
            return {"$": "dtype", "value": _name(value)}
        if kind in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided and value.dtype in _STORED:
            return self._tensor(value.detach(), "tensor")
        if kind.__module__ == "numpy":
            return self._numpy(value)
        self.objects.append(value)
        return {"$": "object", "value": len(self.objects) - 1}

    def _tensor(self, value, tag):
        if value.dim() == 0 and value.dtype in _SCALARS:
            number = self.pack(value.item())
            return {"$": tag, "dtype": _name(value.dtype), "value": number}
        name = str(len(self.tensors))
        self.tensors[name] = value.to("cpu", copy=True).contiguous()
        return {"$": tag, "dtype": _name(value.dtype), "tensor": name}

    def _numpy(self, value):
        """Arrays, and numbers by their bytes."""
        numpy = importlib.import_module("numpy")
        if isinstance(value, numpy.generic) and value.dtype.kind in "biufc":
            return {"$": "number", "dtype": value.dtype.str, "value": _base64(value.tobytes())}
        if type(value) is numpy.ndarray and value.dtype.kind in "biufc":
            name = str(len(self.tensors))
            self.tensors[name] = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) \
                if value.size else torch.zeros(0, dtype=torch.uint8)
            return {"$": "array", "dtype": value.dtype.str, "shape": list(value.shape), "tensor": name}
        self.objects.append(value)
        return {"$": "object", "value": len(self.objects) - 1}


def unpack(packed, tensor, object_):
    """What pack() took. tensor(name) gives a stored tensor, object_(number) an object. ValueError for anything that
    pack() does not write."""
    if isinstance(packed, list):
        return [unpack(item, tensor, object_) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "$" not in packed:
        return {key: unpack(item, tensor, object_) for key, item in packed.items()}
    try:
        return _untag(packed, tensor, object_)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a value is marked as {packed['$']!r} and is not one ({error})") from None


def _untag(packed, tensor, object_):
    tag, value = packed["$"], packed.get("value")
    if tag == "int":
        return int(value, 16)
    if tag == "float":
        return float(value)
    if tag == "bytes":
        return base64.b64decode(value)
    if tag == "text":
        return base64.b64decode(value).decode(*_ANY_TEXT)
    if tag == "dtype":
        return _dtype(value)
    if tag == "object":
        return object_(value)
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](unpack(item, tensor, object_) for item in value)
    if tag == "namespace":
        return argparse.Namespace(**unpack(value, tensor, object_))
    if tag in ("dict", "ordered"):
        rows = [(unpack(key, tensor, object_), unpack(item, tensor, object_)) for key, item in value]
        return dict(rows) if tag == "dict" else OrderedDict(rows)
    if tag == "tensor":
        if "tensor" in packed:
            return tensor(packed["tensor"])
        return torch.tensor(unpack(value, tensor, object_), dtype=_dtype(packed["dtype"]))
    if tag in ("number", "array"):
        return _unpack_numpy(packed, tensor)
    raise ValueError(f"a value is marked as {tag!r}, which this version does not know")


def _unpack_numpy(packed, tensor):
    numpy = importlib.import_module("numpy")
    dtype = numpy.dtype(packed["dtype"])
    if dtype.kind not in "biufc":
        raise ValueError(f"an array of {dtype} is none that a checkpoint has")
    if packed["$"] == "number":
        return numpy.frombuffer(base64.b64decode(packed["value"]), dtype)[0]
    return numpy.frombuffer(tensor(packed["tensor"]).numpy().tobytes(), dtype).reshape(packed["shape"]).copy()


def _is_plain(text):
    """Whether every reader of JSON takes a text: without zeros and halves of characters."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _base64(data):
    return base64.b64encode(data).decode()


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _dtype(name):
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch")
    return found
