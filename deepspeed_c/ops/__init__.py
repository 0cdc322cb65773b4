"""Optimizers whose rule is in the C core: real torch.optim.Optimizers, with an engine and without."""
from deepspeed_c import _paths

# What DeepSpeed's operators of these names do is there; none of them is built.
__compatible_ops__ = dict.fromkeys(
    ("async_io", "cpu_adagrad", "cpu_adam", "cpu_lion", "fused_adam", "fused_lamb", "fused_lion"), True)

__getattr__, __dir__ = _paths.attributes(__name__)
