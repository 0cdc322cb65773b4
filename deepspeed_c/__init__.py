"""deepspeed_c: a training engine with a C core that keeps DeepSpeed's interface.

    import deepspeed_c as deepspeed
    engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json")
"""
import importlib

from ._core import CommError, DeepSpeedConfigError
from .api import add_config_arguments, init_inference, initialize, tp_model_init
from .distributed import init_distributed
from .engine import DeepSpeedEngine

__version__ = "0.1.0"

# Reachable as attributes after a bare import, loaded when first asked for.
_SUBMODULES = ("accelerator", "comm", "dataloader", "lr_schedules", "moe", "optimizer", "utils", "zero")

__all__ = ["CommError", "DeepSpeedConfigError", "DeepSpeedEngine", "add_config_arguments", "init_distributed",
           "init_inference", "initialize", "tp_model_init", *_SUBMODULES]


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_SUBMODULES})
