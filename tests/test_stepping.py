"""The ways in which clients step: every micro-batch, at the boundary only, and on the returned objects.

Accelerate sets the boundary and steps there; scripts and Lightning step after every micro-batch; Ray's example calls
optimizer.step(), optimizer.zero_grad() and scheduler.step() itself. All of them give the same bits.
"""
from argparse import Namespace

import models
import pytest
import torch

import deepspeed_c as deepspeed

GAS, STEPS = 2, 3
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 4, "warmup_type": "linear"}}


def every_micro_batch(engine, optimizer, scheduler, micro_batches):
    for batch in micro_batches:
        engine.backward(engine(*batch))
        engine.step()


def at_the_boundary(engine, optimizer, scheduler, micro_batches):
    for i, batch in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(is_boundary=i == GAS - 1)
        engine.backward(engine(*batch))
    engine.step()


def on_the_objects(engine, optimizer, scheduler, micro_batches):
    for batch in micro_batches:
        engine.backward(engine(*batch))
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()


STYLES = (every_micro_batch, at_the_boundary, on_the_objects)


def train(rank, stage, dtype, step):
    module = models.make()
    config = models.config(stage, dtype, GAS, scheduler=SCHEDULE)
    engine, optimizer, _, scheduler = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                                           config=config)
    rates = []
    for i in range(STEPS):
        step(engine, optimizer, scheduler, [models.batch(rank, i, micro, models.DTYPES[dtype])
                                            for micro in range(GAS)])
        rates.append(optimizer.param_groups[0]["lr"])
    result = models.bits(module), rates, engine.global_steps, engine.get_global_grad_norm(), optimizer.overflow
    engine.destroy()
    return result


def all_styles(rank, world, dtype):
    """[stage][style] of results."""
    torch.set_num_threads(1)
    return [[train(rank, stage, dtype, step) for step in STYLES] for stage in (0, 1, 2)]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_all_ways_of_stepping_give_the_same_bits_rates_and_counts(ranks, dtype):
    for stages in ranks(2, all_styles, dtype):
        for first, second, third in stages:
            assert first == second == third
            assert first[1] == [0.0, 0.005, 0.01] and first[2] == STEPS


def test_styles_can_be_mixed_and_micro_steps_go_on_counting():
    module = models.make()
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=module, model_parameters=module.parameters(), config=models.config(1, gas=GAS, scheduler=SCHEDULE))
    for i in range(2):
        on_the_objects(engine, optimizer, scheduler, [models.batch(0, i, micro) for micro in range(GAS)])
    for i in range(2):
        every_micro_batch(engine, optimizer, scheduler, [models.batch(0, 2 + i, micro) for micro in range(GAS)])
    assert engine.global_steps == 4


class LightningOptimizer:
    """As Lightning wraps an optimizer: its class becomes a subclass of both, reads fall through, writes stay here."""

    def __init__(self, optimizer, engine):
        self._optimizer, self._engine_to_step = optimizer, engine
        self.__class__ = type("Lightning" + type(optimizer).__name__, (LightningOptimizer, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self.__dict__["_optimizer"], name)

    def step(self, closure, **kwargs):
        loss = closure()
        self._engine_to_step.step(**kwargs)
        return loss


class Held(torch.nn.Module):
    """As a LightningModule: the loss comes from training_step, and the strategy puts it where forward is."""

    def __init__(self):
        super().__init__()
        self.net = models.make()

    def training_step(self, batch):
        return self.net(*batch)


def through_lightning(stage, of_torch):
    """fit() as Lightning's strategy drives it: the module, the engine, the wrapped optimizer. of_torch: the optimizer
    is an object, and a schedule of torch's comes with it that Lightning takes away and steps itself."""
    module = Held()
    config = models.config(stage, gas=GAS, gradient_clipping=0.0, zero_allow_untested_optimizer=True)
    given = schedule = None
    if of_torch:
        del config["optimizer"]
        given = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(given, step_size=1, gamma=0.5)
    engine, optimizer, _, returned = deepspeed.initialize(
        args=Namespace(device_rank=None), config=config, model=module, optimizer=given, lr_scheduler=schedule,
        model_parameters=filter(lambda p: p.requires_grad, module.parameters()), dist_init_required=False)
    assert returned is schedule and (given is None or optimizer.optimizer is given)
    engine.lr_scheduler = None
    wrapped = LightningOptimizer(optimizer, engine)
    for i in range(STEPS * GAS):
        def closure(i=i):
            original = module.forward
            module.forward = module.training_step  # the redirection: the engine must call what is there now
            loss = engine(models.batch(0, i // GAS, i % GAS))
            module.forward = original
            if i % GAS == 0:
                wrapped.zero_grad()
            engine.backward(loss)
            return loss.detach()
        assert wrapped.step(closure).ndim == 0
        if of_torch and i % GAS == GAS - 1:
            schedule.step()
    return module, engine, wrapped


def plain_lightning(of_torch):
    module = Held()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    for i in range(STEPS):
        for micro in range(GAS):
            (module.training_step(models.batch(0, i, micro)) / GAS).backward()
        for p in module.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)  # a parameter without a gradient has the gradient zero
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] *= 0.5 if of_torch else 1.0
    return module


@pytest.mark.parametrize("of_torch", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_lightnings_way_equals_plain_torch(stage, of_torch):
    deepspeed.init_distributed()
    module, engine, wrapped = through_lightning(stage, of_torch)
    assert engine.global_steps == STEPS and engine.local_rank == 0
    for got, expected in zip(module.parameters(), plain_lightning(of_torch).parameters()):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert isinstance(wrapped, torch.optim.Optimizer) and type(wrapped).__name__ == "LightningDeepSpeedOptimizer"
    dict(wrapped.state.items())  # what teardown walks over
    wrapped.zero_grad()  # with the wrapper as self
    assert all(p.grad is None for p in module.parameters())


def test_an_engine_for_validation_only_runs_forward():
    """What Lightning's validate() makes: no optimizer, no parameters."""
    deepspeed.init_distributed()
    module = torch.nn.Linear(4, 2)
    engine, optimizer, loader, scheduler = deepspeed.initialize(
        args=Namespace(device_rank=None), config={"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer":
                                                  True}, model=module, optimizer=None, lr_scheduler=None,
        model_parameters=[], dist_init_required=False)
    assert (optimizer, loader, scheduler) == (None, None, None)
    with torch.no_grad():
        assert torch.equal(engine(torch.ones(1, 4)), module(torch.ones(1, 4)))


def test_a_default_group_is_demanded_where_lightning_made_it(ranks):
    """dist_init_required=False without a group is an error that says so, in a process that never had one."""
    assert ranks(1, no_group) == ["RuntimeError"]


def no_group(rank, world):
    try:
        deepspeed.initialize(args=Namespace(device_rank=None), model=torch.nn.Linear(2, 2), dist_init_required=False,
                             config=models.config())
    except RuntimeError as error:
        assert "dist_init_required=False" in str(error)
        return type(error).__name__


def rays_example(rank, world):
    """Ray's loop: a generator of parameters, gradient_clipping a bool, devices "none", an adopted gloo group."""
    torch.distributed.init_process_group("gloo")  # what Ray's TorchTrainer does before the user's function
    torch.set_num_threads(1)
    module = models.make()
    config = models.config(2, "fp16", gradient_clipping=True, zero={
        "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 100}})
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=module, model_parameters=(p for p in module.parameters()), config=config)
    device = deepspeed.get_accelerator().device_name(engine.local_rank)
    losses = []
    for _ in range(8):
        batch = [x.to(device) for x in models.batch(rank, 0, 0, torch.float16)]
        loss = engine(*batch)
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses, engine.global_steps, models.bits(module)


def test_rays_example_trains(ranks):
    (first, steps, bits), (_, _, others) = ranks(2, rays_example)
    assert first[-1] < first[0] and steps == 8 and bits == others
