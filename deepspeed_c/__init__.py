"""deepspeed_c: a training engine with a C core that keeps DeepSpeed's interface.

    import deepspeed_c as deepspeed
    engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json")

Names are loaded when they are first asked for, so that the launcher starts without torch. `_paths` lists them.
"""
from . import _paths

__version__ = "0.1.0"

_paths.install()
__getattr__, __dir__ = _paths.attributes(__name__)
