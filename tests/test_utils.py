"""What scripts take from deepspeed.utils and its neighbours: OnDevice, leaf modules, copies, recomputation."""
import collections
import contextlib
import io
import logging

import pytest
import torch
from torch import nn

import deepspeed_c
from deepspeed_c import utils
from deepspeed_c.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed_c.runtime import utils as runtime_utils
from deepspeed_c.runtime.activation_checkpointing import checkpointing

Point = collections.namedtuple("Point", "x y")


# ---- OnDevice ----

def test_on_device_builds_modules_without_memory_in_the_given_dtype():
    with utils.OnDevice(dtype=torch.bfloat16, device="meta"):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        counts, given = torch.arange(3), torch.zeros(2, dtype=torch.float64)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert (counts.dtype, given.dtype) == (torch.int64, torch.float64)
    after = nn.Linear(2, 2).weight
    assert (after.dtype, after.device.type) == (torch.float32, "cpu")


def test_on_device_leaves_everything_as_it_was_after_an_error_and_when_disabled():
    with contextlib.suppress(ZeroDivisionError), deepspeed_c.OnDevice(dtype=torch.float16):
        raise ZeroDivisionError
    with utils.OnDevice(dtype=torch.float16, enabled=False):
        weight = nn.Linear(2, 2).weight
    assert (weight.dtype, weight.device.type) == (torch.float32, "cpu") and torch.get_default_dtype() == torch.float32


def test_on_device_changes_nothing_where_torch_cannot_have_the_dtype_as_its_default():
    with pytest.raises(TypeError), utils.OnDevice(dtype=torch.float8_e4m3fn):
        pass
    assert torch.empty(1).device.type == "cpu" and torch.get_default_dtype() == torch.float32


def test_on_device_can_be_nested_and_entered_again():
    context = utils.OnDevice(dtype=torch.float64, device="cpu")
    with context:
        with utils.OnDevice(dtype=torch.bfloat16), context:
            assert torch.zeros(1).dtype == torch.float64 and torch.zeros(1).device.type == "cpu"
        assert torch.zeros(1).dtype == torch.float64
    assert torch.zeros(1).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, "fp16"])
def test_on_device_refuses_what_is_no_floating_dtype(dtype):
    with pytest.raises(TypeError, match="allowed: a floating torch.dtype, or None"):
        utils.OnDevice(dtype=dtype)


# ---- leaf modules ----

class Block(nn.Linear):
    pass


def net():
    return nn.Sequential(nn.Linear(2, 2), Block(2, 2), nn.Sequential(Block(2, 2), nn.ReLU()))


@pytest.mark.parametrize("wanted, expected", [
    ([Block], ["1", "2.0"]), (["Block"], ["1", "2.0"]), ([nn.Linear], ["0", "1", "2.0"]),
    ([f"{Block.__module__}.Block", nn.ReLU], ["1", "2.0", "2.1"]),
])
def test_leaf_modules_are_found_by_class_and_by_its_names(wanted, expected):
    model = net()
    found = utils.set_z3_leaf_modules(model, wanted)
    assert found == utils.get_z3_leaf_modules(model) == [model.get_submodule(name) for name in expected]
    assert utils.set_z3_leaf_modules(model, iter(wanted)) == found
    assert utils.unset_z3_leaf_modules(model, wanted) == found and utils.get_z3_leaf_modules(model) == []


def test_leaf_modules_are_found_by_name_and_by_suffix():
    model = net()
    utils.set_z3_leaf_modules_by_name(model, ["2.0"])
    assert utils.get_z3_leaf_modules(model) == [model[2][0]]
    assert utils.set_z3_leaf_modules_by_suffix(model, ["0"]) == [model[0], model[2][0]]
    utils.set_z3_leaf_modules_by_name(model, ["2.0"], flag=False)
    assert utils.get_z3_leaf_modules(model) == [model[0]]
    utils.set_z3_leaf_module(model, True)
    assert utils.z3_leaf_module(model) and not utils.z3_leaf_parameter(model[0].weight)


def test_a_leaf_that_is_not_found_is_an_error_unless_told_otherwise():
    with pytest.raises(ValueError, match="no module of Sequential is of the classes"):
        utils.set_z3_leaf_modules(net(), [nn.Conv2d, "Embedding"])
    assert utils.set_z3_leaf_modules(net(), [nn.Conv2d], raise_if_not_found=False) == []
    with pytest.raises(ValueError, match="no module of Sequential is called '3'"):
        utils.set_z3_leaf_modules_by_name(net(), ["0", "3"])
    with pytest.raises(ValueError, match="is called 'x'"):
        utils.set_z3_leaf_modules_by_suffix(net(), ["x"])
    with pytest.raises(TypeError, match="has 3; allowed: classes"):
        utils.set_z3_leaf_modules(net(), [3])


# ---- small ones ----

def test_an_instrumented_function_is_the_function():
    @utils.instrument_w_nvtx
    def add(a, b=1):
        """Adds."""
        return a + b

    assert add(2, b=3) == 5 and (add.__name__, add.__doc__) == ("add", "Adds.")
    with pytest.raises(TypeError):
        add(None)


def test_a_repeating_loader_begins_anew():
    loader = iter(utils.RepeatingLoader([1, 2]))
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1]


def test_clones_have_memory_of_their_own_and_tied_tensors_stay_tied():
    whole = torch.arange(1000.0)
    state = collections.OrderedDict(a=whole[:3], tied=whole[:3], rest=[whole[3:5], Point(whole[7], "text")], n=4)
    state._metadata = {"version": 1}
    clone = clone_tensors_for_torch_save(state)
    assert type(clone) is collections.OrderedDict and list(clone) == ["a", "tied", "rest", "n"] and clone["n"] == 4
    assert clone["a"].untyped_storage().nbytes() == 12 and clone["a"] is clone["tied"]
    assert torch.equal(clone["rest"][0], whole[3:5]) and clone["rest"][1] == Point(torch.tensor(7.0), "text")
    clone["a"].zero_()
    assert whole[1] == 1
    file = io.BytesIO()
    torch.save(clone, file)
    assert len(file.getvalue()) < 3000
    others = clone_tensors_for_torch_save([torch.zeros(0), torch.zeros(0, 2), nn.Parameter(torch.ones(1))], "cpu")
    sparse = torch.eye(2).to_sparse()
    assert torch.equal(clone_tensors_for_torch_save({"a": sparse})["a"].to_dense(), torch.eye(2))
    assert [t.shape for t in others] == [(0,), (0, 2), (1,)] and not others[2].requires_grad


def test_move_to_device_reaches_nested_tensors_and_leaves_the_rest():
    item = {"a": [torch.ones(2), "text"], "b": Point(torch.ones(1), (3, torch.ones(1)))}
    moved = runtime_utils.move_to_device(item, "meta")
    assert [moved["a"][0].device.type, moved["b"].x.device.type, moved["b"].y[1].device.type] == ["meta"] * 3
    assert moved["a"][1] == "text" and moved["b"].y[0] == 3 and item["a"][0].device.type == "cpu"
    kept = runtime_utils.move_to_device([torch.ones(1)], "meta", criterion_func=lambda value: False)
    assert kept[0].device.type == "cpu"


def test_norms_and_clipping():
    assert runtime_utils.get_global_norm([3.0, 4.0]) == 5.0 and runtime_utils.get_global_norm([1e200]) == 1e200
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert runtime_utils.clip_grad_norm_([p], 1.0) == 5.0 and p.grad.norm() == pytest.approx(1.0)
    with pytest.raises(NotImplementedError, match="mpu"):
        runtime_utils.clip_grad_norm_([p], 1.0, mpu=object())


def test_memory_usage_is_said_only_when_forced(capfd):
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    utils.logger.addHandler(handler)
    runtime_utils.see_memory_usage("quiet")
    runtime_utils.see_memory_usage("after step", force=True)
    utils.logger.removeHandler(handler)
    assert len(seen) == 1 and "after step | MA " in seen[0] and capfd.readouterr().out == ""


# ---- recomputation ----

@pytest.fixture(autouse=True)
def unconfigured(monkeypatch):
    monkeypatch.setattr(checkpointing, "_configured", False)


def test_checkpoint_gives_the_same_gradients_with_fewer_activations():
    runs = []
    layer = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    for through in (lambda f, *a, **k: f(*a, **k), deepspeed_c.checkpointing.checkpoint):
        torch.manual_seed(3)
        layer.zero_grad()
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = through(lambda x, scale=1.0: layer(x) * scale, torch.ones(2, 4), scale=2.0)
        out.sum().backward()
        runs.append(([p.grad.clone() for p in layer.parameters()], sum(kept)))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0]))
    assert runs[1][1] < runs[0][1]


def test_configure_takes_what_lightning_passes():
    assert not checkpointing.is_configured()
    deepspeed_c.checkpointing.configure(mpu_=None, partition_activations=True, contiguous_checkpointing=False,
                                        checkpoint_in_cpu=True, profile=None)
    assert checkpointing.is_configured()
    checkpointing.reset()
    checkpointing.set_num_layers(2), checkpointing.partition_activations_in_checkpoint(True)


def test_configure_reads_the_configuration_where_nothing_is_given():
    config = {"train_batch_size": 2, "activation_checkpointing": {"profile": True}}
    with pytest.raises(NotImplementedError, match="profile=True"):
        checkpointing.configure(None, config)
    checkpointing.configure(None, config, profile=False)
    with pytest.raises(NotImplementedError, match="mpu_"):
        checkpointing.configure(object())
    with pytest.raises(NotImplementedError, match="tensor parallelism"):
        checkpointing.get_cuda_rng_tracker()
