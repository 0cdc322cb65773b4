"""The build: what is missing is named with its remedy, only what is stale compiles, a source archive builds."""
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULE = """/* A module that is as small as a module gets. */
#include <Python.h>
#include "answer.h"
static PyModuleDef_Slot slots[] = {{0, NULL}};
static struct PyModuleDef core = {PyModuleDef_HEAD_INIT, .m_name = "_core", .m_slots = slots};
PyMODINIT_FUNC PyInit__core(void) {
    return answer() == 42 ? PyModuleDef_Init(&core) : NULL;
}
"""


@pytest.fixture
def small(tmp_path):
    """The real build script over a core of two files, so that a build takes a second."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text("text\n")
    (tmp_path / "csrc" / "part").mkdir(parents=True)
    (tmp_path / "deepspeed_c").mkdir()
    (tmp_path / "deepspeed_c" / "__init__.py").write_text("")
    (tmp_path / "csrc" / "module.c").write_text(MODULE)
    (tmp_path / "csrc" / "answer.h").write_text("int answer(void);\n")
    answer = '#include "../answer.h"\nint answer(void) {\n    return 42;\n}\n'
    (tmp_path / "csrc" / "part" / "answer.c").write_text(answer)
    return tmp_path


def build(folder, path=None, **environment):
    """build_ext in a folder; returns the finished process."""
    environment = {**os.environ, **environment}
    if path is not None:
        environment["PATH"] = str(path)
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=120)


def objects(folder):
    """{file name: time at which its object was written}."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "build").rglob("*.o")}


def edit(path):
    """Change a file's time to a later one than that of every object."""
    later = time.time() + 5
    os.utime(path, (later, later))


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# ---- what is missing ----


def test_a_missing_pkg_config_is_named(small, tmp_path):
    result = build(small, path=tmp_path)
    assert result.returncode != 0 and "apt-get install pkg-config" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_cjson_is_named(small, tmp_path):
    result = build(small, PKG_CONFIG_LIBDIR=str(tmp_path), PKG_CONFIG_PATH="")
    assert result.returncode != 0 and "apt-get install libcjson-dev" in result.stderr


@pytest.mark.parametrize("header, text", [
    (None, "there is no dlpack/dlpack.h in"),
    ("#define DLPACK_MAJOR_VERSION 1\n#define DLPACK_MINOR_VERSION 0\n", "is DLPack 1.0; 1.3 or later is needed"),
])
def test_a_missing_or_old_dlpack_header_is_named(small, tmp_path, header, text):
    folder = tmp_path / "include" / "dlpack"
    folder.mkdir(parents=True)
    if header:
        (folder / "dlpack.h").write_text(header)
    result = build(small, DLPACK_INCLUDE=str(folder.parent))
    assert result.returncode != 0 and text in result.stderr and str(folder.parent) in result.stderr


def test_a_warning_ends_the_build(small):
    with (small / "csrc" / "part" / "answer.c").open("a") as source:
        source.write("static int never_called(void) {\n    return 0;\n}\n")
    result = build(small)
    assert result.returncode != 0 and "never_called" in result.stderr + result.stdout


# ---- what is stale ----


def test_a_second_build_compiles_nothing_and_an_edit_compiles_one_file(small):
    assert build(small).returncode == 0
    first = objects(small)
    assert set(first) == {"module.o", "answer.o"}
    assert build(small).returncode == 0
    assert objects(small) == first
    edit(small / "csrc" / "part" / "answer.c")
    assert build(small).returncode == 0
    second = objects(small)
    assert second["answer.o"] > first["answer.o"] and second["module.o"] == first["module.o"]


def test_a_changed_header_or_flag_compiles_everything(small):
    assert build(small).returncode == 0
    first = objects(small)
    edit(small / "csrc" / "answer.h")
    assert build(small).returncode == 0
    second = objects(small)
    assert all(second[name] > first[name] for name in first)
    assert build(small, DSC_SANITIZE="undefined").returncode == 0
    third = objects(small)
    assert all(third[name] > second[name] for name in first)


def test_a_changed_source_reaches_the_module(small):
    check = [sys.executable, "-c", "import deepspeed_c._core"]
    assert build(small).returncode == 0
    assert subprocess.run(check, cwd=small, timeout=60).returncode == 0
    source = small / "csrc" / "part" / "answer.c"
    source.write_text(source.read_text().replace("42", "41"))
    edit(source)
    assert build(small).returncode == 0
    run = subprocess.run(check, cwd=small, capture_output=True, text=True, timeout=60)
    assert run.returncode != 0 and "SystemError" in run.stderr  # initialisation returned NULL


def test_compile_commands_name_every_source_and_compile(small):
    assert build(small).returncode == 0
    commands = json.loads((small / "compile_commands.json").read_text())
    assert sorted(c["file"] for c in commands) == ["csrc/module.c", "csrc/part/answer.c"]
    for command in commands:
        subprocess.run([*command["arguments"], "-o", os.devnull], cwd=command["directory"], check=True, timeout=60)


# ---- the archive, the requirements ----


def test_a_source_archive_holds_what_a_build_needs_and_nothing_built(tmp_path):
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", "data", "out")
    shutil.copytree(ROOT, copy, ignore=ignored)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], cwd=copy, check=True,
                   capture_output=True, timeout=120)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    needed = {str(p.relative_to(copy)) for folder in ("csrc", "deepspeed_c") for p in (copy / folder).rglob("*")
              if p.suffix in (".c", ".h", ".def", ".py")}
    assert needed | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= held
    assert not [name for name in held if name.endswith((".so", ".o", ".png"))]


def test_requirements_come_from_pyproject():
    run = subprocess.run([sys.executable, "tools/requirements.py", "build-system.requires", "project.dependencies"],
                         cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    words = run.stdout.split()
    assert "apache-tvm-ffi>=0.1.15,<0.2" in words and "torch>=2.6" in words


# ---- make: the steps of setting up, with a python that only writes down what it is asked ----

FAKE = """case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python";;
"-m pip") shift 2; echo "$*" >> {log}; [ ! -e {folder}/fail ] || case "$*" in *torch) exit 1;; esac;;
*) exec {python} "$@";;
esac
"""


@pytest.fixture
def making(tmp_path):
    """make(*words) in a small tree: (exit status, lines of what pip was asked to do)."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.c").write_text("")
    log = tmp_path / "asked"
    script(tmp_path / "python", FAKE.format(log=log, folder=tmp_path, python=sys.executable))
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}

    def make(*words):
        log.write_text("")
        run = subprocess.run(["make", f"PYTHON={tmp_path}/python", *words], cwd=tmp_path, env=environment,
                             capture_output=True, text=True, timeout=60)
        return run.returncode, log.read_text().splitlines()

    make.folder = tmp_path
    return make


def test_make_installs_torch_first_then_the_rest_then_the_package_and_all_under_the_constraints(making):
    status, (torch, packages, package) = making("build", "TORCH_INDEX=file:///index")
    assert status == 0
    assert torch.endswith("-c constraints.txt --index-url file:///index torch")
    assert "pytest>=9" in packages.split() and "torch>=2.6" in packages.split() and "--index-url" not in packages
    assert package.endswith("--no-build-isolation --no-deps -e .")
    assert all("-c constraints.txt" in line for line in (torch, packages, package))


def test_make_does_nothing_twice_and_builds_again_for_a_new_source(making):
    assert making("build")[0] == 0
    assert making("build") == (0, [])
    edit(making.folder / "csrc" / "a.c")
    status, lines = making("build")
    assert status == 0 and len(lines) == 1 and lines[0].endswith("-e .")


def test_a_step_that_failed_is_tried_again(making):
    (making.folder / "fail").write_text("")
    status, lines = making("build")
    assert status != 0 and len(lines) == 1
    (making.folder / "fail").unlink()
    status, lines = making("build")
    assert status == 0 and len(lines) == 3


# ---- system packages ----


@pytest.fixture
def bare(tmp_path):
    """A PATH on which only a shell's own tools, this Python and what a test adds can be found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "env", "cat"):
        (folder / name).symlink_to(shutil.which(name))
    (folder / "python3").symlink_to(sys.executable)
    return folder


def require(folder):
    return subprocess.run([shutil.which("sh"), str(ROOT / "tools" / "require_system.sh"), "python3", "gcc"],
                          env={"PATH": str(folder)}, capture_output=True, text=True, timeout=60)


def test_without_root_the_missing_packages_are_named(bare):
    script(bare / "id", "echo 1000")
    script(bare / "apt-get", "echo must not run; exit 1")
    result = require(bare)
    assert result.returncode == 1 and "must not run" not in result.stdout
    for package in ("gcc", "make", "pkg-config", "libcjson-dev"):
        assert package in result.stderr.split()
    assert "sudo apt-get install" in result.stderr


def test_as_root_the_missing_packages_are_installed(bare, tmp_path):
    script(bare / "id", "echo 0")
    script(bare / "apt-get", f'echo "$@" >> {tmp_path}/asked')
    for name in ("gcc", "make"):
        script(bare / name, "exit 0")
    result = require(bare)
    assert result.returncode == 0, result.stderr
    update, install = (tmp_path / "asked").read_text().splitlines()
    assert update.split() == ["update", "-q"] and install.split()[0] == "install"
    assert "pkg-config" in install.split() and "libcjson-dev" in install.split() and "gcc" not in install.split()


def test_a_failed_installation_stops(bare):
    script(bare / "id", "echo 0")
    script(bare / "apt-get", "exit 100")
    result = require(bare)
    assert result.returncode == 1 and "apt-get could not install" in result.stderr


def test_an_old_python_is_named(bare):
    (bare / "python3").unlink()
    script(bare / "python3", 'case "$1" in -V) echo "Python 3.9.1";; *) exit 1;; esac')
    result = require(bare)
    assert result.returncode == 1 and "Python 3.10 or later is needed; python3 is Python 3.9.1" in result.stderr
