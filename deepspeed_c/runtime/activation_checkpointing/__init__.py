"""Recomputing activations in backward instead of keeping them."""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)
