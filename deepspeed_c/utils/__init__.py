"""What scripts import from `deepspeed.utils`."""
from deepspeed_c import _paths

from .logging import log_dist, log_dist_once, logger

__all__ = ["log_dist", "log_dist_once", "logger"]
__getattr__, __dir__ = _paths.attributes(__name__)
