"""Where states may be moved to, and which: words of engine.offload_states and of the offload sections."""
import enum


class OffloadDeviceEnum(str, enum.Enum):
    """Where something is kept."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, enum.Enum):
    """What engine.offload_states can move."""

    optim_states = "optim_states"
    hp_params = "hp_params"  # fp32 masters
    lp_params = "lp_params"  # the module's parameters
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"
