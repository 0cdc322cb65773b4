"""deepspeed_c: a training engine with a C core that keeps DeepSpeed's interface.

    import deepspeed_c as deepspeed
    engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json")

Names are loaded when they are first asked for, so that the launcher starts without torch.
"""
import importlib

__version__ = "0.1.0"

# Name -> module that has it; a module's own name stands for the module itself.
_HOMES = {
    "CommError": "_core", "DeepSpeedConfigError": "_core",
    "initialize": "api", "add_config_arguments": "api", "init_inference": "api", "tp_model_init": "api",
    "init_distributed": "distributed", "DeepSpeedEngine": "engine", "DeepSpeedOptimizer": "optimizer",
    **{name: name for name in ("accelerator", "comm", "dataloader", "launcher", "moe", "optimizer", "runtime",
                               "utils", "zero")},
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = home if _HOMES[name] == name else getattr(home, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOMES})
