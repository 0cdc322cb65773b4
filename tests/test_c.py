"""Every case of every C test program, each in a process of its own with a time limit.

DSC_TEST_SAN=address,undefined or =thread runs instrumented builds (`make asan`, `make tsan`). A case whose name
starts with `stress_` may take a minute; every other has ten seconds.
"""
import os
import pathlib
import platform
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAN = os.environ.get("DSC_TEST_SAN", "")
FOLDER = ROOT / "build" / (f"c-{SAN}" if SAN else "c")
PROGRAMS = sorted((ROOT / "tests" / "c").glob("test_*.c"))


def cases_of(source):
    """Names in the program's table of cases, without building it, so that collecting tests is quick."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", source.read_text(), flags=re.S)
    return re.findall(r"\bCASE\((\w+)\)", text)


def command(program, *args):
    """ThreadSanitizer of older compilers cannot place its shadow memory under wide address randomisation."""
    wrap = ["setarch", platform.machine(), "-R"] if SAN == "thread" and shutil.which("setarch") else []
    return [*wrap, str(FOLDER / program), *args]


@pytest.fixture(scope="module")
def built():
    """All programs, built with `make c-tests`; a build that fails fails every case with make's words."""
    jobs = f"-j{os.cpu_count() or 1}"
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    run = subprocess.run(["make", jobs, "-s", "c-tests", f"SAN={SAN}"], cwd=ROOT, env=environment,
                         capture_output=True, text=True, timeout=600)
    if run.returncode:
        pytest.fail(f"make c-tests SAN={SAN} failed\n{run.stdout[-2000:]}{run.stderr[-6000:]}", pytrace=False)


def run_case(program, case):
    limit = 60 if case.startswith("stress_") else 10
    limit *= 6 if SAN else 1  # instrumented code runs several times slower
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    try:
        run = subprocess.run(command(program, case), cwd=ROOT, env=environment, capture_output=True, text=True,
                             errors="replace", timeout=limit)
    except subprocess.TimeoutExpired as late:
        said = "".join(part.decode(errors="replace") for part in (late.stdout, late.stderr) if part)
        pytest.fail(f"{program} {case} did not end within {limit} s\n{said[-4000:]}", pytrace=False)
    if run.returncode:
        how = f"signal {-run.returncode}" if run.returncode < 0 else f"exit code {run.returncode}"
        pytest.fail(f"{program} {case}: {how}\n{run.stdout[-2000:]}{run.stderr[-6000:]}", pytrace=False)


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.stem)
def test_the_cases_found_in_the_source_are_those_that_the_program_lists(built, source):
    listed = subprocess.run(command(source.stem), capture_output=True, text=True, check=True, timeout=10).stdout
    assert sorted(listed.split()) == sorted(cases_of(source))
    assert listed.split(), f"{source.name} holds no case"


@pytest.mark.parametrize("program, case", [(p.stem, case) for p in PROGRAMS for case in cases_of(p)])
def test_c_case_passes(built, program, case):
    run_case(program, case)


def test_a_failing_check_is_seen(built, tmp_path):
    """The frame itself: a program whose CHECK does not hold must fail."""
    source = tmp_path / "test_frame.c"
    source.write_text('#include "case.h"\n'
                      "static void one_is_two(void) { CHECK_EQ_INT(1, 2); }\n"
                      "static const struct test_case cases[] = {CASE(one_is_two)};\nRUN_CASES(cases)\n")
    program = tmp_path / "test_frame"
    compiler = [os.environ.get("CC", "gcc"), "-std=c11", "-Icsrc", "-Itests/c"]
    subprocess.run([*compiler, source, "csrc/status.c", "-o", program], cwd=ROOT, check=True, timeout=60)
    run = subprocess.run([program, "one_is_two"], capture_output=True, text=True, timeout=10)
    assert run.returncode == 1 and "1 is 1, 2 is 2" in run.stderr
    assert subprocess.run([program, "no_such_case"], timeout=10).returncode == 2
