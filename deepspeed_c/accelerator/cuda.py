"""CUDA devices as an accelerator: torch.cuda under DeepSpeed's names. Imported only where there is a GPU."""
import torch

from deepspeed_c.accelerator.interface import DeepSpeedAccelerator


class CUDA_Accelerator(DeepSpeedAccelerator):
    """Streams, memory counters and random numbers are torch.cuda's own."""

    _name = "cuda"
    _communication_backend_name = "nccl"
    _environ_prefixes = ("NCCL",)

    def is_bf16_supported(self):
        return torch.cuda.is_bf16_supported()

    def is_fp16_supported(self):
        return torch.cuda.get_device_capability()[0] >= 6

    def is_triton_supported(self):
        return torch.cuda.get_device_capability()[0] >= 7

    def is_available(self):
        return torch.cuda.is_available()

    def device_name(self, device_index=None):
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def device(self, device_index=None):
        return torch.cuda.device(device_index)

    def set_device(self, device_index):
        torch.cuda.set_device(device_index)

    def current_device(self):
        return torch.cuda.current_device()

    def current_device_name(self):
        return f"cuda:{torch.cuda.current_device()}"

    def device_count(self):
        return torch.cuda.device_count()

    def synchronize(self, device_index=None):
        torch.cuda.synchronize(device_index)

    # ---- random numbers ----

    def set_rng_state(self, new_state, device_index=None):
        torch.cuda.set_rng_state(new_state, self._index(device_index))

    def get_rng_state(self, device_index=None):
        return torch.cuda.get_rng_state(self._index(device_index))

    def manual_seed_all(self, seed):
        torch.cuda.manual_seed_all(seed)

    def initial_seed(self):
        return torch.cuda.initial_seed()

    def default_generator(self, device_index):
        torch.cuda.init()  # the tuple is empty before
        return torch.cuda.default_generators[device_index]

    @staticmethod
    def _index(device_index):
        return torch.cuda.current_device() if device_index is None else device_index

    # ---- streams and graphs ----

    Stream = property(lambda self: torch.cuda.Stream)
    Event = property(lambda self: torch.cuda.Event)

    def stream(self, stream):
        return torch.cuda.stream(stream)

    def current_stream(self, device_index=None):
        return torch.cuda.current_stream(device_index)

    def default_stream(self, device_index=None):
        return torch.cuda.default_stream(device_index)

    def is_current_stream_capturing(self):
        return torch.cuda.is_current_stream_capturing()

    def create_graph(self):
        return torch.cuda.CUDAGraph()

    def capture_to_graph(self, graph, pool=None, stream=None):
        return torch.cuda.graph(graph, pool=pool, stream=stream)

    def replay_graph(self, graph):
        graph.replay()

    # ---- memory ----

    def empty_cache(self):
        torch.cuda.empty_cache()

    def memory_allocated(self, device_index=None):
        return torch.cuda.memory_allocated(device_index)

    def max_memory_allocated(self, device_index=None):
        return torch.cuda.max_memory_allocated(device_index)

    def reset_peak_memory_stats(self, device_index=None):
        torch.cuda.reset_peak_memory_stats(device_index)

    def memory_reserved(self, device_index=None):
        return torch.cuda.memory_reserved(device_index)

    def max_memory_reserved(self, device_index=None):
        return torch.cuda.max_memory_reserved(device_index)

    def memory_stats(self, device_index=None):
        return torch.cuda.memory_stats(device_index)

    def total_memory(self, device_index=None):
        return torch.cuda.get_device_properties(self._index(device_index)).total_memory

    def available_memory(self, device_index=None):
        """What the driver has free and what torch holds without using it."""
        free = torch.cuda.mem_get_info(self._index(device_index))[0]
        return free + self.memory_reserved(device_index) - self.memory_allocated(device_index)

    # ---- pinned memory ----

    def register_host_memory(self, address, num_bytes):
        """Pins memory in place, until unregister_host_memory(address)."""
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)))

    def unregister_host_memory(self, address):
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))

    def pin_memory(self, tensor, make_copy=True, match_shape=True):
        """A pinned copy, or with make_copy False the tensor itself, pinned where it lies (see unpin_memory)."""
        if make_copy:
            return tensor.pin_memory()
        self.register_host_memory(tensor.data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    def unpin_memory(self, tensor):
        """Undoes pin_memory(make_copy=False)."""
        self.unregister_host_memory(tensor.data_ptr())
        return tensor

    def pin_empty(self, *size, dtype, device="cpu"):
        return torch.empty(*size, dtype=dtype, device=device, pin_memory=True)

    def is_pinned(self, tensor):
        return tensor.is_pinned()

    # ---- the rest ----

    def range_push(self, msg, domain=None, category=None):
        torch.cuda.nvtx.range_push(msg)

    def range_pop(self, domain=None):
        torch.cuda.nvtx.range_pop()

    def lazy_call(self, callback):
        """Calls it once CUDA is initialised; at once if it is."""
        torch.cuda._lazy_call(callback)

    BFloat16Tensor = property(lambda self: torch.cuda.BFloat16Tensor)
    ByteTensor = property(lambda self: torch.cuda.ByteTensor)
    DoubleTensor = property(lambda self: torch.cuda.DoubleTensor)
    FloatTensor = property(lambda self: torch.cuda.FloatTensor)
    HalfTensor = property(lambda self: torch.cuda.HalfTensor)
    IntTensor = property(lambda self: torch.cuda.IntTensor)
    LongTensor = property(lambda self: torch.cuda.LongTensor)
