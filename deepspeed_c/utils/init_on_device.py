"""OnDevice: modules built without memory, or straight on the device and in the dtype that they will have."""
import torch


class OnDevice:
    """A context in which new tensors are made on `device` and new floating ones in `dtype`, unless told otherwise.

        with OnDevice(dtype=torch.bfloat16, device="meta"):
            model = build()          # shapes and dtypes, no memory

    dtype: a floating torch.dtype, or None for torch's default. With enabled=False nothing changes. It can be entered
    again.
    """

    def __init__(self, dtype, device="meta", enabled=True):
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"OnDevice: dtype is {dtype!r}; allowed: a floating torch.dtype, or None")
        self.dtype = dtype
        self.device = device
        self.enabled = enabled
        self._entered = []

    def __enter__(self):
        if self.enabled:
            context, dtype = torch.device(self.device), torch.get_default_dtype()
            if self.dtype is not None:
                torch.set_default_dtype(self.dtype)  # TypeError for one that torch cannot have as its default
            context.__enter__()
            self._entered.append((context, dtype))
        return self

    def __exit__(self, *exception):
        if self.enabled:
            context, dtype = self._entered.pop()
            torch.set_default_dtype(dtype)
            context.__exit__(*exception)
