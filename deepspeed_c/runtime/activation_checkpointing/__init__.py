"""Recomputing activations in backward instead of keeping them."""
