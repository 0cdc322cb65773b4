"""What every accelerator has: DeepSpeed's documented members over torch's device modules.

Invariant: a member that does not depend on the device is written here, once; what does is in cpu.py or cuda.py. Index
arguments are int or None (the current device), sizes are bytes.
"""
import abc

import torch

_BUILDERS = "op builders are not there: the C core is compiled when the package is installed, nothing at run time"


class DeepSpeedAccelerator(abc.ABC):
    """A kind of device. `_name` is torch's device type, `_communication_backend_name` torch.distributed's back end."""

    _name = None
    _communication_backend_name = None
    # Whether operations end before their call returns; four documented questions have this answer.
    _synchronous = False
    _environ_prefixes = ()

    def __init__(self):
        self._compile_backend = "inductor"

    # ---- what kind of device ----

    def is_synchronized_device(self):
        return self._synchronous

    def use_host_timers(self):
        return self._synchronous

    def resolves_data_dependency(self):
        return self._synchronous

    def handles_memory_backpressure(self):
        return self._synchronous

    def communication_backend_name(self):
        return self._communication_backend_name

    def is_fp64_supported(self):
        return True

    @abc.abstractmethod
    def is_bf16_supported(self):
        """Whether torch computes in bfloat16 here."""

    @abc.abstractmethod
    def is_fp16_supported(self):
        """Whether torch computes in float16 here."""

    def supported_dtypes(self):
        """The types that a model may train in."""
        return [torch.float32, *([torch.float16] if self.is_fp16_supported() else []),
                *([torch.bfloat16] if self.is_bf16_supported() else [])]

    def is_triton_supported(self):
        return False

    def prefer_triton_grouped_mm(self):
        return False

    @abc.abstractmethod
    def is_available(self):
        """Whether there is such a device."""

    # ---- which device ----

    @abc.abstractmethod
    def device_name(self, device_index=None):
        """What torch.device takes: 'cpu', 'cuda', 'cuda:0'."""

    @abc.abstractmethod
    def device(self, device_index=None):
        """A context in which the device is the current one."""

    @abc.abstractmethod
    def set_device(self, device_index):
        """Makes it the current device of this process."""

    @abc.abstractmethod
    def current_device(self):
        """Its index."""

    @abc.abstractmethod
    def current_device_name(self):
        """device_name of the current device."""

    @abc.abstractmethod
    def device_count(self):
        """Devices that ranks of this node use."""

    @abc.abstractmethod
    def synchronize(self, device_index=None):
        """Waits for what was started on the device."""

    def on_accelerator(self, tensor):
        """Whether the tensor lies on such a device."""
        return tensor.device.type == self._name

    # ---- random numbers ----

    def random(self):
        return torch.random

    def manual_seed(self, seed):
        return self._torch.manual_seed(seed)

    @property
    def _torch(self):
        """torch's module for the device."""
        return getattr(torch, self._name)

    # ---- memory, under its older names ----

    def memory_cached(self, device_index=None):
        return self.memory_reserved(device_index)

    def max_memory_cached(self, device_index=None):
        return self.max_memory_reserved(device_index)

    def reset_max_memory_allocated(self, device_index=None):
        self.reset_peak_memory_stats(device_index)

    def reset_max_memory_cached(self, device_index=None):
        self.reset_peak_memory_stats(device_index)

    # ---- pinned memory ----

    def pin_memory_alignment(self):
        """Elements to which pinned buffers are rounded."""
        return 1

    def pin_empty_like(self, tensor, device="cpu", dtype=None):
        return self.pin_empty(*tensor.shape, dtype=dtype or tensor.dtype, device=device)

    # ---- compilers and builders ----

    def op_builder_dir(self):
        raise NotImplementedError(_BUILDERS)

    def create_op_builder(self, class_name):
        raise NotImplementedError(f"{class_name}: {_BUILDERS}")

    def get_op_builder(self, class_name):
        raise NotImplementedError(f"{class_name}: {_BUILDERS}")

    def build_extension(self):
        raise NotImplementedError(_BUILDERS)

    def get_compile_backend(self):
        return self._compile_backend

    def set_compile_backend(self, backend):
        """The back end that torch.compile is to use; ValueError names those that there are."""
        supported = torch.compiler.list_backends(exclude_tags=())
        if backend not in supported:
            raise ValueError(f"{backend} not supported by {self.device_name()}. Supported Backends are {supported}")
        self._compile_backend = backend

    # ---- environment ----

    def export_envs(self):
        """Prefixes of environment variables that other nodes need."""
        return list(self._environ_prefixes)

    def visible_devices_envs(self):
        return ["CUDA_VISIBLE_DEVICES"]

    def set_visible_devices_envs(self, current_env, local_accelerator_ids):
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))
