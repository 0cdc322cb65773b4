"""What scripts import from `deepspeed.checkpoint`. Checkpoints themselves are not there yet."""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)
