"""Contract F2: a lost or diverged rank is an error on all others in seconds, and nothing remains."""
import contextlib
import os
import sys
import time

import models
import pytest
import torch
from ranks import die

import deepspeed_c as deepspeed

SECONDS = 5.0


def shared_memory_left():
    """Processes of this Python that map memory of ours and are this run's, or nobody's: compare with those before."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if not os.path.samefile(f"/proc/{pid}/exe", sys.executable) or not ours(pid):
                continue
            with open(f"/proc/{pid}/maps") as maps:
                found |= {pid} if "memfd:deepspeed_c" in maps.read() else set()
        except OSError:
            continue  # ended meanwhile, or not ours
    return found


def ours(pid):
    """Whether a process is below this one, or its parent has ended: another run's tests have memory too."""
    first = parent = parent_of(pid)
    while parent not in ("0", "1", str(os.getpid())):
        parent = parent_of(parent)
    return parent == str(os.getpid()) or first == "1"


def parent_of(pid):
    with open(f"/proc/{pid}/stat") as text:
        return text.read().rpartition(")")[2].split()[1]


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
    before = shared_memory_left()
    outcomes = ranks.outcomes(3, killed_in_backward, stage, timeout=40)
    assert outcomes[1].exit_code == -9
    for rank in (0, 2):
        text, seconds = outcomes[rank].value
        assert "rank 1" in text and "engine.step" in text and seconds < SECONDS, text
    assert shared_memory_left() <= before


class Mortal(torch.optim.Adam):
    """Can end its process in the middle of a step: between what ranks do together before it and after it."""

    dies = False

    def step(self, closure=None):
        if self.dies:
            die()
        return super().step(closure)


def killed_at_stage_3(rank, world, where):
    torch.set_num_threads(1)
    module = models.make(lambda: torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(4))))
    config = models.config(3, zero={"stage3_param_persistence_threshold": 0}, zero_allow_untested_optimizer=True)
    del config["optimizer"]
    optimizer = Mortal(module.parameters())
    optimizer.dies = rank == 1 and where == "step"
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if rank == 1 and where == "forward":
        module[2].register_forward_pre_hook(lambda *_: die())
    if rank == 1 and where == "backward":
        module[2].register_full_backward_hook(lambda *_: die())
    started = time.monotonic()
    try:
        engine.backward(engine(torch.ones(2, 40)).square().mean())
        engine.step()
    except deepspeed.CommError as error:
        seconds = time.monotonic() - started
        with contextlib.suppress(deepspeed.CommError):  # no parameter can be whole any more where ranks share no memory
            engine.destroy()
        return str(error), max(seconds, time.monotonic() - started - SECONDS)
    return "no error", 0.0


@pytest.mark.parametrize("where", ["forward", "backward", "step"])
@pytest.mark.parametrize("env", [{}, {"DSC_COMM_BACKEND": "delegate"}], ids=["shm", "delegate"])
def test_a_rank_killed_anywhere_at_stage_3_is_an_error_on_the_others_and_nothing_remains(ranks, where, env):
    before = shared_memory_left()
    outcomes = ranks.outcomes(3, killed_at_stage_3, where, timeout=40, env=env)
    assert outcomes[1].exit_code == -9
    for rank in (0, 2):
        text, seconds = outcomes[rank].value
        assert "rank 1" in text and seconds < SECONDS, text
    assert shared_memory_left() <= before


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


def retried(rank, world, stage, fail):
    """bf16 with two micro-steps; rank 1's rate differs in the first try where `fail`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 2)
    engine, optimizer, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                                 config=models.config(stage, "bf16", 2))
    for i in range(2):
        engine.backward(engine(torch.full((2, 4), rank + i + 1.0, dtype=torch.bfloat16)).float().square().mean())
        if i == 1 and fail:
            optimizer.param_groups[0]["lr"] = 0.01 * (rank + 1)
            with pytest.raises(ValueError):
                engine.step()
            optimizer.param_groups[0]["lr"] = 0.01
        engine.step()
    return models.bits(module), engine.get_global_grad_norm()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_failed_can_be_tried_again_and_counts_gradients_once(ranks, stage):
    assert ranks(2, retried, stage, True) == ranks(2, retried, stage, False)


def one_refuses(rank, world, stage):
    module = torch.nn.Linear(4, 2)
    engine, optimizer, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                                 config=models.config(stage))
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    if rank == 1:
        optimizer.param_groups[0]["lr"] = -1.0
    started = time.monotonic()
    with pytest.raises(ValueError, match="lr is -1" if rank == 1 else "rank 1 cannot step"):
        engine.step()
    seconds = time.monotonic() - started
    optimizer.param_groups[0]["lr"] = 0.1
    engine.step()
    return seconds, models.bits(module)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_that_cannot_step_is_an_error_on_all_at_once_and_all_can_go_on(ranks, stage):
    (s0, bits0), (s1, bits1) = ranks(2, one_refuses, stage)
    assert max(s0, s1) < SECONDS and bits0 == bits1


def second_initialize_fails(rank, world):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 2)
    config = models.config(2)
    first, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)

    def broken(optimizer):
        raise ZeroDivisionError("no schedule today")

    with pytest.raises(ZeroDivisionError):
        deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config, lr_scheduler=broken)
    first.backward(first(torch.ones(2, 4)).square().mean())
    first.step()
    return first.get_global_grad_norm()


def test_a_second_initialize_that_fails_leaves_the_first_engine_its_gradients(ranks):
    first, second = ranks(2, second_initialize_fails)
    assert first == second > 0.1


def forked_child(rank, world, stage):
    module = torch.nn.Linear(4, 2)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(stage))
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    child = os.fork()
    if child == 0:
        code = 9
        try:
            module(torch.ones(1, 4)).sum().backward()  # a plain backward in the child works, hooks or not
            try:
                engine.step()
            except RuntimeError as error:
                code = 0 if "fork" in str(error) else 8
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    engine.step()
    return status


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_forked_child_gets_an_error_not_a_crash(ranks, stage):
    assert ranks(2, forked_child, stage) == [0, 0]


def pickled(rank, world):
    import pickle
    module = torch.nn.Linear(4, 2)
    deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(2))
    return len(pickle.dumps(module))


def test_a_module_can_be_pickled_while_hooks_are_on_it(ranks):
    assert min(ranks(2, pickled)) > 100


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
    found = [ranks(3, unequal_backwards, stage) for stage in (0, 1, 2, 3)]
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
