"""The N-rank fixture itself: values, failures, deaths, time limits, and that nothing remains."""
import os
import signal
import subprocess
import sys
import time

import pytest
from ranks import RanksFailed, die, processes_of, reserve_port


def add(rank, world, x):
    return (rank, world, x, os.environ["RANK"], os.environ["MASTER_PORT"], os.environ["OMP_NUM_THREADS"])


def fail_on_one(rank, world):
    if rank == 1:
        raise ValueError("rank one says no")
    time.sleep(60)


def die_on_one(rank, world):
    print(f"rank {rank} was here")
    if rank == 1:
        die()
    return rank


def hang(rank, world):
    time.sleep(60)


def leave_child(rank, world):
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid


def unpicklable(rank, world):
    return lambda: None


def quit_early(rank, world):
    os._exit(7)


def torch_store(rank, world):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    return os.environ["MASTER_PORT"]


def test_ranks_return_their_values_in_order_with_the_launcher_s_environment(ranks):
    values = ranks(3, add, 5)
    assert [v[:4] for v in values] == [(r, 3, 5, str(r)) for r in range(3)]
    assert len({v[4] for v in values}) == 1 and all(v[5] == "1" for v in values)


def test_a_failing_rank_ends_all_and_every_rank_is_in_the_error(ranks):
    start = time.monotonic()
    with pytest.raises(RanksFailed) as info:
        ranks(2, fail_on_one)
    assert time.monotonic() - start < 10
    text = str(info.value)
    assert "rank 1 raised ValueError: rank one says no" in text
    assert "rank 0 was ended by SIGKILL" in text and "in fail_on_one" in text


def test_a_killed_rank_is_an_outcome_and_the_others_run_on(ranks):
    one, two = ranks.outcomes(2, die_on_one)
    assert one.ok and one.value == 0 and one.output == "rank 0 was here\n"
    assert two.exit_code == -signal.SIGKILL and not two.ok


def test_a_killed_rank_fails_an_ordinary_call(ranks):
    with pytest.raises(RanksFailed, match="rank 1 was ended by SIGKILL"):
        ranks(2, die_on_one)


def test_an_exit_without_a_result_is_a_failure(ranks):
    with pytest.raises(RanksFailed, match="ended with exit code 7, without returning"):
        ranks(1, quit_early)


def test_the_time_limit_shows_each_rank_s_stack(ranks):
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="did not end on 2 ranks within 1 s") as info:
        ranks(2, hang, timeout=1)
    assert time.monotonic() - start < 5
    assert str(info.value).count("in hang") == 2


def test_a_process_that_outlives_its_rank_is_killed_and_reported(ranks):
    with pytest.raises(RanksFailed, match="outlived") as info:
        ranks.outcomes(1, leave_child, linger=0.1)
    (outcome,) = info.value.outcomes
    assert "time.sleep(60)" in str(info.value)
    stop = time.monotonic() + 5
    while alive(outcome.value):
        assert time.monotonic() < stop, "the child is still there"
        time.sleep(0.01)


def test_a_value_that_cannot_be_pickled_says_so(ranks):
    with pytest.raises(RanksFailed, match="cannot be pickled"):
        ranks(1, unpicklable)


def test_torch_can_listen_on_the_reserved_port_and_others_are_not_given_it(ranks):
    first = ranks(2, torch_store)
    assert first[0] == first[1]
    held, port = reserve_port()
    others = [reserve_port() for _ in range(50)]
    assert port not in [p for _, p in others]
    for sock, _ in [(held, port), *others]:
        sock.close()


def test_two_ranks_start_within_half_a_second_once_the_server_is_warm(ranks):
    ranks(2, add, 0)
    best = min(timed(lambda: ranks(2, add, 0)) for _ in range(5))
    assert best < 0.5, f"{best:.2f} s"


def test_the_server_has_one_thread_and_has_imported_what_is_slow(ranks):
    assert ranks(1, server_threads) == [(1, True, True)]


def test_nothing_remains_after_a_call(ranks):
    outcomes = ranks.outcomes(2, own_pid)
    assert processes_of({o.value for o in outcomes}) == {}


def server_threads(rank, world):
    return len(os.listdir(f"/proc/{os.getppid()}/task")), "torch" in sys.modules, "deepspeed_c._core" in sys.modules


def own_pid(rank, world):
    return os.getpid()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as text:
            return text.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def timed(call):
    start = time.monotonic()
    call()
    return time.monotonic() - start
