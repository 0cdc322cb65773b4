"""Contract N3: on one rank in fp32 the result is plain PyTorch's; several ranks equal one with the whole batch."""
import models
import pytest
import torch

import deepspeed_c as deepspeed


def plain(module, n_steps, gas, make_optimizer, clip=0.5, scheduler=None):
    optimizer = make_optimizer([p for p in module.parameters() if p.requires_grad])
    schedule = scheduler(optimizer) if scheduler else None
    for step in range(n_steps):
        for micro in range(gas):
            (module(*models.batch(0, step, micro)) / gas).backward()
        for p in module.parameters():  # a parameter without a gradient counts as one with zeros
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
    return norm.item()


OPTIMIZERS = {
    "AdamW": ({"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.8, 0.99], "eps": 1e-6}},
              lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6)),
    "Adam is decoupled by default": ({"type": "Adam", "params": {"lr": 1e-2, "weight_decay": 0.1}},
                                     lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1)),
    "Adam with L2": ({"type": "Adam", "params": {"lr": 1e-2, "weight_decay": 0.1, "adam_w_mode": False}},
                     lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1)),
    "SGD": ({"type": "SGD", "params": {"lr": 0.1}}, lambda ps: torch.optim.SGD(ps, lr=0.1)),
    "SGD with momentum": ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01,
                                                     "dampening": 0.2}},
                          lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.2)),
    "SGD with Nesterov": ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
                          lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True)),
}


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_rank_equals_plain_torch(ranks, name, gas):
    assert ranks(1, one_rank_difference, name, gas)[0] < 3e-6


def one_rank_difference(rank, world, name, gas):
    section, make = OPTIMIZERS[name]
    ours, theirs = models.make(), models.make()
    engine, *_ = deepspeed.initialize(model=ours, model_parameters=ours.parameters(),
                                      config=models.config(0, gas=gas, optimizer=section))
    models.train(engine, 0, 5, gas)
    norm = plain(theirs, 5, gas, make)
    assert abs(engine.get_global_grad_norm() / norm - 1) < 1e-5
    return max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters()) if a.numel())


def ranks_against_whole_batch(rank, world, stage):
    """Equal micro-batches on W ranks, against one process that averages W losses."""
    torch.set_num_threads(1)
    ours = models.make(models.MixedDtypes).float()
    engine, *_ = deepspeed.initialize(model=ours, model_parameters=ours.parameters(), config=models.config(stage))
    theirs = models.make(models.MixedDtypes).float()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        data = [torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(world)]
        engine.backward(ours_loss(engine, data[rank]))
        engine.step()
        (sum(ours_loss(theirs, x) for x in data) / world).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters()))


def ours_loss(module, x):
    inner = getattr(module, "module", module)
    return inner.high(torch.tanh(inner.low(x))).square().mean()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process_with_the_whole_batch(ranks, world, stage):
    assert max(ranks(world, ranks_against_whole_batch, stage)) < 2e-6


def groups_and_schedule(rank, world):

    def groups(module):
        return [{"params": list(module.twice.parameters()), "lr": 5e-3, "weight_decay": 0.0},
                {"params": [p for n, p in module.named_parameters() if not n.startswith("twice.")]}]

    ours, theirs = models.make(), models.make()
    engine, optimizer, _, schedule = deepspeed.initialize(
        model=ours, model_parameters=groups(ours), config=models.config(0),
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.1))
    make = lambda _: torch.optim.AdamW(  # noqa: E731
        [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups(theirs)], lr=1e-2,
        weight_decay=0.1)
    models.train(engine, 0, 5)
    plain(theirs, 5, 1, make, scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.1))
    assert [round(g["lr"], 10) for g in optimizer.param_groups] == [5e-5, 1e-4]
    return max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters()) if a.numel())


def test_groups_with_their_own_rates_and_a_torch_schedule_equal_torch(ranks):
    assert ranks(1, groups_and_schedule)[0] < 3e-6


def trains_to(rank, world, dtype, stage):
    torch.set_num_threads(1)
    module = models.make()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                      config=models.config(stage, dtype))
    images, tokens = models.batch(0, 0, 0, models.DTYPES[dtype])
    losses = []
    for _ in range(40):
        loss = engine(images, tokens)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_loss_falls_in_every_dtype(ranks, dtype):
    for first, last in ranks(2, trains_to, dtype, 1):
        assert last < 0.25 * first
