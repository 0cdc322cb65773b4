"""The `delegate` communicator in two levels: the ranks of a node add up first, then nodes. Here nodes are pretended
(DSC_COMM_NODE): the bits of the documented order, errors on every rank within seconds, fewer bytes between nodes."""
import os
import signal
import threading
import time

import models
import pytest
import test_stages
import torch
from ranks import die

from deepspeed_c import _delegate, distributed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)
COMBINE = {"sum": torch.add, "avg": torch.add, "max": torch.maximum, "min": torch.minimum, "prod": torch.mul}


def opened(rank, layout="aabb", timeout=None):
    """The communicator of ranks on pretended nodes, one letter per rank."""
    os.environ["DSC_COMM_NODE"] = layout[rank]
    torch.set_num_threads(1)
    distributed.init_distributed("gloo", verbose=False, timeout=timeout)
    return distributed.world_comm()


def values(rank, n, dtype):
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(n, generator=generator) * 100).to(dtype)


def reduced(parts, op, n_local):
    """The documented order: ranks of a node, then nodes, each sum from +0.0; 16-bit floats in fp32, rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def combine(parts):
        first = parts[0].to(wide)
        total = first + torch.zeros((), dtype=wide) if op in ("sum", "avg") else first.clone()
        for part in parts[1:]:
            total = COMBINE[op](total, part.to(wide))
        return total

    total = combine([combine(parts[i:i + n_local]) for i in range(0, len(parts), n_local)])
    return (total / len(parts) if op == "avg" else total).to(dtype)


def same(found, expected, what):
    nans = torch.isnan(expected) if expected.is_floating_point() else torch.zeros_like(expected, dtype=torch.bool)
    assert torch.equal(torch.isnan(found) if found.is_floating_point() else nans, nans), what
    keep = ~nans
    assert torch.equal(found[keep].view(torch.uint8), expected[keep].view(torch.uint8)), what


def check_operations(comm, n, dtype, ops, n_local=2):
    rank, world = comm.rank, comm.size
    mine = [values(r, n, dtype) for r in range(world)]
    for op in ops:
        found = mine[rank].clone()
        comm.all_reduce(found, op)
        expected = reduced(mine, op, n_local)
        same(found, expected, ("all_reduce", n, dtype, op))
        for root in (0, world - 1):
            found = mine[rank].clone()
            comm.reduce(found, root, op)
            same(found, expected if rank == root else mine[rank], ("reduce", n, dtype, op, root))
        whole = [values(r, n * world, dtype) for r in range(world)]
        part = torch.empty(n, dtype=dtype)
        comm.reduce_scatter(part, whole[rank], op)
        same(part, reduced([w[rank * n:(rank + 1) * n] for w in whole], op, n_local), ("reduce_scatter", n, dtype, op))
    gathered = torch.empty(n * world, dtype=dtype)
    comm.all_gather(gathered, mine[rank])
    same(gathered, torch.cat(mine), ("all_gather", n, dtype))
    for root in range(world):
        found = mine[rank].clone()
        comm.broadcast(found, root)
        same(found, mine[root], ("broadcast", n, dtype, root))
    swapped = torch.empty(n * world, dtype=dtype)
    comm.all_to_all(swapped, torch.cat([m + rank for m in mine]))
    same(swapped, torch.cat([mine[rank] + r for r in range(world)]), ("all_to_all", n, dtype))


def operations(rank, world):
    """With a small staging, so that the areas of the window are used again and again."""
    _delegate.STAGING_BYTES = 256 << 10
    comm = opened(rank)
    for dtype in DTYPES:
        exact = dtype in (torch.int32, torch.int64)
        check_operations(comm, 7, dtype, ("sum", "max", "min", "prod") if exact else tuple(COMBINE))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check_operations(comm, 40_011, dtype, ("sum", "avg"))
    return comm.backend


def test_every_operation_gives_the_bits_of_the_documented_order(ranks):
    assert ranks(4, operations) == ["delegate"] * 4


def long_operations(rank, world):
    comm = opened(rank)
    for n in (262_145, 1_048_577):  # more than a chunk of the window
        for dtype in DTYPES:
            check_operations(comm, n, dtype, ("sum", "prod"))
    return comm.backend


@pytest.mark.long
def test_long_operations_give_the_bits_of_the_documented_order(ranks):
    assert ranks(4, long_operations, timeout=300) == ["delegate"] * 4


# ---- the layout ----


def layouts(rank, world, layout):
    comm = opened(rank, layout)
    found = {op: torch.full((40_000,), 1.0 + rank) for op in ("sum", "max")}
    for op, tensor in found.items():
        comm.all_reduce(tensor, op)
    return {op: tensor.unique().tolist() for op, tensor in found.items()}, comm.size == world


@pytest.mark.parametrize("layout", ["aab", "abab"])
def test_an_uneven_layout_is_flat(ranks, layout):
    n = len(layout)
    assert ranks(n, layouts, layout) == [({"sum": [n * (n + 1) / 2], "max": [float(n)]}, True)] * n


def place_of(name, pid):
    return f"{name} pid:[1] {pid}"


@pytest.mark.parametrize("nodes, n_local, why", [
    ("aabb", 2, "2 nodes of 2 ranks"), ("aaabbb", 3, "2 nodes of 3 ranks"), ("aabbcc", 2, "3 nodes of 2 ranks"),
    ("aab", 1, "different numbers"), ("aabbb", 1, "different numbers"), ("aaab", 1, "different numbers"),
    ("abab", 1, "follow each other"), ("ab", 1, "every node has one rank"), ("aa", 1, "on one node"),
    ("aabc", 1, "different numbers"), ("abba", 1, "follow each other")])
def test_the_layout_says_how_many_ranks_a_node_has_and_why(nodes, n_local, why):
    found = _delegate.layout([place_of(name, pid) for pid, name in enumerate(nodes)])
    assert found[0] == n_local and why in found[1]


def test_a_pretended_node_with_blanks_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("DSC_COMM_NODE", "a b")
    with pytest.raises(ValueError, match="DSC_COMM_NODE is 'a b'"):
        _delegate.node()


# ---- how much travels ----


def sent(kind, rank, size, n_bytes, sends, root):
    if kind == _delegate._EXCHANGE:
        return sum(sends) - sends[rank]
    return n_bytes * (size - 1) if kind == _delegate._GATHER else n_bytes * (kind == _delegate._BROADCAST)


def counted(rank, world, layout):
    """Bytes that this rank sends in a reduce_scatter and an all_gather of 50,000 fp32 per rank, to whom they go."""
    start, n_sent = _delegate.Mover.start, {"rail": 0, "all": 0}

    def spy(self, kind, src, dst, n_bytes, sends, receives, root):
        size = self._size
        which = "all" if size == world else "rail"
        n_sent[which] += sent(kind, rank if size == world else rank // 2, size, n_bytes, sends, root)
        return start(self, kind, src, dst, n_bytes, sends, receives, root)

    comm = opened(rank, layout)
    _delegate.Mover.start = spy
    part, whole = torch.ones(50_000), torch.ones(50_000 * world)
    comm.reduce_scatter(part, whole)
    comm.all_gather(whole, part)
    return n_sent


def test_a_rail_carries_one_of_the_nodes_ranks_share(ranks):
    """Two nodes of two: a rank sends to one other instead of three, of which two are on the other node."""
    n_bytes = 2 * 4 * 50_000
    assert ranks(4, counted, "aabb") == [{"rail": n_bytes, "all": 0}] * 4
    assert ranks(4, counted, "abab") == [{"rail": 0, "all": 3 * n_bytes}] * 4


# ---- failures ----


def killed(rank, world, victim, when):
    comm = opened(rank)
    comm.barrier()
    x = torch.ones(3_000_000)
    if rank == victim:
        if when == "in the middle":
            threading.Timer(0.05, die).start()
            while True:
                comm.all_reduce(x, "sum", "train")
        die()
    while True:
        comm.all_reduce(x, "sum", "train")


@pytest.mark.parametrize("victim, when", [(3, "in the middle"), pytest.param(1, "before", marks=pytest.mark.long)])
def test_a_killed_rank_is_an_error_on_all_within_seconds(ranks, victim, when):
    for rank, outcome in enumerate(ranks.outcomes(4, killed, victim, when)):
        if rank != victim:
            assert outcome.error == "CommError" and outcome.seconds < 8, outcome.describe()
            assert f"rank {victim} (pid" in outcome.text and "died or ended" in outcome.text, outcome.text
            assert outcome.exit_code == 0


def dies_among_messages(rank, world):
    """Rank 3's end breaks a message of rank 0, on the other node; rank 2, who can see it, waits for another message."""
    comm = opened(rank)
    x = torch.ones(300_000)
    comm.barrier()
    if rank == 3:
        time.sleep(0.3)
        die()
    comm.recv(x, 3 if rank == 0 else 0)


def test_a_killed_rank_is_named_to_who_waits_for_its_message(ranks):
    for outcome in ranks.outcomes(4, dies_among_messages)[:3]:
        assert outcome.error == "CommError" and outcome.seconds < 8, outcome.describe()
        assert "rank 3 (pid" in outcome.text and "died or ended" in outcome.text, outcome.text


def gives_up_in_the_node(rank, world):
    """Rank 1 stays away from an operation that was covered: only its node waits for it, then the others."""
    import deepspeed_c as deepspeed
    opened(rank)
    module = torch.nn.Linear(8, 300)
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(1))[0]
    for i in range(3):
        engine.backward(engine(torch.ones(2, 8) + rank).square().mean())
        if rank == 1 and i == 2:
            distributed.engine_comm().abort("no more data")
            return
        engine.step()


def test_a_rank_that_gives_up_tells_the_others_why(ranks):
    found = ranks.outcomes(4, gives_up_in_the_node)
    for outcome in (found[0], *found[2:]):
        assert outcome.error == "CommError" and outcome.seconds < 6, outcome.describe()
        assert "rank 1" in outcome.text and "no more data" in outcome.text, outcome.text


def differ(rank, world):
    comm = opened(rank)
    x = torch.ones(400_000)
    comm.all_reduce(x)
    if rank == 2:
        comm.barrier("mine")
    else:
        comm.all_reduce(x)


def test_different_calls_are_an_error_that_names_both(ranks):
    for outcome in ranks.outcomes(4, differ):
        assert outcome.error == "CommError" and outcome.seconds < 5, outcome.describe()
        assert "all_reduce(fp32 x 400000, sum) as operation 2 while rank 2 called barrier() [mine]" in outcome.text


def two_channels(rank, world):
    comm = opened(rank)
    other = distributed._open_group(comm, range(world), "other")
    first, second = (comm, other) if rank == 0 else (other, comm)
    first.barrier("one")
    second.barrier("two")


@pytest.mark.long  # they wait in agreements, as in the flat form
def test_ranks_that_wait_in_different_channels_are_an_error(ranks):
    for outcome in ranks.outcomes(4, two_channels):
        assert outcome.error == "CommError" and outcome.seconds < 10, outcome.describe()
        assert "wait for each other in different operations" in outcome.text, outcome.text


def slow(rank, world):
    """Ranks that wait for a slow one, some inside their node, take it neither for dead nor for a standstill."""
    from datetime import timedelta
    comm = opened(rank, timeout=timedelta(seconds=4))
    comm.barrier()
    if rank == 3:
        time.sleep(5.5)  # with room for a busy machine
        return
    comm.all_reduce(torch.ones(1_000_000))


@pytest.mark.long
def test_only_the_time_out_ends_a_wait_for_a_slow_rank(ranks):
    for outcome in ranks.outcomes(4, slow)[:3]:
        assert outcome.error == "TimeoutError" and "all_reduce(fp32 x 1000000, sum)" in outcome.text, outcome.describe()


def interrupted(rank, world):
    comm = opened(rank)
    comm.barrier()
    if rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    x = torch.ones(4_000_000)
    while rank != 1 or time.sleep(0.05) is None:
        comm.all_reduce(x)


def test_ctrl_c_ends_a_wait_and_the_others_hear_of_it(ranks):
    found = ranks.outcomes(4, interrupted)
    assert found[0].error == "KeyboardInterrupt", found[0].describe()
    for outcome in found[1:]:
        assert outcome.error == "CommError" and "rank 0" in outcome.text and outcome.seconds < 8, outcome.describe()


# ---- groups ----


def grouped(rank, world):
    import torch.distributed as dist
    comm = opened(rank)
    inside = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    across = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][rank % 2]
    whole = dist.new_group([0, 1, 2, 3])
    found = []
    for group in (inside, across, whole):
        part = distributed.group_comm(group)
        x = torch.full((50_000,), float(rank))
        part.all_reduce(x)
        found.append((part.backend, x.unique().tolist()))
    distributed.destroy_process_group()
    assert comm.closed
    return found


def test_a_group_inside_a_node_shares_memory(ranks):
    node, rail = [1.0, 5.0], [2.0, 4.0]
    expected = [[("shm", [node[r // 2]]), ("delegate", [rail[r % 2]]), ("delegate", [6.0])] for r in range(4)]
    assert ranks(4, grouped) == expected


# ---- the engine ----


def stepped(rank):
    """The weight after one step of plain SGD from zero, where rank r's gradient is values(r)."""
    import deepspeed_c as deepspeed
    module = torch.nn.Linear(700, 30, bias=False)
    torch.nn.init.zeros_(module.weight)
    config = {"train_batch_size": 4, "zero_optimization": {"stage": 1},
              "optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "gradient_clipping": 0.0}
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]
    engine.backward((engine.module.weight.flatten() * values(rank, 21_000, torch.float32)).sum())
    engine.step()
    return module.weight.detach().flatten()


def trained(rank, world):
    opened(rank)
    expected = -reduced([values(r, 21_000, torch.float32) for r in range(world)], "avg", 2)
    same(stepped(rank), expected + 0.0, "a step in the documented order")
    found = {}
    for dtype, gas in (("fp32", 1), ("bf16", 1), ("fp16", 3)):
        for stage in (0, 1, 2):
            for overlap, bucket in ((False, 1e3), (True, 5e8)):
                bits, norm, _ = test_stages.run(rank, stage, dtype, gas, overlap, bucket, n_steps=3)
                sums = "sums of rounds" if stage == 2 and gas > 1 else "one sum"  # another order
                found.setdefault((dtype, sums), set()).add((test_stages.hash_of(bits), norm))
    return found


def test_stages_and_settings_change_no_bit(ranks):
    found = ranks(4, trained)
    assert all(one == found[0] for one in found)
    assert {what: len(values) for what, values in found[0].items()} == {
        ("fp32", "one sum"): 1, ("bf16", "one sum"): 1, ("fp16", "one sum"): 1, ("fp16", "sums of rounds"): 1}


def dies_in_training(rank, world, stage):
    import deepspeed_c as deepspeed
    opened(rank)
    module = torch.nn.Sequential(torch.nn.Linear(8, 300), torch.nn.Linear(300, 3))
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(stage))[0]
    for i in range(400):
        if rank == 2 and i == 5:
            threading.Timer(0.02, die).start()
        engine.backward(engine(torch.ones(2, 8) + rank).square().mean())
        engine.step()


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_rank_killed_in_training_is_an_error_on_all_within_seconds(ranks, stage):
    found = ranks.outcomes(4, dies_in_training, stage)
    for outcome in (*found[:2], found[3]):
        assert outcome.error == "CommError" and outcome.seconds < 8, outcome.describe()
        assert "rank 2" in outcome.text and "died or ended" in outcome.text, outcome.text
        assert outcome.exit_code == 0
