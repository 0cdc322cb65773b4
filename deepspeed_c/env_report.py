"""`ds_report`: what deepspeed_c is here, what it can use, and what else is called deepspeed.

One line for each fact, on stdout; the exit code is 0 whatever they are.
"""
import argparse
import os
import platform
import signal
import sys

from . import __version__, _core, foreign

_WIDTH = 28


def facts(nvme_path=None):
    """The report as (name, what is so) pairs, in order. nvme_path: a folder for files that the report looks into."""
    return [*_versions(), *_machine(), *_back_ends(), *_files(nvme_path), *_deepspeeds()]


def _versions():
    import torch
    cuda = torch.version.cuda or "none"
    return [("deepspeed_c", f"{__version__}, {os.path.dirname(os.path.abspath(__file__))}"),
            ("python", f"{platform.python_version()}, {sys.executable}"),
            ("torch", f"{torch.__version__}, {os.path.dirname(torch.__file__)}"),
            ("torch built with CUDA", cuda),
            ("CUDA devices", str(torch.cuda.device_count() if torch.cuda.is_available() else 0)),
            ("core built by", _core.compiler)]


def _machine():
    from .runtime.utils import host_memory
    total, free = host_memory()
    return [("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
            ("processor", _processor()),
            ("cores of this process", str(len(os.sched_getaffinity(0)))),
            ("memory", f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it free"),
            ("kernels", f"{_core.kernel_tier()}, chosen from {', '.join(_core.kernel_tiers())}"),
            ("threads of loops", _core.loop_threads())]


def _processor():
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _back_ends():
    return [("back end self", "yes"), ("back end shm", _shm()), ("back end delegate", _delegate()),
            ("back end nccl", "no: not yet")]


def _shm():
    """What one machine's ranks need of the system, tried out."""
    try:
        os.close(os.memfd_create("deepspeed_c report"))
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        return f"no: {error}"
    return "yes: memfd_create and pidfd_open work"


def _delegate():
    from torch import distributed
    ready = distributed.is_available() and distributed.is_gloo_available()
    return "yes: over gloo, for ranks that share no memory" if ready else "no: this torch has no gloo"


def _files(folder):
    """What moves the bytes of offload to files, and what a folder for them can do."""
    reason = _core.no_io_uring()
    mover = "by io_uring" if reason is None else f"by threads: {reason}"
    return [("async_io", mover), *([("O_DIRECT", _direct(folder))] if folder is not None else [])]


def _direct(folder):
    try:
        if not os.path.isdir(folder):
            return f"unknown: {folder} is no folder"
        works = _core.has_direct_io(folder)
    except (OSError, ValueError) as error:
        return f"unknown: {error}"
    return f"works in {folder}" if works else f"does not work in {folder}: files there go through the page cache"


def _deepspeeds():
    """The names `deepspeed` of import and of PATH, and whose they are."""
    found, compat = foreign.package(), foreign.compat_version()
    if found is not None:
        imports = f"ANOTHER: {foreign.describe(found)}"
    else:
        imports = f"deepspeed_c, by the distribution of compat/, {compat}" if compat else "nothing (compat/ is not " \
            "installed)"
    path, is_ours = foreign.command()
    commands = "none on PATH" if path is None else f"{'deepspeed_c' if is_ours else 'ANOTHER'}: {path}"
    return [("import deepspeed", imports), ("command deepspeed", commands)]


def main(hide_operator_status=False, hide_errors_and_warnings=False, nvme_path=None):
    """Prints the report. The first two arguments are DeepSpeed's and change nothing: there are no operators to build.
    nvme_path: a folder to look into, or None."""
    for name, fact in facts(nvme_path):
        print(f"{name + ' ':.<{_WIDTH}} {fact}")


def cli_main():
    """The command `ds_report`."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no fault
    parser = argparse.ArgumentParser(prog="ds_report", description="What deepspeed_c is and can use here.")
    for name in "--hide_operator_status", "--hide_errors_and_warnings":
        parser.add_argument(name, action="store_true", help="accepted: there are no operators to build")
    parser.add_argument("--nvme_path", metavar="FOLDER", help="whether O_DIRECT works for files in it")
    main(**vars(parser.parse_args()))


if __name__ == "__main__":
    cli_main()
