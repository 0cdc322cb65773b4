"""What users do with the engine, where ranks share no memory: the cases of the other files again, over `delegate`."""
import logging
import os
import signal
import threading
import time

import models
import pytest
import test_engine_options
import test_faults
import test_optimizers
import torch
from test_delegate import FORCED

import deepspeed_c as deepspeed
from deepspeed_c import distributed

STAGES = (0, 1, 2)


def optimizers(rank, world):
    """LAMB, RMSprop by name and as an object: bits at the stages where they can be."""
    found = []
    for name, stages in (("lamb", STAGES), ("rmsprop", STAGES)):
        for dtype in ("fp32", "bf16"):
            found += [test_optimizers.run(rank, test_optimizers.SECTIONS[name], stage, dtype, False, models.Awkward)
                      for stage in stages]
    for stage in (0, 1):
        module = models.make(test_optimizers.Net)
        engine = test_optimizers.start(torch.optim.RMSprop(module.parameters(), lr=1e-3), stage, module=module,
                                       zero_allow_untested_optimizer=True)
        test_optimizers.train(engine, rank, range(3))
        found.append(models.bits(module))
        engine.destroy()
    return found


def local_parts(rank, world, stage):
    """What the local accessors give and take."""
    from deepspeed_c import utils
    engine, *_ = deepspeed.initialize(model=test_engine_options.net(), config=test_engine_options.config(
        stage, optimizer={"type": "Adam", "params": {"lr": 0.1}}))
    engine.backward(test_engine_options.loss_of(engine, test_engine_options.batch(rank, 0)))
    p = engine.module[0].weight
    found = [utils.safe_get_local_grad(p)]
    engine.step()
    found += [utils.safe_get_local_fp32_param(p), utils.safe_get_local_optimizer_state(p, "exp_avg")]
    if found[1] is not None:
        utils.safe_set_local_fp32_param(p, found[1] * 2)
        utils.safe_set_local_optimizer_state(p, found[2] + 1, "exp_avg")
    found += [utils.safe_get_full_fp32_param(p), utils.safe_get_full_optimizer_state(p, "exp_avg")]
    engine.destroy()
    return [None if t is None else t.tolist() for t in found]


def unequal_without_sync(rank, world, stage):
    """no_sync and accumulation, with another number of backward passes on each rank."""
    module = models.make()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                      config=models.config(stage, "bf16", 3))
    for step in range(2):
        for micro in range(2 + rank):
            loss = engine(*models.batch(rank, step, micro, torch.bfloat16))
            if stage < 2 and micro == 0:
                with engine.no_sync():
                    engine.backward(loss)
            else:
                engine.backward(loss)
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
    bits = models.bits(module), engine.get_global_grad_norm(), engine.global_steps
    engine.destroy()
    return bits


def overflows(rank, world, stage):
    """fp16: a step that one rank's gradient makes overflow is skipped on all, and the next counts."""
    module = models.make(test_optimizers.Net)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                      config=models.config(stage, "fp16"))
    found = []
    for step in range(3):
        factor = float("inf") if rank == 1 and step == 1 else 1.0
        engine.backward(engine(test_optimizers.batch(rank, step, "fp16")) * factor)
        engine.step()
        found.append((engine.skipped_steps, engine.optimizer.overflow, engine.loss_scale(), models.bits(module)))
    engine.destroy()
    return found


def resized(rank, world, stage):
    """set_train_batch_size changes the number of micro-steps."""
    module = models.make()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(stage))
    models.train(engine, rank, 2)
    engine.set_train_batch_size(engine.train_batch_size() * 3)
    models.train(engine, rank, 2, 3)
    found = engine.gradient_accumulation_steps(), engine.global_steps, models.bits(module)
    engine.destroy()
    return found


def loaded(rank, world, stage):
    """Forked data-loader workers between the steps."""
    torch.multiprocessing.set_start_method("fork", force=True)
    module = models.make(lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)))
    engine, _, loader, _ = deepspeed.initialize(
        model=module, model_parameters=module.parameters(), training_data=test_faults.Items(),
        config={**models.config(stage, micro=8), "dataloader_num_workers": 2})
    for _ in range(2):
        for x in loader:
            engine.backward(engine(x).square().mean())
            engine.step()
    found = engine.global_steps, models.bits(module)
    engine.destroy()
    return found


def said_of_overlap(rank, world):
    """What initialize logs where overlap_comm is asked for."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("DeepSpeed").addHandler(handler)
    for overlap in (True, False):
        test_optimizers.start(test_optimizers.SECTIONS["lion"], 1, zero={"overlap_comm": overlap}).destroy()
    logging.getLogger("DeepSpeed").removeHandler(handler)
    return [line for line in lines if "overlap_comm has no effect" in line]


CASES = [
    *[(test_faults.retried, stage, True) for stage in STAGES],
    *[(test_faults.second_initialize_fails,), (test_faults.other_rates,)],
    *[(test_faults.unequal_backwards, stage) for stage in STAGES],
    *[(test_faults.forked_child, stage) for stage in STAGES],
    (test_optimizers.failing,), (test_optimizers.raised_before_the_core, "hook"),
    *[(test_optimizers.taken_over, stage) for stage in STAGES],
    (optimizers,),
    *[(test_engine_options.reads_and_sets, stage, dtype, False) for stage in STAGES for dtype in ("fp32", "bf16")],
    *[(test_engine_options.states, stage, "bf16", kind) for stage in STAGES for kind in ("Adam", "NAdam")],
    *[(test_engine_options.deferred, stage, "bf16", False) for stage in STAGES],
    (test_engine_options.looked_at_while_coalescing, 2, "bf16"),
    *[(case, stage) for case in (local_parts, unequal_without_sync, overflows, resized, loaded) for stage in STAGES],
]


def all_cases(rank, world):
    """{name: what each case returned}, one engine after the other in the same processes."""
    torch.set_num_threads(1)
    distributed.init_distributed("gloo", verbose=False)
    assert distributed.world_comm().backend == os.environ.get("DSC_COMM_BACKEND", "shm")
    found = {}
    for case, *args in CASES:
        torch.manual_seed(7)
        found[" ".join(map(str, (case.__name__, *args)))] = case(rank, world, *args)
    refused = [test_faults.one_refuses(rank, world, stage) for stage in STAGES]
    assert max(seconds for seconds, _ in refused) < test_faults.SECONDS
    found["one_refuses"] = [bits for _, bits in refused]
    expected = 1 if rank == 0 and distributed.world_comm().backend == "delegate" else 0
    assert len(said_of_overlap(rank, world)) == expected
    return found


def test_what_users_do_gives_what_it_gives_over_shared_memory(ranks):
    shm = ranks(2, all_cases, timeout=120)
    over = ranks(2, all_cases, timeout=120, env=FORCED)
    for rank in range(2):
        for name, value in shm[rank].items():
            assert over[rank][name] == value, name


# ---- a rank that ends inside a call ----

def hit(rank, world, where, number):
    """Rank 1 gets a signal inside backward, or while it waits for rank 0 inside step."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(2))
    for i in range(3):
        loss = engine(torch.ones(2, 4)).square().mean()
        if i == 2 and where == "backward" and rank == 1:
            module[0].weight.register_hook(lambda grad: os.kill(os.getpid(), number))
        elif i == 2 and where == "step" and rank == 1:
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        elif i == 2 and where == "step":
            time.sleep(1)
        engine.backward(loss)
        engine.step()


@pytest.mark.parametrize("where, number", [
    ("backward", signal.SIGINT), ("backward", signal.SIGKILL), ("step", signal.SIGINT)])
def test_a_signal_inside_a_call_ends_the_rank_and_is_an_error_on_the_other(ranks, where, number):
    found = ranks.outcomes(2, hit, where, number, env=FORCED)
    assert found[0].error == "CommError" and found[0].seconds < 6, found[0].describe()
    assert "rank 1" in found[0].text and found[0].exit_code == 0, found[0].describe()
    if number == signal.SIGINT:
        assert found[1].error == "KeyboardInterrupt" and found[1].exit_code == 0, found[1].describe()
