"""The device that this process trains on: `get_accelerator()` is its one object.

`DS_ACCELERATOR=cpu` or `cuda` decides; otherwise CUDA where torch sees a GPU. Neither the import nor the choice opens
a CUDA context, so that a process may fork afterwards.
"""
import os

from deepspeed_c import _paths
from deepspeed_c.accelerator.interface import DeepSpeedAccelerator

__all__ = ["DeepSpeedAccelerator", "get_accelerator", "is_current_accelerator_supported", "set_accelerator"]

_NAMES = ("cpu", "cuda")
_current = None

__getattr__, __dir__ = _paths.attributes(__name__)


def get_accelerator():
    """The accelerator, chosen at the first call. ValueError or RuntimeError says why DS_ACCELERATOR cannot be had."""
    global _current
    if _current is None:
        _current = _choose()
    return _current


def set_accelerator(accel_obj):
    """Uses this accelerator from now on; TypeError unless it is a DeepSpeedAccelerator."""
    global _current
    if not isinstance(accel_obj, DeepSpeedAccelerator):
        raise TypeError(f"set_accelerator needs a DeepSpeedAccelerator, got {type(accel_obj).__name__}")
    _current = accel_obj


def is_current_accelerator_supported():
    """Whether the accelerator is one of this package's."""
    return get_accelerator()._name in _NAMES


def _choose():
    name = os.environ.get("DS_ACCELERATOR", "")
    if name not in ("", *_NAMES):
        raise ValueError(f"DS_ACCELERATOR={name!r} is not one of {', '.join(map(repr, _NAMES))}")
    import torch
    n_gpus = torch.cuda.device_count() if name != "cpu" else 0  # through NVML: no context
    if name == "cuda" and n_gpus == 0:
        raise RuntimeError("DS_ACCELERATOR=cuda, but torch sees no GPU"
                           + ("" if torch.backends.cuda.is_built() else ": this torch is built without CUDA"))
    if n_gpus:
        from deepspeed_c.accelerator.cuda import CUDA_Accelerator
        return CUDA_Accelerator()
    from deepspeed_c.accelerator.cpu import CPU_Accelerator
    return CPU_Accelerator()
