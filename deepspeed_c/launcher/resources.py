"""Which slots of this machine take part, and whether they are GPUs.

A slot is a string: a GPU index, or an id from CUDA_VISIBLE_DEVICES. Nothing here imports torch or opens a device:
GPUs are counted by their device files.
"""
import importlib.util
import os
import re
import socket

LOCAL = "localhost"


class Resources:
    """`slots`: one per rank, in rank order. `gpus`: whether a slot is a GPU. `notes`: lines for the user."""

    def __init__(self, slots, gpus, notes=()):
        self.slots, self.gpus, self.notes = slots, gpus, list(notes)


def find(options, environ):
    """The resources that the options and the environment ask for; ValueError or NotImplementedError says why not."""
    hosts = read_hostfile(options.hostfile)
    n_gpus = count_gpus(environ)
    if hosts is not None:
        return _from_hostfile(options, hosts, n_gpus)
    return _from_this_machine(options, environ, n_gpus)


def _from_hostfile(options, hosts, n_gpus):
    hosts = filter_hosts(hosts, options.include, options.exclude)
    others = [host for host in hosts if not is_this_machine(host)]
    if others or len(hosts) > 1:
        raise NotImplementedError(f"{options.hostfile} names {', '.join(hosts)}: ranks on more than this machine are "
                                  "not there yet (--include chooses one host)")
    slots = next(iter(hosts.values()))
    if options.num_gpus > 0:
        slots = [str(k) for k in range(options.num_gpus)]
    if n_gpus:
        _check_gpus(slots, n_gpus)
    return Resources(slots, gpus=n_gpus > 0)


def _from_this_machine(options, environ, n_gpus):
    asked = options.include or options.exclude or options.num_gpus > 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if not n_gpus:
        return _cpu_ranks(options, asked)
    if visible is not None and not (asked or options.num_nodes > 0):
        slots = [entry.strip() for entry in visible.split(",")]
        _check_gpus([slot for slot in slots if not slot or slot.isdigit()], n_gpus)
        return Resources(slots, True, [f"using CUDA_VISIBLE_DEVICES={visible}: {len(slots)} rank(s)"])
    notes = []
    if visible is not None:
        notes = [f"ignoring CUDA_VISIBLE_DEVICES={visible}, because slots were chosen on the command line"]
    if options.num_gpus > 0:
        slots = [str(k) for k in range(options.num_gpus)]
        _check_gpus(slots, n_gpus)
        return Resources(slots, True, notes)
    hosts = filter_hosts({LOCAL: [str(k) for k in range(n_gpus)]}, options.include, options.exclude)
    return Resources(hosts[LOCAL], True, notes)


def _cpu_ranks(options, asked):
    """Without GPUs a slot is just a rank: there are as many as are asked for."""
    if not asked:
        return Resources(["0"], False, ["no GPU found and no number of ranks asked for: one rank on the CPU "
                                        "(--num_gpus N starts N)"])
    if options.num_gpus > 0:
        return Resources([str(k) for k in range(options.num_gpus)], False)
    named = parse_hosts(options.include or options.exclude)
    slots = sorted({0, *(int(slot) for slot in named.get(LOCAL, []))})
    pool = [str(slot) for slot in slots]
    return Resources(filter_hosts({LOCAL: pool}, options.include, options.exclude)[LOCAL], False)


def _check_gpus(slots, n_gpus):
    beyond = [slot for slot in slots if not slot or int(slot) >= n_gpus]
    if beyond:
        raise ValueError(f"GPU {beyond[0]!r} was asked for, but this machine has {n_gpus} GPU(s); "
                         "DS_ACCELERATOR=cpu starts ranks on the CPU")


def count_gpus(environ):
    """GPUs that ranks would use: 0 with DS_ACCELERATOR=cpu, an empty CUDA_VISIBLE_DEVICES or a CPU build of torch."""
    wish = environ.get("DS_ACCELERATOR", "")
    if wish not in ("", "cpu", "cuda"):
        raise ValueError(f"DS_ACCELERATOR={wish!r} is not one of 'cpu', 'cuda'")
    if wish == "cpu" or environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return 0
    n_gpus = sum(1 for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name))
    if wish == "cuda" and n_gpus == 0:
        raise ValueError("DS_ACCELERATOR=cuda, but there is no GPU: /dev has no nvidia0")
    return n_gpus if wish == "cuda" or not _torch_is_cpu_build() else 0


def _torch_is_cpu_build():
    """Read from torch's version file, because importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    try:
        with open(os.path.join(spec.submodule_search_locations[0], "version.py")) as file:
            text = file.read()
    except OSError:
        return False
    return all(re.search(rf"^{name}\b[^=]*= *None", text, re.MULTILINE) for name in ("cuda", "hip"))


def read_hostfile(path):
    """{host: slots} in the order of the file, or None where there is no such file."""
    try:
        with open(path) as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        return None
    hosts = {}
    for line in lines:
        if not line or line.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)", line)
        if not match:
            raise ValueError(f"Hostfile contains a bad entry: {line}, unable to proceed with launching "
                             f"({path}; lines are `host slots=N`)")
        host, n_slots = match[1], int(match[2])
        if host in hosts:
            raise ValueError(f"Hostfile contains multiple entries for {host}, unable to proceed with launching")
        hosts[host] = [str(slot) for slot in range(n_slots)]
    if not any(hosts.values()):
        raise ValueError("Hostfile is empty or not formatted correctly, unable to proceed with launching.")
    return hosts


def parse_hosts(spec):
    """`HOST[:SLOT,...]@HOST...` as {host: sorted slots as strings}; no slots means all: an empty list."""
    named = {}
    for entry in spec.split("@"):
        host, colon, slots = entry.partition(":")
        if not host or (colon and not re.fullmatch(r"\d+(,\d+)*", slots)):
            raise ValueError(f"{entry!r} is not HOST or HOST:SLOT[,SLOT...], as in localhost:0,1")
        numbers = {int(slot) for slot in slots.split(",")} if colon else set()
        named[host] = [str(k) for k in sorted(numbers | {int(k) for k in named.get(host, [])})]
    return named


def filter_hosts(hosts, include, exclude):
    """Those of `hosts` that are included, or not excluded, in their order; never empty."""
    named = parse_hosts(include or exclude) if include or exclude else {}
    for host, slots in named.items():
        if host not in hosts:
            raise ValueError(f"Hostname '{host}' not found in hostfile (known: {', '.join(hosts)})")
        for slot in slots:
            if slot not in hosts[host]:
                raise ValueError(f"No slot '{slot}' specified on host '{host}' (it has {', '.join(hosts[host])})")
    if include:
        kept = {host: named[host] or hosts[host] for host in hosts if host in named}
    else:
        dropped = {host: named[host] or hosts[host] for host in named}
        kept = {host: [s for s in slots if s not in dropped.get(host, [])] for host, slots in hosts.items()}
    kept = {host: slots for host, slots in kept.items() if slots}
    if not kept:
        raise ValueError(f"--{'include' if include else 'exclude'} {include or exclude} leaves no slot")
    return kept


def is_this_machine(host):
    """Without asking a name server: a hostfile with other hosts must not wait for one."""
    own = socket.gethostname()
    return host in (LOCAL, "127.0.0.1", "::1", own, own.partition(".")[0])
