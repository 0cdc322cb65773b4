"""The commands `deepspeed` and `deepspeed_c`: options to ranks to exit code.

This process starts the ranks itself. It imports neither torch nor the engine, so that it is up in a tenth of a
second, and nothing that comes from a hostfile, the environment or the command line goes through a shell.
"""
import os
import sys
import time

from deepspeed_c.launcher import binding, members, port, processes, resources
from deepspeed_c.launcher.options import DEFAULT_MASTER_PORT, parse

# Clients append to the file of this name; it is read by launchers of several nodes.
DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE", ".deepspeed_env")

_LEVELS = ("debug", "info", "warning", "error", "critical")


def main(args=None):
    """Runs a command line (default: this process's). Returns the exit code: 0, that of the first rank to fail
    (128 + n for signal n), 128 + n when signal n ended the launcher, 2 for a mistake in the options."""
    try:
        options = parse(args)
        return _run(options)
    except (ValueError, NotImplementedError, OSError) as error:
        processes.say_line(f"error: {error}")
        return 2
    except KeyboardInterrupt:  # before there was a rank: later the job has a handler of its own
        return 130


def _run(options):
    least = _LEVELS.index("error" if options.quiet else options.log_level)

    def say(level, text):
        if _LEVELS.index(level) >= least:
            processes.say_line(text)

    _check_script(options)
    found = resources.find(options, os.environ)
    for note in found.notes:
        say("info", note)
    rendezvous, note = port.choose(options.master_port, DEFAULT_MASTER_PORT)
    if note:
        say("info", note)
    pid_file = None
    try:
        pid_file = _write_pid(say) if options.save_pid else None
        token, job_value = members.new_token(os.environ)
        ranks = plan(options, found, rendezvous.number, {**os.environ, members.JOB_VARIABLE: job_value})
        return processes.Job(ranks, token, say).run()
    finally:
        rendezvous.release()
        if pid_file:
            os.unlink(pid_file)


def plan(options, found, master_port, environ):
    """The ranks to start, as processes.Rank."""
    n_ranks = len(found.slots)
    cores = [None] * n_ranks
    if options.bind_cores_to_rank:
        cores = binding.cores_of_ranks(options.bind_core_list, n_ranks, environ)
    logs = _log_paths(options.enable_each_rank_log, n_ranks)
    n_threads = len(cores[0]) if cores[0] else max(1, len(os.sched_getaffinity(0)) // n_ranks)
    shared = {
        "WORLD_SIZE": n_ranks, "LOCAL_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks, "CROSS_RANK": 0, "CROSS_SIZE": 1,
        "MASTER_ADDR": options.master_addr or "127.0.0.1", "MASTER_PORT": master_port,
    }
    if found.gpus:
        shared["CUDA_VISIBLE_DEVICES"] = ",".join(found.slots)
    if "OMP_NUM_THREADS" not in environ:
        shared["OMP_NUM_THREADS"] = n_threads
    ranks = []
    for r in range(n_ranks):
        own = {**shared, "RANK": r, "LOCAL_RANK": r}
        memory = binding.memory_command(cores[r]) if cores[r] else []
        ranks.append(processes.Rank(r, memory + command_of(options, r),
                                    {**environ, **{name: str(value) for name, value in own.items()}},
                                    cores[r], logs[r]))
    return ranks


def command_of(options, local_rank):
    """The words that start one rank."""
    python = [] if options.no_python else [sys.executable, "-u", *(["-m"] if options.module else [])]
    flag = [] if options.no_local_rank else [f"--local_rank={local_rank}"]
    return [*python, options.user_script, *flag, *options.user_args]


def _check_script(options):
    """Once, here, instead of one message per rank."""
    if not options.module and not options.no_python and not os.path.exists(options.user_script):
        raise ValueError(f"the script {options.user_script} does not exist")


def _log_paths(folder, n_ranks):
    if folder is None:
        return [None] * n_ranks
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--enable_each_rank_log {folder} is a file: give a folder")
    os.makedirs(folder, exist_ok=True)
    stamp = time.strftime("%Y%m%d%H%M%S")
    return [os.path.join(folder, f"{stamp}_rank{r}.log") for r in range(n_ranks)]


def _write_pid(say):
    path = f"/tmp/{os.getpid()}.deepspeed"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise ValueError(f"--save_pid: {path} exists already; remove it if no launcher runs under that number") \
            from None
    with os.fdopen(fd, "w") as file:
        file.write(str(os.getpid()))
    say("info", f"launcher pid: {os.getpid()}")
    return path


if __name__ == "__main__":
    sys.exit(main())
