"""Pipelines: where ranks stand is in `topology`; the rest is not there yet."""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)
