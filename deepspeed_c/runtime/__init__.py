"""What scripts import from `deepspeed.runtime`."""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)
