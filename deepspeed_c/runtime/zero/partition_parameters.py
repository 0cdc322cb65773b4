"""Parameter sharding as scripts enter it: zero.Init, zero.GatheredParameters.

Stages 0 to 2 keep every parameter whole on every rank, so GatheredParameters has nothing to gather and
does nothing on ordinary parameters; Init(enabled=False) does nothing. Stage 3 is not there yet.
"""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)


class Init:
    """Context manager around model construction; shards parameters as they are made (stage 3).

    Only ``enabled=False`` is there, and does nothing; else NotImplementedError. Arguments as DeepSpeed's ``zero.Init``.
    """

    def __init__(self, module=None, data_parallel_group=None, mem_efficient_linear=True, remote_device=None,
                 pin_memory=False, config_dict_or_path=None, config=None, enabled=True, dtype=None, mpu=None,
                 zero_param_parallel_group=None, zero_quantized_weights=False,
                 zero_quantized_nontrainable_weights=False, sequence_data_parallel_group=None, param_swapper=None,
                 tensor_overrides=None):
        if enabled:
            raise NotImplementedError("zero.Init(enabled=True): ZeRO stage 3 is not yet; allowed: enabled=False, which "
                                      "is all that zero_optimization.stage 0, 1 and 2 need")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


class GatheredParameters:
    """Context manager that makes sharded parameters whole inside (stage 3).

    ``params``: a parameter, or an iterable of parameters, None, buffers, in any mix. Ordinary parameters
    are whole already, so entering and leaving does nothing.
    """

    def __init__(self, params, modifier_rank=None, fwd_module=None, enabled=True):
        pass

    def __enter__(self):
        return None

    def __exit__(self, *exc):
        return False


def register_external_parameter(module, parameter):
    """Tells ZeRO-3 that `module` uses a parameter of another module. Ordinary parameters need no telling."""
