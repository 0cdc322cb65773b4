"""The estimators that DeepSpeed publishes: its numbers, here taken from a run of DeepSpeed 0.19.8."""
import pytest
import torch.nn as nn
from deepspeed_c.runtime.zero.stage3 import (
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from deepspeed_c.runtime.zero.stage_1_and_2 import (
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
)

OPTIONS = ["offload_param=cpu , offload_optimizer=cpu , zero_init=1",
           "offload_param=cpu , offload_optimizer=cpu , zero_init=0",
           "offload_param=none, offload_optimizer=cpu , zero_init=1",
           "offload_param=none, offload_optimizer=cpu , zero_init=0",
           "offload_param=none, offload_optimizer=none, zero_init=1",
           "offload_param=none, offload_optimizer=none, zero_init=0"]


@pytest.fixture
def table(capsys):
    """table(estimator, ...) -> ([(GB per CPU, GB per GPU), ...], [options, ...]) of what it prints"""

    def call(estimator, *args):
        assert estimator(*args) is None
        head, columns, *rows = capsys.readouterr().out.splitlines()
        assert head.startswith("Model states") and columns == "  per CPU  |  per GPU |   Options"
        rows = [[cell.strip() for cell in row.split("|")] for row in rows]
        return [tuple(cell.removesuffix("GB") for cell in row[:2]) for row in rows], [row[2] for row in rows]

    return call


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tables_of_a_model(table, device):
    layers = [nn.Linear(3000, 3000, device=device), nn.Linear(3000, 5000, device=device)]
    model = nn.Sequential(*layers, layers[0])  # what stands twice counts once
    numbers, options = table(estimate_zero3_model_states_mem_needs_all_live, model, 8, 2)
    assert options == OPTIONS
    assert numbers == [("0.30", "0.06"), ("1.07", "0.06"), ("0.27", "0.06"), ("1.07", "0.06"), ("0.67", "0.08"),
                       ("1.07", "0.08")]
    numbers, options = table(estimate_zero2_model_states_mem_needs_all_live, model, 8, 2)
    assert options == ["offload_optimizer=cpu", "offload_optimizer=none"]
    assert numbers == [("2.15", "0.04"), ("1.07", "0.07")]


def test_tables_of_numbers(table):
    assert table(estimate_zero3_model_states_mem_needs_all_cold, 2.7e9, 5e8, 4, 3, 1.2)[0] == [
        ("18.10", "1.86"), ("48.28", "1.86"), ("16.09", "2.28"), ("48.28", "2.28"), ("8.94", "5.63"), ("48.28", "5.63")]
    assert table(estimate_zero3_model_states_mem_needs_all_cold, 123456789, 1234567, 1, 2)[0] == [
        ("1.55", "0.00"), ("1.55", "0.00"), ("1.38", "0.12"), ("1.38", "0.12"), ("0.01", "1.04"), ("0.69", "1.04")]
    assert table(estimate_zero2_model_states_mem_needs_all_cold, 2.7e9, 4, 3, 2.0)[0] == [
        ("241.40", "5.03"), ("80.47", "8.80")]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_nodes is 0; allowed: an integer >= 1"):
        estimate_zero2_model_states_mem_needs_all_cold(10, 1, 0)
    with pytest.raises(ValueError, match="largest_layer_params is -1"):
        estimate_zero3_model_states_mem_needs_all_cold(10, -1)
    with pytest.raises(TypeError, match="model is a int"):
        estimate_zero3_model_states_mem_needs_all_live(3)
