"""The readers of checkpoint files under a fuzzer, with AddressSanitizer and UBSan (`make fuzz`)."""
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FUZZERS = sorted(path.stem for path in (ROOT / "tests" / "fuzz").glob("fuzz_*.c") if path.stem != "fuzz_driver")


def make(*words, timeout):
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "LD_PRELOAD")}
    run = subprocess.run(["make", "-s", f"-j{os.cpu_count() or 1}", *words], cwd=ROOT, env=environment,
                         capture_output=True, text=True, errors="replace", timeout=timeout)
    if run.returncode:
        pytest.fail(f"make {' '.join(words)}\n{run.stdout[-2000:]}{run.stderr[-6000:]}", pytrace=False)
    return run.stdout


def fuzz(seconds):
    make("fuzzers", timeout=600)
    said = make("fuzz", f"SECONDS={seconds}", timeout=seconds * len(FUZZERS) + 120)
    assert said.count("places reached") == len(FUZZERS)


def test_nothing_is_found_in_twenty_seconds():
    fuzz(20 / len(FUZZERS))


@pytest.mark.long
def test_nothing_is_found_in_ten_minutes():
    fuzz(600)


def test_a_fault_is_found_and_its_input_kept(tmp_path):
    """The driver itself: a harness that aborts on some input, reached only past a branch that depends on another."""
    harness = tmp_path / "fuzz_fault.c"
    harness.write_text('''#include "fuzz.h"
#include <stdlib.h>
const char *const fuzz_words[] = {"{", NULL};
size_t fuzz_repair(uint8_t *data, size_t size, size_t room) { (void)data; (void)room; return size; }
size_t fuzz_seed(size_t i, uint8_t *to, size_t room) { (void)room; to[0] = 'a'; return i == 0; }
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size > 3 && data[1] == 'b')
        if (data[2] == 'c')
            if (data[3] == '{')
                abort();
    return 0;
}
''')
    program = tmp_path / "fuzz_fault"
    compiler = [os.environ.get("CC", "gcc"), "-std=c11", "-fsanitize=address", "-Itests/fuzz"]
    subprocess.run([*compiler, "-fsanitize-coverage=trace-pc", "-c", harness, "-o", tmp_path / "harness.o"], cwd=ROOT,
                   check=True, timeout=60)
    subprocess.run([*compiler, "tests/fuzz/fuzz_driver.c", tmp_path / "harness.o", "-o", program], cwd=ROOT, check=True,
                   timeout=60)
    run = subprocess.run([program, "20"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and "the input that failed" in run.stderr
    failed = (tmp_path / "fuzz_fault.failed").read_bytes()
    assert failed[1:4] == b"bc{"
    assert subprocess.run([program, tmp_path / "fuzz_fault.failed"], capture_output=True, timeout=60).returncode == 1
