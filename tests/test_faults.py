"""Contract F2: a lost or diverged rank is an error on all others in seconds, and nothing remains."""
import os
import time

import models
import pytest
import torch
from ranks import die

import deepspeed_c as deepspeed

SECONDS = 5.0


def shared_memory_left():
    """Names under /dev/shm that could be ours."""
    return [n for n in os.listdir("/dev/shm") if "dsc" in n.lower()]


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return torch.full((4,), float(i))


def killed_in_backward(rank, world, stage):
    """Rank 1 dies inside backward while its loader's two forked workers keep its sockets and mappings open."""
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method("fork", force=True)  # as in an ordinary script
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    config = {**models.config(stage, micro=2), "dataloader_num_workers": 2}
    engine, _, loader, _ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                                training_data=Items(), config=config)
    for i, x in enumerate(loader):
        loss = engine(x).square().mean()
        if rank == 1 and i == 2:
            module[0].weight.register_hook(lambda grad: die())
        started = time.monotonic()
        try:
            engine.backward(loss)
            engine.step()
        except deepspeed.CommError as error:
            return str(error), time.monotonic() - started
    return "no error", 0.0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_rank_killed_in_backward_is_an_error_on_the_others_within_seconds(ranks, stage):
    outcomes = ranks.outcomes(3, killed_in_backward, stage, timeout=40)
    assert outcomes[1].exit_code == -9
    for rank in (0, 2):
        text, seconds = outcomes[rank].value
        assert "rank 1" in text and "engine.step" in text and seconds < SECONDS, text
    assert shared_memory_left() == []


def another_collective(rank, world):
    torch.set_num_threads(1)
    module = torch.nn.Linear(4, 2)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(1))
    started = time.monotonic()
    try:
        if rank == 1:
            deepspeed.comm.all_reduce(torch.ones(5))
        else:
            engine.backward(engine(torch.ones(2, 4)).square().mean())
            engine.step()
    except deepspeed.CommError as error:
        return str(error), time.monotonic() - started
    return "no error", 0.0


def test_a_rank_that_calls_another_collective_is_an_error_on_all_naming_both_calls(ranks):
    for text, seconds in ranks(2, another_collective, timeout=30):
        assert "rank 0" in text and "rank 1" in text, text
        assert "all_reduce" in text and "engine.step" in text, text
        assert seconds < SECONDS


def left_early(rank, world):
    torch.set_num_threads(1)
    module = torch.nn.Linear(4, 2)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(2))
    started = time.monotonic()
    try:
        for _ in range(4 if rank == 0 else 8):  # rank 0 runs out of batches
            engine.backward(engine(torch.ones(2, 4)).square().mean())
            engine.step()
            started = time.monotonic()
    except deepspeed.CommError as error:
        return str(error), time.monotonic() - started, engine.global_steps
    return "", 0.0, engine.global_steps


def test_a_rank_that_runs_out_of_batches_and_ends_is_an_error_on_the_others(ranks):
    first, second = ranks(2, left_early, timeout=30)
    assert first == ("", 0.0, 4)
    text, seconds, steps = second
    assert steps == 4 and "rank 0" in text and seconds < SECONDS


def other_rates(rank, world):
    module = torch.nn.Linear(4, 2)
    engine, optimizer, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                                 config=models.config(1))
    optimizer.param_groups[0]["lr"] = 0.1 * (rank + 1)
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    with pytest.raises(ValueError, match=r"lr 0\.1 .*on rank 0 and 0\.2.* on rank 1"):
        engine.step()
    return models.bits(module)


def test_different_rates_on_two_ranks_are_an_error_on_both_and_change_nothing(ranks):
    assert len(set(ranks(2, other_rates))) == 1


def other_models(rank, world):
    module = torch.nn.Linear(4, 2 + rank)
    with pytest.raises((ValueError, deepspeed.CommError), match="rank 1"):
        deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(1))
    return True


def test_different_models_on_two_ranks_are_an_error_on_both(ranks):
    assert ranks(2, other_models) == [True, True]


def unequal_backwards(rank, world, stage):
    """Rank r runs backward r + 1 times before the step; what is missing counts as zero."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 2)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(stage))
    for _ in range(2):
        for i in range(rank + 1):
            engine.backward(engine(torch.full((2, 4), rank + i + 1.0)).square().mean())
        engine.step()
    return models.bits(module), engine.get_global_grad_norm()


def test_ranks_may_run_backward_different_numbers_of_times(ranks):
    found = [ranks(3, unequal_backwards, stage) for stage in (0, 1, 2)]
    for per_stage in found:
        assert len({bits for bits, _ in per_stage}) == 1
    norms = [per_stage[0][1] for per_stage in found]
    assert max(norms) / min(norms) - 1 < 1e-5


def bad_loader_sleep(rank, world):
    """A slow rank is not a dead one."""
    module = torch.nn.Linear(4, 2)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(1))
    if rank == 1:
        time.sleep(1.5)
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    engine.step()
    return engine.global_steps


def test_a_slow_rank_is_waited_for(ranks):
    assert ranks(2, bad_loader_sleep) == [1, 1]
