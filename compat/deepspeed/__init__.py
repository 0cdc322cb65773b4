"""`deepspeed` is `deepspeed_c`: the same module objects, each path under a second name."""
import os
import sys


def _become(name, folder):
    """Puts deepspeed_c into sys.modules under this name. ImportError where the folder is DeepSpeed's own as well."""
    others = sorted(set(os.listdir(folder)) - {"__init__.py", "__pycache__"})
    if others:
        raise ImportError(f"{folder} holds files of another deepspeed ({', '.join(others[:5])}), installed over or "
                          "under the one that stands for deepspeed_c: pip uninstall deepspeed until none is left, "
                          "remove that folder, then install ./compat again")
    import deepspeed_c

    deepspeed_c._paths.also_as(name)
    sys.modules[name] = deepspeed_c  # what `import deepspeed` returns


_become(__name__, os.path.dirname(os.path.abspath(__file__)))
