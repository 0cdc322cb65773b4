"""Runs a function on N ranks, each a fresh process, and never leaves one behind.

The processes are forked from a server that has imported torch and deepspeed_c and run nothing, so that two ranks
start in tens of milliseconds and no fork happens after torch has started its threads. Invariant: when a call
returns or raises, every process that it or its ranks started is gone; one that had to be killed is an error.

    def add(rank, world, x):            # at a test module's top level
        return rank + x

    def test_add(ranks):                # the fixture of conftest.py
        assert ranks(2, add, 5) == [5, 6]

`ranks(...)` raises RanksFailed with every rank's last output when one fails. `ranks.outcomes(...)` is for fault
tests: each rank ends as it may, and its Outcome tells how. A call that exceeds its time limit is an error in
both, with every rank's stacks.
"""
import ctypes
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass

# deepspeed_c loads its parts when they are asked for, so they are named; the last two for test modules.
PRELOAD = ["torch", "torch.distributed", "deepspeed_c.api", "deepspeed_c.comm", "deepspeed_c.distributed",
           "deepspeed_c.engine", "torch._dynamo", "numpy", "pytest"]
LAST_OUTPUT = 6000  # characters of each rank's output that an error shows
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
GRACE = 2.0  # seconds that ranks have to fail by themselves once one has failed: what they say helps


class RanksFailed(AssertionError):
    """At least one rank failed, or the time limit passed. `outcomes` has what each rank did."""

    def __init__(self, text, outcomes):
        super().__init__(text)
        self.outcomes = outcomes


@dataclass
class Outcome:
    """How one rank ended: a value, an exception, or a signal."""

    rank: int
    value: object = None
    error: str = None  # type name of the exception, None if the function returned
    text: str = ""  # str() of the exception
    trace: str = ""  # its traceback
    exit_code: int = None  # 0; the code of a process that ended itself; negative: the signal that killed it
    seconds: float = 0.0  # from the start of the function to its return or exception
    output: str = ""  # what the rank wrote to stdout and stderr

    @property
    def ok(self):
        return self.exit_code == 0 and self.error is None

    def describe(self):
        if self.ok:
            how = f"returned after {self.seconds:.2f} s"
        elif self.error:
            how = f"raised {self.error}: {self.text}"
        elif self.exit_code is not None and self.exit_code < 0:
            how = f"was ended by {signal.Signals(-self.exit_code).name}"
        else:
            how = f"ended with exit code {self.exit_code}, without returning"
        said = (self.trace + self.output[-LAST_OUTPUT:]).strip()
        return f"---- rank {self.rank} {how}\n{said}".rstrip()


def die():
    """For a rank of a fault test: end this process as `kill -9` does, at once and without clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def reserve_port():
    """A free port, and the socket that keeps it from being handed to anybody who asks for a free one.

    The socket is bound and never listens. With SO_REUSEADDR on both sides, rank 0's store (which sets it too)
    can bind and listen there all the same, so that no moment exists in which the port is up for grabs.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held, held.getsockname()[1]


def run_rank(rank, world, port, folder, environment, fn, args):
    """The body of one rank's process: output to a file, result or exception to another."""
    gc.freeze()  # a collection need not look at what torch and its modules are made of
    os.setsid()  # whatever this rank starts can be found and ended by its session
    # The server ends when the test run does, however that ended; so do its ranks then.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    log = os.open(os.path.join(folder, f"{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        LOCAL_SIZE=str(world), CROSS_RANK="0", CROSS_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    os.environ.update(environment)
    outcome = Outcome(rank, exit_code=0)
    start = time.monotonic()
    try:
        outcome.value = fn(rank, world, *args)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are outcomes as well
        outcome.error, outcome.text = type(error).__name__, str(error)
        outcome.trace = traceback.format_exc()
    outcome.seconds = time.monotonic() - start
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        data = pickle.dumps(outcome)
    except Exception as error:
        data = pickle.dumps(Outcome(rank, error=type(error).__name__, exit_code=0,
                                    text=f"the value that rank {rank} returned cannot be pickled: {error}"))
    partial = os.path.join(folder, f"{rank}.partial")
    with open(partial, "wb") as out:
        out.write(data)
    os.rename(partial, os.path.join(folder, f"{rank}.result"))  # whole or absent


def processes_of(sessions):
    """{pid: command line} of live processes in these sessions; a zombie is not alive."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat") as text:
                fields = text.read().rpartition(")")[2].split()
            if int(fields[3]) in sessions and fields[0] not in "ZX":
                with open(f"/proc/{name}/cmdline") as text:
                    found[int(name)] = text.read().replace("\0", " ")[:200]
        except (OSError, IndexError):
            continue  # it ended while we looked
    return found


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Ranks:
    """What the fixture `ranks` gives. One object serves a whole test session."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def __call__(self, n, fn, *args, timeout=60, env=None):
        """fn(rank, world, *args) on n ranks: the list of what they returned, or RanksFailed."""
        outcomes = self.run(n, fn, args, timeout, env, stop_at_failure=True, linger=2.0)
        if not all(outcome.ok for outcome in outcomes):
            raise RanksFailed(self.report(outcomes, f"{fn.__name__} failed on {n} ranks"), outcomes)
        return [outcome.value for outcome in outcomes]

    def outcomes(self, n, fn, *args, timeout=60, env=None, linger=10.0):
        """The same, but every rank runs to its own end; returns an Outcome for each.

        `linger`: seconds that processes which a rank started (data-loader workers) may outlive it.
        """
        return self.run(n, fn, args, timeout, env, stop_at_failure=False, linger=linger)

    def run(self, n, fn, args, timeout, env, stop_at_failure, linger):
        folder = tempfile.mkdtemp(prefix="ranks-")
        held, port = reserve_port()
        processes = []
        try:
            # The server's own environment is set when it starts: libgomp reads OMP_NUM_THREADS only then.
            with one_thread():
                for rank in range(n):
                    process = self.context.Process(
                        target=run_rank, args=(rank, n, port, folder, dict(env or {}), fn, args), daemon=False)
                    process.start()
                    processes.append(process)
            timed_out = not self.wait(processes, folder, time.monotonic() + timeout, stop_at_failure)
            self.dump_stacks(processes)
            left = self.end(processes, 0.0 if timed_out else linger)
            outcomes = [self.outcome(rank, processes[rank], folder) for rank in range(n)]
        finally:
            kill(process.pid for process in processes if process.is_alive())
            held.close()
            shutil.rmtree(folder, ignore_errors=True)
        if timed_out:
            text = f"{fn.__name__} did not end on {n} ranks within {timeout} s; what each thread was doing:"
            raise RanksFailed(self.report(outcomes, text), outcomes)
        if left:
            lines = "\n".join(f"    {pid}: {command}" for pid, command in left.items())
            raise RanksFailed(self.report(outcomes, f"processes outlived their ranks (killed now):\n{lines}"), outcomes)
        return outcomes

    def wait(self, processes, folder, deadline, stop_at_failure):
        """Until every rank has ended, or one has failed and the others had their grace. False: time is up."""
        failed = False
        while alive := [process for process in processes if process.is_alive()]:
            left = deadline - time.monotonic()
            if left <= 0:
                return failed
            multiprocessing.connection.wait([process.sentinel for process in alive], left)
            if stop_at_failure and not failed:
                failed = any(not self.outcome(rank, process, folder).ok
                             for rank, process in enumerate(processes) if not process.is_alive())
                if failed:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return True

    def dump_stacks(self, processes):
        """Have every live rank write all its threads' Python stacks to its output."""
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            try:
                os.kill(process.pid, signal.SIGUSR1)
            except ProcessLookupError:
                pass
        if alive:
            multiprocessing.connection.wait([process.sentinel for process in alive], 0.5)

    def end(self, processes, linger):
        """Kills what is still there. Returns processes that outlived ranks which had ended by themselves."""
        live_ranks = {process.pid for process in processes if process.is_alive()}
        sessions = {process.pid for process in processes}
        kill(live_ranks)
        for process in processes:
            process.join()
        stop = time.monotonic() + linger
        left = processes_of(sessions)
        while left and not live_ranks and time.monotonic() < stop:
            time.sleep(0.02)  # these are not our children: nothing tells when they end
            left = processes_of(sessions)
        kill(left)
        return {} if live_ranks else left

    def outcome(self, rank, process, folder):
        try:
            with open(os.path.join(folder, f"{rank}.result"), "rb") as data:
                outcome = pickle.load(data)
        except OSError:
            outcome = Outcome(rank)
        outcome.exit_code = process.exitcode
        try:
            with open(os.path.join(folder, f"{rank}.log"), errors="replace") as text:
                outcome.output = text.read()
        except OSError:
            pass
        return outcome

    def report(self, outcomes, headline):
        return "\n".join([headline, *(outcome.describe() for outcome in outcomes)])


class one_thread:
    """OMP_NUM_THREADS=1 in this process's environment for a moment."""

    def __enter__(self):
        self.before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"

    def __exit__(self, *exception):
        if self.before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = self.before
