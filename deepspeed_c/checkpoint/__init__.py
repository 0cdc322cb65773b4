"""What scripts import from `deepspeed.checkpoint`, and what the engine saves and loads by: save.py says in what order,
contents.py what an engine has, restore.py how it comes back, native.py what files it is in."""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)
