"""Optimizers whose rule is in the C core: real torch.optim.Optimizers, with an engine and without."""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)
