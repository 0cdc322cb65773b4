"""Another DeepSpeed: whether `import deepspeed`, or the command `deepspeed`, is not this package's.

The rule is docs/compatibility.md's: what this process has imported or would import, and what started it, must be ours,
because half of a job would otherwise train with the other one; whatever else the machine holds is only reported.
Nothing here imports what it looks at.
"""
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections import namedtuple

from .launcher.members import JOB_VARIABLE

ALLOW = "DS_ALLOW_OTHER_DEEPSPEED"
_OURS = "+deepspeed.c."  # in the version of the distribution in compat/

# what: "imported", "installed" or "launcher". where: a path, or the launcher's command line.
Found = namedtuple("Found", "what where version")


def refuse():
    """RuntimeError where another deepspeed is in this process, in its environment, or has started it; ALLOW=1 in the
    environment lets it pass."""
    if os.environ.get(ALLOW, "0") not in ("", "0"):
        return
    found = package() or launcher()
    if found is None:
        return
    raise RuntimeError(f"{describe(found)}. {_REMEDIES[found.what]}; or set {ALLOW}=1 to go on as it is")


_REMEDIES = {
    "imported": "Use one of the two in a process: `pip uninstall deepspeed` and, for code that imports deepspeed, "
                "`pip install ./compat` from the tree of deepspeed_c",
    "installed": "It has the same command and the same import as deepspeed_c: `pip uninstall deepspeed`, install "
                 "deepspeed_c again for its command and, for code that imports deepspeed, ./compat",
    "launcher": "Start the script with deepspeed_c's own command: `deepspeed_c ...`",
}


def describe(found):
    """A sentence, without its full stop, of what was found."""
    version = f" {found.version}" if found.version else ""
    return {"imported": f"another deepspeed{version} is imported in this process, from {found.where}",
            "installed": f"another deepspeed{version} is installed in this environment, at {found.where}",
            "launcher": f"this process was started by another deepspeed's launcher ({found.where})"}[found.what]


def package():
    """The Found of another package `deepspeed` that this process has imported, or would import; None for none."""
    module = sys.modules.get("deepspeed")
    if module is not None:
        if module is sys.modules[__package__]:
            return None
        where = getattr(module, "__file__", None) or "an unknown place"
        return Found("imported", where, str(getattr(module, "__version__", "")))
    folder = _folder_of("deepspeed")
    if folder is None or not os.path.isdir(os.path.join(folder, "runtime")):
        return None  # a folder of that name is no DeepSpeed, and that of compat/ has nothing but __init__.py
    return Found("installed", folder, _version_at(folder))


def launcher(pid=None):
    """The Found of another deepspeed's launcher that started this process (or `pid` its parent); None for none."""
    if JOB_VARIABLE in os.environ or "LOCAL_RANK" not in os.environ:
        return None
    words = _command_line(os.getppid() if pid is None else pid)
    if any(word == "deepspeed.launcher.launch" or word.endswith("deepspeed/launcher/launch.py") for word in words):
        return Found("launcher", " ".join(words[:4]), "")
    return None


def command():
    """(path of `deepspeed` on PATH or None, whether it is deepspeed_c's)."""
    path = shutil.which("deepspeed")
    if path is None:
        return None, False
    try:
        with open(path, "rb") as file:
            return path, b"deepspeed_c.launcher" in file.read(4096)
    except OSError:
        return path, False


def compat_version():
    """The version of the distribution in compat/ where it is installed, else None."""
    version = _distribution_version()
    return version if version and _OURS in version else None


def _distribution_version():
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder_of(name):
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    origin = spec.origin if spec is not None else None
    return os.path.dirname(origin) if origin and os.path.basename(origin) == "__init__.py" else None


def _version_at(folder):
    """The version of the distribution that lies beside this folder, or "" where none does."""
    for distribution in importlib.metadata.distributions(name="deepspeed", path=[os.path.dirname(folder)]):
        return distribution.version
    return ""


def _command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [word.decode(errors="replace") for word in file.read().split(b"\0") if word]
    except OSError:
        return []
