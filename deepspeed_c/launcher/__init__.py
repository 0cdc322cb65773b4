"""The `deepspeed` command: one process per slot of this machine."""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)
