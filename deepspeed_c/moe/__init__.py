"""Mixture of experts: the layer in `layer`, what it is made of beside, optimizer groups in `utils`."""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)
