"""`deepspeed.checkpointing`: configure() and checkpoint(), which recomputes a function in backward.

Without tensor parallelism each rank is the only one that has its activations, so there is nothing to partition, and on
a CPU they are in CPU memory anyway; those settings are accepted because they change nothing. The recomputation is
torch's.
"""
import torch
import torch.utils.checkpoint

from deepspeed_c import _core

from ...accelerator import get_accelerator

__all__ = ["checkpoint", "configure", "get_cuda_rng_tracker", "is_configured", "model_parallel_cuda_manual_seed",
           "partition_activations_in_checkpoint", "reset", "set_num_layers"]

_configured = False


def configure(mpu_, deepspeed_config=None, partition_activations=None, contiguous_checkpointing=None,
              num_checkpoints=None, checkpoint_in_cpu=None, synchronize=None, profile=None):
    """Says how checkpoint() works from now on; everything is optional.

    deepspeed_config: what initialize() takes; its section activation_checkpointing serves where an argument is None.
    mpu_, profile=True, and checkpoint_in_cpu=True on another device than a CPU: not yet.
    """
    global _configured
    section = {}
    if deepspeed_config is not None:
        section = _core.Config(deepspeed_config, _world_size()).get("activation_checkpointing") or {}

    def chosen(given, key):
        return section.get(key) if given is None else given

    if mpu_ is not None:
        raise NotImplementedError("checkpointing.configure(mpu_=...): not yet; tensor parallelism is not there")
    if chosen(profile, "profile"):
        raise NotImplementedError("checkpointing.configure(profile=True): not yet; allowed: False")
    if chosen(checkpoint_in_cpu, "cpu_checkpointing") and get_accelerator().device_name() != "cpu":
        raise NotImplementedError("checkpointing.configure(checkpoint_in_cpu=True): not yet on "
                                  f"{get_accelerator().device_name()}; allowed: False")
    _configured = True


def is_configured():
    """Whether configure() was called."""
    return _configured


def checkpoint(function, *args, **kwargs):
    """function(*args, **kwargs), whose inner activations are computed again in backward instead of being kept.

    Random numbers are drawn again from the same state. Works with and without configure().
    """
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


def reset():
    """Between iterations, for buffers that contiguous_checkpointing would have: nothing to do here."""


def partition_activations_in_checkpoint(partition_activation):
    """Accepted: without tensor parallelism there is nothing to partition."""


def set_num_layers(nlayers):
    """Accepted: it sizes the buffers that contiguous_checkpointing would have."""


def get_cuda_rng_tracker():
    """Not there yet."""
    raise NotImplementedError("checkpointing.get_cuda_rng_tracker() is not yet: tensor parallelism is not there")


def model_parallel_cuda_manual_seed(seed):
    """Not there yet."""
    raise NotImplementedError("checkpointing.model_parallel_cuda_manual_seed() is not yet: tensor parallelism is not "
                              "there")


def _world_size():
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1
