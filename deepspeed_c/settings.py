"""What an engine answers about its configuration, and the methods that DeepSpeed documents and are not there yet.

One accessor per key comes from the core's table; what follows from several keys is written here.
"""
import torch

from . import _core
from .runtime.fp16 import loss_scaler
from .utils import groups

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
           "bfp16": torch.bfloat16}  # the last is upstream's other spelling


class EngineSettings:
    """A base of DeepSpeedEngine, which has: _config, _layout (this rank's MpuLayout)."""

    def _model_dtype(self):
        return "fp16" if self._config.get("fp16.enabled") else "bf16" if self._config.get("bf16.enabled") else "fp32"

    def zero_optimization(self):
        """Whether anything is sharded: a ZeRO stage above 0."""
        return self._config.get("zero_optimization.stage") > 0

    def zero_optimization_partition_gradients(self):
        """Whether gradients are sharded: stage 2."""
        return self._config.get("zero_optimization.stage") >= 2

    def zero_optimization_partition_weights(self):
        """Whether parameters are sharded: stage 3."""
        return self._config.get("zero_optimization.stage") >= 3

    is_first_weights_partition_group = zero_optimization_partition_weights

    def zero_partial_offload(self):
        """The part of the optimizer's states that is offloaded where any is."""
        return self._config.get("zero_optimization.offload_optimizer.ratio")

    def zero_cpu_offload(self):
        """Whether optimizer states are offloaded to the CPU."""
        return self._config.get("zero_optimization.offload_optimizer.device") == "cpu"

    def zero_use_cpu_optimizer(self):
        """Whether optimizer states are offloaded."""
        return self._config.get("zero_optimization.offload_optimizer.device") in ("cpu", "nvme")

    def zero_nvme_offload_optimizer(self):
        """Whether optimizer states are offloaded to files."""
        return self._config.get("zero_optimization.offload_optimizer.device") == "nvme"

    def postscale_gradients(self):
        """Whether gradients are averaged after they were added up over ranks."""
        return not self._config.get("prescale_gradients")

    @property
    def communication_data_type(self):
        """The torch.dtype in which gradients travel: the configuration's, or the model's."""
        return _DTYPES[self._config.get("communication_data_type") or self._model_dtype()]

    def get_data_types(self):
        """(torch.dtype of the model, torch.dtype in which gradients accumulate)."""
        return _DTYPES[self._model_dtype()], _DTYPES[self._config.get("data_types.grad_accum_dtype") or "fp32"]

    def initial_dynamic_scale(self):
        """The loss scale that a dynamic one begins with."""
        return 2 ** self._config.get("fp16.initial_scale_power")

    def dynamic_loss_scale_args(self):
        """Keywords of the loss scaler where the scale changes by itself, else None."""
        if not self.dynamic_loss_scale():
            return None
        return {loss_scaler.INITIAL_LOSS_SCALE: self.initial_dynamic_scale(),
                loss_scaler.SCALE_WINDOW: self._config.get("fp16.loss_scale_window"),
                loss_scaler.DELAYED_SHIFT: self._config.get("fp16.hysteresis"),
                loss_scaler.CONSECUTIVE_HYSTERESIS: self._config.get("fp16.consecutive_hysteresis"),
                loss_scaler.MIN_LOSS_SCALE: self._config.get("fp16.min_loss_scale")}

    def get_data_parallel_rank(self):
        """This rank's number among those that share a batch."""
        return self._layout.data_rank

    def get_model_parallel_rank(self):
        """This rank's number among those that share layers; 0 without an mpu."""
        return self._layout.tensor_rank

    get_tensor_parallel_rank = get_model_parallel_rank

    def get_sequence_parallel_group(self):
        """The torch group of ranks that share a sequence; RuntimeError without an mpu that has one."""
        return groups._get_sequence_parallel_group()

    @property
    def is_compiled(self):
        """False: compile() is not there yet."""
        return False

    def is_deepcompile_enabled(self):
        """False: compile() is not there yet."""
        return False

    is_deepcompile_active = is_deepcompile_enabled


def _accessor(name, path, text):
    def read(self):
        return self._config.get(path)
    read.__name__ = read.__qualname__ = name
    read.__doc__ = f"``{path}`` of the configuration: {text}"
    return read


def _not_yet(name):
    def method(self, *args, **kwargs):
        raise NotImplementedError(f"engine.{name}() is not yet")
    method.__name__ = method.__qualname__ = name
    method.__doc__ = "Not there yet."
    return method


# The rest of the documented surface: an error that says so, never silence.
_LATER = """
all_gather_scalar allreduce_and_copy allreduce_bucket allreduce_gradients allreduce_no_retain
autotuning_profile_model_info buffered_allreduce_fallback checkpoint_serialization_enabled
checkpoint_writer_enabled clip_fp32_gradients
collect_python_gc compile compile_autosp compile_autotp compile_zero_optimization_stage get_autosp_backend
get_autotp_backend get_compile_time get_deepcompile_backend get_deepspeed_compile_backend get_optimizer_configuration
print_forward_breakdown random_ltd_initialize register_compile_pass
set_custom_curriculum_learning_schedule set_data_post_process_func sparse_all_gather sparse_allreduce
sparse_allreduce_bucket sparse_allreduce_no_retain swap_tensor_config uses_parallelization_pass_only
""".split()


def _derive():
    for row in _core.config_keys():
        name = row["accessor"]
        if name and name not in vars(EngineSettings):
            setattr(EngineSettings, name, _accessor(name, row["path"], row["help"]))
    for name in _LATER:
        setattr(EngineSettings, name, _not_yet(name))


_derive()
