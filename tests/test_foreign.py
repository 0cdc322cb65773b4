"""Another deepspeed: what is refused at start, what is only reported. Stand-ins for DeepSpeed are a few empty files."""
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

import deepspeed_c
from deepspeed_c import env_report, foreign

CONFIG = {"train_batch_size": 2, "optimizer": {"type": "SGD"}}


def forget():
    """Takes every `deepspeed` out of sys.modules and returns it."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "deepspeed"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No deepspeed is imported, and none started the tests; what a test imports goes with it."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv(foreign.ALLOW, raising=False)
    before = forget()
    yield
    forget()
    sys.modules.update(before)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder first on sys.path in which DeepSpeed 0.19.8 seems to be installed."""
    package, info = tmp_path / "deepspeed", tmp_path / "deepspeed-0.19.8.dist-info"
    (package / "runtime").mkdir(parents=True), info.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.19.8'\n")
    (package / "runtime" / "__init__.py").write_text("")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.8\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def start():
    return deepspeed_c.initialize(model=torch.nn.Linear(2, 1), config=CONFIG)


def test_an_installed_deepspeed_is_named_at_start_without_importing_it(installed):
    with pytest.raises(RuntimeError, match=r"another deepspeed 0.19.8 is installed.*pip uninstall deepspeed") as caught:
        start()
    assert str(installed / "deepspeed") in str(caught.value) and "deepspeed" not in sys.modules


def test_an_imported_deepspeed_is_named_at_start(installed):
    importlib.import_module("deepspeed")
    with pytest.raises(RuntimeError, match="another deepspeed 0.19.8 is imported in this process.*Use one of the two"):
        start()


def test_it_passes_where_the_user_says_so(installed, monkeypatch):
    monkeypatch.setenv(foreign.ALLOW, "1")
    start()
    monkeypatch.setenv(foreign.ALLOW, "0")
    with pytest.raises(RuntimeError, match=f"set {foreign.ALLOW}=1"):
        start()


def test_the_name_deepspeed_that_is_deepspeed_c_is_no_other(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed_c)
    assert foreign.package() is None
    start()


def test_a_folder_called_deepspeed_is_no_deepspeed(tmp_path, monkeypatch):
    (tmp_path / "deepspeed").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert foreign.package() is None
    (tmp_path / "deepspeed" / "__init__.py").write_text("")  # as in compat/
    importlib.invalidate_caches()
    assert foreign.package() is None


def test_a_script_called_deepspeed_is_no_deepspeed(tmp_path, monkeypatch):
    (tmp_path / "deepspeed.py").write_text("")
    (tmp_path / "runtime").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert foreign.package() is None


def test_the_distribution_of_compat_is_told_from_deepspeed_by_its_version(tmp_path, monkeypatch):
    info = tmp_path / "deepspeed-1.dist-info"
    info.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    for version, expected in (("0.19.8+deepspeed.c.0.1.0",) * 2, ("0.19.8", None)):
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
        importlib.invalidate_caches()
        assert foreign.compat_version() == expected


LAUNCHER = """
import subprocess, sys
code = "from deepspeed_c import foreign; foreign.refuse()"
run = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
print(run.stderr)
"""


@pytest.mark.parametrize("ours", [False, True])
def test_another_launcher_is_named_at_start(installed, root, ours):
    folder = installed / "deepspeed" / "launcher"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "launch.py").write_text(LAUNCHER)
    environment = {**os.environ, "PYTHONPATH": str(root), "LOCAL_RANK": "0"}
    if ours:
        environment["DEEPSPEED_C_JOB"] = "token"
    run = subprocess.run([sys.executable, "-m", "deepspeed.launcher.launch", "--world_info=x"], cwd=installed,
                         env=environment, capture_output=True, text=True, timeout=60)
    said = "started by another deepspeed's launcher" in run.stdout and "`deepspeed_c ...`" in run.stdout
    assert said is not ours, run.stdout + run.stderr


def test_a_process_without_a_launcher_was_started_by_none(monkeypatch):
    assert foreign.launcher() is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("DEEPSPEED_C_JOB", raising=False)
    assert foreign.launcher() is None and foreign.launcher(pid=2 ** 22 + 1) is None


def script(folder, text):
    folder.mkdir()
    path = folder / "deepspeed"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_command_on_path_is_ours_or_named(tmp_path, monkeypatch, capsys):
    theirs = script(tmp_path / "theirs", "# /opt/deepspeed_c/bin\nfrom deepspeed.launcher.runner import main")
    ours = script(tmp_path / "ours", "from deepspeed_c.launcher.runner import main")
    for path, expected in ((theirs, f"ANOTHER: {theirs}"), (ours, f"deepspeed_c: {ours}"), (None, "none on PATH")):
        monkeypatch.setenv("PATH", str(path.parent) if path else str(tmp_path))
        assert dict(env_report._deepspeeds())["command deepspeed"] == expected
    start()  # what is on PATH and did not start us is no reason to refuse


def test_ds_report_names_everything(installed, capsys):
    env_report.main()
    facts = dict(re.fullmatch(r"(.+?) \.+ (.*)", line).groups() for line in capsys.readouterr().out.splitlines())
    assert facts["deepspeed_c"].startswith(deepspeed_c.__version__)
    assert torch.__version__ in facts["torch"] and facts["kernels"].split(",")[0] in facts["kernels"].split("from ")[1]
    assert facts["back end shm"] == "yes: memfd_create and pidfd_open work"
    assert re.match("by io_uring$|by threads: .*(liburing|io_uring)", facts["async_io"]) and "O_DIRECT" not in facts
    assert facts["core built by"].split()[0] in ("gcc", "clang") and "GiB" in facts["memory"]
    assert facts["import deepspeed"] == f"ANOTHER: another deepspeed 0.19.8 is installed in this environment, at " \
                                        f"{installed / 'deepspeed'}"


def direct_io_works(folder):
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    finally:
        os.unlink(folder / "probe")
    return True


def test_ds_report_looks_into_a_folder_for_files(tmp_path, monkeypatch, capsys):
    def said(folder):
        env_report.main(nvme_path=str(folder))
        return dict(re.findall(r"(.+?) \.+ (.*)\n", capsys.readouterr().out))

    works = "works" if direct_io_works(tmp_path) else "does not work"
    assert said(tmp_path)["O_DIRECT"].startswith(f"{works} in {tmp_path}") and os.listdir(tmp_path) == []
    assert said(tmp_path / "a")["O_DIRECT"] == f"unknown: {tmp_path / 'a'} is no folder" and os.listdir(tmp_path) == []
    if subprocess.run(["mount", "-t", "ramfs", "none", tmp_path], capture_output=True).returncode == 0:  # for root
        try:
            assert said(tmp_path)["O_DIRECT"].startswith(f"does not work in {tmp_path}: ")
        finally:
            subprocess.run(["umount", tmp_path], check=True)
    monkeypatch.setattr(env_report._core, "no_io_uring", lambda: "the kernel gave no io_uring: no")
    assert said(tmp_path)["async_io"] == "by threads: the kernel gave no io_uring: no"
    monkeypatch.setattr(env_report._core, "no_io_uring", lambda: None)
    assert said(tmp_path)["async_io"] == "by io_uring"


def test_ds_report_takes_the_documented_options(root):
    run = subprocess.run([sys.executable, "-m", "deepspeed_c.env_report", "--hide_operator_status",
                          "--hide_errors_and_warnings"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == len(env_report.facts()), run.stderr
