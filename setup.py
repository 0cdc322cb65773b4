"""Builds deepspeed_c._core: every C file under csrc, at the ABI baseline, in parallel."""
import glob
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = os.path.dirname(os.path.abspath(__file__))
CFLAGS = [
    "-std=c11", "-O3", "-g", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-pthread",
    "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers",
]


def pkg_config(flag, package, remedy):
    """Words of `pkg-config flag package`, or an exit that says how to get the package."""
    if shutil.which("pkg-config") is None:
        sys.exit("deepspeed_c: pkg-config is missing (Debian, Ubuntu: apt-get install pkg-config)")
    run = subprocess.run(["pkg-config", flag, package], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"deepspeed_c: {package} is missing ({remedy})\n{run.stderr}")
    return shlex.split(run.stdout)


def dlpack_include():
    """The folder that holds dlpack/dlpack.h, version 1.3 or later."""
    folder = os.environ.get("DLPACK_INCLUDE")
    if not folder:
        try:
            import tvm_ffi.libinfo
        except ImportError:
            sys.exit("deepspeed_c: the DLPack header is missing: pip install 'apache-tvm-ffi>=0.1.15,<0.2', "
                     "or set DLPACK_INCLUDE to a folder that holds dlpack/dlpack.h (1.3 or later)")
        folder = tvm_ffi.libinfo.find_dlpack_include_path()
    if not os.path.exists(os.path.join(folder, "dlpack", "dlpack.h")):
        sys.exit(f"deepspeed_c: {folder}/dlpack/dlpack.h does not exist (DLPACK_INCLUDE or apache-tvm-ffi)")
    return folder


def numpy_include():
    """The folder of the NumPy C API."""
    import numpy
    return numpy.get_include()


class ParallelBuild(build_ext):
    """build_ext that compiles files in parallel and writes compile_commands.json."""

    def build_extension(self, ext):
        ext.include_dirs += [dlpack_include(), numpy_include()]
        ext.extra_compile_args += pkg_config("--cflags", "libcjson", "Debian, Ubuntu: apt-get install libcjson-dev")
        ext.extra_link_args += pkg_config("--libs", "libcjson", "Debian, Ubuntu: apt-get install libcjson-dev")
        compiler = self.compiler
        original = compiler._compile
        jobs, commands = [], []

        def collect(obj, src, *rest):
            jobs.append((obj, src, *rest))
            _, cc_args, extra, pp_opts = rest[0], rest[1], rest[2], rest[3]
            commands.append({"directory": ROOT, "file": src,
                             "arguments": [*compiler.compiler_so, *cc_args, src, "-o", obj, *extra]})

        # setuptools' compile() calls _compile once per stale file; collect them, then run all at once.
        compiler._compile = collect
        compile_all = compiler.compile

        def compile_parallel(*args, **kwargs):
            objects = compile_all(*args, **kwargs)
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                list(pool.map(lambda job: original(*job), jobs))
            return objects

        compiler.compile = compile_parallel
        self.force = True
        super().build_extension(ext)
        with open(os.path.join(ROOT, "compile_commands.json"), "w") as out:
            json.dump(commands, out, indent=1)


setup(
    ext_modules=[
        Extension(
            "deepspeed_c._core",
            sorted(os.path.relpath(p, ROOT) for p in glob.glob(os.path.join(ROOT, "csrc", "**", "*.c"), recursive=True)),
            include_dirs=["csrc"],
            extra_compile_args=CFLAGS,
            extra_link_args=["-pthread", "-lm"],
        )
    ],
    cmdclass={"build_ext": ParallelBuild},
)
