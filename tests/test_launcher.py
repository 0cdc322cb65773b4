"""The launcher from outside: what it refuses, what ranks see, and that nothing of a job survives its end."""
import argparse
import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspeed_c.launcher import binding, port, resources, runner
from deepspeed_c.launcher.options import parse

RUNNER = [sys.executable, "-m", "deepspeed_c.launcher.runner"]
LIMIT_S = 20
ROOT = Path(__file__).resolve().parent.parent
CLEARED = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "KMP_AFFINITY", "RANK", "LOCAL_RANK", "WORLD_SIZE",
           "MASTER_PORT", "DEEPSPEED_C_JOB")


def environment(**changes):
    """This process's, for ranks on the CPU."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", **changes}


def launch(*args, **changes):
    return subprocess.run([*RUNNER, *map(str, args)], env=environment(**changes), capture_output=True, text=True,
                          timeout=LIMIT_S)


@contextlib.contextmanager
def launched(*args, **changes):
    """A launcher in the background; killed with what it started if the test leaves it."""
    with subprocess.Popen([*RUNNER, *map(str, args)], env=environment(**changes), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def script(tmp_path):
    """Writes a script and returns its path; it knows `rank` and `say(word)`, which leaves a file of that name."""
    def write(body):
        path = tmp_path / "script.py"
        path.write_text("import json, os, signal, subprocess, sys, time\n"
                        "rank = int(os.environ['RANK'])\n"
                        f"here = {str(tmp_path)!r}\n"
                        "def say(word, text=''):\n"
                        "    with open(f'{here}/.{word}', 'w') as file: file.write(str(text))\n"
                        "    os.rename(f'{here}/.{word}', f'{here}/{word}')\n"
                        "def wait(word):\n"
                        "    while not os.path.exists(f'{here}/{word}'): time.sleep(0.005)\n" + body)
        return path
    return write


def until(condition, limit_s=LIMIT_S):
    """Polls: what is waited for is another process's doing, which this one cannot be told of."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "time is over"
        time.sleep(0.005)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def pids_said(tmp_path, words):
    until(lambda: all((tmp_path / word).exists() for word in words))
    return [int((tmp_path / word).read_text()) for word in words]


# ---- bad arguments ----

@pytest.mark.parametrize("args, text", [
    (["--num_nodes", 2, "x.py"], "--num_nodes 2 is not there yet"),
    (["--launcher", "openmpi", "x.py"], "--launcher is not there yet"),
    (["--launcher_args=-x", "x.py"], "--launcher_args is not there yet"),
    (["--node_rank", 0, "x.py"], "--node_rank is not there yet"),
    (["--no_ssh", "x.py"], "--no_ssh is not there yet"),
    (["--force_multi", "x.py"], "--force_multi is not there yet"),
    (["--ssh_port", 22, "x.py"], "--ssh_port is not there yet"),
    (["--venv_script", "f", "x.py"], "--venv_script is not there yet"),
    (["--autotuning", "run", "x.py"], "--autotuning is not there yet"),
    (["--elastic_training", "x.py"], "--elastic_training is not there yet"),
    (["--min_elastic_nodes", 1, "x.py"], "--min_elastic_nodes is not there yet"),
    (["--max_elastic_nodes", 1, "x.py"], "--max_elastic_nodes is not there yet"),
    (["--num_gpus", 0, "x.py"], "--num_gpus must be at least 1, got 0"),
    (["--num_nodes", 0, "x.py"], "--num_nodes must be 1, got 0"),
    (["--master_port", 70000, "x.py"], "--master_port must be in 1 to 65535, got 70000"),
    (["--module", "--no_python", "x"], "--module and --no_python exclude each other"),
    (["--bind_core_list", "0", "x.py"], "--bind_core_list has no effect without --bind_cores_to_rank"),
    (["--include", "localhost:0", "--exclude", "localhost:1", "x.py"], "mutually exclusive"),
    (["--include", "localhost:0", "--num_gpus", 1, "x.py"], "Cannot specify num_nodes/gpus with include/exclude"),
    (["no_such_script.py"], "the script no_such_script.py does not exist"),
])
def test_mistake_is_one_line_that_names_it(args, text):
    run = launch(*args)
    assert run.returncode == 2
    assert text in run.stderr and run.stderr.startswith("deepspeed: error: ") and run.stderr.count("\n") == 1
    assert run.stdout == ""


@pytest.mark.parametrize("spec, text", [
    ("otherhost:0", "Hostname 'otherhost' not found in hostfile"),
    ("localhost:a", "'localhost:a' is not HOST or HOST:SLOT"),
    ("localhost:", "'localhost:' is not HOST"),
    ("localhost:0@", "'' is not HOST"),
])
def test_include_and_exclude_name_what_is_wrong(spec, text, script):
    for option in ("--include", "--exclude"):
        run = launch(option, spec, script(""))
        assert run.returncode == 2 and text in run.stderr


def test_exclude_of_everything_is_an_error(script):
    run = launch("--exclude", "localhost", script(""))
    assert run.returncode == 2 and "--exclude localhost leaves no slot" in run.stderr


@pytest.mark.parametrize("text, error", [
    ("localhost slots=2\nlocalhost slots=3\n", "Hostfile contains multiple entries for localhost"),
    ("localhost\n", "Hostfile contains a bad entry: localhost"),
    ("# only this\n\n", "Hostfile is empty or not formatted correctly"),
    ("localhost slots=1\nfaraway slots=1\n", "ranks on more than this machine are not there yet"),
    ("faraway slots=1\n", "ranks on more than this machine are not there yet"),
    ("localhost slots=2\n$(touch${IFS}hit) slots=1\n", "more than this machine"),
])
def test_hostfile_errors(text, error, script, tmp_path):
    (tmp_path / "hosts").write_text(text)
    run = launch("-H", tmp_path / "hosts", script(""))
    assert run.returncode == 2 and error in run.stderr
    assert not Path("hit").exists()


def test_slot_beyond_the_hostfile_is_an_error(script, tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    run = launch("-H", tmp_path / "hosts", "-i", "localhost:2", script(""))
    assert run.returncode == 2 and "No slot '2' specified on host 'localhost'" in run.stderr


@pytest.mark.parametrize("text, error", [
    ("3-1", "'3-1' does not ascend"), ("0,0", "'0' does not ascend or overlaps"), ("0-3,2", "overlaps"),
    ("a", "'a' is not a core"), ("", "'' is not a core"), ("1,,2", "'' is not a core"), ("-1", "'-1' is not a core"),
])
def test_bad_core_lists_are_named(text, error):
    with pytest.raises(ValueError, match=f"Bad range.*{error}"):
        binding.parse_core_list(text)


def test_cores_that_do_not_suffice_or_are_not_ours_are_errors():
    with pytest.raises(ValueError, match="core 100000 is not among those that this process may use"):
        binding.cores_of_ranks("100000", 1, {})
    with pytest.raises(ValueError, match="too few for 100000 ranks"):
        binding.cores_of_ranks(None, 100000, {})
    with pytest.raises(ValueError, match="KMP_AFFINITY"):
        binding.cores_of_ranks(None, 1, {"KMP_AFFINITY": "compact"})


def test_explicit_port_that_is_taken_is_an_error(script):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        number = server.getsockname()[1]
        run = launch("--master_port", number, script(""))
    assert run.returncode == 2 and f"--master_port {number} is in use" in run.stderr


def test_program_that_cannot_be_started_is_an_error():
    run = launch("--no_python", "./no_such_program")
    assert run.returncode == 2 and "rank 0 could not be started" in run.stderr and "no_such_program" in run.stderr


# ---- what ranks see ----

REPORT = "say(f'rank{rank}', json.dumps([sys.argv[1:], dict(os.environ)]))\n"


def reports(tmp_path, n):
    return [json.loads((tmp_path / f"rank{r}").read_text()) for r in range(n)]


def test_nothing_asked_means_one_rank_and_says_so_once(script, tmp_path):
    run = launch(script(REPORT))
    assert run.returncode == 0
    assert run.stderr.count("one rank on the CPU") == 1
    (argv, environ), = reports(tmp_path, 1)
    assert argv == ["--local_rank=0"] and environ["WORLD_SIZE"] == "1"
    assert launch("-q", script(REPORT)).stderr == ""
    assert launch("--log_level", "warning", script(REPORT)).stderr == ""


@pytest.mark.parametrize("option", [["--num_gpus", 3], ["--num_accelerators", 3], ["--include", "localhost:0,1,2"],
                                    ["-i", "localhost:2,1,0,0"], ["--num_nodes", 1, "--num_gpus", 3]])
def test_environment_of_each_rank(option, script, tmp_path):
    with port_free() as number:
        pass
    assert launch(*option, "--master_addr", "127.0.0.2", "--master_port", number, script(REPORT)).returncode == 0
    n_cores = len(os.sched_getaffinity(0))
    for r, (argv, environ) in enumerate(reports(tmp_path, 3)):
        assert argv == [f"--local_rank={r}"]
        expected = {"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": 3, "LOCAL_SIZE": 3, "LOCAL_WORLD_SIZE": 3,
                    "CROSS_RANK": 0, "CROSS_SIZE": 1, "MASTER_ADDR": "127.0.0.2", "MASTER_PORT": number,
                    "OMP_NUM_THREADS": max(1, n_cores // 3)}
        assert {name: environ[name] for name in expected} == {k: str(v) for k, v in expected.items()}
        assert "CUDA_VISIBLE_DEVICES" not in environ


@contextlib.contextmanager
def port_free():
    with socket.socket() as probe:
        probe.bind(("", 0))
        yield probe.getsockname()[1]


def test_master_address_is_this_machine_and_omp_threads_of_the_user_stay(script, tmp_path):
    assert launch("--num_gpus", 2, script(REPORT), OMP_NUM_THREADS="7").returncode == 0
    for _, environ in reports(tmp_path, 2):
        assert environ["OMP_NUM_THREADS"] == "7" and environ["MASTER_ADDR"] == "127.0.0.1"


ODD = ["two words", "it's", 'say "x"', "$HOME", "`id`", "*", "", "a\nb", "--num_gpus", "9", "-h", "ü", ";", "&&", "\\"]


def test_arguments_and_values_pass_unharmed(script, tmp_path):
    assert launch("--num_gpus", 1, script(REPORT), *ODD, ODD_VALUE="$(id) 'x' \"y\"").returncode == 0
    (argv, environ), = reports(tmp_path, 1)
    assert argv == ["--local_rank=0", *ODD] and environ["ODD_VALUE"] == "$(id) 'x' \"y\""


def test_script_with_a_space_in_its_path_and_without_local_rank(script, tmp_path):
    path = script(REPORT).rename(tmp_path / "my script.py")
    assert launch("--no_local_rank", "--num_gpus", 1, path, "x").returncode == 0
    assert reports(tmp_path, 1)[0][0] == ["x"]


def test_module_and_program_of_its_own(script, tmp_path):
    script(REPORT)
    run = launch("--module", "--num_gpus", 1, "script", "x", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert run.returncode == 0 and reports(tmp_path, 1)[0][0] == ["--local_rank=0", "x"]
    run = launch("--no_python", "--num_gpus", 1, "/bin/echo", "-x")
    assert run.returncode == 0 and run.stdout == "--local_rank=0 -x\n"


def test_output_passes_through_unmodified(script):
    run = subprocess.run([*RUNNER, "-q", "--num_gpus", "2", str(script(
        "data = bytes(range(256)) * 500\n"
        "if rank: os.write(1, data); os.write(2, data)\n"))], env=environment(), capture_output=True, timeout=LIMIT_S)
    assert run.returncode == 0 and run.stdout == bytes(range(256)) * 500 == run.stderr


def test_rank_0_reads_the_input_and_the_others_see_its_end(script, tmp_path):
    path = script("say(f'rank{rank}', sys.stdin.read())\n")
    subprocess.run([*RUNNER, "--num_gpus", "2", str(path)], env=environment(), input=b"hello", timeout=LIMIT_S,
                   check=True)
    assert [(tmp_path / f"rank{r}").read_text() for r in range(2)] == ["hello", ""]


def test_hostfile_of_this_machine_gives_its_slots(script, tmp_path):
    (tmp_path / "hosts").write_text(f"# ours\n{socket.gethostname()} slots=4 # all of it\n")
    assert launch("-H", tmp_path / "hosts", "-e", f"{socket.gethostname()}:1", script(REPORT)).returncode == 0
    assert [environ["WORLD_SIZE"] for _, environ in reports(tmp_path, 3)] == ["3"] * 3


def test_one_host_of_several_can_be_chosen(script, tmp_path):
    (tmp_path / "hosts").write_text("faraway slots=8\nlocalhost slots=2\n")
    assert launch("-H", tmp_path / "hosts", "--include", "localhost", script(REPORT)).returncode == 0
    assert len(reports(tmp_path, 2)) == 2


def test_cores_are_bound_and_omp_threads_follow(script, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core only")
    path = script("say(f'rank{rank}', json.dumps([sorted(os.sched_getaffinity(0)), dict(os.environ)]))\n")
    text = f"{cores[0]},{cores[1]}"
    run = launch("--num_gpus", 2, "--bind_cores_to_rank", "--bind_core_list", text, path)
    assert run.returncode == 0, run.stderr
    seen = reports(tmp_path, 2)
    assert [own for own, _ in seen] == [[cores[0]], [cores[1]]]
    assert [environ["OMP_NUM_THREADS"] for _, environ in seen] == ["1", "1"]


def test_core_lists_and_their_parts():
    assert binding.parse_core_list("1,3-5, 7") == [1, 3, 4, 5, 7]
    assert binding.compress([7, 1, 3, 4, 5]) == "1,3-5,7"
    allowed = sorted(os.sched_getaffinity(0))
    assert binding.cores_of_ranks(binding.compress(allowed), 1, {}) == [allowed]
    assert set(binding.physical_cores(set(allowed))) <= set(allowed)


def test_default_port_that_is_taken_is_replaced_and_said(script, tmp_path):
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody listens there already: as good
            server.bind(("", 29500))
            server.listen()
        run = launch("--num_gpus", 1, script(REPORT))
    number = reports(tmp_path, 1)[0][1]["MASTER_PORT"]
    assert run.returncode == 0 and number != "29500"
    assert f"port 29500 is in use: the ranks meet at port {number}" in run.stderr


def test_two_launchers_never_choose_one_port():
    with port_free() as number:
        pass
    first, _ = port.choose(None, number)
    second, note = port.choose(None, number)
    assert first.number == number != second.number and "in use" in note
    with pytest.raises(port.PortTaken):
        port.choose(number, 0)
    first.release(), second.release()
    port.choose(number, 0)[0].release()


def test_log_files_hold_both_streams_of_each_rank(script, tmp_path):
    path = script("print('out', rank, flush=True); print('err', rank, file=sys.stderr)\n")
    run = launch("-q", "--num_gpus", 2, "--enable_each_rank_log", tmp_path / "new" / "logs", path)
    assert run.returncode == 0 and run.stdout == run.stderr == ""
    logs = sorted((tmp_path / "new" / "logs").iterdir())
    assert [re.sub(r"^\d{14}", "T", log.name) for log in logs] == ["T_rank0.log", "T_rank1.log"]
    assert [log.read_text() for log in logs] == [f"out {r}\nerr {r}\n" for r in range(2)]
    run = launch("--enable_each_rank_log", path, path)
    assert run.returncode == 2 and "is a file: give a folder" in run.stderr


def test_pid_file_is_there_while_it_runs(script, tmp_path):
    with launched("--num_gpus", 1, "--save_pid", script("say('up'); wait('go')\n")) as process:
        until(lambda: (tmp_path / "up").exists())
        file = Path(f"/tmp/{process.pid}.deepspeed")
        assert file.read_text() == str(process.pid)
        (tmp_path / "go").touch()
        assert f"launcher pid: {process.pid}" in process.communicate(timeout=LIMIT_S)[1]
        assert process.returncode == 0 and not file.exists()


# ---- failure ----

def test_exit_code_is_that_of_the_first_failing_rank_and_its_traceback_is_last(script):
    run = launch("--num_gpus", 3, script(
        "if rank == 1:\n"
        "    sys.excepthook = lambda *a: (sys.__excepthook__(*a), os._exit(3))\n"
        "    raise RuntimeError('the cause')\n"
        "try: time.sleep(60)\n"
        "finally: print('not the cause', file=sys.stderr)\n"))
    assert run.returncode == 3
    shown = run.stderr.rpartition("deepspeed: ")[2]
    assert shown.startswith("rank 1 of 3 exited with code 3")
    assert shown.splitlines()[1] == "Traceback (most recent call last):"
    assert shown.endswith("RuntimeError: the cause\n")


TRAINING = """
import torch
import deepspeed_c as deepspeed
torch.set_num_threads(1)
module = torch.nn.Linear(4, 2)
engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config={
    "train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 1}})
for i in range(1000):
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    if rank == 1 and i == 5: ENDS
    engine.step()
"""


@pytest.mark.parametrize("ends, code, last", [("raise ValueError('boom')", 1, "ValueError: boom\n"),
                                              ("print('Traceback (most recent call last):\\nseven', file=sys.stderr); "
                                               "sys.exit(7)", 7, "seven\n")])
@pytest.mark.parametrize("n", [1, pytest.param(5, marks=pytest.mark.long)])
def test_rank_that_fails_between_steps_is_named_not_those_that_wait_for_it(ends, code, last, n, script):
    for _ in range(n):
        run = launch("--num_gpus", 2, script(TRAINING.replace("ENDS", ends)))
        shown = run.stderr.rpartition("deepspeed: ")[2]
        assert shown.startswith(f"rank 1 of 2 exited with code {code};") and shown.endswith(last), run.stderr
        assert run.returncode == code


def test_one_rank_keeps_stderr_and_its_code(script):
    run = launch("-q", "--num_gpus", 1, script("print('last words', file=sys.stderr); sys.exit(5)"))
    assert run.returncode == 5
    assert run.stderr == "last words\ndeepspeed: rank 0 exited with code 5\n"


def test_end_of_a_log_is_shown_too(script, tmp_path):
    run = launch("--num_gpus", 2, "--enable_each_rank_log", tmp_path, script("if rank: raise OSError('in the log')"))
    assert run.returncode == 1 and run.stderr.endswith("OSError: in the log\n") and "_rank1.log" in run.stderr


@pytest.mark.parametrize("name, code", [("SIGKILL", 137), ("SIGSEGV", 139), ("SIGTERM", 143)])
def test_death_by_signal_is_128_plus_its_number(name, code, script):
    run = launch("--num_gpus", 2, script(
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        f"if rank: os.kill(os.getpid(), signal.{name})\n"
        "time.sleep(60)\n"))
    assert run.returncode == code
    assert f"rank 1 of 2 was killed by {name}" in run.stderr


def test_rank_that_ends_well_ends_nobody(script, tmp_path):
    run = launch("--num_gpus", 2, script("if rank: wait('done0'); say('done1')\nelse: say('done0')\n"))
    assert run.returncode == 0 and (tmp_path / "done1").exists()


def test_failure_is_noticed_at_once(script):
    path = script("if rank == 0: say('at', time.time()); sys.exit(4)\ntime.sleep(60)\n")
    assert launch("--num_gpus", 2, path).returncode == 4
    assert time.time() - float((path.parent / "at").read_text()) < 1.0


# Each rank leaves a child in its session, one in a session of its own, and one whose parent is gone.
FAMILY = """
nap = [sys.executable, "-c", "import os, sys, time; open(sys.argv[1] + '~', 'w').write(str(os.getpid())); "
       "os.rename(sys.argv[1] + '~', sys.argv[1]); time.sleep(120)"]
subprocess.Popen([*nap, f"{here}/child{rank}"])
subprocess.Popen([*nap, f"{here}/away{rank}"], start_new_session=True)
if os.fork() == 0:
    subprocess.Popen([*nap, f"{here}/orphan{rank}"], start_new_session=True)
    os._exit(0)
os.wait()
for word in ("child", "away", "orphan"): wait(f"{word}{rank}")
say(f"self{rank}", os.getpid())
"""
WORDS = [f"{word}{r}" for word in ("child", "away", "orphan", "self") for r in range(2)]


def family_is_gone(pids, limit_s):
    until(lambda: not any(map(alive, pids)), limit_s)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_to_the_launcher_leaves_no_process(number, code, script, tmp_path):
    with launched("--num_gpus", 2, script(FAMILY + "time.sleep(120)\n")) as process:
        pids = pids_said(tmp_path, WORDS)
        process.send_signal(number)
        assert process.wait(LIMIT_S) == code
        assert not any(map(alive, pids))
        assert f"ended by {number.name}" in process.stderr.read()


def test_failing_rank_leaves_no_process(script, tmp_path):
    path = script(FAMILY + "wait('self0'); wait('self1')\nif rank: sys.exit(3)\ntime.sleep(120)\n")
    assert launch("--num_gpus", 2, path).returncode == 3
    assert not any(map(alive, pids_said(tmp_path, WORDS)))


def test_killed_launcher_leaves_no_process(script, tmp_path):
    with launched("--num_gpus", 2, script(FAMILY + "time.sleep(120)\n")) as process:
        pids = pids_said(tmp_path, WORDS)
        process.kill()
        assert process.wait(LIMIT_S) == -signal.SIGKILL
        family_is_gone(pids, 5)


def test_ranks_die_with_the_launcher_even_without_its_guardian(script, tmp_path):
    with launched("--num_gpus", 2, script("say(f'self{rank}', os.getpid())\ntime.sleep(120)\n")) as process:
        ranks = pids_said(tmp_path, ["self0", "self1"])
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        guardian, = {int(pid) for pid in children} - set(ranks)
        os.kill(guardian, signal.SIGKILL)
        process.kill()
        process.wait(LIMIT_S)
        family_is_gone(ranks, 5)


def test_process_that_dropped_its_environment_is_ended_with_its_rank(script, tmp_path):
    path = script("child = subprocess.Popen(['/usr/bin/env', '-i', '/bin/sleep', '120'])\n"
                  "while open(f'/proc/{child.pid}/comm').read() != 'sleep\\n': time.sleep(0.005)\n"
                  "say(f'bare{rank}', child.pid)\ntime.sleep(120)\n")
    with launched("--num_gpus", 2, path) as process:
        pids = pids_said(tmp_path, ["bare0", "bare1"])
        process.terminate()
        assert process.wait(LIMIT_S) == 143 and not any(map(alive, pids))


def test_ctrl_c_reaches_the_script_as_keyboard_interrupt(script, tmp_path):
    with launched("--num_gpus", 2, script("say(f'up{rank}')\n"
                                          "try: time.sleep(120)\n"
                                          "except KeyboardInterrupt: say(f'saved{rank}')\n")) as process:
        until(lambda: all((tmp_path / f"up{r}").exists() for r in range(2)))
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 130
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


DEAF = ("for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "say(f'up{rank}', os.getpid())\n"
        "time.sleep(120)\n")


def test_second_ctrl_c_kills_at_once(script, tmp_path):
    with launched("--num_gpus", 2, script(DEAF)) as process:
        pids = pids_said(tmp_path, ["up0", "up1"])
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired):  # the ranks do not listen
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 130 and time.monotonic() - begin < 3
        assert not any(map(alive, pids))


def test_rank_that_does_not_listen_is_killed_after_the_grace(script, tmp_path):
    begin = time.monotonic()
    run = launch("--num_gpus", 2, script(DEAF.replace("time.sleep", "if rank: wait('up0'); sys.exit(9)\ntime.sleep")))
    assert run.returncode == 9 and 4.5 < time.monotonic() - begin < 9
    assert not any(map(alive, pids_said(tmp_path, ["up0"])))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_signal_at_any_moment_of_the_start_leaves_no_process(name, script, tmp_path):
    path = script("subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', here],\n"
                  "                 start_new_session=True)\ntime.sleep(60)\n")
    mark = str(tmp_path).encode()
    for k in range(15):  # from before the first import to after the last rank
        with launched("--num_gpus", 3, path) as process:
            time.sleep(k * 0.012)
            process.send_signal(signal.Signals[name])
            process.wait(LIMIT_S)
            until(lambda: not any(mark in command for command in commands()), 3)


def commands():
    """The command lines of all live processes but this one; a zombie's is empty."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        if int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                yield Path(f"/proc/{entry}/cmdline").read_bytes()


def test_job_inside_a_job_ends_with_the_outer_one(script, tmp_path):
    inner = tmp_path / "inner.py"
    inner.write_text(f"import os, time\nopen({str(tmp_path)!r} + '/~', 'w').write(str(os.getpid()))\n"
                     f"os.rename({str(tmp_path)!r} + '/~', {str(tmp_path)!r} + '/inner')\ntime.sleep(120)\n")
    with launched("--num_gpus", 1, script(
            f"os.execv(sys.executable, {[*RUNNER, '--num_gpus', '1', str(inner)]!r})\n")) as process:
        pids = pids_said(tmp_path, ["inner"])
        process.kill()
        process.wait(LIMIT_S)
        family_is_gone(pids, 5)


def test_reader_of_the_output_sees_its_end_when_the_launcher_has_gone(script):
    with launched("--num_gpus", 2, script("os.write(1, b'x\\n')\n")) as process:
        out, _ = process.communicate(timeout=LIMIT_S)  # would wait for ever on a guardian that holds the pipe
        assert out == "x\nx\n" and process.returncode == 0


# ---- GPUs, as seen from device files ----

@pytest.fixture
def gpus(monkeypatch):
    """Four device files and a torch that can use them."""
    real = os.listdir
    names = ["nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "null"]
    monkeypatch.setattr(os, "listdir", lambda path=".": names if path == "/dev" else real(path))
    monkeypatch.setattr(resources, "_torch_is_cpu_build", lambda: False)


def planned(args, **environ):
    options = parse(["--hostfile", "/no/such/file", *args, "script.py"])
    return options, resources.find(options, environ)


@pytest.mark.parametrize("args, environ, slots", [
    ([], {}, "0123"), (["--num_gpus", "2"], {}, "01"), (["--include", "localhost:1,3"], {}, "13"),
    (["--exclude", "localhost:0"], {}, "123"), ([], {"CUDA_VISIBLE_DEVICES": "0,2"}, "02"),
    ([], {"CUDA_VISIBLE_DEVICES": "3, 1"}, "31"), (["--num_gpus", "1"], {"CUDA_VISIBLE_DEVICES": "2,3"}, "0"),
])
@pytest.mark.usefixtures("gpus")
def test_gpu_slots_and_the_variable_that_ranks_get(args, environ, slots):
    options, found = planned(args, **environ)
    assert found.gpus and found.slots == list(slots)
    ranks = runner.plan(options, found, 1, environ)
    assert [rank.environ["CUDA_VISIBLE_DEVICES"] for rank in ranks] == [",".join(slots)] * len(slots)
    assert bool(found.notes) == ("CUDA_VISIBLE_DEVICES" in environ)


@pytest.mark.usefixtures("gpus")
def test_gpu_ids_that_are_not_numbers_pass():
    _, found = planned([], CUDA_VISIBLE_DEVICES="GPU-8a1b,MIG-77")
    assert found.slots == ["GPU-8a1b", "MIG-77"]


@pytest.mark.parametrize("args, environ, text", [
    (["--num_gpus", "5"], {}, "GPU '4' was asked for, but this machine has 4"),
    (["--include", "localhost:4"], {}, "No slot '4' specified on host 'localhost'"),
    ([], {"CUDA_VISIBLE_DEVICES": "0,7"}, "GPU '7' was asked for"),
    ([], {"CUDA_VISIBLE_DEVICES": "0,,1"}, "GPU '' was asked for"),
    ([], {"DS_ACCELERATOR": "tpu"}, "DS_ACCELERATOR='tpu' is not one of 'cpu', 'cuda'"),
])
@pytest.mark.usefixtures("gpus")
def test_gpus_that_are_not_there_are_errors(args, environ, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        planned(args, **environ)


@pytest.mark.parametrize("environ", [{"DS_ACCELERATOR": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""},
                                     {"CUDA_VISIBLE_DEVICES": "-1"}])
@pytest.mark.usefixtures("gpus")
def test_gpus_can_be_left_out(environ):
    _, found = planned([], **environ)
    assert not found.gpus and found.slots == ["0"]


def test_cpu_build_of_torch_is_seen_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    for text, is_cpu in (("cuda: Optional[str] = None\nhip: Optional[str] = None\n", True),
                         ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", False),
                         ("cuda = None\nhip = '6.1'\n", False)):
        (package / "version.py").write_text(text)
        assert resources._torch_is_cpu_build() is is_cpu


# ---- the launcher itself ----

def test_launcher_imports_no_torch_and_no_core(script):
    code = ("import sys; from deepspeed_c.launcher.runner import main; code = main(sys.argv[1:]); "
            "assert not {'torch', 'numpy', 'deepspeed_c._core'} & set(sys.modules), 'imported'; sys.exit(code)")
    subprocess.run([sys.executable, "-c", code, "--num_gpus", "1", str(script(""))], env=environment(), check=True,
                   timeout=LIMIT_S)


def test_launcher_costs_under_150_ms(script):
    """Processor time of launcher and rank, less that of the script alone: other loads do not count."""
    def cost(*command):
        def spent():
            usage = resource.getrusage(resource.RUSAGE_CHILDREN)
            return usage.ru_utime + usage.ru_stime
        costs = []
        for _ in range(5):
            before = spent()
            subprocess.run(command, env=environment(RANK="0"), check=True, timeout=LIMIT_S, capture_output=True)
            costs.append(spent() - before)
        return min(costs)

    path = str(script(""))
    assert cost(*RUNNER, "--num_gpus", "1", path) - cost(sys.executable, path) < 0.15


def test_environment_file_has_the_documented_name():
    assert runner.DEEPSPEED_ENVIRONMENT_NAME == os.environ.get("DS_ENV_FILE", ".deepspeed_env")


def test_every_documented_option_is_known():
    documented = ("-H --hostfile -i --include -e --exclude --num_nodes --num_gpus --num_accelerators "
                  "--min_elastic_nodes --max_elastic_nodes --elastic_training --master_port --master_addr --node_rank "
                  "--no_ssh --no_ssh_check --launcher --launcher_args --module --no_python --no_local_rank "
                  "--force_multi --ssh_port --venv_script --save_pid --enable_each_rank_log --autotuning "
                  "--bind_cores_to_rank --bind_core_list --log_level -q").split()
    known = set()
    real = argparse.ArgumentParser.parse_args

    def spy(self, args=None, namespace=None):
        known.update(option for action in self._actions for option in action.option_strings)
        return real(self, args, namespace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", spy)
        parse(["script.py"])
    assert set(documented) <= known
