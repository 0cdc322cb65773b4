"""Faults that users of DeepSpeed reported, each as a test here or as one that stands elsewhere.

ELSEWHERE names the tests that cover a report and stand with their subject. What is reported about checkpoints,
ZeRO stage 3, NVMe, sequence parallelism and CUDA streams comes with those.
"""
import os
import pathlib
import re
import subprocess
import sys

import models
import pytest
import torch
import torch.nn as nn

import deepspeed_c as deepspeed

TESTS = pathlib.Path(__file__).resolve().parent

# What was reported (DS: DeepSpeed's tracker) -> the tests that hold it, by file.
ELSEWHERE = {
    "module called twice per forward, stage 2, bf16 (DS#8224)":
        {"test_stages": ["test_module_called_twice_per_forward_stage_2_bf16_2_ranks_equals_stage_0"]},
    "accumulation with a manual boundary, several backwards in a step (open-instruct#1498, DS#7718)":
        {"test_engine_api": ["test_gas_with_manual_boundary_equals_counting"],
         "test_numbers": ["test_two_losses_in_a_step_accumulate_in_fp32"],
         "test_stepping": ["test_all_ways_of_stepping_give_the_same_bits_rates_and_counts"]},
    "overlap on and off, tiny bucket (DS#5545, #7898, #7965, #8061)":
        {"test_stages": ["test_stages_overlap_and_bucket_size_change_no_bit"]},
    "one rank has 8 batches, the others 4 (DS#2223)":
        {"test_faults": ["test_a_rank_that_runs_out_of_batches_and_ends_is_an_error_on_the_others"]},
    "frozen, tied and zero-size parameters, two groups, trained (DS#3090, #5439, #1412, #8467)":
        {"test_parity": ["test_one_rank_equals_plain_torch",
                         "test_groups_with_their_own_rates_and_a_torch_schedule_equal_torch"],
         "test_numbers": ["test_frozen_and_unused_parameters_stay_as_they_are"]},
    "all-inf gradient in bf16, all-zero gradient (DS#8415, #8614)":
        {"test_numbers": ["test_all_inf_gradient_under_bf16_is_skipped_and_reported", "test_all_zero_gradient_steps"]},
    "float32 buffers stay float32 (DS#5812, #8066)":
        {"test_numbers": ["test_fp32_buffers_stay_fp32_in_modules_without_parameters"]},
    "a slip in a configuration key (DS#653)":
        {"test_config": ["test_a_slip_in_gradient_clipping_is_an_error"]},
    "import opens no CUDA context, prints nothing, loads little (trl#3351, transformers#26308, DS#3680)":
        {"test_binding": ["test_import_prints_nothing_and_starts_no_thread_process_or_cuda"],
         "test_accelerator": ["test_choosing_opens_no_cuda_context_and_prints_nothing"],
         "test_compat": ["test_import_loads_no_torch_and_says_nothing"]},
    "CUDA_VISIBLE_DEVICES=0,2 (DS#5818)":
        {"test_launcher": ["test_gpu_slots_and_the_variable_that_ranks_get"]},
    "ctrl-C and a killed child leave no process; the exit code is the child's (DS#3645, #1016, #1995)":
        {"test_launcher": ["test_ctrl_c_reaches_the_script_as_keyboard_interrupt",
                           "test_signal_to_the_launcher_leaves_no_process", "test_failing_rank_leaves_no_process",
                           "test_death_by_signal_is_128_plus_its_number",
                           "test_exit_code_is_that_of_the_first_failing_rank_and_its_traceback_is_last"]},
    "50 engines made and closed (DS#7204, #5674, #896)":
        {"test_memory": ["test_fifty_engines_leave_memory_and_files_flat"]},
    "the schedule's state continues (DS#4344)":
        {"test_lr_schedules": ["test_every_schedule_resumes_from_its_state_or_its_index"]},
    "resuming in mid-epoch loses and repeats no sample (transgenic#59, accelerate#4071)":
        {"test_dataloader": ["test_resuming_on_another_world_size_loses_and_repeats_nothing"]},
}


@pytest.mark.parametrize("report", ELSEWHERE)
def test_the_tests_that_hold_a_report_are_there(report):
    for file, names in ELSEWHERE[report].items():
        found = re.findall(r"^def (test_\w+)", (TESTS / f"{file}.py").read_text(), re.M)
        assert set(names) <= set(found)


# ---- unused parameters, and gradients that come in some micro-steps only (DS#545) ----


class Branches(nn.Module):
    """A trunk and two branches, of which a call uses the ones that it names, as often as it says."""

    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, uses):
        x = torch.tanh(self.trunk(x))
        for branch in uses:
            x = torch.tanh(getattr(self, branch)(x))
        return x.square().mean()


def plan_of(kind, rank, step, micro):
    """Which branches a rank uses in a micro-step."""
    return {
        "unused in some micro-steps": "a" if micro == 0 else "ab",
        "unused on one rank": "ab" if rank == 0 else "a",
        "unused everywhere in one step": "a" if step == 1 else "ab",
        "used once on one rank, three times on the other": "ab" if rank == 0 else "abbb",
        "used in another order": "ab" if rank == 0 else "ba",
    }[kind]


def inputs(rank, step, micro):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * rank + 10 * step + micro))


def through_the_engine(rank, world, kinds, gas, n_steps, dtype):
    """{(kind, stage, overlap): parameters} after training."""
    torch.set_num_threads(1)
    results = {}
    for kind in kinds:
        for stage, overlap in ((0, False), (1, False), (1, True), (2, False), (2, True)):
            module = models.make(Branches)
            config = models.config(stage, dtype, gas, micro=3, zero={"overlap_comm": overlap, "reduce_bucket_size": 40},
                                   gradient_clipping=0.0)
            engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
            for step in range(n_steps):
                for micro in range(gas):
                    x = inputs(rank, step, micro).to(models.DTYPES[dtype])
                    engine.backward(engine(x, plan_of(kind, rank, step, micro)))
                    engine.step()
            results[kind, stage, overlap] = [p.detach().float().numpy() for p in module.parameters()]
            engine.destroy()
    return results


def in_plain_torch(kind, gas, n_steps, world=2):
    module = models.make(Branches)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(n_steps):
        for p in module.parameters():
            p.grad = torch.zeros_like(p)  # no gradient counts as the gradient zero
        for micro in range(gas):
            for rank in range(world):
                (module(inputs(rank, step, micro), plan_of(kind, rank, step, micro)) / gas / world).backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()]


UNBALANCED = ["unused in some micro-steps", "unused on one rank", "unused everywhere in one step"]
DIFFERENT_MODULES = ["used once on one rank, three times on the other", "used in another order"]


@pytest.fixture(scope="module")
def branches(ranks):
    """What two ranks got in fp32 for every plan."""
    return ranks(2, through_the_engine, UNBALANCED + DIFFERENT_MODULES, 2, 4, "fp32", timeout=120)


def check_against_torch(results, kind):
    expected = in_plain_torch(kind, 2, 4)
    for rank in results:
        for stage, overlap in ((0, False), (1, False), (1, True), (2, False), (2, True)):
            for got, value in zip(rank[kind, stage, overlap], expected):
                torch.testing.assert_close(torch.from_numpy(got), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", UNBALANCED)
def test_unused_parameters_and_unbalanced_gradients_between_micro_steps(branches, kind):
    check_against_torch(branches, kind)


@pytest.mark.parametrize("kind", DIFFERENT_MODULES)
def test_one_rank_runs_module_b_once_another_three_times(branches, kind):
    """DS#7998."""
    check_against_torch(branches, kind)


# ---- ranks that generate to different lengths (DS#8262) ----


def generate_then_train(rank, world, stage):
    torch.set_num_threads(1)
    module = models.make(Branches)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(stage))
    for step in range(3):
        engine.eval()
        with torch.no_grad():
            for _ in range(1 + 5 * rank):
                engine(inputs(rank, step, 0), "ab")
        engine.train()
        engine.backward(engine(inputs(rank, step, 0), "ab"))
        engine.step()
    return models.bits(module)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ranks_finish_generating_at_different_lengths(ranks, stage):
    first, second = ranks(2, generate_then_train, stage)
    assert first == second


# ---- a script without a launcher (DS#8444) ----

SCRIPT = """
import torch
import deepspeed_c as deepspeed
deepspeed.init_distributed()
model = torch.nn.Linear(4, 2)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
    "train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}, "zero_optimization": {"stage": 2}})
before = model.weight.clone()
engine.backward(engine(torch.ones(2, 4)).square().mean())
engine.step()
assert not torch.equal(model.weight, before) and torch.distributed.get_world_size() == 1
"""


def test_python_train_py_without_any_environment_works_and_prints_nothing(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Traceback" not in done.stderr and "DeepSpeed" not in done.stderr


# ---- the first step uses the rate of the warm-up (accelerate#2124) ----


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_first_step_uses_the_warm_up_rate(stage):
    module = nn.Linear(4, 2)
    config = models.config(stage, optimizer={"type": "SGD", "params": {"lr": 1.0}}, gradient_clipping=0.0,
                           scheduler={"type": "WarmupLR", "params": {
                               "warmup_min_lr": 0.001, "warmup_max_lr": 1.0, "warmup_num_steps": 10,
                               "warmup_type": "linear"}})
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    assert engine.get_lr() == [0.001]
    before = module.weight.detach().clone()
    loss = engine(torch.ones(2, 4)).square().mean()
    grad, = torch.autograd.grad(loss, module.weight, retain_graph=True)
    engine.backward(loss)
    engine.step()
    torch.testing.assert_close(module.weight.detach(), before - 0.001 * grad, rtol=1e-6, atol=1e-7)
