"""Mixture of experts: parameter groups in `utils`; the layer itself is not there yet."""
