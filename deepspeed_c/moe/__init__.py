"""Mixture of experts: parameter groups in `utils`; the layer itself is not there yet."""
from . import layer, utils

__all__ = ["layer", "utils"]
