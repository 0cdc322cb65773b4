"""Contracts N4 to N6, loss scale, skips, counters, edits from outside: numbers that nobody should have to doubt."""
import logging

import models
import pytest
import torch
import torch.nn as nn

import deepspeed_c as deepspeed


def one_rank(config, module=None, **more):
    module = module or models.make(models.MixedDtypes).float()
    engine, optimizer, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config,
                                                 **more)
    return engine, module, optimizer


@pytest.fixture
def log(caplog):
    """What the DeepSpeed logger says (it does not propagate)."""
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


class Scalar(nn.Module):
    """loss = w * x: the gradient is x itself."""

    def __init__(self, n=1):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return (self.w * x).sum()


SGD = {"type": "SGD", "params": {"lr": 1.0}}


def scalar(**config):
    base = {"train_micro_batch_size_per_gpu": 1, "optimizer": SGD, "gradient_clipping": 0, **config}
    return one_rank(base, Scalar())


def step(engine, x, dtype=torch.float32):
    loss = engine(torch.tensor([x], dtype=dtype))
    engine.backward(loss)
    engine.step()


def test_sixteen_bit_gradients_accumulate_in_fp32():
    # 256 + 1 is not a bf16 number: torch's own .grad would lose every 1.
    engine, module, _ = scalar(bf16={"enabled": True}, gradient_accumulation_steps=5)
    for x in (256.0, 1.0, 1.0, 1.0, 1.0):
        step(engine, x, torch.bfloat16)
    assert engine.get_global_grad_norm() * 5 == pytest.approx(260.0, rel=1e-3)  # bf16 sums would stay at 256


def test_two_losses_in_a_step_accumulate_in_fp32():
    engine, module, _ = scalar(bf16={"enabled": True})
    for x in (256.0, 1.0, 1.0, 1.0):
        engine.backward(engine(torch.tensor([x], dtype=torch.bfloat16)))
    engine.step()
    assert engine.get_global_grad_norm() == pytest.approx(259.0)


@pytest.mark.parametrize("through", ["engine", "optimizer"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_zero_grad_drops_what_micro_steps_added_up(dtype, through):
    section = {"bf16": {"enabled": True}} if dtype == "bf16" else {}
    engine, module, optimizer = scalar(gradient_accumulation_steps=3, **section)
    for i, x in enumerate((64.0, 1.0, 1.0)):
        if i == 1:
            (engine if through == "engine" else optimizer).zero_grad()
        step(engine, x, models.DTYPES[dtype])
    assert engine.get_global_grad_norm() * 3 == pytest.approx(2.0, rel=1e-2)


def test_loss_scale_is_applied_and_removed_at_every_stage():
    for stage in (0, 1, 2):
        engine, module, _ = scalar(fp16={"enabled": True, "loss_scale": 128}, zero_optimization={"stage": stage})
        step(engine, 0.5, torch.float16)
        assert module.w.item() == -0.5


def test_gradients_are_unscaled_with_the_scale_they_were_made_with():
    # Window 1: the scale doubles after every clean step but the first; each update must be x all the same.
    engine, module, optimizer = scalar(fp16={"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1})
    scales = []
    for _ in range(5):
        before = module.w.item()
        step(engine, 0.5, torch.float16)
        scales.append(optimizer.loss_scale)
        assert before - module.w.item() == 0.5
    assert scales == [16.0, 32.0, 64.0, 128.0, 256.0]


def test_overflow_skips_halves_and_counts(log):
    engine, module, optimizer = scalar(fp16={"enabled": True, "initial_scale_power": 16, "hysteresis": 1})
    step(engine, 2.0, torch.float16)  # 2 * 65536 is not an fp16 number
    assert (engine.global_steps, engine.skipped_steps, engine.global_samples) == (1, 1, 1)
    assert optimizer.overflow and not engine.was_step_applied()
    assert module.w.item() == 0.0 and optimizer.loss_scale == 32768.0
    assert "skipped" in log.text and "loss scale 65536, next 32768" in log.text and "w" in log.text


def test_overflow_at_the_minimum_scale_is_an_error_that_says_what_to_do():
    engine, *_ = scalar(fp16={"enabled": True, "initial_scale_power": 0, "hysteresis": 1})
    with pytest.raises(RuntimeError, match="minimum"):
        step(engine, float("inf"), torch.float16)


def test_all_inf_gradient_under_bf16_is_skipped_and_reported(log):
    engine, module, _ = scalar(bf16={"enabled": True})
    step(engine, float("inf"), torch.bfloat16)
    assert engine.skipped_steps == 1 and module.w.item() == 0.0
    assert "element 0, on rank 0, in backward pass 1" in log.text


def test_all_zero_gradient_steps():
    engine, module, _ = scalar(bf16={"enabled": True})
    step(engine, 0.0, torch.bfloat16)
    assert engine.get_global_grad_norm() == 0.0 and engine.skipped_steps == 0 and engine.was_step_applied()


def test_nonfinite_gradient_in_fp32_is_reported_not_skipped(log):
    engine, module, _ = scalar()
    step(engine, float("nan"))
    assert engine.skipped_steps == 0 and module.w.isnan().all()
    assert "used a non-finite gradient" in log.text


def test_nonfinite_gradient_in_fp32_is_skipped_where_asked():
    engine, module, _ = scalar(fp32={"check_grad_overflow": True})
    step(engine, float("nan"))
    assert engine.skipped_steps == 1 and module.w.item() == 0.0


def test_the_micro_step_where_a_nonfinite_gradient_began_is_named(log):
    engine, *_ = scalar(gradient_accumulation_steps=3)
    for x in (1.0, float("inf"), 1.0):
        step(engine, x)
    assert "in backward pass 2" in log.text


def test_skipped_step_does_not_advance_the_schedule_or_the_optimizer():
    engine, module, optimizer = scalar(
        bf16={"enabled": True},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 1.0}})
    step(engine, 1.0, torch.bfloat16)
    lr = engine.get_lr()
    step(engine, float("inf"), torch.bfloat16)
    assert engine.get_lr() == lr and engine.global_steps == 2


def test_rates_written_into_param_groups_are_used():
    engine, module, optimizer = scalar()
    optimizer.param_groups[0]["lr"] = 0.25
    step(engine, 1.0)
    assert module.w.item() == -0.25
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    step(engine, 1.0)
    assert module.w.item() == -0.75


def test_a_negative_rate_is_an_error_and_nothing_changes():
    engine, module, optimizer = scalar()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr is -1.*allowed"):
        step(engine, 1.0)
    assert module.w.item() == 0.0 and engine.global_steps == 0


@pytest.mark.parametrize("write", [
    lambda p: p.data.mul_(2), lambda p: p.data.copy_(p.data * 2), lambda p: setattr(p, "data", p.data * 2),
    lambda p: torch.no_grad()(lambda: p.mul_(2))()], ids=["data.mul_", "data.copy_", "data =", "no_grad"])
def test_edits_of_sixteen_bit_parameters_reach_the_masters(write, log):
    engine, module, _ = scalar(bf16={"enabled": True})
    step(engine, 1.0, torch.bfloat16)
    write(module.w)
    assert module.w.item() == -2.0
    step(engine, 1.0, torch.bfloat16)
    assert module.w.item() == -3.0
    assert "changed outside the engine" in log.text


def test_a_float32_models_grad_counts_as_it_is_at_the_boundary():
    engine, module, _ = scalar()
    engine.backward(engine(torch.tensor([1.0])))
    module.w.grad.mul_(0.5)
    engine.step()
    assert module.w.item() == -0.5 and module.w.grad is None


def test_the_norm_is_of_unscaled_gradients_before_clipping():
    engine, module, _ = scalar(gradient_clipping=0.5, fp16={"enabled": True, "loss_scale": 64})
    assert engine.get_global_grad_norm() is None
    step(engine, 4.0, torch.float16)
    assert engine.get_global_grad_norm() == 4.0
    assert module.w.item() == pytest.approx(-0.5, rel=1e-3)


def test_gradient_clipping_is_on_by_default():
    engine, module, _ = one_rank({"train_batch_size": 1, "optimizer": SGD}, Scalar())
    step(engine, 4.0)
    assert module.w.item() == pytest.approx(-1.0, rel=1e-5)


def test_the_engine_draws_nothing_from_torchs_generators():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data = torch.utils.data.TensorDataset(torch.ones(12, 1))
    module = Scalar()
    after_model = torch.get_rng_state()
    engine, _, loader, _ = deepspeed.initialize(
        model=module, model_parameters=module.parameters(), training_data=data,
        config={"train_batch_size": 3, "optimizer": SGD})
    for (x,) in loader:
        engine.backward(engine(x))
        engine.step()
    assert torch.equal(torch.get_rng_state(), after_model) and torch.equal(before, after_model)


def test_two_engines_in_a_process_do_not_meet():
    a, ma, _ = scalar()
    b, mb, _ = scalar(bf16={"enabled": True})
    step(a, 1.0)
    step(b, 2.0, torch.bfloat16)
    step(a, 1.0)
    assert (ma.w.item(), mb.w.item()) == (-2.0, -2.0)
    a.destroy()
    step(b, 2.0, torch.bfloat16)
    assert mb.w.item() == -4.0


def test_initialize_twice_on_the_same_module_goes_on_with_the_new_engine():
    a, module, _ = scalar()
    step(a, 1.0)
    b, _, _ = one_rank({"train_batch_size": 1, "optimizer": SGD, "gradient_clipping": 0}, module)
    step(b, 1.0)
    assert module.w.item() == -2.0


def buffers(rank, world):
    module = models.make()
    deepspeed.initialize(model=module, model_parameters=module.parameters(), config=models.config(0, "bf16"))
    assert module.norm.running_mean.dtype == torch.bfloat16  # batch norm has parameters: its buffers follow
    assert module.norm.num_batches_tracked.dtype == torch.int64
    assert module.table.angles.dtype == torch.float32
    assert module.frozen.weight.dtype == torch.bfloat16
    return True


def test_fp32_buffers_stay_fp32_in_modules_without_parameters(ranks):
    assert ranks(1, buffers) == [True]


def test_frozen_and_unused_parameters_stay_as_they_are():
    module = models.make()
    frozen = module.frozen.weight.clone()
    engine, *_ = one_rank(models.config(1, optimizer={"type": "AdamW", "params": {"weight_decay": 0.0}}), module)
    unused = module.unused.weight.clone()
    models.train(engine, 0, 3)
    assert torch.equal(module.frozen.weight, frozen) and torch.equal(module.unused.weight, unused)


def test_masters_and_states_can_be_looked_at():
    engine, module, _ = one_rank({"train_batch_size": 1, "gradient_clipping": 0, "bf16": {"enabled": True},
                                  "optimizer": {"type": "Adam", "params": {"lr": 0.5}}}, Scalar(3))
    engine.backward(engine(torch.tensor([1.0, 2.0, -4.0], dtype=torch.bfloat16)))
    engine.step()
    begins, held = zip(*(engine._core.held(0, which) for which in (-1, 0, 1)))
    master, first, second = map(torch.utils.dlpack.from_dlpack, held)
    assert begins == (0, 0, 0) and master.dtype == torch.float32
    assert torch.equal(master.to(torch.bfloat16), module.w.detach())
    assert first.tolist() == pytest.approx([0.1, 0.2, -0.4])
    assert second.tolist() == pytest.approx([0.001, 0.004, 0.016])
    with pytest.raises(IndexError, match="allowed"):
        engine._core.held(1, 0)


def test_a_plain_backward_with_a_loss_scale_is_an_error_that_says_what_to_call():
    engine, module, _ = scalar(fp16={"enabled": True, "loss_scale": 128})
    engine(torch.tensor([1.0], dtype=torch.float16)).backward()
    with pytest.raises(RuntimeError, match="Loss scaling is required.*engine.backward"):
        engine.step()
    module.w.grad = None
    engine.scale(engine(torch.tensor([1.0], dtype=torch.float16))).backward()
    engine.step()
    assert module.w.item() == -1.0
