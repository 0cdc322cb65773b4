"""Tensors in a form that a file should hold."""
import copy

import torch


def clone_tensors_for_torch_save(item, device=None):
    """`item` with every tensor in it copied into memory of its own, on `device` (None: the CPU).

    torch.save writes the whole storage behind a tensor; a part of a larger one would be written as large as that.
    Tensors that are the same memory (tied weights) stay so. item: a tensor, or nested lists, tuples and dicts of
    tensors; anything else is handed on as it is.
    """
    device = torch.device("cpu" if device is None else device)
    copies = {}

    def clone(value):
        if isinstance(value, torch.Tensor):
            at = value.data_ptr() if value.layout == torch.strided else 0  # 0: shared with nobody
            key = (at, value.dtype, value.shape, value.stride()) if at else id(value)
            if key not in copies:
                copies[key] = value.detach().to(device, copy=True)
            return copies[key]
        if isinstance(value, dict):
            clones = copy.copy(value)  # keeps what a subclass has beside its items
            clones.update((key, clone(inner)) for key, inner in value.items())
            return clones
        if isinstance(value, (list, tuple)):
            inner = [clone(each) for each in value]
            return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
        return value

    return clone(item)
