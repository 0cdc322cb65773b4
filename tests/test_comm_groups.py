"""deepspeed_c.comm beyond the world and the synchronous: every operation on groups, asynchronous, with messages, and
what goes wrong there. Values are formulas of (rank, index); gloo's results serve where torch defines the outcome."""
import functools
import os
import signal
import threading
import time
import weakref

import models
import pytest
import torch
import torch.distributed as dist
from deepspeed_c._core import Comm
from ranks import die

import deepspeed_c as deepspeed
from deepspeed_c import CommError, comm, reduction
from deepspeed_c import engine as engine_module
from deepspeed_c.distributed import engine_comm, group_comm, world_comm
from deepspeed_c.mpu import MpuLayout

WITHIN = 5.0  # seconds in which a lost rank is an error elsewhere
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.int8, torch.int16]
GLOO = DTYPES[:3]


def start():
    deepspeed.init_distributed()
    return comm.get_rank(), comm.get_world_size()


def values(rank, n, dtype):
    x = (torch.arange(n) * 7 + rank * 13) % 31 - 15
    return x.to(dtype) if dtype != torch.uint8 else x.abs().to(dtype)


# ---- every operation against gloo, on the world and on groups ----


def operations(c, rank, ranks, group, dtype, n, is_async, via=None):
    """Every operation of module `c` once; the tensors that came out. ranks: the group's members. via: the dtype that
    stands for one that `c` does not have."""
    via = via or dtype
    me, size, root = ranks.index(rank), len(ranks), ranks[-1]
    found = []

    def run(call, outputs):
        work = call(group=group, async_op=is_async)
        if is_async:
            assert work.wait() is not False and work.is_completed()
        found.extend(t.clone() for t in outputs)

    def new(k=1):
        return torch.zeros(k * n, dtype=via)

    def given(r, k):
        return values(r, k, dtype).to(via)

    mine = given(rank, n)
    if dtype in (torch.float32, torch.bfloat16, torch.int64):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
            x = mine.clone().clamp(-2, 2)
            run(functools.partial(c.all_reduce, x, op), [x])
        x = mine.clone()
        run(lambda **k: c.reduce(x, root, **k), [x] if rank == root else [])
        out, parts = new(), [given(rank + r, n) for r in range(size)]
        run(lambda **k: c.reduce_scatter(out, parts, **k), [out])
        run(lambda **k: c.reduce_scatter_tensor(out, torch.cat(parts), **k), [out])
        many = [given(rank, k) for k in (1, n, 3)]
        run(lambda **k: c.all_reduce_coalesced(many, **k), many)
    x = mine.clone()
    run(lambda **k: c.broadcast(x, root, **k), [x])
    whole, some = new(size), [new() for _ in ranks]
    run(lambda **k: c.all_gather_into_tensor(whole, mine, **k), [whole])
    run(lambda **k: c.all_gather(some, mine, **k), some)
    there = rank == root
    run(lambda **k: c.gather(mine, some if there else None, root, **k), some if there else [])
    out = new()
    parts = [given(r * 3, n) for r in range(size)] if there else None
    run(lambda **k: c.scatter(out, parts, root, **k), [out])
    run(lambda **k: c.all_to_all_single(whole, given(rank, n * size), **k), [whole])
    send = [(me + 2 * r) % 3 * (n // 2) for r in range(size)]
    recv = [(r + 2 * me) % 3 * (n // 2) for r in range(size)]
    uneven = torch.zeros(sum(recv), 2, dtype=via)
    rows = given(rank, 2 * sum(send)).view(-1, 2)
    run(lambda **k: c.all_to_all_single(uneven, rows, recv, send, **k), [uneven])
    outs = [torch.zeros(k, dtype=via) for k in recv]
    run(lambda **k: c.all_to_all(outs, list(given(rank, sum(send)).split(send)), **k), outs)
    run(lambda **k: c.barrier(**k), [])
    return [t.to(dtype) for t in found]


class Gloo:
    """torch.distributed, with what gloo lacks put together from what it has."""

    def __getattr__(self, name):
        return getattr(dist, name)

    @staticmethod
    def all_to_all(outs, ins, group, async_op):
        flat = torch.empty(sum(t.numel() for t in outs), dtype=outs[0].dtype)
        work = dist.all_to_all_single(flat, torch.cat(ins), [t.numel() for t in outs], [t.numel() for t in ins],
                                      group=group, async_op=async_op)
        if work is not None:
            work.wait()
        for out, part in zip(outs, flat.split([t.numel() for t in outs])):
            out.copy_(part)
        return work

    @staticmethod
    def all_reduce_coalesced(tensors, group, async_op):
        for t in tensors:
            dist.all_reduce(t, group=group)
        return dist.barrier(group=group, async_op=async_op)


def against_gloo(rank, world, dtypes=DTYPES, sizes=(1, 5, 9001)):
    rank, world = start()
    groups = [(None, list(range(world))), (dist.new_group(range(world)), list(range(world)))]
    for ranks in ([0, 1], [1, 0, world - 1][:world]):
        ranks = sorted(set(ranks))
        group = dist.new_group(ranks)
        if rank in ranks:
            groups.append((group, ranks))
    engine_comm().barrier()
    for group, ranks in groups:
        for dtype in dtypes:
            for n in sizes:
                whole = dtype is torch.float32
                for is_async in (False, True) if whole else (n == 5,):
                    ours = operations(comm, rank, ranks, group, dtype, n, is_async)
                    theirs = operations(Gloo(), rank, ranks, group, dtype, n, False,
                                        None if dtype in GLOO else torch.int32)
                    assert len(ours) == len(theirs)
                    for i, (a, b) in enumerate(zip(ours, theirs)):
                        same = torch.equal(a, b) or (dtype is torch.bfloat16 and torch.allclose(a, b, rtol=0.02))
                        assert same, (i, dtype, n, is_async, ranks, a, b)
    assert group_comm(groups[1][0]).size == world
    return group_comm(groups[1][0]).backend


@pytest.mark.parametrize("world", [2, 3])
def test_every_operation_gives_what_gloo_gives_on_any_group_synchronous_or_not(ranks, world):
    assert ranks(world, against_gloo, timeout=120) == ["shm"] * world


def test_groups_and_asynchronous_operations_work_on_the_delegate_too(ranks):
    found = ranks(2, against_gloo, DTYPES[::3], (5,), timeout=120, env={"DSC_COMM_BACKEND": "delegate"})
    assert found == ["delegate"] * 2


def not_contiguous(rank, world):
    rank, world = start()
    for is_async in (False, True):
        x = torch.arange(12.0).view(3, 4).t()
        work = comm.all_reduce(x, async_op=is_async)
        assert work is None or (work.wait() and work.result()[0] is x)
        assert torch.equal(x, world * torch.arange(12.0).view(3, 4).t())
        out = torch.zeros(2 * world, 2).t()[:, ::2]
        version = out._version
        work = comm.all_gather_into_tensor(out, torch.full((1, 2), float(rank)), async_op=is_async)
        assert work is None or work.wait()
        assert out.reshape(-1).tolist() == [0.0, 0.0, 1.0, 1.0] and out._version > version
        columns = torch.zeros(4, 6)[:, 1]
        if rank == 0:
            comm.send(torch.arange(8.0)[::2], 1)
        else:
            comm.recv(columns, 0) if not is_async else comm.irecv(columns, 0).wait()
            assert columns.tolist() == [0.0, 2.0, 4.0, 6.0]


def test_tensors_that_are_not_contiguous_are_written_all_the_same(ranks):
    ranks(2, not_contiguous)


def coalesced(rank, world):
    rank, world = start()
    for sizes in ((1, 5, 300), (3, 900_000)):
        outputs = [torch.zeros(world, n) for n in sizes]
        comm.all_gather_coalesced(outputs, [torch.full((n,), float(rank + n)) for n in sizes])
        for n, out in zip(sizes, outputs):
            assert all((out[r] == r + n).all() for r in range(world))
        tensors = [torch.full((n,), float(rank)) for n in sizes]
        comm.all_reduce_coalesced(tensors, async_op=True).wait()
        assert all((t == 1).all() for t in tensors)


def test_coalesced_operations_reach_every_tensor(ranks):
    ranks(2, coalesced)


def outside(rank, world):
    rank, world = start()
    group = dist.new_group([0, 1])
    x = torch.ones(3)
    if rank < 2:
        comm.all_reduce(x, group=group)
    else:
        with pytest.warns(UserWarning):
            assert comm.all_reduce(x, group=group) is None
        assert comm.get_rank(group) == -1
    objects = [None, None]
    if rank < 2:
        comm.all_gather_object(objects, {"rank": rank}, group=group)
        assert objects == [{"rank": 0}, {"rank": 1}]
    comm.barrier()
    return x.tolist()


def test_a_rank_outside_a_group_gets_torchs_answer(ranks):
    assert ranks(3, outside) == [[2.0] * 3, [2.0] * 3, [1.0] * 3]


# ---- messages ----


def messages(rank, world):
    rank, world = start()
    following, before = (rank + 1) % world, (rank - 1) % world
    group = dist.new_group(range(world))
    for dtype in (torch.float32, torch.bool, torch.int16):
        for n in (0, 1, 200_001):
            got = torch.zeros(n, dtype=dtype)
            ops = [comm.P2POp(comm.isend, values(rank, n, dtype), following, group),
                   comm.P2POp(dist.irecv, got, before, group)]
            for work in comm.batch_isend_irecv(ops):
                work.wait()
            assert torch.equal(got, values(before, n, dtype))
    x, y = torch.zeros(1), torch.zeros(1)
    if rank == 0:
        works = [comm.isend(torch.tensor([float(tag)]), 1, tag=tag) for tag in range(5)]
        comm.send(torch.tensor([50.0]), 1, group=group)  # the same tag in another group
        for work in works:
            work.wait()
    elif rank == 1:
        assert comm.recv(x, 0, group=group) == 0 and x.item() == 50
        for tag in (3, 1, 4, 0, 2):
            assert comm.recv(x, tag=tag) == 0 and x.item() == tag
        work = comm.irecv(y, 0, tag=9)
        assert not work.is_completed() and work.exception() is None
    comm.barrier()
    if rank == 0:
        comm.send(torch.tensor([9.0]), 1, tag=9)
    elif rank == 1:
        assert work.wait() and y.item() == 9 and work.source_rank() == 0 and work.is_success()
        assert work.get_future().value()[0] is y


def test_messages_find_their_receivers_by_group_and_tag(ranks):
    ranks(3, messages)


def messages_differ(rank, world):
    rank, world = start()
    with pytest.raises(CommError) as caught:
        comm.send(torch.zeros(300_000), 1) if rank == 0 else comm.recv(torch.zeros(3), 0)
        comm.barrier()
    return str(caught.value)


def test_ends_of_a_message_that_disagree_are_named_on_both(ranks):
    for text in ranks(2, messages_differ):
        assert "rank 0 called send(fp32 x 300000, to rank 1" in text and "recv(fp32 x 3, from rank 0" in text


def gathers_what_it_overwrites(rank, world):
    rank, world = start()
    x = torch.arange(3.0 * world) + 100 * rank
    comm.all_gather(list(x.chunk(world)), x.chunk(world)[0])
    return x.tolist()


def test_all_gather_may_overwrite_its_input(ranks):
    assert ranks(2, gathers_what_it_overwrites) == [[0, 1, 2, 100, 101, 102]] * 2


# ---- asynchronous ----


def in_order(rank, world):
    rank, world = start()
    group = dist.new_group(range(world))
    x = torch.full((1000,), 1.0)
    works = [comm.all_reduce(x, group=group, async_op=True) for _ in range(6)]
    comm.all_reduce(x, group=group)  # behind them
    assert x[0].item() == world**7 and all(work.is_completed() for work in works)
    for _ in range(300):
        comm.all_reduce(torch.ones(5000), async_op=True)  # nobody keeps tensor or handle
    comm.barrier()
    slow = torch.zeros(4)
    if rank == 0:
        time.sleep(0.4)
    work = comm.broadcast(slow.fill_(rank + 1), 0, async_op=True)
    if rank == 1:
        with pytest.raises(TimeoutError, match="still runs"):
            work.wait(timeout=0.05)
    work.wait()
    return slow.tolist()


def test_operations_that_have_ended_keep_no_tensors():
    core = Comm.self_()
    for look in (lambda work: work.wait(), lambda work: work.done()):
        x = torch.ones(5)
        work, gone = core.all_reduce(x, "sum", None, True), weakref.ref(x)
        del x
        until = time.monotonic() + WITHIN
        while not look(work) and gone() is not None and time.monotonic() < until:
            time.sleep(0.001)
        assert gone() is None
    core.close()


def test_asynchronous_operations_keep_their_order_and_their_tensors(ranks):
    assert ranks(2, in_order) == [[1.0] * 4] * 2


def interrupted(rank, world):
    rank, world = start()
    if rank == 1:
        time.sleep(1.0)
        comm.barrier()
        return True
    work = comm.barrier(async_op=True)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        work.wait()
    return work.wait()


def test_ctrl_c_ends_a_wait_and_not_the_operation(ranks):
    assert ranks(2, interrupted) == [True, True]


def ends_in_flight(rank, world):
    rank, world = start()
    if rank == 0:
        work = comm.all_reduce(torch.ones(1 << 20), async_op=True)
        child = os.fork()
        if child == 0:
            os._exit(0 if _says(work_after_fork) and _says(work.wait) and not work.is_completed() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        comm.destroy_process_group()
        assert work.is_completed() and not work.is_success()
        with pytest.raises(RuntimeError, match="closed before"):
            work.wait()
    else:
        time.sleep(0.5)


def work_after_fork():
    comm.all_reduce(torch.ones(1), async_op=True)


def _says(call):
    try:
        call()
    except RuntimeError as error:
        return "forked child" in str(error)
    return False


def test_closing_ends_what_is_in_flight_and_a_forked_child_cannot_use_it(ranks):
    ranks(2, ends_in_flight)


# ---- what goes wrong ----


def diverged_in_a_group(rank, world):
    rank, world = start()
    group = dist.new_group([0, 2])
    started = time.monotonic()
    with pytest.raises(CommError) as caught:
        if rank == 0:
            comm.all_reduce(torch.ones(3), group=group)
        elif rank == 2:
            comm.all_reduce(torch.ones(4), group=group)
        while True:  # rank 1: its next call says that the job is lost
            comm.barrier()
    assert time.monotonic() - started < WITHIN
    return str(caught.value)


def test_a_diverged_rank_of_a_group_is_an_error_on_all(ranks):
    for text in ranks(3, diverged_in_a_group):
        assert "all_reduce(fp32 x 3, sum)" in text and "all_reduce(fp32 x 4, sum)" in text


def in_two_groups(rank, world, other):
    rank, world = start()
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    engine = engine_comm()
    for group in groups:
        comm.barrier(group)
    started = time.monotonic()
    with pytest.raises(CommError, match="ranks wait for each other in different operations") as caught:
        if rank == 0:
            engine.barrier("engine.step #3") if other == "engine" else comm.barrier(groups[0])
        else:
            comm.barrier() if other == "engine" else comm.barrier(groups[1])
    assert time.monotonic() - started < WITHIN
    return str(caught.value)


@pytest.mark.parametrize("other", ["engine", "group"])
def test_ranks_that_wait_in_different_channels_are_told_so(ranks, other):
    for text in ranks(2, in_two_groups, other):
        assert "rank 0 in barrier()" in text and "rank 1 in barrier()" in text
        assert other != "engine" or "[engine.step #3]" in text


OPERATIONS = {
    "reduce": lambda x, r: comm.reduce(x, 0), "gather": lambda x, r: comm.gather(x, [x.clone(), x.clone()], 0),
    "scatter": lambda x, r: comm.scatter(x, None, 1), "all_to_all": lambda x, r: comm.all_to_all_single(x.clone(), x),
    "recv": lambda x, r: comm.recv(x, 1), "asynchronous": lambda x, r: comm.all_reduce(x, async_op=True).wait(),
    "irecv": lambda x, r: comm.irecv(x, 1).wait(),
}


def dies_inside(rank, world, name):
    rank, world = start()
    group = dist.new_group(range(world))
    comm.barrier(group)
    if rank == 1:
        time.sleep(0.2)
        die()
    started = time.monotonic()
    with pytest.raises(CommError, match="rank 1 .* died"):
        OPERATIONS[name](torch.ones(400_000), rank)
    assert time.monotonic() - started < WITHIN
    with pytest.raises(CommError):
        comm.barrier()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_rank_that_dies_inside_an_operation_is_named(ranks, name):
    outcomes = ranks.outcomes(2, dies_inside, name, timeout=30)
    assert outcomes[0].ok, outcomes[0].describe()


def wrong_arguments(rank, world):
    rank, world = start()
    x = torch.ones(4)
    group = dist.new_group([1])
    for error, match, call in (
        (ValueError, "input_split_sizes .* add up to 3", lambda: comm.all_to_all_single(x, x, [2, 2], [1, 2])),
        (ValueError, "has 3 rows, which 2", lambda: comm.all_to_all_single(x[:3], x[:3], None, [1, 2])),
        (ValueError, "exactly one of dst and group_dst", lambda: comm.reduce(x)),
        (ValueError, "root is 5", lambda: comm.reduce(x, 5)),
        (ValueError, "one for each of 2 ranks", lambda: comm.gather(x, [x], comm.get_rank())),
        (ValueError, "must be None", lambda: comm.scatter(x, [x, x], 1 - comm.get_rank())),
        (ValueError, "the other rank is", lambda: comm.send(x, comm.get_rank())),
        (ValueError, "the other rank is 7", lambda: comm.irecv(x, 7)),
        (ValueError, "op is", lambda: comm.P2POp(comm.send, x, 0)),
        (ValueError, "at least one", lambda: comm.batch_isend_irecv([])),
        (TypeError, "output is fp32, input is bytes", lambda: comm.all_to_all_single(x, x.bool())),
    ):
        with pytest.raises(error, match=match):
            call()
    assert group is not None
    comm.barrier()


def test_wrong_arguments_of_the_other_operations_are_named_and_change_nothing(ranks):
    ranks(2, wrong_arguments)


def opened_often(rank, world):
    rank, world = start()

    def size():
        fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssShmem")))
        return sum(int(value.split()[0]) for value in fields.values()), len(os.listdir("/proc/self/fd"))

    found = []
    group = dist.new_group([0, 1])
    for i in range(60):
        c = world_comm().group([0, 1], f"turn {i}")
        x = torch.ones(100_000)
        c.all_reduce(x, "sum", None, True).wait()
        c.close()
        comm.all_reduce(x, group=group)
        if i in (9, 59):
            found.append(size())
    (kib, fds), (kib_after, fds_after) = found
    assert fds_after <= fds and kib_after - kib < 2048, found


def test_opening_and_closing_groups_leaves_memory_and_descriptors_flat(ranks):
    ranks(2, opened_often)


# ---- the log ----


def logged(rank, world):
    rank, world = start()
    comm.configure({"comms_logger": {"enabled": True, "prof_all": False, "prof_ops": ["broadcast"]}})
    x = torch.ones(1 << 18)
    comm.all_reduce(x)
    comm.all_reduce(x, prof=True)
    comm.broadcast(x, 0)
    assert comm.get_logged_comm_ops() == ["all_reduce", "broadcast"] and comm.get_comm_operation_count() == 2
    comm.reset_log()
    assert not comm.has_comm_data()
    comm.configure(prof_all=True, debug=True)
    for _ in range(20):
        comm.all_gather_into_tensor(torch.zeros(2 << 18), x, async_op=True).wait()
    summary = comm.log_summary(show_straggler=True, return_dict=True)
    row = summary["all_gather_into_tensor | [Caller Func: logged]"][1 << 20]
    assert row["count"] == 20 and row["total_straggler_ms"] >= 0
    assert abs(row["busbw_avg_gbps"] / row["tput_avg_gbps"] - 0.5) < 1e-6
    comm.configure(enabled=False)


def test_the_log_counts_and_times_what_it_is_asked_to(ranks):
    ranks(2, logged)


def engine_logged(rank, world):
    torch.set_num_threads(1)
    found = []
    for stage in (0, 1, 2):
        module = torch.nn.Linear(300, 200)
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=module.parameters(), config={
                **models.config(stage), "wall_clock_breakdown": True, "comms_logger": {"enabled": stage != 1}})
        for _ in range(3):
            engine.backward(engine(torch.ones(2, 300)).square().mean())
            if rank == 1:
                time.sleep(0.05)  # rank 0 waits for it in the reduction
            engine.step()
        timers = engine.get_wall_clock_timers()
        found.append((comm.log_summary(return_dict=True), timers["bwd_allreduce"], timers["step"]))
        comm.configure(enabled=False)
        comm.reset_log()
    return found


def test_the_engines_own_operations_are_in_the_log_and_in_the_timers(ranks):
    n_bytes = (300 * 200 + 200) * 4
    (whole, reduced, stepped), (off, *_), (parts, *_) = ranks(2, engine_logged)[0]
    assert set(whole) == {"engine.reduce_gradients"} and whole["engine.reduce_gradients"][n_bytes]["count"] == 3
    assert 20 < reduced <= stepped and whole["engine.reduce_gradients"][n_bytes]["total_latency_ms"] > 60
    assert off == {}
    assert set(parts) == {"engine.reduce_gradients", "engine.gather_values"}
    assert all(sizes[n_bytes // 2]["count"] == 3 for sizes in parts.values())


def test_bandwidths_follow_the_documented_formulas():
    from deepspeed_c.comm.logger import bandwidths
    assert bandwidths("all_reduce", 10**9, 1000, 4) == (16, 12)
    assert bandwidths("all_gather_into_tensor", 10**9, 1000, 4) == (32, 24)
    assert bandwidths("reduce_scatter_tensor", 10**9, 1000, 4) == (32, 24)
    assert bandwidths("all_to_all_single", 10**9, 1000, 4) == (8, 6)
    assert bandwidths("broadcast", 10**9, 1000, 4) == bandwidths("gather", 10**9, 1000, 4) == (8, 8)


def test_helpers_say_where_the_message_is():
    assert comm.get_tensor_position(comm.all_reduce) == 0 and comm.get_tensor_position(comm.barrier) == -1
    assert comm.get_msg_size_from_args(comm.all_gather, [torch.zeros(2)] * 2, torch.zeros(3)) == 12
    assert comm.get_default_args(comm.send)["tag"] == 0
    assert comm.get_tensor_kwarg(comm.broadcast, {"tensor": 5}) == 5


# ---- engines over groups ----


def trains_in_pairs(rank, world, victim):
    """Ranks {0, 2} take 5 steps of one micro-step, {1, 3} 3 steps of two, at the same time; then `victim` dies."""
    deepspeed.init_distributed()
    odd = rank % 2
    members = [3, 1] if odd else [0, 2]
    pair = world_comm().group(members, f"pair {odd}", 20.0)
    engine_module.engine_comm = reduction.engine_comm = lambda ranks=None: pair
    engine_module.mpu_layout = lambda mpu: MpuLayout(tuple(members), 2, pair.rank, (rank,))
    torch.set_num_threads(1)
    module = models.make()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                      config=models.config(1 + odd, gas=1 + odd))
    models.train(engine, pair.rank, 3 if odd else 5, 1 + odd)
    comm.barrier()  # the script's own channel, of all ranks
    bits, started = models.bits(module), time.monotonic()
    if rank == victim:
        die()
    try:
        models.train(engine, pair.rank, 1 if rank % 2 != victim % 2 else 100, 1 + odd)
        error = ""
    except CommError as e:
        error = str(e)
    return bits, error, time.monotonic() - started


def trains_as_a_world(rank, world):
    torch.set_num_threads(1)
    module = models.make()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(1))
    models.train(engine, rank, 5)
    return models.bits(module)


def test_pairs_of_four_ranks_train_on_their_own_and_a_death_is_an_error_in_its_pair(ranks):
    outcomes = ranks.outcomes(4, trains_in_pairs, 1, timeout=60)
    assert outcomes[1].exit_code == -9
    assert outcomes[0].value[0] == outcomes[2].value[0] == ranks(2, trains_as_a_world)[0] != outcomes[3].value[0]
    text, seconds = outcomes[3].value[1:]
    assert "rank 1" in text and "of group pair 1" in text and seconds < WITHIN, text
