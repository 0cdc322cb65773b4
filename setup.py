"""Builds deepspeed_c._core from every C file under csrc, at the ABI baseline, two or more files at once.

What a plain build_ext does not do and this one does: files compile in parallel; a file is compiled again only
when it, a header, a table (*.def) or this script is newer than its object or its flags changed; missing
prerequisites end the build with a sentence that names the remedy; compile_commands.json is written for editors.
Environment: CC, CFLAGS as ever; DLPACK_INCLUDE, a folder that holds dlpack/dlpack.h; DSC_SANITIZE, a value for
-fsanitize (for `make asan`). Wider instruction sets are chosen at run time by the core, never here.
"""
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = os.path.dirname(os.path.abspath(__file__))
# -ffp-contract=off and no -ffast-math: all CPU tiers give the same bits. -fno-math-errno: sqrtf vectorises.
CFLAGS = [
    "-std=c11", "-O3", "-g", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-pthread",
    "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers",
]
LDFLAGS = ["-pthread", "-lm", "-ldl"]
DLPACK_NEEDED = (1, 3)


def fail(sentence):
    """End the build with one sentence instead of a traceback."""
    sys.exit(f"deepspeed_c: {sentence}")


def pkg_config(flag, package, remedy):
    """Words of `pkg-config flag package`."""
    if shutil.which("pkg-config") is None:
        fail("pkg-config is missing (Debian, Ubuntu: apt-get install pkg-config)")
    run = subprocess.run(["pkg-config", flag, package], capture_output=True, text=True)
    if run.returncode:
        fail(f"{package} is missing ({remedy})\n{run.stderr}")
    return shlex.split(run.stdout)


def dlpack_include():
    """The folder that holds dlpack/dlpack.h, recent enough for the exchange table."""
    folder, source = os.environ.get("DLPACK_INCLUDE"), "DLPACK_INCLUDE"
    if not folder:
        try:
            from tvm_ffi.libinfo import find_dlpack_include_path
        except ImportError:
            fail("the DLPack header is missing: pip install 'apache-tvm-ffi>=0.1.15,<0.2', "
                 "or set DLPACK_INCLUDE to a folder that holds dlpack/dlpack.h (1.3 or later)")
        folder, source = find_dlpack_include_path(), "the package apache-tvm-ffi"
    header = os.path.join(folder, "dlpack", "dlpack.h")
    if not os.path.exists(header):
        fail(f"there is no dlpack/dlpack.h in {folder}, which {source} names")
    with open(header) as text:
        found = dict(re.findall(r"#define DLPACK_(MAJOR|MINOR)_VERSION (\d+)", text.read()))
    version = (int(found.get("MAJOR", 0)), int(found.get("MINOR", 0)))
    if version < DLPACK_NEEDED:
        fail(f"{header} is DLPack {version[0]}.{version[1]}; 1.3 or later is needed")
    return folder


def numpy_include():
    """The folder of the NumPy C API."""
    try:
        import numpy
    except ImportError:
        fail("NumPy is needed to build: pip install numpy")
    return numpy.get_include()


def newest(paths):
    """The latest modification time of some files."""
    return max((os.path.getmtime(path) for path in paths), default=0.0)


class ParallelBuild(build_ext):
    """build_ext with files compiled in parallel, each only when it is out of date."""

    def build_extension(self, ext):
        remedy = "Debian, Ubuntu: apt-get install libcjson-dev"
        ext.include_dirs += [dlpack_include(), numpy_include()]
        ext.extra_compile_args += pkg_config("--cflags", "libcjson", remedy)
        ext.extra_link_args += pkg_config("--libs", "libcjson", remedy)
        if sanitize := os.environ.get("DSC_SANITIZE"):
            flags = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1"]
            ext.extra_compile_args += flags
            ext.extra_link_args += flags
        self.write_compile_commands(ext)
        compile_one = self.compiler.compile
        shared = newest([*self.headers(), "setup.py"])
        self.drop_objects_of_other_flags(ext)

        def compile_parallel(sources, output_dir=None, **options):
            def compile_stale(source):
                (target,) = self.compiler.object_filenames([source], output_dir=output_dir)
                stamp = os.path.getmtime(target) if os.path.exists(target) else 0.0
                if stamp <= max(shared, os.path.getmtime(source)):
                    compile_one([source], output_dir=output_dir, **options)
                return target

            for source in sources:
                os.makedirs(os.path.join(output_dir or "", os.path.dirname(source)), exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                return list(pool.map(compile_stale, sources))

        self.compiler.compile = compile_parallel
        # setuptools looks at the sources only, and would take a changed header for nothing to do.
        self.force = True
        super().build_extension(ext)

    def headers(self):
        """Every file that a source may include from this tree."""
        return [path for end in ("h", "def") for path in glob.glob(f"csrc/**/*.{end}", recursive=True)]

    def drop_objects_of_other_flags(self, ext):
        """Objects that other flags or another interpreter made are stale, whatever their time says."""
        record = os.path.join(self.build_temp, "flags.json")
        flags = [list(self.compiler.compiler_so), ext.include_dirs, ext.extra_compile_args, sys.version]
        try:
            with open(record) as text:
                if json.load(text) == flags:
                    return
        except (OSError, ValueError):
            pass
        shutil.rmtree(self.build_temp, ignore_errors=True)
        os.makedirs(self.build_temp)
        with open(record, "w") as out:
            json.dump(flags, out)

    def write_compile_commands(self, ext):
        """compile_commands.json, which clangd and other tools read."""
        flags = [*self.compiler.compiler_so, *(f"-I{d}" for d in [*ext.include_dirs, *self.compiler.include_dirs]),
                 *ext.extra_compile_args]
        commands = [{"directory": ROOT, "file": source, "arguments": [*flags, "-c", source]} for source in ext.sources]
        with open("compile_commands.json", "w") as out:
            json.dump(commands, out, indent=1)


os.chdir(ROOT)  # sources are named relative to the root, and so are the objects
setup(
    ext_modules=[
        Extension(
            "deepspeed_c._core",
            sorted(glob.glob("csrc/**/*.c", recursive=True)),
            include_dirs=["csrc"],
            extra_compile_args=list(CFLAGS),
            extra_link_args=list(LDFLAGS),
        )
    ],
    cmdclass={"build_ext": ParallelBuild},
)
