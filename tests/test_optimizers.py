"""Optimizers of the engine: by name, as objects, in the core and by torch; contract N1 for each."""
import copy
import gc
import io
import itertools
import pickle
import weakref

import models
import pytest
import torch

import deepspeed_c as deepspeed
from deepspeed_c import _core, zero
from deepspeed_c.utils import safe_get_full_optimizer_state

SECTIONS = {
    "adagrad": {"type": "Adagrad", "params": {"lr": 1e-2, "lr_decay": 0.1, "weight_decay": 0.1,
                                              "initial_accumulator_value": 0.1}},
    "lion": {"type": "Lion", "params": {"lr": 1e-3, "weight_decay": 0.1}},
    "lamb": {"type": "Lamb", "params": {"lr": 1e-2, "weight_decay": 0.1}},
    "momentum": {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9, "nesterov": True}},
    "rmsprop": {"type": "RMSprop", "params": {"lr": 1e-3}},
    "amsgrad": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True, "amsgrad": True}},
    "adafactor": {"type": "Adafactor", "params": {"lr": 1e-2}},
}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 33))
        self.head = torch.nn.Linear(33, 3)

    def forward(self, x):
        return self.head(self.body(x)).float().square().mean()


def start(optimizer=None, stage=0, dtype="fp32", module=None, **more):
    module = models.make(Net) if module is None else module
    section = {"optimizer": optimizer} if isinstance(optimizer, dict) else {"optimizer": None}
    config = models.config(stage, dtype, **{**section, **more})
    if config["optimizer"] is None:
        del config["optimizer"]
    engine, *_ = deepspeed.initialize(model=module, optimizer=None if isinstance(optimizer, dict) else optimizer,
                                      config=config)
    return engine


def batch(rank, step, dtype="fp32"):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(4, 6, generator=generator).to(models.DTYPES[dtype])


def train(engine, rank, steps, dtype="fp32"):
    for step in steps:
        engine.backward(engine(batch(rank, step, dtype)))
        engine.step()


# ---- contract N1 ----

def run(rank, section, stage, dtype, overlap, kind):
    module = models.make(kind)
    engine = start(section, stage, dtype, module, zero={"overlap_comm": overlap}, zero_allow_untested_optimizer=True)
    models.train(engine, rank, 3, 1, dtype)
    found = models.bits(module)
    engine.destroy()
    return found


def matrix(rank, world, names):
    torch.set_num_threads(1)
    wrong = []
    for name, dtype in itertools.product(names, ("fp32", "bf16")):
        base = run(rank, SECTIONS[name], 0, dtype, False, models.Awkward)
        others = (0, True), (1, False), (1, True), (2, False), (3, False)
        wrong += [(name, dtype, stage, overlap) for stage, overlap in others
                  if run(rank, SECTIONS[name], stage, dtype, overlap, models.Awkward) != base]
    return wrong


@pytest.mark.parametrize("world", [2, 4])
def test_stages_change_no_bit_with_the_cores_optimizers(ranks, world):
    assert ranks(world, matrix, ("adagrad", "lion", "lamb", "momentum"), timeout=180) == [[]] * world


def test_stages_change_no_bit_with_optimizers_that_torch_runs(ranks):
    assert ranks(2, matrix, ("rmsprop", "amsgrad", "adafactor"), timeout=180) == [[]] * 2


# ---- plain torch, one rank ----

def plain(make, n_steps=5, clip=0.5):
    module = models.make(Net)
    optimizer = make(module.parameters())
    for step in range(n_steps):
        optimizer.zero_grad()
        module(batch(0, step)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


TORCHS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=1e-2, maximize=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", TORCHS)
def test_an_optimizer_object_steps_as_in_plain_torch(name, stage):
    engine = start(TORCHS[name](list((module := models.make(Net)).parameters())), stage, module=module,
                   zero_allow_untested_optimizer=True)
    train(engine, 0, range(5))
    got = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
    torch.testing.assert_close(got, plain(TORCHS[name]), rtol=1e-5, atol=1e-6)
    engine.destroy()


def test_a_subclass_is_run_as_given():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            return super().step()

    module = models.make(Net)
    engine = start(Twice(module.parameters(), lr=1e-2), module=module)
    train(engine, 0, range(3))
    got = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(got, plain(lambda p: Twice(p, lr=1e-2), 3), rtol=1e-5, atol=1e-7)


def test_a_callable_makes_the_optimizer():
    engine = start(lambda params: torch.optim.RMSprop(params, lr=1e-2))
    assert type(engine.basic_optimizer) is torch.optim.RMSprop
    train(engine, 0, range(1))


# ---- the object that was given ----

@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_the_object_stays_the_one_that_was_given(name, dtype):
    module = models.make(Net)
    given = TORCHS[name](list(module.parameters()))
    groups, params = given.param_groups, list(given.param_groups[0]["params"])
    schedule = torch.optim.lr_scheduler.StepLR(given, 1, 0.5)
    engine = start(given, 1, dtype, module)
    assert engine.optimizer.optimizer is engine.basic_optimizer is given
    assert engine.optimizer.param_groups is given.param_groups is groups
    train(engine, 0, range(1), dtype)
    schedule.step()
    assert engine.get_lr() == [pytest.approx(0.005)]
    assert all(a is b for a, b in zip(groups[0]["params"], params, strict=True))
    assert set(given.state) == set(params), "states are known by parameters, not by fragments"
    assert given.state[params[0]]["step"] == 1
    state = given.state[params[0]]["exp_avg_sq" if name == "AdamW" else "square_avg"]
    assert state.dtype == torch.float32 and state.shape == params[0].shape and state.any()


def test_steps_taken_before_initialize_count():
    for name in ("Adam", "SGD", "Adagrad", "RMSprop"):
        module = models.make(Net)
        optimizer = TORCHS[name](list(module.parameters()))
        for step in range(2):
            optimizer.zero_grad()
            module(batch(0, step)).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
        optimizer.zero_grad()
        engine = start(optimizer, module=module)
        train(engine, 0, range(2, 5))
        got = torch.cat([p.detach().flatten() for p in module.parameters()])
        torch.testing.assert_close(got, plain(TORCHS[name]), rtol=1e-5, atol=1e-6)


def test_what_is_written_into_states_takes_effect():
    module = models.make(Net)
    given = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.5)
    engine = start(given, module=module, gradient_clipping=0)
    train(engine, 0, range(1))
    p = module.head.bias
    for written in (lambda: given.state[p]["momentum_buffer"].fill_(3.0),
                    lambda: given.state[p].update(momentum_buffer=torch.full((3,), 3.0)),
                    lambda: setattr(given, "state", {q: {"momentum_buffer": torch.full_like(q, 3.0)}
                                                     for q in module.parameters()})):
        written()
        before = p.detach().clone()
        engine.backward(engine(batch(0, 1)) * 0)
        engine.step()
        torch.testing.assert_close(before - p.detach(), torch.full((3,), 1.5))


def test_states_that_somebody_holds_outlive_the_engine():
    module = models.make(Net)
    given = torch.optim.AdamW(module.parameters(), lr=1e-3)
    engine = start(given, dtype="bf16", module=module)
    train(engine, 0, range(1), "bf16")
    state = given.state[module.head.weight]["exp_avg"]
    before = state.clone()
    engine.destroy()
    del engine
    gc.collect()
    assert torch.equal(state, before) and state.any()


@pytest.mark.parametrize("name", SECTIONS)
def test_destroy_frees_what_nobody_holds(name):
    start(SECTIONS[name]).destroy()  # the communicator, which the first engine opens, stays
    gc.collect()
    before = _core.alloc_counters()["n_bytes"]
    engine = start(SECTIONS[name], dtype="bf16")
    train(engine, 0, range(1), "bf16")
    engine.destroy()
    gc.collect()
    assert _core.alloc_counters()["n_bytes"] == before


def test_groups_stay_as_they_were_given():
    module, other = models.make(Net), torch.nn.Parameter(torch.ones(3))
    module.head.bias.requires_grad_(False)
    given = torch.optim.SGD([{"params": list(module.parameters())}, {"params": []}, {"params": [other], "lr": 3.0}],
                            lr=0.1)
    engine = start(given, module=module)
    assert [len(group["params"]) for group in engine.optimizer.param_groups] == [6, 0, 1]
    assert engine.get_lr() == [0.1, 0.1, 3.0]
    before = module.head.bias.detach().clone()
    engine.backward(engine(batch(0, 0)) + other.sum())
    engine.step()
    assert torch.equal(module.head.bias, before) and not torch.equal(other, torch.ones(3))
    with pytest.raises(ValueError, match="optimizer.param_groups holds.*more than once: head.weight"):
        given.param_groups[1]["params"].append(module.head.weight)
        start(given, module=module)


# Bytes per stepped element: states, a foreign optimizer's gradients; a 16-bit model adds 4 for masters.
BYTES = {"adagrad": 4, "lion": 4, "lamb": 8, "momentum": 4, "rmsprop": 4, "adafactor": 4}


def bytes_held(rank, world, stage, dtype):
    torch.set_num_threads(1)
    wrong = []
    for name, size in BYTES.items():
        engine = start(SECTIONS[name], stage, dtype, zero_allow_untested_optimizer=True)
        train(engine, rank, range(1), dtype)
        counters = engine._core.counters()
        sums = 4 * counters["owned_elems"] if stage == 1 else 0
        expected = counters["owned_elems"] * (size + (4 if dtype != "fp32" else 0)) + sums
        if counters["private_bytes"] != expected:
            wrong.append((name, counters["private_bytes"], expected))
        engine.destroy()
    return wrong


@pytest.mark.parametrize("stage, dtype", [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_memory_is_that_of_the_table(ranks, stage, dtype):
    assert ranks(2, bytes_held, stage, dtype) == [[], []]


# ---- errors ----

def test_wrong_optimizers_are_named():
    module = models.make(Net)
    for optimizer, error, text in (
        ({"type": "Lio"}, ValueError, "Lio.*did you mean Lion"),
        ({"type": "rmsprop"}, ValueError, "did you mean RMSprop"),
        ({"type": "OneBitAdam"}, NotImplementedError, "OneBitAdam.*not yet"),
        ({"type": "RMSprop", "params": {"alpah": 1}}, ValueError, "alpah.*did you mean alpha"),
        ({"type": "Adam", "params": {"amsgrad": True}}, NotImplementedError, "torch_adam"),
        (object(), TypeError, "optimizer is a object"),
        (lambda params: None, TypeError, "NoneType"),
        (torch.optim.LBFGS(module.parameters()), ValueError, "LBFGS.step needs a closure"),
    ):
        with pytest.raises(error, match=text):
            start(optimizer, module=module)


def test_an_untested_optimizer_with_sharded_states_has_to_be_allowed():
    for optimizer in (SECTIONS["adafactor"], lambda p: type("Own", (torch.optim.SGD,), {})(p, lr=1)):
        with pytest.raises(ValueError, match="zero_allow_untested_optimizer.*RMSprop"):
            start(optimizer, 1)
        start(optimizer, 0).destroy()
        start(optimizer, 1, zero_allow_untested_optimizer=True).destroy()


def failing(rank, world):
    found = []

    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails and rank == 1:
                raise KeyError("mine")
            super().step()

    def steps(engine, first, last):
        for i in range(first, last):
            engine.backward(engine(batch(rank, i)))
            engine.step()

    for stage in (0, 1, 2, 3):
        module = models.make(Net)
        optimizer = Failing(module.parameters(), lr=0.1, momentum=0.9)
        engine = start(optimizer, stage, module=module, zero_allow_untested_optimizer=True)
        steps(engine, 0, 2)
        with zero.GatheredParameters(list(module.parameters())):
            saved = copy.deepcopy((module.state_dict(), engine.optimizer.state_dict()))
        steps(engine, 2, 4)
        expected = models.bits(module)
        optimizer.fails = True
        said = []
        for _ in range(2):
            with pytest.raises((KeyError, RuntimeError)) as caught:
                steps(engine, 4, 5)
            said.append(str(caught.value))
            optimizer.fails = False
        with zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
            module.load_state_dict(saved[0])
        engine.optimizer.load_state_dict(saved[1])
        steps(engine, 2, 4)
        found.append((said, expected == models.bits(module)))
    return found


def test_an_optimizer_that_raises_on_one_rank_is_an_error_on_all_until_values_are_loaded(ranks):
    for (first, same), (second, same_there) in zip(*ranks(2, failing)):
        assert "raised on rank 1" in first[0] and "mine" in second[0]
        assert "ranks may hold different values" in first[1] and first[1] == second[1]
        assert same and same_there


def one_that_fails(rank, world):
    """Loaded on one rank only: the other still refuses, and both hear of it."""
    module = models.make(Net)
    optimizer = type("Own", (torch.optim.SGD,), {})(module.parameters(), lr=0.1)
    engine = start(optimizer, 0, module=module)
    saved = copy.deepcopy(engine.optimizer.state_dict())
    step, optimizer.step = optimizer.step, (lambda: 1 / 0) if rank == 1 else optimizer.step
    said = []
    for _ in range(2):
        engine(batch(rank, 0)).backward()
        with pytest.raises((ZeroDivisionError, RuntimeError, ValueError)) as caught:
            engine.step()
        said.append(str(caught.value))
        optimizer.step = step
        if rank == 0:
            engine.optimizer.load_state_dict(saved)
    return said[1]


def test_values_that_only_one_rank_loads_are_an_error_on_both(ranks):
    first, second = ranks(2, one_that_fails)
    assert "rank 1 cannot step" in first and "ranks may hold different values" in second


def test_a_late_group_is_named():
    engine = start(SECTIONS["lion"])
    for optimizer in (engine.optimizer, engine.basic_optimizer):
        with pytest.raises(NotImplementedError, match="head.weight.*pass all groups to initialize"):
            optimizer.add_param_group({"params": engine.module.head.weight})


# ---- the contract of the returned optimizer ----

def saved_and_loaded(rank, world, section, stage, dtype):
    """Two engines: the second takes over after two steps; both must end alike."""
    torch.set_num_threads(1)
    options = {"zero_allow_untested_optimizer": True}
    first = start(section, stage, dtype, **options)
    train(first, rank, range(2), dtype)
    buffer = io.BytesIO()
    torch.save(first.optimizer.state_dict(), buffer)
    with zero.GatheredParameters(list(first.module.parameters())):
        module = {name: value.clone() for name, value in first.module.state_dict().items()}
    train(first, rank, range(2, 4), dtype)
    second = start(section, stage, dtype, module=models.make(Net, seed=9), **options)
    with zero.GatheredParameters(list(second.module.parameters()), modifier_rank=0):
        second.module.load_state_dict(module)
    buffer.seek(0)
    second.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    train(second, rank, range(2, 4), dtype)
    return models.bits(first.module) == models.bits(second.module)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_saving_and_loading_restores_every_bit(ranks, dtype):
    for name, stage in (("lamb", 1), ("momentum", 2), ("adagrad", 0), ("rmsprop", 1), ("adafactor", 2), ("rmsprop", 3)):
        assert ranks(2, saved_and_loaded, SECTIONS[name], stage, dtype) == [True, True], (name, stage)


def test_loading_what_does_not_fit_changes_nothing():
    engine = start(SECTIONS["lion"])
    saved = engine.optimizer.state_dict()
    for broken, text in (({**saved, "place": {**saved["place"], "world_size": 3}}, "world_size"),
                         ({**saved, "param_groups": []}, r"groups of \[\]"),
                         ({key: value for key, value in saved.items() if key != "masters"}, "masters missing")):
        with pytest.raises(ValueError, match=text):
            engine.optimizer.load_state_dict(broken)


def test_copying_the_returned_optimizer_is_a_clear_error():
    engine = start(SECTIONS["lion"])
    for call in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            call(engine.optimizer)


def test_a_wrapper_that_takes_class_and_attributes_works():
    engine = start(SECTIONS["lamb"])

    class Wrapper:  # as Lightning and Fabric make theirs
        def __init__(self, inner):
            self.__dict__ = {k: v for k, v in inner.__dict__.items() if k not in ("step", "zero_grad")}
            self.__class__ = type("Wrapped", (Wrapper, type(inner)), {})
            self._inner = inner

        @property
        def optimizer(self):
            return self._inner

    wrapped = Wrapper(engine.optimizer)
    assert wrapped.param_groups is engine.basic_optimizer.param_groups and isinstance(wrapped, torch.optim.Optimizer)
    before = models.bits(engine.module)
    engine.backward(engine(batch(0, 0)))
    wrapped.zero_grad()
    engine.backward(engine(batch(0, 0)))
    wrapped.step()
    assert models.bits(engine.module) != before and engine.global_steps == 1
    assert wrapped.state_dict()["state"] and wrapped.overflow is False
    wrapped.state = {}
    assert engine.basic_optimizer.state == {}


# ---- what is shown and taken over ----

def steps_of(optimizer):
    return {float(state["step"]) for state in optimizer.state.values()}


def test_plain_torch_goes_on_with_the_steps_that_the_core_took():
    """Each parameter's number of steps is its own: torch counts them on in place, one by one."""
    module, other = models.make(Net), models.make(Net)
    given = torch.optim.AdamW(module.parameters(), lr=1e-2)
    engine = start(given, module=module)
    train(engine, 0, range(3))
    buffer = io.BytesIO()
    torch.save(given.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.optim.AdamW(other.parameters(), lr=1e-2)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    engine.destroy()
    for net, optimizer in ((module, given), (other, loaded)):
        net(batch(0, 3)).backward()
        optimizer.step()
        assert steps_of(optimizer) == {4.0}


def test_written_steps_count():
    module = models.make(Net)
    given = torch.optim.AdamW(module.parameters(), lr=1e-2)
    engine = start(given, module=module)
    train(engine, 0, range(1))
    given.state[module.head.bias]["step"].fill_(7)
    train(engine, 0, range(1, 2))
    assert steps_of(given) == {8.0}


def taken_over(rank, world, stage):
    """A group whose only parameter is on one rank's side."""
    torch.set_num_threads(1)
    module = models.make(Net)
    params = list(module.parameters())
    given = torch.optim.AdamW([{"params": params[:-1]}, {"params": params[-1:]}], lr=1e-2)
    for step in range(3):
        module(batch(0, step)).backward()
        given.step()
        given.zero_grad()
    engine = start(given, stage, module=module)
    train(engine, rank, range(3, 5))
    held = [sum(t.numel() for t in state.values()) - 1 for state in given.state.values()]
    return models.bits(module), steps_of(given), sum(held) < 2 * sum(p.numel() for p in params)


def test_steps_taken_before_initialize_count_on_ranks_that_hold_nothing_of_a_group(ranks):
    base = ranks(2, taken_over, 0)
    for stage in (1, 2, 3):
        found = ranks(2, taken_over, stage)
        assert [bits for bits, _, _ in found] == [bits for bits, _, _ in base]
        assert [(steps, part) for _, steps, part in found] == [({5.0}, True)] * 2


def test_a_layout_that_changed_after_initialize_is_an_error():
    module = torch.nn.Conv2d(3, 8, 3)
    engine = start({"type": "AdamW", "params": {"lr": 1e-2}}, module=module)
    engine.backward(engine(torch.ones(1, 3, 5, 5)).sum())
    engine.step()
    module.to(memory_format=torch.channels_last)
    engine.backward(engine(torch.ones(1, 3, 5, 5)).sum())
    with pytest.raises(ValueError, match="weight has its elements in another order"):
        engine.step()


@pytest.mark.parametrize("flag", ["maximize", "amsgrad"])
def test_an_option_that_the_core_lacks_is_an_error_when_it_comes_later(flag):
    module = models.make(Net)
    given = torch.optim.Adam(module.parameters())
    engine = start(given, module=module)
    given.param_groups[0][flag] = True
    engine.backward(engine(batch(0, 0)))
    with pytest.raises(NotImplementedError, match=flag):
        engine.step()


def frozen_and_written(rank, world, name, stage):
    torch.set_num_threads(1)
    module = models.make(Net)
    engine = start(SECTIONS[name], stage, "bf16", module)
    train(engine, rank, range(2), "bf16")
    module.head.weight.requires_grad_(False)
    module.head.weight.data.fill_(3)
    train(engine, rank, range(2), "bf16")
    return bool((module.head.weight == 3).all())


@pytest.mark.parametrize("name", ["adagrad", "lamb", "rmsprop"])
def test_what_is_written_to_a_frozen_parameter_stays(ranks, name):
    for stage in (0, 1, 3):
        assert ranks(2, frozen_and_written, name, stage) == [True, True], stage


class Line(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(n))

    def forward(self):
        return self.w.float().square().sum()


def one_step(section, n, dtype):
    engine = start(section, 0, dtype, Line(n))
    engine.backward(engine())
    engine.step()
    return engine


@pytest.mark.parametrize("name", ["lion", "momentum", "rmsprop"])
def test_loading_other_shapes_or_dtypes_is_an_error_and_changes_nothing(name):
    target = one_step(SECTIONS[name], 5, "bf16")
    before = copy.deepcopy(target.optimizer.state_dict())
    for n, dtype in ((1, "bf16"), (5, "fp32")):
        with pytest.raises(ValueError, match="of w"):
            target.optimizer.load_state_dict(one_step(SECTIONS[name], n, dtype).optimizer.state_dict())
    assert str(target.optimizer.state_dict()) == str(before)


def test_loading_a_state_from_before_the_first_step_forgets_states():
    for name in ("rmsprop", "momentum"):
        module = models.make(Net)
        engine = start(SECTIONS[name], module=module)
        saved, values = copy.deepcopy(engine.optimizer.state_dict()), copy.deepcopy(module.state_dict())
        train(engine, 0, range(3))
        once = models.bits(module)
        engine.optimizer.load_state_dict(saved)
        module.load_state_dict(values)
        train(engine, 0, range(3))
        assert models.bits(module) == once


def test_states_of_a_scalar_parameter_can_be_read():
    module = Line(())
    engine = start(SECTIONS["rmsprop"], module=module)
    engine.backward(engine())
    engine.step()
    assert safe_get_full_optimizer_state(module.w, "square_avg").shape == ()


@pytest.mark.parametrize("name", ["lamb", "rmsprop"])
def test_a_destroyed_engine_goes_with_its_last_reference(name):
    """Cycles would keep modules and states of many engines until Python next collects."""
    gc.collect()
    gc.disable()
    try:
        module = models.make(Net)
        engine = start(SECTIONS[name], 0, "bf16", module)
        train(engine, 0, range(1), "bf16")
        engine.destroy()
        with pytest.raises(RuntimeError, match="destroyed"):
            engine.optimizer.step()
        gone = weakref.ref(engine)
        del engine
        assert gone() is None
    finally:
        gc.enable()


def raised_before_the_core(rank, world, how):
    """Rank 0 cannot step, and goes on; the others must not take its next step for this one."""
    torch.set_num_threads(1)
    module = models.make(Net)
    given = torch.optim.AdamW(module.parameters())
    engine = start(given, 1, module=module)
    train(engine, rank, range(1))
    state, hook = given.state, None
    if rank == 0 and how == "state":
        given.state = {module.body[0].weight: {"exp_avg": torch.zeros(99)}}
    elif rank == 0:
        hook = given.register_step_pre_hook(lambda *_: 1 / 0)
    engine.backward(engine(batch(rank, 1)))
    with pytest.raises((ValueError, ZeroDivisionError)) as error:
        engine.step()
    given.state = state
    if hook is not None:
        hook.remove()
    engine.step()
    return str(error.value), engine.global_steps, models.bits(module)


@pytest.mark.parametrize("how", ["state", "hook"])
def test_a_rank_that_raises_before_the_step_is_an_error_on_all(ranks, how):
    (first, *found), (second, *others) = ranks(2, raised_before_the_core, how)
    assert ("shape" if how == "state" else "zero") in first and "rank 0 cannot step" in second
    assert found == others and found[0] == 2
