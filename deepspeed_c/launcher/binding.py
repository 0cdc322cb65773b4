"""Which cores each rank runs on (`--bind_cores_to_rank`), and the memory nodes that go with them."""
import glob
import os
import re
import shutil
import subprocess


def cores_of_ranks(core_list, n_ranks, environ):
    """One sorted list of cores per rank: consecutive, equal parts; cores left over stay unused.

    core_list: "1,3-5,7", or None for one hardware thread of each physical core that this process may use.
    """
    if environ.get("KMP_AFFINITY"):
        raise ValueError("KMP_AFFINITY is set and would undo --bind_cores_to_rank: unset one of them")
    allowed = os.sched_getaffinity(0)
    cores = physical_cores(allowed) if core_list is None else parse_core_list(core_list)
    for core in cores:
        if core not in allowed:
            raise ValueError(f"--bind_core_list: core {core} is not among those that this process may use "
                             f"({compress(allowed)})")
    per_rank = len(cores) // n_ranks
    if per_rank < 1:
        raise ValueError(f"--bind_cores_to_rank: {len(cores)} core(s) are too few for {n_ranks} ranks")
    return [cores[per_rank * r:per_rank * (r + 1)] for r in range(n_ranks)]


def parse_core_list(text):
    """"1,3-5,7" as [1, 3, 4, 5, 7]; ValueError unless it ascends."""
    cores = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise ValueError(f"Bad range in --bind_core_list {text!r}: {part!r} is not a core or first-last")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or (cores and first <= cores[-1]):
            raise ValueError(f"Bad range in --bind_core_list {text!r}: {part!r} does not ascend or overlaps "
                             "what stands before it")
        cores += range(first, last + 1)
    return cores


def compress(cores):
    """Cores as text, with ranges: "0-3,8"."""
    cores, parts = sorted(cores), []
    for core in cores:
        if parts and parts[-1][1] == core - 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def physical_cores(allowed):
    """One hardware thread of each core: the lowest sibling among those allowed."""
    chosen = []
    for cpu in sorted(allowed):
        siblings = _read_list(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or [cpu]
        if cpu == min((s for s in siblings if s in allowed), default=cpu):
            chosen.append(cpu)
    return chosen


def memory_command(cores):
    """`numactl -m NODES` for the memory nodes of these cores, or [] where there is one node or no numactl.

    The mask of cores itself needs no numactl: the child sets it before it starts the script.
    """
    nodes = {int(re.search(r"\d+$", path)[0]): _read_list(f"{path}/cpulist")
             for path in glob.glob("/sys/devices/system/node/node[0-9]*")}
    near = sorted(node for node, cpus in nodes.items() if set(cpus) & set(cores))
    if len(nodes) < 2 or not near or shutil.which("numactl") is None:
        return []
    command = ["numactl", "-m", ",".join(map(str, near))]
    # A container may forbid memory policies; then the first touch decides, which is local as well.
    allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


def _read_list(path):
    try:
        with open(path) as file:
            text = file.read().strip()
    except OSError:
        return []
    return parse_core_list(text) if text else []
