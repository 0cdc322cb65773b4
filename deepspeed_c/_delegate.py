"""Ranks that share no memory: what moves the bytes of a `delegate` communicator, and the board that its ranks read.

The core (csrc/comm/delegate.c) numbers, compares, orders and adds; a Mover only moves bytes inside its staging, through
a gloo group that is its own, never the user's. Invariant: at most one operation runs, and gloo's threads touch nothing
but the staging, which lives as long as they may.
"""
import atexit
import contextlib
import ctypes
import ipaddress
import math
import os
import secrets
import socket
import time
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist

from ._core import Comm, CommError, shm_node

STAGING_BYTES = 8 << 20  # two chunks to send, two to receive
_PREFIX = "deepspeed_c/delegate"
_EXCHANGE, _GATHER, _BROADCAST, _MINIMUM = range(4)  # enum dsc_move_kind
_NEVER = timedelta(days=365)  # the core keeps the time
_LOST = (RuntimeError, ValueError, OSError)  # what torch raises for a broken connection, a store that is gone

_movers = weakref.WeakSet()


def node():
    """This process's node, as text without blanks: ranks where it is equal can share memory. DSC_COMM_NODE, if set,
    makes ranks pretend to be on another machine. Raises ValueError where that has blanks or cannot be shown."""
    pretended = os.environ.get("DSC_COMM_NODE", "")
    if not pretended:
        return shm_node()
    if not pretended.isprintable() or " " in pretended:
        raise ValueError(f"the environment variable DSC_COMM_NODE is {pretended!r}; text without blanks is expected")
    return f"{shm_node()}/{pretended}"


def place():
    """Where this process runs, as text: its node, and its process id as others of the node know it."""
    try:
        return f"{node()} {os.readlink('/proc/self/ns/pid')} {os.getpid()}"
    except OSError:
        return f"{node()} ? {os.getpid()}"


def layout(places):
    """How many ranks each node has, if their ranks reduce among themselves first, else 1; and a phrase that says so.

    places: `place()` of every rank, in order.
    """
    names = [text.split(" ")[0] for text in places]
    n_nodes = len(set(names))
    n_local = len(names) // n_nodes
    if n_nodes == 1:
        return 1, "flat, because all ranks are on one node"
    if n_local * n_nodes != len(names) or any(names.count(name) != n_local for name in names[::n_local]):
        return 1, "flat, because nodes have different numbers of ranks"
    if n_local == 1:
        return 1, "flat, because every node has one rank"
    if any(len(set(names[i:i + n_local])) > 1 for i in range(0, len(names), n_local)):
        return 1, "flat, because the ranks of a node do not follow each other"
    return n_local, f"{n_nodes} nodes of {n_local} ranks, which reduce inside the node first"


class Mover:
    """One rank's end of a gloo group, and its view of the job's board.

    store: the job's. channel: text that names the group among all of the job. places: `place()` of every rank.
    memory: another Mover's, of the same rank, which never moves at the same time.
    Methods other than the constructor return a str, the reason, where the connection or the store is lost.
    """

    def __init__(self, store, channel, rank, size, places, timeout, memory=None):
        self._store = store
        self._size = size
        self._neighbours = _neighbours(places)  # a blocked rank looks at them, however large the world is
        self._pid = os.getpid()
        self._work = None
        self._tensors = ()
        self._memory = torch.empty(max(STAGING_BYTES, size * 4096), dtype=torch.uint8) if memory is None else memory
        self.staging = memoryview(self._memory.numpy())
        self._group = dist.ProcessGroupGloo(dist.PrefixStore(f"gloo/{channel}", store), rank, size, timeout)
        self._group.set_timeout(_NEVER)
        self._minimum = dist.AllreduceOptions()
        self._minimum.reduceOp = dist.ReduceOp.MIN
        self._exchange = dist.AllToAllOptions()
        self._gather = torch._C._distributed_c10d.AllgatherOptions()
        _movers.add(self)

    # ---- moving ----

    def start(self, kind, src, dst, n_bytes, sends, receives, root):
        """Begins a move (csrc/comm/delegate.h); offsets and lengths in bytes of the staging."""
        memory, group = self._memory, self._group
        try:
            if kind == _EXCHANGE:
                source, into = memory[src:src + sum(sends)], memory[dst:dst + sum(receives)]
                self._tensors = source, into
                self._work = group.alltoall_base(into, source, receives, sends, self._exchange)
            elif kind == _GATHER:
                source, into = memory[src:src + n_bytes], memory[dst:dst + n_bytes * self._size]
                self._tensors = source, into
                self._work = group._allgather_base(into, source, self._gather)
            elif kind == _BROADCAST:
                options = dist.BroadcastOptions()
                options.rootRank, options.rootTensor = root, 0
                self._tensors = ([memory[dst:dst + n_bytes]],)
                self._work = group.broadcast(self._tensors[0], options)
            else:
                self._tensors = ([memory[dst:dst + n_bytes].view(torch.int64)],)
                self._work = group.allreduce(self._tensors[0], self._minimum)
        except _LOST as error:
            return _reason(error)
        return None

    def wait(self, ms):
        """Waits at most `ms` milliseconds; True once the move is done."""
        try:
            self._work.wait(timedelta(milliseconds=ms))
        except _LOST as error:
            if not self._work.is_completed():
                return False  # torch says a time-out by the same exception, and goes on
            return self._failure(error)
        self._work, self._tensors = None, ()
        return True

    def _failure(self, error):
        """A move that ended between the time-out and the look at it is none."""
        try:
            self._work.wait()
        except _LOST as real:
            self._work, self._tensors = None, ()
            return _reason(real)
        self._work, self._tensors = None, ()
        return True

    # ---- the board ----

    def add(self, key, by):
        try:
            return self._store.add(key, by)
        except _LOST as error:
            return self._gone(error)

    def put(self, key, text, once):
        try:
            if once:
                self._store.compare_set(key, "", text.decode(errors="replace"))
            else:
                self._store.set(key, text.decode(errors="replace"))
        except _LOST as error:
            return self._gone(error)
        return None

    def look(self, key):
        try:
            return self._store.get(key) if self._store.check([key]) else None
        except _LOST as error:
            return self._gone(error)

    def dead(self):
        """Names a rank of this machine whose process has ended, as bytes; None where there is none."""
        name = _dead(self._neighbours)
        return name and name.encode()

    def _gone(self, error):
        text = f"the job's store, in rank 0's process or the launcher's, cannot be reached: {_reason(error)}"
        dead = self.dead()
        return f"{dead.decode()} died or ended ({text})" if dead else text

    # ---- the end ----

    def leave(self):
        """Ends the connections. gloo's threads may be inside an operation for ever: then all that they use stays."""
        if self._group is None:
            return
        if self._work is not None and not self._work.is_completed():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        else:
            self._work, self._tensors = None, ()
        if self._work is None:
            self._group = None


def open_comm(store, channel, rank, places, timeout, flat=False, messages=False):
    """A communicator of some or all of the default group's ranks, over a gloo group of its own. Collective.

    store: the default group's. channel: text, equal on all its ranks and no other communicator's, past or present.
    rank: this one's place. places: place() of every rank. timeout: seconds of one operation, 0 for none.
    flat: every rank counts as a node of its own, wherever it is.
    messages: whether it also has messages between two ranks; one communicator of the job may.
    Raises TimeoutError, CommError where ranks do not come.
    """
    try:
        store = store.clone()  # a connection of its own: another thread may wait in the store
    except (RuntimeError, NotImplementedError):
        pass  # a store without connections
    size = len(places)
    limit = timedelta(seconds=timeout) if timeout > 0 else _NEVER
    store = dist.PrefixStore(_PREFIX, store)
    with contextlib.ExitStack() as ends:
        mail = ends.enter_context(_Listener(store, rank, places)) if messages else None
        _meet(store, channel, places, timeout)
        mover = Mover(store, channel, rank, size, places, limit)
        levels = None, None
        n_local = 1 if flat else layout(places)[0]
        if n_local > 1:
            index, at = divmod(rank, n_local)
            rail = Mover(store, f"{channel}/rail {at}", index, size // n_local, places[at::n_local], limit,
                         mover._memory)
            first = index * n_local
            levels = _open_node(store, f"{channel}/node {index}", at, places[first:first + n_local], timeout), rail
        return Comm.delegate(mover, channel, rank, size, dist.get_rank(), dist.get_world_size(), timeout, *levels,
                             *(mail.take() if messages else ()))


def _open_node(store, channel, at, places, timeout):
    """The communicator over shared memory of this node's ranks, of which this one is number `at`."""
    listener, address, token = Comm.listen() if at == 0 else (None, "", "")
    if at == 0:
        store.set(f"open/{channel}", f"{address}\n{token}")
    _poll(lambda: store.check([f"open/{channel}"]), places, timeout,
          lambda: f"rank 0 of \"{channel}\" did not open its memory")
    address, token = store.get(f"open/{channel}").decode().split("\n")
    return Comm.shm(listener, address, token, at, len(places), timeout)


class _Listener:
    """A listening socket for messages, and its place on the board. Closed at the end of the block, unless taken.

    The other ranks find it at this machine's address on the way to the job's store. On the store's own machine that
    may be a loopback address, which is nothing to ranks elsewhere: they get the store's name, as they have it already.
    """

    def __init__(self, store, rank, places):
        self._token = secrets.token_hex(16)
        base = store
        while isinstance(base, dist.PrefixStore):
            base = base.underlying_store
        host = getattr(base, "host", "") or socket.gethostname()
        family, _, _, _, where = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            mine = probe.getsockname()[0]
        here = {place.rpartition(" ")[0] for place in places}
        by_name = ipaddress.ip_address(mine.partition("%")[0]).is_loopback and len(here) > 1
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(("" if by_name else mine, 0))
        self._socket.listen(128)
        store.set(f"mail/{rank}", f"{host if by_name else mine} {self._socket.getsockname()[1]} {self._token}")

    def take(self):
        """Its descriptor, which is the caller's now, and the token that a connection has to show."""
        return self._socket.detach(), self._token

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._socket.close()


def _meet(store, channel, places, timeout):
    """gloo's own connecting handles no signal and no death, so it begins when all ranks are there."""
    came = store.add(f"open/{channel}", 1)

    def all_came():
        nonlocal came
        came = store.add(f"open/{channel}", 0)
        return came >= len(places)

    _poll(all_came, places, timeout,
          lambda: f"{came} of {len(places)} ranks came to open the communicator \"{channel}\"")


def _poll(is_there, places, timeout, what):
    """Returns once is_there() is true. what(): for the text of a time-out. Raises TimeoutError, CommError naming a rank
    that has ended."""
    deadline, pause = time.monotonic() + (timeout or math.inf), 0.001
    while not is_there():
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{what()} within {timeout:.1f} s")
        time.sleep(pause)
        pause = min(1.5 * pause, 0.05)
        if pause == 0.05 and (dead := _dead(_neighbours(places))):
            raise CommError(f"{dead} died or ended before a communicator was open: {what()}")


def _neighbours(places):
    """[(rank, pid)] of those whose process id means something here."""
    here = place().rpartition(" ")[0]
    split = [text.rpartition(" ") for text in places]
    return [(rank, pid) for rank, (where, _, pid) in enumerate(split) if where == here]


def _dead(neighbours):
    for rank, pid in neighbours:
        if not _lives(pid):
            return f"rank {rank} (pid {pid})"
    return None


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as text:
            return text.read().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def _reason(error):
    """The first line of torch's text, without the place in its source."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.rpartition("] ")[2].partition(". This is typically")[0] if text.startswith("[") else text


@atexit.register
def _end():
    """gloo's threads must not run while the process takes down what they use; a forked child has none, and must not
    wait for them."""
    for mover in list(_movers):
        if mover._pid == os.getpid():
            mover.leave()
        else:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(mover))
