"""The `delegate` communicator: ranks that share no memory. Same bits as `shm`, errors on every rank within seconds."""
import itertools
import os
import signal
import threading
import time

import models
import pytest
import test_comm_groups
import test_stages
import torch
from ranks import die

from deepspeed_c import distributed

FORCED = {"DSC_COMM_BACKEND": "delegate"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)


def opened(timeout=None):
    distributed.init_distributed("gloo", verbose=False, timeout=timeout)
    comm = distributed.world_comm()
    assert comm.backend == os.environ.get("DSC_COMM_BACKEND", "shm")
    return comm


def values(rank, n, dtype):
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(n, generator=generator) * 100).to(dtype)


def results(rank, world):
    """What every operation gives, as bytes: lengths around the chunks, one and several."""
    comm = opened()
    out = []
    for n in (0, 1, 7, 5000, 20_011, 700_001):
        for dtype in DTYPES if n < 10_000 else DTYPES[:2]:
            x = values(rank, n, dtype)
            for op in ("sum", "max", "prod") if n < 10_000 else ("sum",):
                y = x.clone()
                comm.all_reduce(y, op)
                out.append(y)
            gathered, part = torch.empty(n * world, dtype=dtype), torch.empty(n, dtype=dtype)
            comm.all_gather(gathered, x)
            comm.reduce_scatter(part, gathered + gathered.flip(0))
            sent = x.clone()
            comm.broadcast(sent, world - 1)
            out += [gathered, part, sent]
    return b"".join(t.view(torch.uint8).numpy().tobytes() for t in out)


@pytest.mark.parametrize("world", [2, 3])
def test_every_operation_gives_the_bits_of_shm(ranks, world):
    shm = ranks(world, results)
    assert ranks(world, results, env=FORCED) == shm


def differ(rank, world):
    comm = opened()
    x = torch.ones(4)
    comm.all_reduce(x)
    if rank == 1:
        comm.barrier("mine")
    else:
        comm.all_reduce(x)


def test_different_calls_are_an_error_that_names_both(ranks):
    found = ranks.outcomes(3, differ, env=FORCED)
    for outcome in found:
        assert outcome.error == "CommError" and outcome.seconds < 5, outcome.describe()
        calls = "rank 0 called all_reduce(fp32 x 4, sum) as operation 2 while rank 1 called barrier() [mine]"
        assert calls in outcome.text
    assert len({outcome.text for outcome in found}) == 1


def killed(rank, world, when):
    comm = opened()
    comm.barrier()
    if rank == world - 1:
        if when == "later":
            time.sleep(0.5)
        die()
    comm.all_reduce(torch.ones(4), "sum", "train")


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_killed_rank_is_an_error_on_all_within_seconds(ranks, when):
    found = ranks.outcomes(4, killed, when, env=FORCED)
    for outcome in found[:3]:
        assert outcome.error == "CommError" and outcome.seconds < 6, outcome.describe()
        assert "rank 3 (pid" in outcome.text and "died or ended" in outcome.text, outcome.text
        assert outcome.exit_code == 0


def raising(rank, world):
    comm = opened()
    comm.barrier()
    if rank == 1:
        comm.abort("no more data")
        return
    comm.barrier()


def test_a_rank_that_gives_up_tells_the_others_why(ranks):
    found = ranks.outcomes(3, raising, env=FORCED)
    for outcome in (found[0], found[2]):
        assert outcome.error == "CommError" and outcome.seconds < 5, outcome.describe()
        assert "rank 1" in outcome.text and "no more data" in outcome.text, outcome.text


def leaving(rank, world):
    comm = opened()
    comm.barrier()
    if rank == 1:
        comm.close()
        time.sleep(3)
        return
    comm.barrier()


def test_a_rank_that_closes_is_an_error_for_who_waits_for_it(ranks):
    found = ranks.outcomes(2, leaving, env=FORCED)
    assert found[0].error == "CommError" and "rank 1" in found[0].text and "left" in found[0].text, found[0].describe()


def two_channels(rank, world, orders):
    comm = opened()
    other = distributed._open_group(comm, range(world), "other")
    for which, label in orders[rank]:
        (comm, other)[which].barrier(label)


def test_ranks_that_wait_in_different_channels_are_an_error_naming_both(ranks):
    orders = [[(0, "engine.step 4"), (1, "mine")], [(1, "mine"), (0, "engine.step 4")], [(0, "engine.step 4")]]
    for outcome in ranks.outcomes(3, two_channels, orders, env=FORCED):
        assert outcome.error == "CommError" and outcome.seconds < 10, outcome.describe()
        assert "engine.step 4" in outcome.text and "barrier() [mine]" in outcome.text, outcome.text


def slow(rank, world):
    comm = opened()
    if rank == 1:
        time.sleep(4)
    comm.barrier("a")
    if rank == 0:
        time.sleep(3)
    comm.all_reduce(torch.ones(3_000_000))
    return True


def test_a_slow_rank_is_waited_for(ranks):
    assert ranks(3, slow, env=FORCED) == [True] * 3


def late(rank, world):
    from datetime import timedelta
    comm = opened(timedelta(seconds=1.5))
    if rank == 1:
        time.sleep(3)
        return
    comm.barrier("here")


def test_the_time_out_ends_a_wait(ranks):
    outcome = ranks.outcomes(2, late, env=FORCED)[0]
    assert outcome.error == "TimeoutError" and "barrier() [here]" in outcome.text, outcome.describe()
    assert outcome.exit_code == 0


def interrupted(rank, world):
    comm = opened()
    if rank == 1:
        time.sleep(3)
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    comm.barrier()


def test_ctrl_c_ends_a_wait(ranks):
    outcome = ranks.outcomes(2, interrupted, env=FORCED)[0]
    assert outcome.error == "KeyboardInterrupt" and outcome.seconds < 4, outcome.describe()
    assert outcome.exit_code == 0


def test_an_unknown_backend_is_an_error_that_names_it(ranks):
    for outcome in ranks.outcomes(2, slow, env={"DSC_COMM_BACKEND": "tcp"}):
        assert outcome.error == "ValueError" and "'tcp'" in outcome.text


# ---- the engine ----


def trained(rank, world, dtype, gas):
    """{(stage, overlap, bucket): hash of the parameters and the norm} after a few steps."""
    torch.set_num_threads(1)
    found = {}
    for stage, overlap, bucket in itertools.product((0, 1, 2), (False, True), (1e3, 5e8)):
        bits, norm, _ = test_stages.run(rank, stage, dtype, gas, overlap, bucket, n_steps=3)
        found[stage, overlap, bucket] = test_stages.hash_of(bits), norm
    return found


@pytest.mark.parametrize("world, dtype, gas", [
    (2, "fp32", 1), (2, "fp32", 3), (2, "bf16", 1), (2, "bf16", 3), (2, "fp16", 1), (2, "fp16", 3), (4, "bf16", 3)])
def test_training_over_the_delegate_gives_the_bits_of_shm(ranks, world, dtype, gas):
    shm = ranks(world, trained, dtype, gas, timeout=180)
    assert ranks(world, trained, dtype, gas, env=FORCED, timeout=180) == shm


def step(engine, rank, micro=1):
    for _ in range(micro):
        engine.backward(engine(torch.ones(2, 8) + rank).square().mean())
    engine.step()


def small_engine(stage):
    import deepspeed_c as deepspeed
    torch.set_num_threads(1)
    module = torch.nn.Sequential(torch.nn.Linear(8, 300), torch.nn.Linear(300, 3))
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(stage))[0]


def step_against_barrier(rank, world, stage):
    from deepspeed_c import comm
    engine = small_engine(stage)
    step(engine, rank)
    if rank == 1:
        comm.barrier()
    step(engine, rank)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_against_a_users_barrier_is_an_error_naming_both(ranks, stage):
    for outcome in ranks.outcomes(2, step_against_barrier, stage, env=FORCED):
        assert outcome.error == "CommError" and outcome.seconds < 12, outcome.describe()
        assert "barrier" in outcome.text and "step 2" in outcome.text, outcome.text
        assert outcome.exit_code == 0


def dies_in_training(rank, world, stage):
    engine = small_engine(stage)
    for i in range(50):
        if rank == 1 and i == 5:
            threading.Timer(0.01, die).start()
        step(engine, rank)
    time.sleep(20)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_rank_killed_in_training_is_an_error_on_all_within_seconds(ranks, stage):
    found = ranks.outcomes(3, dies_in_training, stage, env=FORCED)
    for outcome in (found[0], found[2]):
        assert outcome.error == "CommError" and outcome.seconds < 8, outcome.describe()
        assert "rank 1" in outcome.text and "died or ended" in outcome.text, outcome.text
        assert outcome.exit_code == 0


def unequal(rank, world):
    """Ranks with unequal numbers of backward passes at stage 2; then one whose settings differ."""
    engine = small_engine(2)
    for i in range(3):
        step(engine, rank, 1 + (i + rank) % 3)
    bits = models.bits(engine.module)
    engine.optimizer.param_groups[0]["lr"] = 0.5 if rank == 0 else 0.25
    engine.backward(engine(torch.ones(2, 8)).square().mean())
    with pytest.raises(ValueError, match="lr 0.5 on rank 0 and 0.25 on rank 1"):
        engine.step()
    engine.optimizer.param_groups[0]["lr"] = 0.5
    engine.step()
    return bits, models.bits(engine.module)


def test_unequal_numbers_of_backward_passes_give_the_bits_of_shm(ranks):
    shm = ranks(3, unequal)
    assert ranks(3, unequal, env=FORCED) == shm
    assert len(set(shm)) == 1


def asynchronous(rank, world):
    comm = opened()
    from deepspeed_c import comm as public
    tensors = [torch.full((100_000,), float(rank + i)) for i in range(5)]
    works = [public.all_reduce(t, async_op=True) for t in tensors]
    x = torch.ones(4)
    public.all_reduce(x)
    for work in works:
        work.wait()
    return [t[-1].item() for t in tensors], x.tolist(), comm.backend


def test_asynchronous_operations(ranks):
    sums = [1.0 + 2 * i for i in range(5)]
    assert ranks(2, asynchronous, env=FORCED) == [(sums, [2.0] * 4, "delegate")] * 2


def test_every_operation_gives_what_gloo_gives_on_any_group(ranks):
    ranks(3, test_comm_groups.against_gloo, timeout=120, env=FORCED)


def test_a_diverged_rank_of_a_group_is_an_error_on_all_ranks(ranks):
    for text in ranks(3, test_comm_groups.diverged_in_a_group, env=FORCED):
        assert "all_reduce(fp32 x 3, sum)" in text and "all_reduce(fp32 x 4, sum)" in text
