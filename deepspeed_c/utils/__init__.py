"""What scripts import from `deepspeed.utils`."""
from .logging import log_dist, log_dist_once, logger

__all__ = ["log_dist", "log_dist_once", "logger"]
