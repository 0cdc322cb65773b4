"""Which processes belong to a job, and the guardian that ends them when the launcher is killed.

Invariant: a process belongs to the job if its environment carries the job's token, which children inherit whatever
session or parent they have; for one that drops its environment, the session of its rank decides.
"""
import os
import signal
import time

JOB_VARIABLE = "DEEPSPEED_C_JOB"
UNKILLABLE_S = 10.0  # from SIGKILL to giving up: a process in the kernel's hands cannot be ended


def new_token(environ):
    """(token, value of JOB_VARIABLE): a job inside a job carries both tokens, so that ending the outer ends all."""
    token = os.urandom(8).hex()
    outer = environ.get(JOB_VARIABLE)
    return token, f"{outer}:{token}" if outer else token


class Guardian:
    """A process that outlives this one by a moment, should this one be killed, and ends the job's processes."""

    def __init__(self, token):
        read_end, self._write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _guard(read_end, token)
            finally:
                os._exit(0)
        os.close(read_end)

    def dismiss(self):
        """The job has ended in an orderly way: the guardian leaves what there is alone."""
        try:
            os.write(self._write_end, b".")
            os.waitpid(self._pid, 0)
        except (BrokenPipeError, ChildProcessError):
            pass  # somebody killed it


def _guard(read_end, token):
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # whoever reads the launcher's output must see its end
        os.dup2(null, fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != read_end:  # the pipe's other end above all: only the launcher may hold it
            try:
                os.close(fd)
            except OSError:
                pass  # the listing's own
    if os.read(read_end, 1):
        return
    deadline = time.monotonic() + UNKILLABLE_S
    while (members := find_members(token, ())) and time.monotonic() < deadline:
        for pid in members:
            send(pid, signal.SIGKILL)
        time.sleep(0.02)


def find_members(token, sessions):
    """Live processes that carry the token or are in one of the sessions, without this one and its parent."""
    # The environment of a process that is just calling exec reads as empty: none means none twice.
    members = _scan(token, sessions)
    if not members:
        time.sleep(0.01)
        members = _scan(token, sessions)
    return members


def _scan(token, sessions):
    mark, members = token.encode(), []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in (os.getpid(), os.getppid()):
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                state, _, _, session = file.read().rpartition(b")")[2].split()[:4]
            if state in (b"Z", b"X"):
                continue
            if int(session) not in sessions:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if mark not in file.read():
                        continue
        except (OSError, ValueError):
            continue  # gone, or another user's
        members.append(int(entry))
    return members


def send(pid, number):
    """os.kill, for a process that may be gone."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass
