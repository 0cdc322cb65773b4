"""Start-up of several processes: torch.distributed's default group, and the C communicator of the same ranks.

The group exists because scripts and libraries use it directly, and because rendezvous and objects go through its
store. Everything that the engine does goes through the communicator. Invariant: every rank opens the communicator
of one default group once, in the same order, so that the numbers in the store's keys agree.
"""
import atexit
import ctypes
import os
import socket
import time
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist

from . import _delegate as delegate
from . import mpi
from ._core import Comm
from .utils.logging import logger

DEFAULT_TIMEOUT_MINUTES = 10
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # MASTER_PORT has a default, LOCAL_RANK a use of its own

_timeout = None  # (weak reference to the default group, what init_distributed was given for it, as a timedelta)
_opened = None  # (weak reference to the default group, its Comm, where each rank runs)
_engine = {}  # ranks -> the engines' own Comm of them
_groups = weakref.WeakKeyDictionary()  # torch's group -> its Comm
_used = None  # (weak reference to the default group that init_distributed made or adopted, the pid that did)


def init_distributed(dist_backend=None, auto_mpi_discovery=True, distributed_port=29500, verbose=True, timeout=None,
                     init_method=None, dist_init_required=None, config=None, rank=-1, world_size=-1):
    """Makes torch.distributed's default group, or adopts the one that exists. Collective.

    dist_backend: None picks nccl where CUDA is available, else gloo.
    auto_mpi_discovery: where RANK or WORLD_SIZE is missing, mpirun's (or Azure ML's, or SageMaker's) variables tell;
        see mpi.py.
    distributed_port: the port of rank 0 where MASTER_PORT is not set.
    timeout: timedelta of one operation, also the communicator's; None: DEEPSPEED_TIMEOUT minutes, else 10.
    init_method, rank, world_size: as in torch.distributed.init_process_group; the environment fills the gaps.
    dist_init_required: False demands that the group exists already.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; with none of them this process is a world of one.
    Raises ValueError naming variables that are missing or wrong, RuntimeError, NotImplementedError.
    """
    global _timeout, _used
    if config is not None:
        from .comm import configure  # which imports this module

        configure(config)
    if dist.is_initialized():
        if _used is None or _used[0]() is not dist.group.WORLD:
            _used = weakref.ref(dist.group.WORLD), os.getpid()
        if timeout is not None:
            _timeout = weakref.ref(dist.group.WORLD), timeout
        return
    if dist_init_required is False:
        raise RuntimeError("dist_init_required=False, but torch.distributed has no default group: initialize it "
                           "before, or leave dist_init_required at None")
    timeout = timeout or _default_timeout()
    _wanted_backend()  # a wrong one is an error before there is a group
    backend = dist_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(_integer("LOCAL_RANK"))
    if rank < 0 and world_size < 0 and not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
        if auto_mpi_discovery:
            mpi.take_over(distributed_port, verbose)
        elif mpi.started_by_mpi():
            raise ValueError("mpirun started this process, RANK and WORLD_SIZE are not set, and auto_mpi_discovery is "
                             "False: a rank must not take itself for a world of one")
    where = _rendezvous(init_method, rank, world_size, distributed_port)
    _wait_for_rank_0(where, timeout.total_seconds())
    dist.init_process_group(backend, timeout=timeout, **where)
    _timeout = weakref.ref(dist.group.WORLD), timeout
    _used = weakref.ref(dist.group.WORLD), os.getpid()
    _open_at_once()
    if verbose and dist.get_rank() == 0:
        logger.info("torch.distributed: %s, %d ranks", backend, dist.get_world_size())


def world_comm():
    """The C communicator of all ranks, opened by the first call (collective), the same object afterwards.

    Over shared memory where all ranks are on one machine, else through a gloo group of its own (`delegate`).
    Raises RuntimeError without a default group, TimeoutError and CommError where ranks do not come.
    """
    group = dist.group.WORLD  # None before there is one; this is the way of every call
    if group is not None and _opened is not None and _opened[0]() is group and not _opened[1].closed:
        return _opened[1]
    return _open(_world_group())


def opened_comm():
    """The communicator if it is open already, else None. Never waits."""
    if _opened is None or _opened[1].closed or not dist.is_initialized() or _opened[0]() is not _world_group():
        return None
    return _opened[1]


def engine_comm(ranks=None):
    """The engines' communicator of some ranks (global ones, this among them; None: all), with a sequence of its own, so
    that a script may communicate while a backward pass runs. Collective over them at the first call."""
    world = world_comm()
    ranks = tuple(range(world.size) if ranks is None else ranks)
    comm = _engine.get(ranks)
    if comm is None or comm.closed:
        name = "engine" if len(ranks) == world.size else f"engine (ranks {', '.join(map(str, ranks))})"
        comm = _engine[ranks] = _open_group(world, ranks, name)
    return comm


def group_comm(group):
    """The communicator of a torch group (None: of all ranks); collective over its members at the first use, and None
    outside it. Two groups of the same ranks have one each."""
    if group is None or group is dist.group.WORLD:
        return world_comm()
    comm = _groups.get(group)
    if comm is not None and not comm.closed:
        return comm
    ranks = dist.get_process_group_ranks(group)
    if dist.get_rank() not in ranks:
        return None
    name = f"{group.group_name} (ranks {', '.join(map(str, ranks))})"
    comm = _groups[group] = _open_group(world_comm(), ranks, name, _comm_timeout(group).total_seconds())
    return comm


def _open_group(world, ranks, name, timeout=None):
    """A communicator of some ranks: the one place where its back end is chosen. Equal on all members."""
    if world.backend != "delegate":
        return world.group(ranks, name, timeout)
    timeout = _comm_timeout(_world_group()).total_seconds() if timeout is None else timeout
    if len(ranks) == 1:
        return Comm.self_(timeout)
    places, opening, flat = _opened[2]
    n_local = 1 if flat else delegate.layout(places)[0]
    if len({rank // n_local for rank in ranks}) == 1:
        return world.group(ranks, name, timeout)  # inside a node of a world in two levels: shared memory
    store = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore(str(opening), store)  # what was told in an earlier opening is past
    return delegate.open_comm(store, f"group {name}", list(ranks).index(world.rank),
                              [places[r] for r in ranks], timeout, flat)


def destroy_process_group(group=None):
    """Closes the communicator with the group, then has torch.distributed destroy the group."""
    if group is None or group is _world_group():
        close_comm()
    elif group in _groups:
        _groups.pop(group).close()
    dist.destroy_process_group(group)


@atexit.register
def _end():
    """At exit: a gloo group that nobody destroyed, an adopted one too, is destroyed, because its threads otherwise end
    the process by abort() in one of ten runs. The communicator stays open: the others see this process's end when it
    has ended, so that none of them can fail before the rank that is the cause."""
    for comm in _all_comms():
        comm.halt()  # no thread of ours works on tensors while the interpreter goes
    if _used is None or not dist.is_initialized() or _used[0]() is not dist.group.WORLD:
        return
    if _used[1] != os.getpid():
        # A forked child: a group's destructor would join threads that a fork does not copy, so it must never run.
        for group in dist.distributed_c10d._world.pg_map:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    elif dist.get_backend() == "gloo":
        dist.destroy_process_group()


def _all_comms():
    """Every open communicator, the world's last."""
    ours = [*_groups.values(), *_engine.values(), _opened and _opened[1]]
    return [comm for comm in ours if comm is not None and not comm.closed]


def close_comm():
    """Closes the communicators, if any: of groups, of the engine, of all ranks."""
    global _opened
    comms = _all_comms()
    _opened = None
    _engine.clear()
    _groups.clear()
    for comm in comms:
        comm.close()


# ---- the default group ----


def _world_group():
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed has no default group yet: call deepspeed_c.init_distributed() first")
    return dist.group.WORLD


def _default_timeout():
    text = os.environ.get("DEEPSPEED_TIMEOUT", str(DEFAULT_TIMEOUT_MINUTES))
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0
    if not minutes > 0:
        raise ValueError(f"DEEPSPEED_TIMEOUT is {text!r}; a positive number of minutes is expected")
    return timedelta(minutes=minutes)


def _integer(name):
    text = os.environ[name]
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(f"the environment variable {name} is {text!r}; a number from 0 is expected")
    return value


def _rendezvous(init_method, rank, world_size, port):
    """The keyword arguments of init_process_group that say who is where."""
    if init_method is not None and not init_method.startswith("env://"):
        return {"init_method": init_method, "rank": rank if rank >= 0 else _required("RANK"),
                "world_size": world_size if world_size >= 0 else _required("WORLD_SIZE")}
    given = {"RANK": rank >= 0, "WORLD_SIZE": world_size >= 0}
    found = [name for name in (*_RENDEZVOUS, "MASTER_PORT") if os.environ.get(name) or given.get(name)]
    if not found:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    rank = rank if rank >= 0 else _required("RANK", found)
    world_size = world_size if world_size >= 0 else _required("WORLD_SIZE", found)
    if rank >= world_size:
        raise ValueError(f"RANK is {rank}, WORLD_SIZE is {world_size}; a rank below the size is expected")
    if world_size == 1:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # no port that could be taken
    address = _required("MASTER_ADDR", found)
    if os.environ.get("MASTER_PORT"):
        return {"init_method": "env://", "rank": rank, "world_size": world_size}
    host = f"[{address}]" if ":" in address else address
    return {"init_method": f"tcp://{host}:{port}", "rank": rank, "world_size": world_size}


def _wait_for_rank_0(where, timeout):
    """Returns once rank 0's store listens. torch's own client, too early, comes again after half a second."""
    if where.get("rank") == 0 or where.get("init_method") is None:
        return
    method = where["init_method"]
    if method.startswith("tcp://"):
        host, _, port = method.removeprefix("tcp://").partition("?")[0].rpartition(":")
    elif method.startswith("env://"):
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    else:
        return
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
                return
        except (ConnectionRefusedError, TimeoutError):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"rank {where['rank']} found nobody listening at {host}:{port} within "
                                   f"{timeout:.1f} s: has rank 0 ended?") from None
            time.sleep(0.005)
        except (OSError, ValueError):
            return  # torch's own error about this address is the better one


def _required(name, found=()):
    if not os.environ.get(name):
        missing = [n for n in _RENDEZVOUS if not os.environ.get(n)]
        have = f"{', '.join(found)} set, " if found else ""
        raise ValueError(f"the environment is incomplete: {have}{', '.join(missing)} missing. Start with the "
                         "deepspeed launcher or torchrun, or unset all of them for one process")
    return os.environ[name] if name == "MASTER_ADDR" else _integer(name)


# ---- the communicator ----


def _open_at_once():
    """While all ranks are here, so that a rank which dies before its first call is noticed too."""
    if dist.get_world_size() > 1:
        world_comm()


def _open(group):
    global _opened
    close_comm()
    rank, size = dist.get_rank(), dist.get_world_size()
    timeout = _comm_timeout(group).total_seconds()
    comm, where = (Comm.self_(timeout), None) if size == 1 else _open_ranks(rank, size, timeout)
    _opened = (weakref.ref(group), comm, where)
    return comm


def _comm_timeout(group):
    """init_distributed's; of an adopted group its own."""
    if _timeout is not None and _timeout[0]() is group:
        return _timeout[1]
    try:
        return group._get_backend(torch.device("cpu")).options._timeout
    except (AttributeError, RuntimeError):  # a back end without a CPU side, or a torch without options
        return _default_timeout()


def _open_ranks(rank, size, timeout):
    """All ranks tell where they are through the store, rank 0 its address too; then they know which way they share."""
    wanted = _wanted_backend()  # while the store still is there for sure
    store = dist.distributed_c10d._get_default_store()
    listener, address, token = Comm.listen() if rank == 0 else (None, "", "")
    # A count per rank in the store itself: a new default group, or the same store again, gives new keys.
    opening = store.add(f"deepspeed_c/comm/openings/{rank}", 1)
    prefix = f"deepspeed_c/comm/{opening}"
    store.set(f"{prefix}/{rank}", "\n".join((delegate.node(), address, token, delegate.place(), wanted)))
    told = _read_all(store, prefix, size, timeout)
    why, flat = _why_delegate(told)
    places = [t[3] for t in told]
    where = places, opening, flat
    if why is None:
        return Comm.shm(listener, told[0][1], told[0][2], rank, size, timeout), where
    if rank == 0:
        how = "flat, because each rank counts as its own node then" if flat else delegate.layout(places)[1]
        logger.info("communicator: delegate, over gloo, %d ranks: %s; %s", size, why, how)
    store = dist.PrefixStore(str(opening), store)
    return delegate.open_comm(store, "world", rank, places, timeout, flat, messages=True), where


def _wanted_backend():
    wanted = os.environ.get("DSC_COMM_BACKEND", "")
    if wanted not in ("", "shm", "delegate"):
        raise ValueError(f"the environment variable DSC_COMM_BACKEND is {wanted!r}; 'shm' or 'delegate' is expected")
    return wanted


def _why_delegate(told):
    """A phrase where ranks cannot, or shall not, share memory, None where they can; and whether every rank shall be its
    own node. Equal on all ranks."""
    elsewhere = [str(r) for r, other in enumerate(told) if other[0] != told[0][0]]
    asked = [str(r) for r, other in enumerate(told) if other[4] == "delegate"]
    if asked:
        return f"DSC_COMM_BACKEND asks for it on ranks {', '.join(asked)}", True
    if elsewhere:
        return f"ranks {', '.join(elsewhere)} do not share rank 0's machine, user and network namespace", False
    return None, False


def _read_all(store, prefix, size, timeout):
    deadline = time.monotonic() + timeout
    told = []
    for rank in range(size):
        _wait_for(store, f"{prefix}/{rank}", rank, timeout, deadline)
        told.append(store.get(f"{prefix}/{rank}").decode().split("\n"))
    return told


def _wait_for(store, key, rank, timeout, deadline):
    """Polls: the store's own wait handles no signal, and c10d logs each one that expires."""
    pause = 0.001
    while not store.check([key]):
        if time.monotonic() >= deadline:
            raise TimeoutError(f"rank {rank} did not open its communicator within {timeout:.1f} s: every rank "
                               "must come to initialize() or its first deepspeed_c.comm call")
        time.sleep(pause)
        pause = min(1.5 * pause, 0.05)
