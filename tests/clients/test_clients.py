"""Clients of DeepSpeed, unmodified, over the name `deepspeed`: what they compute is what plain torch computes.

Each script runs all of its cases in one set of two processes; the tests look at what it wrote.
"""
import json
import math
import os
import pathlib
import subprocess
import sys

import plain
import pytest

FP32 = ["both from the JSON", "scheduler from Transformers", "both from Transformers"]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return plain.start("torch.distributed.run --standalone --nproc-per-node 2", "trainer_script.py",
                       tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def accelerate(tmp_path_factory):
    return plain.start("accelerate.commands.launch --use_deepspeed --num_machines 1 --num_processes 2 "
                       "--main_process_port 0 --mixed_precision no --dynamo_backend no", "accelerate_script.py",
                       tmp_path_factory.mktemp("accelerate"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    return plain.start("torch.distributed.run --standalone --nproc-per-node 2", "resume_script.py",
                       tmp_path_factory.mktemp("resumed"))


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(resumed):
    found = [row for rank in resumed for row in rank]
    assert len(found) == 24
    for row in found:
        assert row["resumed"] == row["straight"], (row["case"], row["stage"])


def rows(results, case, stage):
    """What each rank wrote about a case."""
    found = [row for rank in results for row in rank if row["case"] == case and row["stage"] == stage]
    assert len(found) == 2
    assert [row.get("error") for row in found] == [None, None]
    return found


def check_equal(row):
    assert row["dtype"] == "torch.float32"
    assert row["losses"] == pytest.approx(row["expected"], abs=1e-4)
    assert row["norms"] == pytest.approx(row["expected_norms"], rel=1e-4)
    assert row["losses"][-1] < row["losses"][0]


def check_close(row, dtype):
    assert row["dtype"] == dtype
    assert all(map(math.isfinite, row["losses"]))
    assert row["losses"] == pytest.approx(row["expected"], rel=0.01)
    assert row["losses"] != row["expected"]  # it did not run in float32
    assert row["losses"][-1] < row["losses"][0]


@pytest.mark.parametrize("stage", plain.STAGES)
@pytest.mark.parametrize("case", FP32)
def test_trainer_equals_plain_torch(trainer, case, stage):
    for row in rows(trainer, case, stage):
        check_equal(row)
        assert row["evaluated"] == pytest.approx(row["expected_evaluated"], abs=1e-4)
        assert row["saved"]


@pytest.mark.parametrize("stage", plain.STAGES)
def test_trainer_in_bf16_is_close_to_plain_torch(trainer, stage):
    for row in rows(trainer, "bf16", stage):
        check_close(row, "torch.bfloat16")
        assert row["saved"]


@pytest.mark.parametrize("stage", plain.STAGES)
@pytest.mark.parametrize("case", ["JSON", "torch's optimizer and schedule"])
def test_accelerate_equals_plain_torch(accelerate, case, stage):
    for row in rows(accelerate, case, stage):
        check_equal(row)
        assert row["saved"]


@pytest.mark.parametrize("stage", plain.STAGES)
@pytest.mark.parametrize("case, dtype", [("bf16", "torch.bfloat16"), ("fp16", "torch.float16")])
def test_accelerate_in_16_bits_is_close_to_plain_torch(accelerate, case, dtype, stage):
    for row in rows(accelerate, case, stage):
        check_close(row, dtype)
        assert row["saved"]


def test_peft_trains_an_adapter_over_a_frozen_base_as_plain_torch(tmp_path):
    for rank in plain.start("torch.distributed.run --standalone --nproc-per-node 2", "peft_script.py", tmp_path):
        assert [row["stage"] for row in rank] == [2, 3]
        for row in rank:
            assert row["losses"] == pytest.approx(row["expected"], abs=1e-4)
            assert row["evaluations"] == pytest.approx([row["evaluations"][0]] * 3, abs=1e-4)
            assert row["evaluations"][0] < row["untrained"] - 1e-3
        assert rank[0]["held"] == rank[0]["parameters"] == rank[1]["parameters"] > rank[1]["held"] == 0


@pytest.mark.parametrize("dtype, stage", [("bf16", 0), ("fp16", 2), ("fp32", 1), ("fp32", 3)])
def test_a_script_for_deepspeed_runs_by_the_deepspeed_command(tmp_path, dtype, stage):
    command = pathlib.Path(sys.executable).parent / "deepspeed"
    done = subprocess.run(
        [command, "--num_gpus", "2", plain.TESTS / "cifar_script.py", tmp_path, "--deepspeed", "--dtype", dtype,
         "--stage", str(stage)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["dtype"] == second["dtype"] == {"bf16": "torch.bfloat16", "fp16": "torch.float16",
                                                 "fp32": "torch.float32"}[dtype]
    assert first["weights"] == second["weights"]
    assert first["losses"] != second["losses"]  # other pictures
    for rank in (first, second):
        assert len(rank["losses"]) == 30
        assert sum(rank["losses"][-5:]) < 0.5 * sum(rank["losses"][:5])
