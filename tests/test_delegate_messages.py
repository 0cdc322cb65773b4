"""Messages between two ranks that share no memory: the contract of shared memory, over TCP."""
import contextlib
import os
import resource
import signal
import socket
import struct
import threading
import time
import types
from datetime import timedelta

import pytest
import test_comm_groups
import torch
from ranks import die
from test_delegate import FORCED, opened

from deepspeed_c import CommError, _core, _delegate, comm, distributed

WITHIN = 6.0
LONG = 700_001  # fp32 elements: travels when it is taken; shorter ones at once


def values(rank, n, tag=0):
    return torch.arange(n, dtype=torch.float32) + 1000 * rank + tag


def in_any_order(rank, world):
    """Long and short ones of several tags, both ways at once, taken in another order; nobody waits for a collective."""
    other = 1 - rank
    lengths = [0, 1, LONG, 5, 300_000, LONG]
    works = [comm.isend(values(rank, n, tag), other, tag=tag) for tag, n in enumerate(lengths)]
    for tag in (5, 3, 0, 4, 2, 1):
        got = torch.empty(lengths[tag])
        assert comm.recv(got, other, tag=tag) == other
        assert torch.equal(got, values(other, lengths[tag], tag))
    for work in works:
        work.wait()
    many = [comm.isend(torch.tensor([float(i)]), other) for i in range(40)]  # one tag: in order, eight at a time
    got = [torch.zeros(1) for _ in range(40)]
    for work in [comm.irecv(t) for t in got] + many:
        work.wait()
    assert [t.item() for t in got] == list(range(40))


def beside_collectives(rank, world):
    """A sent message, up to the length of which it may, waits for nobody; a collective passes a long one."""
    if rank == 0:
        comm.send(values(0, 1 << 18), 1, tag=1)
        long = comm.isend(values(0, LONG), 1, tag=2)
    comm.barrier()
    if rank == 0:
        assert not long.is_completed()
        comm.barrier()
        assert long.wait()
    else:
        comm.barrier()
        for n, tag in ((1 << 18, 1), (LONG, 2)):
            got = torch.empty(n)
            comm.recv(got, tag=tag)
            assert torch.equal(got, values(0, n))


def address_of(rank):
    store = torch.distributed.distributed_c10d._get_default_store()
    host, port, token = store.get(f"{distributed._opened[2][1]}/{_delegate._PREFIX}/mail/{rank}").decode().split()
    assert len(token) == 32
    return host, int(port)


def no_descriptor_is_left(rank, world):
    """A connection that cannot be accepted waits until it can be, and keeps no core busy meanwhile."""
    comm.barrier()
    if rank == 0:
        free = os.dup(0)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        os.close(free)
        comm.barrier()
        used = time.process_time()
        time.sleep(0.5)
        used = time.process_time() - used
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert used < 0.05
    else:
        comm.barrier()
        comm.send(values(1, 5), 0, tag=8)
        return
    got = torch.empty(5)
    comm.recv(got, 1, tag=8)
    assert torch.equal(got, values(1, 5))


def strangers_come(rank, world):
    """Who does not know the token is dropped, says it nothing or nonsense, and disturbs nobody."""
    said = [b"", b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100, os.urandom(48)]
    calls = [socket.create_connection(address_of(rank), timeout=5) for _ in range(20)]
    for i, call in enumerate(calls):
        call.sendall(said[i % 3])
    in_any_order(rank, world)
    for i, call in enumerate(calls):
        if i % 3:
            with call, contextlib.suppress(ConnectionResetError):
                assert call.recv(1) == b""


def ends_after_sending(rank, world):
    """Rank 0 ends as soon as its send has returned. Rank 1 is played by hand: it reads late, and its receipt for
    another message comes in between, at which the kernel drops what a process that has ended left in its socket."""
    opened()
    store = torch.distributed.distributed_c10d._get_default_store()
    if rank == 0:
        store.wait(["listens"])
        comm.isend(torch.ones(3), 1, tag=1)
        comm.send(values(0, 400_000), 1, tag=2)
        os._exit(0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store.set(f"{distributed._opened[2][1]}/{_delegate._PREFIX}/mail/1",
                  f"127.0.0.1 {listener.getsockname()[1]} {32 * 'a'}")
        store.set("listens", "")
        call = listener.accept()[0]
    with call, call.makefile("rb") as letters:
        letters.read(48 + 96 + 12 + 96)  # hello, two letters, the first one's body
        call.sendall(struct.pack("=4Q", 1, 1, 2, 2))  # received 1, taken 2
        time.sleep(0.3)
        call.sendall(struct.pack("=2Q", 2, 1))  # taken 1
        time.sleep(0.1)
        body = letters.read(96 + 1_600_000)[96:]
        call.sendall(struct.pack("=2Q", 1, 2))  # received 2
        return body == values(0, 400_000).numpy().tobytes()


def test_a_long_message_outlives_its_sender(ranks):
    found = ranks.outcomes(2, ends_after_sending, env=FORCED)
    assert found[1].value is True, found[1].describe()
    assert found[0].exit_code == 0 and not found[0].error, found[0].describe()


def every_way(rank, world):
    comm_ = opened()
    for case in (no_descriptor_is_left, in_any_order, beside_collectives, strangers_come):
        case(rank, world)
        comm.barrier()
    with pytest.raises(ValueError, match="the other rank is"):
        comm_.send(torch.zeros(1), rank)
    if os.fork() == 0:  # the child's copies of the connections close; it may not use them
        try:
            comm.send(torch.zeros(1), 1 - rank)
        except RuntimeError as error:
            os._exit(0 if "forked child" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    in_any_order(rank, world)
    if rank == 0:
        time.sleep(0.5)
        x = torch.empty(200_000)
        for i in range(8):  # their sender has left
            assert comm.recv(x) == 1 and torch.equal(x, values(1, 200_000, i))
        with pytest.raises(CommError, match="rank 1"):
            comm.recv(x)
        return True
    for i in range(8):
        comm.send(values(1, 200_000, i), 0)
    return True


@pytest.mark.parametrize("mover, size, token, error", [
    (object(), 2, "t" * 32, "staging"), (types.SimpleNamespace(staging=bytearray(1 << 16)), 1, "t" * 32, "two ranks"),
    (types.SimpleNamespace(staging=bytearray(1 << 16)), 2, "short", "32 characters")])
def test_a_communicator_that_does_not_open_closes_its_listener(mover, size, token, error):
    listener = socket.create_server(("127.0.0.1", 0)).detach()
    with pytest.raises((AttributeError, ValueError), match=error):
        _core.Comm.delegate(mover, "x", 0, size, 0, size, 0.0, None, None, listener, token)
    with pytest.raises(OSError):
        os.fstat(listener)


def test_messages_keep_their_order_and_wait_for_nobody(ranks):
    assert ranks(2, every_way, env=FORCED) == [True, True]


def test_messages_find_their_receivers_by_group_and_tag(ranks):
    ranks(3, test_comm_groups.messages, env=FORCED)


def fails(rank, world, how):
    """What rank 0 gets in a call that cannot end, and what rank 1 does meanwhile."""
    opened(timedelta(seconds=1) if how == "time-out" else None)
    x = torch.zeros(LONG)
    comm.barrier()
    if rank == 0:
        if how == "Ctrl-C":
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        if how in ("another length", "died before it took"):
            comm.send(x, 1)
        comm.recv(x, None if how == "any" else 1)
    elif how == "another length":
        comm.recv(x[:3], 0)
    elif how in ("Ctrl-C", "time-out"):
        time.sleep(1.6)
    else:
        time.sleep(0.3)
        die()


@pytest.mark.parametrize("how, error, text", [
    ("another length", "CommError", "rank 0 called send(fp32 x 700001, to rank 1"),
    ("died before it took", "CommError", "rank 1 (pid"), ("any", "CommError", "rank 1 (pid"),
    ("Ctrl-C", "KeyboardInterrupt", ""), ("time-out", "TimeoutError", "recv(fp32 x 700001, from rank 1")])
def test_a_message_that_cannot_end_is_an_error_in_seconds(ranks, how, error, text):
    found = ranks.outcomes(2, fails, how, env=FORCED)
    assert found[0].error == error and text in found[0].text, found[0].describe()
    assert found[0].seconds < WITHIN and found[0].exit_code == 0, found[0].describe()
    if how == "another length":
        assert found[1].error == error and text in found[1].text, found[1].describe()


def on_two_nodes(rank, world):
    os.environ["DSC_COMM_NODE"] = "ab"[rank // 2]
    test_comm_groups.messages(rank, world)
    assert distributed.world_comm().backend == "delegate"


def test_messages_inside_and_between_nodes(ranks):
    ranks(4, on_two_nodes)
