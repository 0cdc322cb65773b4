"""The CPU as an accelerator: one device, in step with its caller, memory by the kernel's counters.

Streams, events and pinning have no meaning here and do nothing, as callers that are written for both kinds expect;
what would have to hand back a result that it cannot compute (graphs) raises.
"""
import contextlib
import os
import re

import torch

from deepspeed_c.accelerator.interface import DeepSpeedAccelerator


class CPU_Accelerator(DeepSpeedAccelerator):
    """`LOCAL_RANK` is the current device's index, `LOCAL_SIZE` the number of devices; there is one device name."""

    _name = "cpu"
    _communication_backend_name = "gloo"
    _synchronous = True
    Stream = None
    Event = None

    def is_bf16_supported(self):
        return True

    def is_fp16_supported(self):
        return True

    def is_available(self):
        return True

    def device_name(self, device_index=None):
        return "cpu"

    def device(self, device_index=None):
        return contextlib.nullcontext()

    def set_device(self, device_index):
        """Nothing: ranks are placed by the launcher."""

    def current_device(self):
        return int(os.environ.get("LOCAL_RANK", 0))

    def current_device_name(self):
        return "cpu"

    def device_count(self):
        return max(1, int(os.environ.get("LOCAL_SIZE", 1)))

    def synchronize(self, device_index=None):
        """Nothing: operations have ended when their call returns."""

    # ---- random numbers: torch's default generator ----

    def set_rng_state(self, new_state, device_index=None):
        torch.set_rng_state(new_state)

    def get_rng_state(self, device_index=None):
        return torch.get_rng_state()

    def manual_seed(self, seed):
        return torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        return torch.manual_seed(seed)

    def initial_seed(self):
        return torch.initial_seed()

    def default_generator(self, device_index):
        return torch.default_generator

    # ---- streams and graphs ----

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self, device_index=None):
        return None

    def default_stream(self, device_index=None):
        return None

    def is_current_stream_capturing(self):
        return False

    def create_graph(self):
        return None

    def capture_to_graph(self, graph, pool=None, stream=None):
        raise RuntimeError("a CPU has no graphs to capture to: create_graph() returned None")

    def replay_graph(self, graph):
        raise RuntimeError("a CPU has no graphs to replay: create_graph() returned None")

    # ---- memory: this process's resident pages ----

    def empty_cache(self):
        """Nothing: torch keeps no cache of CPU memory."""

    def memory_allocated(self, device_index=None):
        return _kilobytes("/proc/self/status", "VmRSS")

    def max_memory_allocated(self, device_index=None):
        """The peak since the process began or since reset_peak_memory_stats."""
        return _kilobytes("/proc/self/status", "VmHWM")

    def reset_peak_memory_stats(self, device_index=None):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): resets the peak resident set size

    def memory_reserved(self, device_index=None):
        return self.memory_allocated()

    def max_memory_reserved(self, device_index=None):
        return self.max_memory_allocated()

    def memory_stats(self, device_index=None):
        return {"allocated_bytes.all.current": self.memory_allocated(),
                "allocated_bytes.all.peak": self.max_memory_allocated()}

    def total_memory(self, device_index=None):
        return _kilobytes("/proc/meminfo", "MemTotal")

    def available_memory(self, device_index=None):
        return _kilobytes("/proc/meminfo", "MemAvailable")

    # ---- pinned memory: all memory is the device's own ----

    def register_host_memory(self, address, num_bytes):
        """Nothing to register with."""

    def unregister_host_memory(self, address):
        """Nothing to undo."""

    def pin_memory(self, tensor, make_copy=True, match_shape=True):
        return tensor

    def pin_empty(self, *size, dtype, device="cpu"):
        return torch.empty(*size, dtype=dtype, device=device)

    def unpin_memory(self, tensor):
        return tensor

    def is_pinned(self, tensor):
        return tensor.is_pinned()

    # ---- the rest ----

    def range_push(self, msg, domain=None, category=None):
        """Nothing: there is no profiler to mark ranges in."""

    def range_pop(self, domain=None):
        """Nothing."""

    def lazy_call(self, callback):
        return callback()

    BFloat16Tensor = property(lambda self: torch.BFloat16Tensor)
    ByteTensor = property(lambda self: torch.ByteTensor)
    DoubleTensor = property(lambda self: torch.DoubleTensor)
    FloatTensor = property(lambda self: torch.FloatTensor)
    HalfTensor = property(lambda self: torch.HalfTensor)
    IntTensor = property(lambda self: torch.IntTensor)
    LongTensor = property(lambda self: torch.LongTensor)


def _kilobytes(path, field):
    """A "Field:  123 kB" line of a /proc file, in bytes."""
    with open(path) as file:
        match = re.search(rf"^{field}:\s*(\d+) kB$", file.read(), re.MULTILINE)
    if not match:
        raise RuntimeError(f"{path} of this kernel has no {field}")
    return int(match[1]) * 1024
