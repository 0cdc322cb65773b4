"""State dicts, files of weights, and states put aside: engine.module_state_dict, save_16bit_model, offload_states."""
import errno
import os

import models
import pytest
import torch
import torch.nn as nn

import deepspeed_c as deepspeed
from deepspeed_c import utils
from deepspeed_c.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum

STAGES = (0, 1, 2, 3)
EVERYTHING = tuple(OffloadStateTypeEnum)


def engine_of(stage=0, dtype="fp32", threshold=0, gather=True):
    """threshold: parameters of as many elements at most stay whole at stage 3."""
    module = models.make()
    zero = {"stage3_param_persistence_threshold": threshold, "stage3_gather_16bit_weights_on_model_save": gather}
    return deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                config=models.config(stage, dtype, zero=zero))[0]


def tiny(**more):
    module = nn.Linear(3, 2)
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(**more))[0]


def expected_state(dtype):
    """The state dict that two steps at stage 0 give on this rank."""
    engine = engine_of(0, dtype)
    models.train(engine, engine.global_rank, 2, dtype=dtype)
    state = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
    engine.destroy()
    return state


def differences(state, expected):
    """Names whose value, dtype or order is not the expected one."""
    if list(state) != list(expected):
        return [*state, "instead of", *expected]
    return [name for name, value in state.items() if value.dtype != expected[name].dtype
            or value.device.type != "cpu" or not torch.equal(value, expected[name])]


# ---- state dicts ----

def test_the_state_dict_is_the_modules_own_by_reference():
    engine = engine_of()
    state = engine.module_state_dict()
    assert list(state) == list(engine.module.state_dict())
    assert state["head.weight"].data_ptr() == engine.module.embed.weight.data_ptr()
    given = {}
    assert engine.module_state_dict(destination=given, prefix="m.", keep_vars=True) is given
    assert given["m.twice.weight"] is engine.module.twice.weight
    engine.destroy()


def test_frozen_parameters_can_be_left_out_by_every_name():
    engine = engine_of()
    engine.module.embed.weight.requires_grad_(False)  # tied
    left = set(engine.module.state_dict()) - set(engine.module_state_dict(prefix="", exclude_frozen_parameters=True))
    assert left == {"frozen.weight", "frozen.bias", "embed.weight", "head.weight"}
    assert "a.frozen.bias" not in engine.module_state_dict(prefix="a.", exclude_frozen_parameters=True)
    engine.destroy()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_loaded_is_what_the_next_step_starts_from(dtype):
    first, second = engine_of(1, dtype), engine_of(1, dtype)
    models.train(first, 0, 2, dtype=dtype)
    state = {name: value.clone() for name, value in first.module_state_dict().items()}
    second.load_module_state_dict({"module": state})
    assert models.bits(first.module) == models.bits(second.module)
    second.module.train()
    models.train(second, 0, 1, dtype=dtype)
    p = second.module.twice.weight
    assert torch.equal(utils.safe_get_full_fp32_param(p).to(p.dtype), p)
    moved = (p.float() - state["twice.weight"].float()).abs().max()
    assert 0 < moved < 0.1  # a step of Adam from what was loaded, not from what was there
    for engine in (first, second):
        engine.destroy()


def test_wrong_checkpoints_are_errors():
    engine = tiny()
    with pytest.raises(ValueError, match=r"has no 'module'; it has \['weight'\]"):
        engine.load_module_state_dict({"weight": 1})
    with pytest.raises(RuntimeError, match="Missing key.*bias"):
        engine.load_module_state_dict({"module": {"weight": torch.zeros(2, 3)}})
    with pytest.raises(RuntimeError, match="size mismatch"):
        engine.load_module_state_dict({"module": {"weight": torch.zeros(2)}}, strict=False)
    with pytest.raises(NotImplementedError, match="frozen_param_fragments"):
        engine.load_module_state_dict({"module": {}, "frozen_param_fragments": {"a": torch.ones(1)}})
    engine.destroy()


def test_names_that_may_be_missing_and_no_others_are_forgiven():
    engine = tiny()
    engine.load_module_state_dict({"module": {"weight": torch.ones(2, 3)}}, allowed_missing_keys=["bias"])
    assert engine.module.weight.eq(1).all()
    for state, said in (({"bias": torch.zeros(2)}, r"missing in the checkpoint: \['weight'\]"),
                        ({"weight": torch.ones(2, 3), "other": torch.ones(1)}, r"not in the module: \['other'\]")):
        with pytest.raises(RuntimeError, match=said):
            engine.load_module_state_dict({"module": state}, allowed_missing_keys={"bias"})
    engine.load_module_state_dict({"module": {}}, strict=False, allowed_missing_keys=[])
    engine.destroy()


def test_a_load_function_of_ones_own_gets_source_and_module():
    engine, calls = tiny(), []
    engine.load_module_state_dict({"module": {"a": 1}}, custom_load_fn=lambda src, dst: calls.append((src, dst)))
    assert calls == [({"a": 1}, engine.module)]
    engine.destroy()


# ---- files ----

def saving(rank, world, folder):
    """At every stage: names that rank 0 wrote otherwise than stage 0 has them, or that it shouldn't have written."""
    torch.set_num_threads(1)
    wrong = []
    for dtype in ("fp32", "bf16"):
        expected = expected_state(dtype)
        for stage in STAGES:
            engine = engine_of(stage, dtype)
            models.train(engine, rank, 2, dtype=dtype)
            assert engine.save_16bit_model(f"{folder}/new/{dtype}/{stage}") is True
            assert engine.save_fp16_model(folder, "short") is True
            assert engine.save_16bit_model(folder, "part", exclude_frozen_parameters=True) is True
            if rank == 0:
                wrong += wrong_files(folder, f"{folder}/new/{dtype}/{stage}/pytorch_model.bin", expected)
            engine.destroy()
    return wrong


def wrong_files(folder, path, expected):
    whole, short, part = (torch.load(file, weights_only=True) for file in (path, f"{folder}/short", f"{folder}/part"))
    trained = {name: expected[name] for name in expected if not name.startswith("frozen.")}
    untied = [path] if whole["head.weight"].data_ptr() != whole["embed.weight"].data_ptr() else []
    return differences(whole, expected) + differences(short, expected) + differences(part, trained) + untied


def test_the_file_has_the_weights_of_every_stage_and_the_folder_nothing_else(ranks, tmp_path):
    assert ranks(2, saving, str(tmp_path)) == [[], []]
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(found) == sorted(["part", "short", *(f"new/{dtype}/{stage}/pytorch_model.bin"
                                                       for dtype in ("fp32", "bf16") for stage in STAGES)])


def test_a_file_that_cannot_be_written_is_an_error_and_the_old_one_stays(tmp_path, monkeypatch):
    engine, path = tiny(), tmp_path / "pytorch_model.bin"
    assert engine.save_16bit_model(tmp_path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            engine.save_16bit_model(tmp_path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    with pytest.raises(NotADirectoryError):
        engine.save_16bit_model(path / "below")
    engine.destroy()


# ---- stage 3 ----

def test_below_stage_3_nothing_is_consolidated():
    engine = tiny(stage=1)
    with pytest.raises(ValueError, match="zero_optimization.stage is 1; allowed: 3"):
        engine._zero3_consolidated_16bit_state_dict()
    assert engine.empty_partition_cache() is None and not engine.is_first_weights_partition_group()
    engine.destroy()


def test_without_the_key_nothing_is_written_at_stage_3(tmp_path):
    engine = engine_of(3, gather=False)
    assert engine.zero_gather_16bit_weights_on_model_save() is False
    assert engine.save_16bit_model(tmp_path) is False and os.listdir(tmp_path) == []
    assert engine._zero3_consolidated_16bit_state_dict()["empty"].shape == (0, 4)
    engine.destroy()


def consolidated(rank, world, dtype, threshold):
    """(what is wrong about the state dict, about a model that loaded it, about one that loaded a part of it)."""
    torch.set_num_threads(1)
    expected, wrong = expected_state(dtype), []
    engine = engine_of(3, dtype, threshold)
    models.train(engine, rank, 2, dtype=dtype)
    state = engine._zero3_consolidated_16bit_state_dict()
    part = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    empty = engine.module_state_dict()
    if rank == 0:
        wrong += differences(state, expected) + sorted(set(state) - set(part))
        if state["head.weight"] is not state["embed.weight"]:
            wrong.append("tied weights are two")
        if sum(empty[name].numel() for name in dict(engine.module.named_parameters())) != (13 if threshold else 0):
            wrong.append("parameters are whole in module_state_dict()")
    elif state is not None or part is not None:
        wrong.append("ranks other than 0 have a state dict")
    before = [p.ds_status for p in engine.module.parameters()]
    if loaded_again(engine, rank, dtype, expected):
        wrong.append("what was loaded is not there")
    if [p.ds_status for p in engine.module.parameters()] != before:
        wrong.append("loading left parameters whole")
    engine.destroy()
    return wrong


def loaded_again(engine, rank, dtype, expected):
    """Names whose values are not those that were loaded; fp32 masters included."""
    state = {name: value + 1 if value.is_floating_point() else value for name, value in expected.items()}
    engine.load_module_state_dict({"module": state if rank == 0 else expected}, fetch_z3_params=True)
    wrong = []
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(p):
            wrong += [] if torch.equal(p, state[name]) else [name]
    models.train(engine, rank, 1, dtype=dtype)
    moved = utils.safe_get_full_fp32_param(engine.module.twice.weight) - state["twice.weight"].float()
    return wrong + ([] if 0 < moved.abs().max() < 0.1 else ["the master did not follow"])


@pytest.mark.parametrize("dtype, threshold, backend", [("fp32", 0, "shm"), ("bf16", 5, "shm"), ("bf16", 0, "delegate"),
                                                       ("fp32", 5, "delegate")])
def test_the_consolidated_state_dict_is_whole_on_rank_0_and_loads_again(ranks, dtype, threshold, backend):
    wrong = ranks(2, consolidated, dtype, threshold, env={"DSC_COMM_BACKEND": backend})
    assert wrong == [["frozen.bias", "frozen.weight"], []]


@pytest.mark.parametrize("threshold", [0, 5])
def test_whole_values_are_refused_where_they_are_not_to_be_fetched(threshold):
    engine = engine_of(3, threshold=threshold)
    state = engine._zero3_consolidated_16bit_state_dict()
    with pytest.raises(ValueError, match=r"transposed is \(20, 7\) in the checkpoint, .* fetch_z3_params=True"):
        engine.load_module_state_dict({"module": state})
    engine.load_module_state_dict({"module": engine.module_state_dict()})  # parameters are empty: they stay
    models.train(engine, 0, 1)
    engine.load_module_state_dict({"module": state}, fetch_z3_params=True)
    again = engine._zero3_consolidated_16bit_state_dict()
    assert differences(again, state) == []
    only = {"twice.bias": torch.ones(20)}
    engine.load_module_state_dict({"module": only}, strict=False, z3_params_to_fetch=[engine.module.twice.bias])
    assert differences(engine._zero3_consolidated_16bit_state_dict(), {**state, **only}) == []
    loads = []
    engine.load_module_state_dict({"module": state}, fetch_z3_params=True, custom_load_fn=lambda src, dst: loads.append(
        dst.load_state_dict(src)))
    assert loads and differences(engine._zero3_consolidated_16bit_state_dict(), state) == []
    engine.destroy()


def test_parameters_of_leaf_modules_know_their_leaf_until_the_engine_is_gone():
    module = models.make()
    module.twice._z3_leaf = True
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(3))
    leaves = [name for name, p in module.named_parameters() if utils.z3_leaf_parameter(p)]
    assert leaves == ["twice.weight", "twice.bias"] and module.twice.bias.ds_z3_leaf_module is module.twice
    engine.destroy()
    assert not any(map(utils.z3_leaf_parameter, module.parameters()))


def cannot_write(rank, world, folder):
    engine = engine_of(3)
    if rank == 0:
        os.fsync = full
    engine.save_16bit_model(folder)


def full(file):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_rank_0_cannot_write_is_an_error_on_every_rank(ranks, tmp_path):
    first, second = ranks.outcomes(2, cannot_write, str(tmp_path))
    assert (first.error, second.error) == ("OSError", "RuntimeError") and os.listdir(tmp_path) == []
    assert "rank 0 could not write" in second.text and "pytorch_model.bin" in second.text


# ---- states put aside ----

def test_words_that_are_not_there_are_errors():
    engine = tiny()
    with pytest.raises(ValueError, match="include is 'weights'; allowed: 'optim_states', 'hp_params', 'lp_params'"):
        engine.offload_states(include=["weights"])
    with pytest.raises(ValueError, match="device is 'disk'; allowed: 'none', 'cpu', 'nvme'"):
        engine.offload_states(device="disk")
    with pytest.raises(ValueError, match="device is 'nvme'; allowed: 'cpu', 'none'"):
        engine.offload_states(device=OffloadDeviceEnum.nvme)
    engine.offload_states(device="none")
    models_step(engine)
    engine.destroy()
    with pytest.raises(RuntimeError, match="needs an optimizer"):
        engine.offload_states()


def models_step(engine):
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()


USES = {
    "forward": lambda engine: engine(torch.ones(1, 3)),
    "backward": lambda engine: engine.backward(engine.module(torch.ones(1, 3)).sum()),
    "step": lambda engine: engine.step(),
    "optimizer.step": lambda engine: engine.optimizer.step(),
    "state_dict": lambda engine: engine.optimizer.state_dict(),
    "module_state_dict": lambda engine: engine.module_state_dict(),
    "save_16bit_model": lambda engine: engine.save_16bit_model("/nowhere"),
    "full master": lambda engine: utils.safe_get_full_fp32_param(engine.module.weight),
    "local master": lambda engine: utils.safe_set_local_fp32_param(engine.module.weight, torch.zeros(6)),
    "full state": lambda engine: utils.safe_get_full_optimizer_state(engine.module.weight, "exp_avg"),
    "gradient": lambda engine: utils.safe_get_full_grad(engine.module.weight),
}
NEEDS = {
    "lp_params": {"forward", "backward", "step", "optimizer.step", "module_state_dict", "save_16bit_model"},
    "lp_grads": {"backward", "step", "optimizer.step", "gradient"},
    "contiguous_grad_buffer": {"backward", "step", "optimizer.step", "gradient"},
    "hp_params": {"step", "optimizer.step", "state_dict", "full master", "local master"},
    "optim_states": {"step", "optimizer.step", "state_dict", "full state"},
}


@pytest.mark.parametrize("kind", EVERYTHING)
def test_a_state_that_is_put_aside_is_an_error_to_use_until_it_is_back(kind):
    engine = tiny()
    models_step(engine)
    engine.offload_states(include=[kind])
    for name in NEEDS[kind.value]:
        with pytest.raises(RuntimeError, match=rf"put '{kind.value}' aside; call reload_states\(\) first"):
            USES[name](engine)
    engine.reload_states(non_blocking=True)
    models_step(engine)
    engine.destroy()


def with_and_without(rank, world):
    """Parameters after training with states put aside between steps, and without, at every stage."""
    torch.set_num_threads(1)
    results = []
    for stage in STAGES:
        for aside in (False, True):
            engine = engine_of(stage, "bf16")
            for step in range(3):
                engine.backward(engine(*models.batch(rank, step, dtype=torch.bfloat16)))
                engine.step()
                if aside:
                    engine.offload_states(include=EVERYTHING[:step + 2], pin_memory=False, non_blocking=True)
                    engine.offload_states()
                    engine.reload_states()
            engine.destroy()
            results.append(models.bits(engine.module))
    return [a == b for a, b in zip(results[::2], results[1::2])]


def test_putting_states_aside_changes_no_bit(ranks):
    assert ranks(2, with_and_without) == [[True] * len(STAGES)] * 2
