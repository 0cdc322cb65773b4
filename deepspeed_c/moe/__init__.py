"""Mixture of experts: parameter groups in `utils`; the layer itself is not there yet."""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)
