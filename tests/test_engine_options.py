"""Options of the engine beyond stage and dtype: how gradients travel and add up, what is frozen, sizes, reports."""
import copy
import itertools
import logging
import math

import pytest
import torch

import deepspeed_c as deepspeed
from deepspeed_c import utils
from deepspeed_c.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_grad


def config(stage=0, dtype="fp32", gas=1, optimizer=None, **more):
    out = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": gas, "gradient_clipping": 0,
           "zero_optimization": {"stage": stage, "reduce_bucket_size": 2000,
                                 "stage3_param_persistence_threshold": 0},
           "optimizer": optimizer or {"type": "SGD", "params": {"lr": 0.5}}}
    if dtype != "fp32":
        out[dtype] = {"enabled": True, **({"loss_scale": 8} if dtype == "fp16" else {})}
    for key, value in more.items():
        if isinstance(value, dict):
            out.setdefault(key, {}).update(value)
        else:
            out[key] = value
    return out


def net(seed=0, width=12):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(width, 40), torch.nn.Tanh(), torch.nn.Linear(40, 5))


def batch(rank, step, micro=0, width=12):
    torch.manual_seed(1000 + 100 * rank + 10 * step + micro)
    return torch.randn(4, width)


def loss_of(engine, x):
    dtype = next(engine.module.parameters()).dtype
    return engine(x.to(dtype)).float().square().mean()


def train(rank, settings, n_steps=3, model=None):
    engine, *_ = deepspeed.initialize(model=model or net(), config=settings)
    for step in range(n_steps):
        for micro in range(engine.gradient_accumulation_steps()):
            engine.backward(loss_of(engine, batch(rank, step, micro)))
            engine.step()
    engine.destroy()  # from here on parameters are ordinary ones again, at stage 3 too
    return [p.detach().clone() for p in engine.module.parameters()]


def by_hand(world, settings, narrow=None, divide=True, n_steps=3):
    """The same training in plain torch: gradients of each rank, rounded where they travel, added in rank order."""
    module = net()
    for step in range(n_steps):
        sums = [torch.zeros_like(p) for p in module.parameters()]
        for rank in range(world):
            module.zero_grad()
            module(batch(rank, step)).square().mean().backward()
            for total, p in zip(sums, module.parameters()):
                total += p.grad.to(narrow).float() if narrow else p.grad
        with torch.no_grad():
            for total, p in zip(sums, module.parameters()):
                p -= 0.5 * total / (world if divide else 1)
    return list(module.parameters())


# ---- how gradients travel ----


def travels(rank, world, settings):
    return [v.tolist() for v in train(rank, settings)]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("more, kwargs", [
    ({"prescale_gradients": True}, {}),
    ({"gradient_predivide_factor": 4.0}, {}),
    ({"gradient_allreduce_op": "sum"}, {"divide": False}),
    ({"communication_data_type": "bf16"}, {"narrow": torch.bfloat16}),
    ({"communication_data_type": "fp16", "prescale_gradients": True}, {"narrow": torch.float16}),
    ({"communication_data_type": "fp32"}, {}),
], ids=["prescale", "predivide", "sum", "bf16", "fp16-prescale", "fp32"])
def test_gradients_travel_as_the_configuration_says(ranks, stage, more, kwargs):
    got = ranks(2, travels, config(stage, **more))
    want = by_hand(2, more, **kwargs)
    tolerance = 2e-3 if "fp16" in str(more) else 1e-6  # prescaled before it is rounded: another rounding
    for values in got:
        for a, b in zip(values, want):
            assert torch.allclose(torch.tensor(a), b, atol=tolerance, rtol=tolerance)


def stages_agree(rank, world, dtype, more):
    found = []
    for stage, overlap in (*itertools.product((0, 1, 2), (False, True)), (3, False)):
        settings = config(stage, dtype, **more)
        settings["zero_optimization"]["overlap_comm"] = overlap
        found.append(train(rank, settings))
    return [[torch.equal(a, b) for a, b in zip(found[0], other)] for other in found]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("more", [
    {"communication_data_type": "bf16"}, {"communication_data_type": "fp16", "gradient_predivide_factor": 3.0},
    {"prescale_gradients": True}, {"data_types": {"grad_accum_dtype": "MODEL"}}, {"MODEL": True}],
    ids=["bf16", "fp16-predivide", "prescale", "accum", "masters"])
def test_options_of_gradients_change_no_bit_between_stages(ranks, dtype, more):
    more = copy.deepcopy(more)
    if more.get("data_types"):
        more["data_types"]["grad_accum_dtype"] = dtype
    if more.pop("MODEL", False):
        if dtype == "fp32":
            pytest.skip("an fp32 model has no masters")
        more[dtype] = {f"{dtype}_master_weights_and_grads": True}
    for same in ranks(2, stages_agree, dtype, more):
        assert all(map(all, same))


# ---- sums over micro-steps, masters ----


def accumulate(rank, world, stage, more):
    """Gradients of 1, then 256 times 2**-9: in bf16, whose ulp at 1 is 2**-7, the small ones are lost one by one."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0)
    settings = config(stage, "bf16", gas=9, **more)
    settings["train_micro_batch_size_per_gpu"] = 1
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    for micro in range(9):
        x = torch.tensor([[1.0 if micro == 0 else 2.0**-9]], dtype=torch.bfloat16)
        engine.backward(engine(x).sum(), scale_wrt_gas=False)
        if micro == 8:
            grad = safe_get_full_grad(model.weight)
        engine.step()
    value = safe_get_full_fp32_param(model.weight).item()
    return grad.item(), value, engine._core.held(0, -1) is None


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_sums_over_micro_steps_are_fp32_unless_the_configuration_says_otherwise(ranks, stage):
    for grad, value, _ in ranks(2, accumulate, stage, {}):
        assert grad == 1 + 8 * 2.0**-9 and value == -0.5 * grad
    for grad, value, _ in ranks(2, accumulate, stage, {"data_types": {"grad_accum_dtype": "bf16"}}):
        assert grad < 1 + 4 * 2.0**-9 and value == -0.5 * grad


def test_16bit_masters_keep_no_fp32_copy(ranks):
    for _, value, no_master in ranks(2, accumulate, 1, {"bf16": {"bf16_master_weights_and_grads": True}}):
        assert no_master and value == torch.tensor(value).to(torch.bfloat16).item()


def overflows(rank, world, prescale):
    """Each rank's gradient is 98,304: more than float16 holds, and half of it is not."""
    model = torch.nn.Linear(1, 1, bias=False)
    engine, *_ = deepspeed.initialize(model=model, config=config(1, prescale_gradients=prescale,
                                                                 communication_data_type="fp16"))
    engine.backward(engine(torch.full((1, 1), 98304.0)).sum())
    engine.step()
    return engine.get_global_grad_norm()


def test_prescaling_keeps_a_gradient_inside_float16(ranks):
    assert ranks(2, overflows, True) == [98304.0] * 2
    assert not any(math.isfinite(norm) for norm in ranks(2, overflows, False))


# ---- micro-steps ----


def deferred(rank, world, stage, dtype, overlap):
    """coalesce_grad_reduction against one backward pass over the same sum of losses."""
    outs = []
    for coalesce in (False, True):
        settings = config(stage, dtype)
        settings["zero_optimization"]["overlap_comm"] = overlap
        engine, *_ = deepspeed.initialize(model=net(), config=settings)
        before = engine._core.counters()["n_settled"]
        if coalesce:
            with engine.coalesce_grad_reduction():
                engine.backward(loss_of(engine, batch(rank, 0, 0)))
                engine.backward(loss_of(engine, batch(rank, 0, 1)))
                assert engine._core.counters()["n_settled"] == before
                with pytest.raises(RuntimeError, match="coalesce_grad_reduction"):
                    engine.step()
        else:
            engine.backward(loss_of(engine, batch(rank, 0, 0)) + loss_of(engine, batch(rank, 0, 1)))
        engine.step()
        outs.append([p.detach().float() for p in engine.module.parameters()])
        engine.destroy()
    return max((a - b).abs().max().item() for a, b in zip(*outs))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage, overlap", [(0, False), (1, True), (2, False)])
def test_coalesced_backward_passes_reduce_once_at_the_end(ranks, stage, overlap, dtype):
    assert max(ranks(2, deferred, stage, dtype, overlap)) < (1e-6 if dtype == "fp32" else 1e-2)


def looked_at_while_coalescing(rank, world, stage, dtype):
    """After an earlier backward pass, what is added up inside the block counts once however often it is read."""
    torch.set_num_threads(1)
    engine, *_ = deepspeed.initialize(model=net(), config=config(stage, dtype, 3))
    weight = engine.module[0].weight
    engine.backward(loss_of(engine, batch(rank, 0)))
    engine.step()
    with engine.coalesce_grad_reduction():
        engine.backward(loss_of(engine, batch(rank, 1)))
        grads = [safe_get_full_grad(weight) for _ in range(2)]
    return [torch.equal(grads[0], grad) for grad in (grads[1], safe_get_full_grad(weight))]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_reading_gradients_while_coalescing_counts_them_once(ranks, dtype):
    for stage in (1, 2):
        assert ranks(2, looked_at_while_coalescing, stage, dtype) == [[True, True]] * 2, stage


def test_unmanaged_accumulation_makes_every_step_a_boundary_and_divides_no_loss():
    managed = {"gradient_accumulation_steps": 2, "managed_gradient_accumulation": False}
    engine, *_ = deepspeed.initialize(model=net(), config={**config(1), **managed})
    plain = net()
    for micro in range(2):
        engine.backward(loss_of(engine, batch(0, 0, micro)))
        plain(batch(0, 0, micro)).square().mean().backward()
    assert engine.is_gradient_accumulation_boundary()
    engine.step()
    assert engine.global_steps == 1 and engine.was_step_applied()
    for p, q in zip(engine.module.parameters(), plain.parameters()):
        assert torch.allclose(p, q.detach() - 0.5 * q.grad, atol=1e-6)


def test_batch_sizes_change_between_steps():
    engine, *_ = deepspeed.initialize(model=net(), config=config(0, gas=2))
    assert engine.get_batch_info() == (8, 4, 2)
    engine.backward(loss_of(engine, batch(0, 0)))
    engine.step()
    with pytest.raises(RuntimeError, match="between optimizer steps"):
        engine.set_train_batch_size(16)
    engine.backward(loss_of(engine, batch(0, 0, 1)))
    engine.step()
    engine.set_train_batch_size(12)
    assert engine.get_batch_info() == (12, 4, 3)
    boundaries = []
    for micro in range(6):
        boundaries.append(engine.is_gradient_accumulation_boundary())
        engine.backward(loss_of(engine, batch(0, 1, micro)))
        engine.step()
    assert boundaries == [False, False, True] * 2 and engine.global_steps == 3 and engine.global_samples == 8 + 24
    engine.set_train_micro_batch_size(2)
    assert engine.get_batch_info() == (6, 2, 3)
    for wrong in (7, 0, "8"):
        with pytest.raises(ValueError, match="Train batch size must be divisible by micro-batch data parallelism"):
            engine.set_train_batch_size(wrong)
    with pytest.raises(ValueError, match="micro_batch_size"):
        engine.set_train_micro_batch_size(0)


# ---- frozen, unfrozen, unused ----


def freeze(rank, world, stage):
    settings = config(stage, optimizer={"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.1}})
    engine, *_ = deepspeed.initialize(model=net(), config=settings)
    first, last = engine.module[0].weight, engine.module[2].weight
    for step in range(4):
        if step == 2:
            first.requires_grad_(False)
            kept = first.detach().clone()
        moved = last.detach().clone()
        engine.backward(loss_of(engine, batch(rank, step)))
        engine.step()
        assert not torch.equal(moved, last)
    same = torch.equal(kept, first)
    first.requires_grad_(True)
    engine.backward(loss_of(engine, batch(rank, 4)))
    engine.step()
    return same, torch.equal(kept, first)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_parameter_frozen_after_initialize_stays_and_thawed_moves_again(ranks, stage):
    assert ranks(2, freeze, stage) == [(True, False)] * 2


def freeze_on_one(rank, world):
    engine, *_ = deepspeed.initialize(model=net(), config=config(1))
    if rank == 1:
        engine.module[0].weight.requires_grad_(False)
    engine.backward(loss_of(engine, batch(rank, 0)))
    engine.step()


def test_freezing_on_one_rank_only_is_an_error_on_both(ranks):
    for outcome in ranks.outcomes(2, freeze_on_one, timeout=20):
        assert outcome.error == "ValueError" and "requires_grad" in outcome.text


def test_a_parameter_unfrozen_after_initialize_is_an_error_that_names_it():
    model = net()
    model[0].weight.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=config(0))
    engine.backward(loss_of(engine, batch(0, 0)))
    engine.step()
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"parameter 0\.weight requires a gradient now"):
        engine.backward(loss_of(engine, batch(0, 0)))


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(12, 3), torch.nn.Linear(12, 3)

    def forward(self, x, both):
        return self.a(x) + self.b(x) if both else self.a(x)


def unused(rank, world, stage, overlap):
    torch.manual_seed(0)
    settings = config(stage)
    settings["zero_optimization"] |= {"ignore_unused_parameters": False, "overlap_comm": overlap}
    engine, *_ = deepspeed.initialize(model=Branches(), config=settings)
    engine.backward(engine(batch(rank, 0), True).sum())
    engine.step()
    engine.backward(engine(batch(rank, 1), False).sum())
    with pytest.raises(ValueError, match=r"b\.weight got no gradient.*ignore_unused_parameters"):
        engine.step()
    engine.backward(engine(batch(rank, 1), True).sum())
    engine.step()
    return engine.global_steps


@pytest.mark.parametrize("stage, overlap", [(0, False), (1, True), (2, False)])
def test_an_unused_parameter_is_an_error_where_the_configuration_says_so(ranks, stage, overlap):
    assert ranks(2, unused, stage, overlap) == [2, 2]


# ---- casting ----


class Typed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(12, 3)

    def forward(self, x, extra):
        self.seen = (x.dtype, extra["mask"].dtype, extra["weights"][0].dtype, self.layer(x).dtype)
        return self.layer(x)


def test_auto_cast_makes_floating_inputs_half():
    model = Typed()
    engine, *_ = deepspeed.initialize(model=model, config=config(0, "fp16", fp16={"auto_cast": True}))
    engine(torch.randn(4, 12), extra={"mask": torch.ones(4, dtype=torch.int64), "weights": [torch.ones(1)]})
    assert model.seen == (torch.float16, torch.int64, torch.float16, torch.float16)


@pytest.mark.parametrize("name, dtype", [("bfloat16", torch.bfloat16), ("torch.float16", torch.float16)])
def test_torch_autocast_runs_forward_in_a_lower_type_over_fp32_parameters(name, dtype):
    model = Typed()
    settings = config(0, torch_autocast={"enabled": True, "dtype": name})
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    out = engine(torch.randn(4, 12), extra={"mask": torch.ones(1), "weights": [torch.ones(1)]})
    assert out.dtype == dtype and model.layer.weight.dtype == torch.float32
    assert engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == dtype
    assert engine.loss_scale() == (2.0**16 if dtype == torch.float16 else 1.0)
    engine.backward(1e-3 * out.float().sum())
    engine.step()
    assert engine.was_step_applied()


# ---- what it says ----


@pytest.fixture
def lines():
    """What goes through the logger's handlers, whatever its level."""
    logger, found = logging.getLogger("DeepSpeed"), []

    class Keep(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    handler = Keep()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def run_some(settings, n_steps=5):
    engine, *_ = deepspeed.initialize(model=net(), config=settings)
    for step in range(n_steps):
        engine.backward(loss_of(engine, batch(0, step)))
        engine.step()
    return engine


def test_nothing_is_said_unless_asked(lines):
    run_some(config(0))
    run_some(config(0, steps_per_print=math.inf))
    assert [line for line in lines if "DeepSpeed info" not in line] == []


def test_steps_per_print_gives_progress_and_speed(lines):
    run_some(config(0, steps_per_print=2))
    assert [line for line in lines if "step=" in line and "skipped" in line] == [
        "[Rank 0] step=2, skipped=0, lr=[0.5], mom=[0.0]", "[Rank 0] step=4, skipped=0, lr=[0.5], mom=[0.0]"]
    assert sum("RunningAvgSamplesPerSec=" in line and "global_step=4" in line for line in lines) == 1


def test_wall_clock_breakdown_gives_times_of_the_parts(lines):
    engine = run_some(config(0, wall_clock_breakdown=True, gas=1), 2)
    assert sum(line.startswith("[Rank 0] time (ms) | fwd_microstep: ") for line in lines) == 2
    assert sum(line.startswith("[Rank 0] time (ms) | fwd: ") for line in lines) == 2
    assert set(engine.get_wall_clock_timers()) == {"fwd", "bwd", "bwd_inner", "bwd_allreduce", "step"}
    assert run_some(config(0), 1).get_wall_clock_timers() == {}


def test_memory_breakdown_and_dump_state(lines):
    run_some(config(0, memory_breakdown=True, dump_state=True), 1)
    assert any("memory before forward: " in line for line in lines)
    assert any("state: zero_optimization" in line for line in lines)
    assert any("state: parameters = 4" in line for line in lines)


# ---- full gradients ----


def values_of(module):
    with deepspeed.zero.GatheredParameters(module.parameters()):
        return [p.detach().clone() for p in module.parameters()]


def reads_and_sets(rank, world, stage, dtype, overlap):
    settings = config(stage, dtype, gas=2)
    settings["zero_optimization"]["overlap_comm"] = overlap
    outs = []
    for look in (False, True):
        engine, *_ = deepspeed.initialize(model=net(), config=settings)
        for micro in range(2):
            engine.backward(loss_of(engine, batch(rank, 0, micro)))
            if micro == 0:
                engine.step()
        if look:
            grads = [safe_get_full_grad(p) for p in engine.module.parameters()]
            again = [safe_get_full_grad(p) for p in engine.module.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(grads, again))
        engine.step()
        outs.append(values_of(engine.module))
        engine.destroy()
    assert all(torch.equal(a, b) for a, b in zip(*outs)), "looking changed the step"
    engine, *_ = deepspeed.initialize(model=net(), config=config(stage, dtype, zero_optimization={
        "overlap_comm": overlap, "stage": stage}))
    before = safe_get_full_fp32_param(engine.module[0].weight)
    engine.backward(loss_of(engine, batch(rank, 0, 0)))
    value = torch.arange(480.0).reshape(40, 12) / 64
    safe_set_full_grad(engine.module[0].weight, value)
    assert torch.equal(safe_get_full_grad(engine.module[0].weight), value)
    engine.step()
    stepped = safe_get_full_fp32_param(engine.module[0].weight)
    assert torch.equal(stepped, before - 0.5 * value)
    return [g.tolist() for g in grads]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage, overlap", [(0, False), (0, True), (1, False), (1, True), (2, False), (3, False)])
def test_full_gradients_are_what_the_step_uses_and_can_be_replaced(ranks, stage, overlap, dtype):
    one, two = ranks(2, reads_and_sets, stage, dtype, overlap)
    assert one == two
    if dtype == "fp32":
        module = net()
        for rank in range(2):
            for micro in range(2):
                (module(batch(rank, 0, micro)).square().mean() / 4).backward()
        for got, p in zip(one, module.parameters()):
            assert torch.allclose(torch.tensor(got), p.grad, atol=1e-7)


def states(rank, world, stage, dtype, kind):
    from deepspeed_c.utils import safe_get_full_optimizer_state as get
    from deepspeed_c.utils import safe_get_local_fp32_param as local
    from deepspeed_c.utils import safe_set_full_fp32_param
    from deepspeed_c.utils import safe_set_full_optimizer_state as put
    from deepspeed_c.utils import safe_set_local_fp32_param as set_local
    settings = config(stage, dtype, optimizer={"type": kind, "params": {"lr": 0.1}})
    engine, *_ = deepspeed.initialize(model=net(), config=settings)
    engine.backward(loss_of(engine, batch(rank, 0)))
    engine.step()
    p = engine.module[0].weight
    m = get(p, "exp_avg")
    assert m.shape == (40, 12) and m.abs().sum() > 0
    put(p, m * 2, "exp_avg")
    assert torch.equal(get(p, "exp_avg"), m * 2)
    master = safe_get_full_fp32_param(p)
    safe_set_full_fp32_param(p, master + 1)
    assert torch.equal(safe_get_full_fp32_param(p), master + 1)
    assert torch.equal(values_of(engine.module)[0], (master + 1).to(p.dtype))
    with pytest.raises(ValueError, match="optim_state_key is 'exp_avgg'"):
        get(p, "exp_avgg")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        safe_set_full_fp32_param(p, torch.zeros(3))
    part = local(p)
    if part is not None:
        set_local(p, part + 1)
        assert torch.equal(local(p), part + 1)
    torch.distributed.barrier()
    assert torch.equal(safe_get_full_fp32_param(p), master + 1 + 1)
    assert safe_get_full_fp32_param(torch.nn.Parameter(torch.zeros(2))) is None
    return m.tolist(), 0 if part is None else part.numel()


@pytest.mark.parametrize("kind", ["Adam", "NAdam"])  # the core's, torch's
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_masters_and_states_by_parameter(ranks, stage, dtype, kind):
    (m0, n0), (m1, n1) = ranks(2, states, stage, dtype, kind)
    assert m0 == m1 and (n0 + n1 == 480 if stage else n0 == n1 == 480)


@pytest.mark.parametrize("dtype, kind", [("fp32", "Adam"), ("bf16", "NAdam")])
def test_masters_and_states_over_a_delegate_at_stage_3(ranks, dtype, kind):
    (m0, n0), (m1, n1) = ranks(2, states, 3, dtype, kind, env={"DSC_COMM_BACKEND": "delegate"})
    assert m0 == m1 and n0 + n1 == 480


def test_full_gradients_over_a_delegate_at_stage_3_are_those_over_shared_memory(ranks):
    over = ranks(2, reads_and_sets, 3, "fp32", False, env={"DSC_COMM_BACKEND": "delegate"})
    assert over == ranks(2, reads_and_sets, 3, "fp32", False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_by_parameter_on_one_rank_at_stage_3(dtype):
    model = net()
    model[2].bias.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=config(3, dtype, gas=2))
    p, frozen = model[0].weight, model[2].bias
    engine.backward(loss_of(engine, batch(0, 0)))
    engine.step()
    engine.backward(loss_of(engine, batch(0, 1)))
    assert p.shape == (0,) and safe_get_full_grad(p).shape == (40, 12)
    for value in (torch.ones(40, 12), torch.full((40, 12), 2.0)):
        safe_set_full_grad(p, value)
        assert torch.equal(safe_get_full_grad(p), value)
    utils.safe_set_local_grad(p, torch.full((480,), 3.0))
    utils.safe_update_full_grad_vectorized([p, frozen], lambda grad, param: grad + 1)
    assert torch.equal(safe_get_full_grad(p), torch.full((40, 12), 4.0))
    before = safe_get_full_fp32_param(p)
    engine.step()
    assert torch.equal(safe_get_full_fp32_param(p), before - 0.5 * 4)
    for kind in ("full_fp32_param", "full_grad", "local_fp32_param", "local_grad"):
        assert getattr(utils, f"safe_get_{kind}")(frozen) is None
    assert utils.safe_get_full_optimizer_state(frozen, "momentum_buffer") is None
    with pytest.raises(ValueError, match=r"no engine trains this parameter \(5,\)"):
        utils.safe_set_full_fp32_param(frozen, torch.zeros(5))
    engine.destroy()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_no_masters_with_lamb_or_with_what_torch_runs_names_both(dtype):
    for name in ("Lamb", "RMSprop"):
        with pytest.raises(NotImplementedError, match=f"{dtype}_master_weights_and_grads.*LAMB, or with"):
            run_some(config(0, dtype, optimizer={"type": name, "params": {"lr": 1e-3}},
                            **{dtype: {"enabled": True, f"{dtype}_master_weights_and_grads": True}}), 1)
