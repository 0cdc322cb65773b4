"""The command line of `deepspeed`: what is accepted, and what is not there yet.

An option whose feature is missing is parsed, so that the message can name it, and refused when given: nothing that
was asked for is ignored.
"""
import argparse

DEFAULT_HOSTFILE = "/job/hostfile"
DEFAULT_MASTER_PORT = 29500

# Parsed and refused; the values are what argparse needs to know about each.
_NOT_YET = {
    "--elastic_training": {"action": "store_true"},
    "--min_elastic_nodes": {"type": int},
    "--max_elastic_nodes": {"type": int},
    "--node_rank": {"type": int},
    "--no_ssh": {"action": "store_true"},
    "--launcher": {"metavar": "NAME"},
    "--launcher_args": {"metavar": "ARGS"},
    "--force_multi": {"action": "store_true"},
    "--ssh_port": {"type": int},
    "--venv_script": {"metavar": "FILE"},
    "--autotuning": {"choices": ["tune", "run"]},
}


def parse(args=None):
    """The options of a command line (default: this process's) as a namespace.

    NotImplementedError names an option that is not there yet; a mistake ends the process with argparse's code 2.
    """
    parser = argparse.ArgumentParser(
        prog="deepspeed", allow_abbrev=False,
        description="Runs a training script on several ranks of this machine and ends all when one fails.")
    _add_resources(parser)
    _add_script(parser)
    multi = parser.add_argument_group("several nodes, elastic training, autotuning: not yet")
    for name, keywords in _NOT_YET.items():
        multi.add_argument(name, default=None, help=argparse.SUPPRESS, **keywords)
    options = parser.parse_args(args)
    for name in _NOT_YET:
        if getattr(options, name[2:]) is not None:
            raise NotImplementedError(f"{name} is not there yet: this launcher starts ranks on this machine only")
    if options.num_nodes > 1:
        raise NotImplementedError(f"--num_nodes {options.num_nodes} is not there yet: only 1 (this machine) is")
    _check(options)
    return options


def _add_resources(parser):
    add = parser.add_argument_group("ranks").add_argument
    add("-H", "--hostfile", default=DEFAULT_HOSTFILE, help="lines `host slots=N`; a missing file means this machine")
    add("-i", "--include", default="", metavar="HOST[:SLOT,...]", help="use these slots only: localhost:0,1")
    add("-e", "--exclude", default="", metavar="HOST[:SLOT,...]", help="use all slots but these")
    add("--num_nodes", type=int, default=-1, help="1")
    add("--num_gpus", "--num_accelerators", type=int, default=-1, dest="num_gpus", metavar="N",
        help="ranks on this machine: slots 0 to N-1")
    add("--master_addr", default="", help="where rank 0 listens (127.0.0.1)")
    add("--master_port", type=int, default=None, help=f"default {DEFAULT_MASTER_PORT}, or a free one if that is taken")
    add("--bind_cores_to_rank", action="store_true", help="give each rank cores of its own")
    add("--bind_core_list", default=None, metavar="0,2-5", help="with --bind_cores_to_rank: the cores to divide")


def _add_script(parser):
    add = parser.add_argument_group("script").add_argument
    add("--module", action="store_true", help="the script is a module: python -m")
    add("--no_python", action="store_true", help="the script is a program of its own")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    add("--save_pid", action="store_true", help="write the launcher's pid to /tmp/<pid>.deepspeed while it runs")
    add("--enable_each_rank_log", default=None, metavar="DIR", help="output of each rank into a file in DIR")
    add("--log_level", default="info", choices=["debug", "info", "warning", "error", "critical"])
    add("-q", "--quiet", action="store_true", help="the launcher itself says errors only")
    add("--no_ssh_check", action="store_true", help="accepted: one machine needs no ssh")
    add("user_script", help="the training script")
    add("user_args", nargs=argparse.REMAINDER, help="its arguments, passed on as they are")


def _check(options):
    if options.module and options.no_python:
        raise ValueError("--module and --no_python exclude each other: a module needs python to run it")
    if options.include and options.exclude:
        raise ValueError("--include and --exclude are mutually exclusive.")
    if (options.include or options.exclude) and (options.num_gpus > 0 or options.num_nodes > 0):
        raise ValueError("Cannot specify num_nodes/gpus with include/exclude")
    if options.num_nodes == 0 or options.num_nodes < -1:
        raise ValueError(f"--num_nodes must be 1, got {options.num_nodes}")
    if options.num_gpus == 0 or options.num_gpus < -1:
        raise ValueError(f"--num_gpus must be at least 1, got {options.num_gpus}")
    if options.master_port is not None and not 0 < options.master_port < 65536:
        raise ValueError(f"--master_port must be in 1 to 65535, got {options.master_port}")
    if options.bind_core_list is not None and not options.bind_cores_to_rank:
        raise ValueError("--bind_core_list has no effect without --bind_cores_to_rank: give both")
