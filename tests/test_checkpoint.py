"""What an engine has comes back: into any stage, dtype and number of ranks, and nothing changes where it cannot."""
import hashlib
import os
import random

import models
import numpy
import pytest
import torch
from checkpoints import MemorySource, state_of, taken
from deepspeed_c._core import CheckpointError
from torch import nn

import deepspeed_c as deepspeed
from deepspeed_c.checkpoint.contents import HERE
from deepspeed_c.checkpoint.native import NativeSource
from deepspeed_c.checkpoint.packing import pack, unpack
from deepspeed_c.checkpoint.restore import Options, restore

PATTERN = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 5}}


def made(stage=0, dtype="fp32", seed=3, kind=models.Awkward, **more):
    """An engine over a model of its own."""
    more.setdefault("scheduler", PATTERN)
    module = models.make(kind, seed)
    return deepspeed.initialize(model=module, config=models.config(stage, dtype, **more))[0]


# ---- values ----


def packed_and_back(value):
    tensors, objects = {}, []
    return unpack(pack(value, tensors, objects), tensors.__getitem__, objects.__getitem__)


def test_values_come_back_with_their_types():
    odd = {"a": (1, [2.5, None]), 3: True, "$": "x", "big": 2**80, "inf": [float("inf"), -float("inf")],
           "bytes": b"\0\xff", "number": numpy.float32(0.1), "dtype": torch.bfloat16, "empty": {},
           "texts": ["a\0b", "\udcff", "\u20ac"], "keys": {"a\0": 1}}
    back = packed_and_back(odd)
    assert back == odd and list(back) == list(odd)
    assert type(back["a"]) is tuple and type(back["number"]) is numpy.float32
    assert packed_and_back(float("nan")) != packed_and_back(float("nan"))
    for value in (torch.tensor(0.1), torch.tensor(7, dtype=torch.int64), torch.randn(3, 4).t(), torch.zeros(0, 2)):
        back = packed_and_back([value])[0]
        assert torch.equal(back.reshape(value.shape), value) and back.dtype == value.dtype
    array = numpy.arange(6, dtype=">i4").reshape(2, 3)
    assert (packed_and_back(array) == array).all()


def test_no_text_makes_anything_but_values():
    for wrong in ({"$": "object_", "value": 0}, {"$": "namespace", "value": [1]},
                  {"$": "tensor", "dtype": "load", "value": 1}, {"$": "tuple"},
                  {"$": "array", "dtype": "O", "shape": [1], "tensor": "0"}):
        with pytest.raises(ValueError):
            unpack(wrong, lambda name: torch.zeros(8, dtype=torch.uint8), None)


# ---- one rank ----


def test_everything_comes_back_on_one_rank():
    """From any stage and dtype into a model with other values, and training goes on with the same bits."""
    for dtype, a, b in (("fp32", 0, 3), ("fp32", 3, 1), ("bf16", 1, 3), ("bf16", 2, 0), ("fp16", 3, 2)):
        first = made(a, dtype)
        models.train(first, 0, 2, dtype=dtype)
        saved = MemorySource([taken(first, client_state={"step": 3, "odd": (1,)})])
        then = state_of(first)
        second = made(b, dtype, seed=4)
        assert restore(second, saved, Options()) == {"step": 3, "odd": (1,)}
        assert state_of(second) == then
        models.train(first, 0, 1, dtype=dtype)
        models.train(second, 0, 1, dtype=dtype)
        assert models.bits(first.module) == models.bits(second.module)
        assert state_of(first) == state_of(second)


def test_random_generators_come_back():
    engine = made()
    saved = MemorySource([taken(engine)])
    drawn = torch.rand(3).tolist(), random.random(), numpy.random.rand()
    restore(engine, saved, Options())
    assert (torch.rand(3).tolist(), random.random(), numpy.random.rand()) == drawn


def test_another_dtype_takes_masters():
    first = made(1, "bf16")
    models.train(first, 0, 2, dtype="bf16")
    saved = MemorySource([taken(first)])
    second = made(2, "fp32", seed=4)
    restore(second, saved, Options())
    exact = saved.values["master", "twice.weight", HERE]
    assert torch.equal(second.module.twice.weight.detach().flatten(), exact)
    third = made(2, "bf16", seed=5)
    restore(third, MemorySource([taken(second)]), Options())
    assert models.bits(third.module) == models.bits(first.module)
    assert state_of(third) == state_of(first)


class Odd(nn.Module):
    """Parameters that torch's own optimizers run over, in two groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.b(self.a(x).tanh()).square().mean()


@pytest.mark.parametrize("name, options", [
    ("SGD", {"momentum": 0.9}), ("SGD", {}), ("Adagrad", {}), ("RMSprop", {"momentum": 0.5}), ("NAdam", {}),
    ("Adam", {"amsgrad": True, "torch_adam": True}), ("Lamb", {}), ("Lion", {}), ("ASGD", {})])
def test_the_states_of_optimizers_come_back(name, options):
    optimizer = {"type": name, "params": {"lr": 1e-2, **options}}

    def steps(engine, n):
        for i in range(n):
            engine.backward(engine(torch.linspace(-1, i, 12).view(3, 4)))
            engine.step()

    for n in (0, 2):
        first, second = (made(0, kind=Odd, seed=seed, optimizer=optimizer) for seed in (1, 2))
        steps(first, n)
        saved = MemorySource([taken(first)])
        steps(second, 1)
        restore(second, saved, Options())
        assert state_of(second) == state_of(first)
        for engine in (first, second):
            steps(engine, 2)
        assert state_of(second) == state_of(first)


def test_only_weights():
    first = made(1, "bf16")
    models.train(first, 0, 2, dtype="bf16")
    saved = MemorySource([taken(first)])
    for options in (Options(module_only=True), Options(optimizer_states=False)):
        second = made(1, "bf16", seed=4)
        models.train(second, 0, 1, dtype="bf16")
        restore(second, saved, options)
        assert models.bits(second.module) == models.bits(first.module)
        now = {part.tensor.key: part.values for part in taken_parts(second)}
        assert torch.equal(now["master", "twice.weight", HERE], now["model", "twice.weight", HERE].float())
        assert second.global_steps == (1 if options.module_only else 2)


def taken_parts(engine):
    from deepspeed_c.checkpoint.contents import Contents

    return Contents(engine).parts


def test_what_does_not_fit_is_an_error_and_changes_nothing():
    first = made(1)
    models.train(first, 0, 2)
    for damage, said in (
            (lambda s: s.tensors.pop(("model", "twice.weight", HERE)), "not in the checkpoint: twice.weight"),
            (lambda s: s.tensors.pop(("state.exp_avg", "conv.weight", HERE)), "states of conv.weight"),
            (lambda s: s.tensors.update({("model", "x", HERE): s.tensors["model", "embed.weight", HERE]}), "module: x"),
            (lambda s: reshape(s, "twice.bias"), r"twice.bias has shape \(4, 5\); the engine's has \(20,\)"),
            (lambda s: s.sections["groups"].append({}), "2 parameter groups, the engine 1"),
            (lambda s: s.sections["groups"][0].update(lr=-1.0), "lr"),
            (lambda s: s.sections["schedule"].update(state={}), "last_batch_iteration"),
            (lambda s: s.sections["world"].update(tensor=2), "2 tensor-parallel x 1 pipeline-parallel")):
        saved = MemorySource([taken(first)])
        damage(saved)
        second = made(1, seed=4)
        before = state_of(second)
        with pytest.raises((CheckpointError, ValueError, KeyError), match=said):
            restore(second, saved, Options())
        assert state_of(second) == before
        models.train(second, 0, 1)


def reshape(source, name):
    from dataclasses import replace

    tensor = source.tensors["model", name, HERE]
    source.tensors[tensor.key] = replace(tensor, shape=(4, 5), stride=(5, 1))


def test_without_strict_what_both_have_is_loaded():
    first = made(0)
    saved = MemorySource([taken(first, exclude_frozen=True)])
    second = made(0, seed=4)
    with pytest.raises(CheckpointError, match="frozen.weight.*exclude_frozen_parameters"):
        restore(second, saved, Options())
    frozen = second.module.frozen.weight.clone()
    restore(second, saved, Options(strict=False))
    assert torch.equal(second.module.frozen.weight, frozen)
    assert torch.equal(second.module.twice.weight, first.module.twice.weight)


def test_engines_without_an_optimizer():
    first = made(1)
    models.train(first, 0, 1)
    for stage in (0, 3):
        module = models.make(seed=4)
        bare = deepspeed.initialize(model=module, config={
            "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}})[0]
        restore(bare, MemorySource([taken(first)]), Options())
        assert models.bits(module) == models.bits(first.module) and bare.global_steps == 1
        second = made(2, seed=5)
        saved = MemorySource([taken(bare)])
        with pytest.raises(CheckpointError, match="load_optimizer_states=False loads the weights alone"):
            restore(second, saved, Options())
        restore(second, saved, Options(optimizer_states=False))
        assert models.bits(second.module) == models.bits(first.module)


def test_loading_inside_a_step_that_has_reduced_gradients_is_an_error():
    engine = made(2)
    saved = MemorySource([taken(engine)])
    engine.backward(engine(*models.batch(0, 0)))
    with pytest.raises(RuntimeError, match="inside an open step"):
        restore(engine, saved, Options())


def test_masters_from_the_weights_where_the_configuration_says_so():
    first = made(1, "bf16")
    models.train(first, 0, 1, dtype="bf16")
    second = made(1, "bf16", seed=4, zero={"load_from_fp32_weights": False})
    restore(second, MemorySource([taken(first)]), Options())
    now = {part.tensor.key: part.values for part in taken_parts(second)}
    assert torch.equal(now["master", "twice.weight", HERE], now["model", "twice.weight", HERE].float())
    assert second._run.states_of(0)["exp_avg"].abs().sum() > 0


def test_a_function_of_the_callers_loads_the_module():
    first, second = made(3), made(3, seed=4)
    models.train(first, 0, 1)

    def load(src, dst):
        dst.twice.weight.data.copy_(src["twice.weight"])

    restore(second, MemorySource([taken(first)]), Options(custom_load_fn=load, optimizer_states=False))
    whole = [dict(e.module.named_parameters())["twice.weight"].ds_full for e in (first, second)]
    assert torch.equal(*whole)
    assert models.bits(first.module) != models.bits(second.module)


# ---- several ranks ----

STAGES = 0, 1, 2, 3


def train_on(engine, rank, dtype):
    """What two more steps give: a digest of all parameters."""
    models.train(engine, rank, 2, dtype=dtype)
    return hashlib.sha256(models.bits(engine.module)).hexdigest()


def save_all(rank, world, folder, dtypes, stages):
    """A checkpoint after three steps for each dtype and stage, and the digests of who went on without a break."""
    ends = {}
    for dtype in dtypes:
        for stage in stages:
            engine = made(stage, dtype)
            models.train(engine, rank, 3, dtype=dtype)
            tag = f"{world}.{dtype}.{stage}"
            engine.save_checkpoint(folder, tag, {"tag": tag})
            ends[tag] = train_on(engine, rank, dtype)
            engine.destroy()
    return ends


def load_all(rank, world, folder, tags, stages):
    """Each of these checkpoints into each stage, and saved again; the digests of who goes on from it."""
    ends = {}
    for tag in tags:
        dtype = tag.split(".")[1]
        for stage in stages:
            engine = made(stage, dtype, seed=5)
            path, client = engine.load_checkpoint(folder, tag)
            assert client == {"tag": tag}
            again = f"{tag} to {world}.{stage}"
            engine.save_checkpoint(folder, again, client)
            ends[again] = train_on(engine, rank, dtype)
            engine.destroy()
    return ends


def all_of(folder, tag):
    """A checkpoint without its random generators: {(key, dtype, group): bytes in C order}, some sections."""
    source = NativeSource(os.path.join(folder, tag))
    found = {}
    for tensor in source.tensors.values():
        if tensor.kind != "rng":
            values = torch.empty(tensor.numel, dtype=tensor.dtype)
            source.read(*tensor.key, 0, tensor.numel, values)
            values = values.as_strided(tensor.shape, tensor.stride).contiguous()
            found[tensor.key, tensor.dtype, tensor.group] = values.flatten().view(torch.uint8).numpy().tobytes()
    sections = "counters", "scaler", "groups", "schedule", "client", "modules", "tied", "scalars"
    return found, {name: source.sections.get(name) for name in sections}


def check_matrix(ranks, folder, dtypes, worlds, saved_at=STAGES, loaded_at=STAGES):
    """worlds: [(ranks that save, ranks that load)]"""
    ends, made = {}, {}
    for n in sorted({n for n, _ in worlds}):
        ends.update(ranks(n, save_all, folder, dtypes, saved_at, timeout=300)[0])
    for m in sorted({m for _, m in worlds}):
        tags = [tag for tag in ends if (int(tag[0]), m) in worlds and "to" not in tag]
        made.update(ranks(m, load_all, folder, tags, loaded_at, timeout=600)[0])
    for tag, end in ends.items():
        held = all_of(folder, tag)
        for m in {m for n, m in worlds if n == int(tag[0])}:
            digests = {made[f"{tag} to {m}.{stage}"] for stage in loaded_at}
            assert digests == {end} if m == int(tag[0]) else len(digests) == 1, (tag, m)
            for stage in loaded_at:
                assert all_of(folder, f"{tag} to {m}.{stage}") == held, (tag, m, stage)


def test_any_stage_into_any_stage(ranks, tmp_path):
    check_matrix(ranks, str(tmp_path), ("fp32", "bf16"), [(2, 2)])


def test_any_number_of_ranks_into_any_other(ranks, tmp_path):
    check_matrix(ranks, str(tmp_path), ("bf16",), [(1, 3), (3, 1)], (1, 3), (0, 2, 3))


@pytest.mark.long
def test_the_whole_matrix(ranks, tmp_path):
    check_matrix(ranks, str(tmp_path), ("fp32", "bf16", "fp16"), [(n, m) for n in (1, 2, 3, 4) for m in (1, 2, 3, 4)])


class Rows(torch.optim.Optimizer):
    """An optimizer that is not known to treat each element alone: a mean square per row, and a number."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, rows=torch.zeros(p.shape[:1]), last=torch.zeros_like(p))
                state["step"] += 1
                state["rows"].mul_(0.9).add_(p.grad.square().flatten(1).mean(1) if p.dim() > 1 else p.grad.square())
                rows = state["rows"].view(-1, *[1] * (p.dim() - 1))
                state["last"].copy_(p.grad / (rows.sqrt() + 1e-3))
                p.sub_(state["last"], alpha=group["lr"])


OPTIMIZERS = {
    "RMSprop in two groups": lambda m: torch.optim.RMSprop([
        {"params": [p for p in m.parameters() if p.dim() > 1]},
        {"params": [p for p in m.parameters() if p.dim() < 2], "lr": 1e-4}], lr=1e-3, momentum=0.5),
    "Rows": lambda m: Rows(m.parameters(), 1e-3),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
}


def through_optimizers(rank, world, folder, save, load):
    """Digests after two more steps, by optimizer and (stage, with fp32 masters or without) that was loaded into."""
    found = {}
    for name, make in OPTIMIZERS.items():
        for stage, masters in load:
            if name != "SGD" and not masters:
                continue
            module = models.make(Odd, 1 if save else 5)
            engine = deepspeed.initialize(model=module, optimizer=make(module), config={
                "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True, "bf16": {
                    "enabled": True, "bf16_master_weights_and_grads": not masters}})[0]
            tag = f"{name}, {masters}"
            if save:
                steps_of(engine, rank, 2)
                engine.save_checkpoint(folder, tag)
            else:
                engine.load_checkpoint(folder, tag)
            steps_of(engine, rank, 2)
            found[name, stage, masters] = hashlib.sha256(models.bits(module)).hexdigest()
            engine.destroy()
    return found


def steps_of(engine, rank, n):
    for i in range(n):
        x = torch.linspace(-1, 1 + i + rank, 12).view(3, 4).bfloat16()
        engine.backward(engine(x))
        engine.step()


def test_optimizers_that_torch_runs_and_models_without_masters(ranks, tmp_path):
    ends = ranks(2, through_optimizers, str(tmp_path), True, [(1, True), (2, False)])[0]
    again = ranks(2, through_optimizers, str(tmp_path), False, [(s, m) for s in STAGES for m in (True, False)])[0]
    for (name, stage, masters), end in again.items():
        assert end == ends[name, 1 if masters else 2, masters], (name, stage, masters)
    three = ranks(3, through_optimizers, str(tmp_path), False, [(s, True) for s in STAGES])[0]
    for name in OPTIMIZERS:
        assert len({end for (other, *_), end in three.items() if other == name}) == 1


def test_another_grouping_of_parameters_is_an_error():
    first, second = made(kind=Odd), models.make(Odd)
    groups = [{"params": list(second.a.parameters())}, {"params": list(second.b.parameters()), "lr": 0.5}]
    engine = deepspeed.initialize(model=second, model_parameters=groups, config=models.config(1))[0]
    with pytest.raises(CheckpointError, match="1 parameter groups, the engine 2"):
        restore(engine, MemorySource([taken(first)]), Options())
    third = models.make(Odd)
    other = deepspeed.initialize(model=third, config=models.config(2), model_parameters=[
        {"params": [third.a.weight]}, {"params": [third.a.bias, *third.b.parameters()]}])[0]
    with pytest.raises(CheckpointError, match="a.bias is in parameter group 0 in the checkpoint and in 1 here"):
        restore(other, MemorySource([taken(engine)]), Options())
    restore(other, MemorySource([taken(engine)]), Options(optimizer_states=False))
    assert torch.equal(third.a.bias, second.a.bias)


def over_nodes(rank, world, folder):
    """As save_all and load_all, where ranks share no memory."""
    ends = save_all(rank, world, folder, ("bf16",), (0, 2, 3))
    return ends, load_all(rank, world, folder, list(ends), (0, 1, 3))


def test_where_ranks_share_no_memory(ranks, tmp_path):
    ends, again = ranks(2, over_nodes, str(tmp_path), env={"DSC_COMM_BACKEND": "delegate"})[0]
    for tag, end in again.items():
        assert end == ends[tag.split()[0]]
        assert all_of(tmp_path, tag) == all_of(tmp_path, tag.split()[0])
    assert ranks(2, load_all, str(tmp_path), list(ends), (3,))[0] == {
        tag: end for tag, end in again.items() if tag.endswith("3")}
