"""Starting, watching and ending the ranks of one machine.

Invariant: when `Job.run` returns after a failure or a signal, no process of the job is left; when this process dies
without a word (SIGKILL), the same holds within a moment. Three things see to that: each rank is in a session of its
own, the kernel kills a rank when this process is gone, and a guardian process (members.py) ends whatever the ranks
had started.
"""
import ctypes
import os
import select
import signal
import subprocess
import threading
import time

from deepspeed_c.launcher.members import UNKILLABLE_S, Guardian, find_members, send

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what asks the job to end
GRACE_S = 5.0  # from the first signal to SIGKILL
_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 100
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Rank:
    """One process to be: what to run and where its output goes. `code` is Popen's returncode once it has ended."""

    def __init__(self, rank, command, environ, cores=None, log_path=None):
        self.rank, self.command, self.environ = rank, command, environ
        self.cores, self.log_path = cores, log_path
        self.process = self.code = self.pump = None

    def start(self, launcher_pid, piped):
        """Starts the process; `piped` sends its stderr through this process, so that its end can be shown again."""
        log = open(self.log_path, "wb") if self.log_path else None
        try:
            # Returns when the child has called exec, so that no signal sent from here meets this process's handlers.
            self.process = subprocess.Popen(
                self.command, env=self.environ, start_new_session=True,
                # Two readers would steal each other's input: rank 0 has it.
                stdin=None if self.rank == 0 else subprocess.DEVNULL,
                stdout=log, stderr=log or (subprocess.PIPE if piped else None),
                preexec_fn=lambda: self._in_child(launcher_pid))
        finally:
            if log:
                log.close()

    def _in_child(self, launcher_pid):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher_pid:  # gone before the line above
            os._exit(1)
        if self.cores:
            os.sched_setaffinity(0, self.cores)

    def tail(self):
        """The last lines that it wrote to stderr (with a log: to either), from a traceback on if there is one."""
        if self.log_path:
            with open(self.log_path, "rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
                text = log.read()
        else:
            text = self.pump.tail if self.pump else b""
        lines = text.splitlines(keepends=True)[-_TAIL_LINES:]
        starts = [k for k, line in enumerate(lines) if line.startswith(b"Traceback (most recent call last):")]
        return b"".join(lines[starts[0]:] if starts else lines)


class Pump(threading.Thread):
    """Passes a rank's stderr on as it comes and keeps its end."""

    def __init__(self, stream):
        super().__init__(daemon=True)
        self._fd = stream.fileno()
        self._stream = stream  # keeps the descriptor open
        self.tail = b""

    def run(self):
        while chunk := os.read(self._fd, 65536):
            self.tail = (self.tail + chunk)[-_TAIL_BYTES:]
            write_stderr(chunk)


class Job:
    """The ranks of one run. `token` marks its processes; `say` takes lines for the user."""

    def __init__(self, ranks, token, say):
        self._ranks, self._token, self._say = ranks, token, say
        self._signals = []  # those that asked this process to end, in order
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)

    def run(self):
        """Runs the ranks to their end. Returns 0, the first failure's exit code, or 128 + a signal's number."""
        handlers = self._catch_signals()
        guardian = Guardian(self._token)
        try:
            self._start()
            failed = self._watch()
            if failed is None and not self._signals:
                self._drain()
                return 0
            self._end(self._signals[0] if self._signals else signal.SIGTERM)
            self._drain()
            return self._report(failed)
        except BaseException:
            self._end(signal.SIGKILL)
            raise
        finally:
            guardian.dismiss()
            self._release_signals(handlers)

    def _catch_signals(self):
        """Returns the handlers that were there."""
        handlers = {}
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
                handlers[number] = signal.signal(number, lambda number, frame: self._signals.append(number))
        # Wakes _sleep. An inherited SIG_IGN would also make the kernel drop the exit codes of the ranks.
        handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        return handlers

    def _release_signals(self, handlers):
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _start(self):
        launcher_pid = os.getpid()
        # One rank keeps the terminal for its progress bar and its debugger; its end is on the screen anyway.
        piped = len(self._ranks) > 1
        for rank in self._ranks:
            if self._signals:
                return
            try:
                rank.start(launcher_pid, piped)
            except (OSError, subprocess.SubprocessError) as error:
                raise OSError(f"rank {rank.rank} could not be started: {error}") from None
        for rank in self._ranks:  # after the last fork, which must not copy a thread's lock
            if rank.process.stderr:
                rank.pump = Pump(rank.process.stderr)
                rank.pump.start()

    def _watch(self):
        """Waits until a rank fails (returned), a signal came or all ended well (None)."""
        while not self._signals:
            failed = self._reap()
            if failed or all(rank.code == 0 for rank in self._ranks):
                return failed
            self._sleep(None)
        return None

    def _reap(self):
        """Notes which ranks have ended; returns one that has just failed, or None."""
        failed = None
        for rank in self._ranks:
            if rank.process is not None and rank.code is None:
                rank.code = rank.process.poll()
                if rank.code and failed is None:
                    failed = rank
        return failed

    def _sleep(self, seconds):
        """Until a signal comes (SIGCHLD: a rank ended) or the time is over."""
        select.select([self._wake_read], [], [], seconds)
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass

    def _end(self, first):
        """Ends every process of the job: `first` to all, SIGTERM to what outlives its rank, SIGKILL after the grace
        or at once on a second signal."""
        # A rank that ended long ago may have lent its number to a stranger's session: its children have the token.
        sessions = {rank.process.pid for rank in self._ranks if rank.process and rank.code != 0}
        begin, sent = time.monotonic(), set()
        while True:
            self._reap()
            members = find_members(self._token, sessions)
            elapsed = time.monotonic() - begin
            if not members:
                return
            if elapsed > GRACE_S + UNKILLABLE_S:
                self._say("warning", f"process(es) {', '.join(map(str, members))} could not be ended")
                return
            number = first
            if elapsed > GRACE_S or len(self._signals) > 1:
                number = signal.SIGKILL
            elif first != signal.SIGKILL and all(rank.process is None or rank.code is not None
                                                 for rank in self._ranks):
                number = signal.SIGTERM
            for pid in members:
                if number == signal.SIGKILL or (pid, number) not in sent:
                    send(pid, number)
                    sent.add((pid, number))
            self._sleep(0.05)

    def _drain(self):
        """Lets the pumps pass on what is in the pipes; somebody else may hold one open, so not for ever."""
        deadline = time.monotonic() + 1.0
        for rank in self._ranks:
            if rank.pump:
                rank.pump.join(max(0.0, deadline - time.monotonic()))

    def _report(self, failed):
        if failed is None:
            name = signal.Signals(self._signals[0]).name
            self._say("error", f"ended by {name}, and with it the ranks")
            return 128 + self._signals[0]
        what, code = describe(failed.code)
        tail = failed.tail()
        where = f" (log: {failed.log_path})" if failed.log_path else ""
        heading = f"rank {failed.rank} of {len(self._ranks)} {what}; the other ranks were ended{where}" \
            if len(self._ranks) > 1 else f"rank 0 {what}{where}"
        self._say("error", f"{heading}. Its last output:" if tail else heading)
        write_stderr(tail if tail.endswith(b"\n") or not tail else tail + b"\n")
        return code


def describe(returncode):
    """Words and this process's exit code for a Popen returncode that is not 0."""
    if returncode > 0:
        return f"exited with code {returncode}", returncode
    number = -returncode
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hint = " (out of memory, perhaps)" if number == signal.SIGKILL else ""
    return f"was killed by {name}{hint}", 128 + number


def write_stderr(data):
    """All of it; dropped where nobody reads any more."""
    try:
        while data:
            data = data[os.write(2, data):]
    except OSError:
        pass


def say_line(text):
    """A line of the launcher's own."""
    write_stderr(f"deepspeed: {text}\n".encode(errors="backslashreplace"))
