"""Logging, as scripts know it. Other members of deepspeed.utils are listed in docs/compatibility.md."""
from .logging import log_dist, logger

__all__ = ["log_dist", "logger"]
