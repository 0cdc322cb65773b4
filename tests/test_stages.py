"""Contract N1: stage, overlap and bucket size change no bit."""
import hashlib
import itertools

import models
import pytest
import torch

import deepspeed_c as deepspeed

STAGES = (0, 1, 2)


def run(rank, stage, dtype, gas, overlap, bucket, n_steps=4, kind=models.Awkward):
    module = models.make(kind)
    config = models.config(stage, dtype, gas, zero={"overlap_comm": overlap, "reduce_bucket_size": bucket})
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    models.train(engine, rank, n_steps, gas, dtype)
    counters = engine._core.counters()
    result = models.bits(module), engine.get_global_grad_norm(), counters
    engine.destroy()
    return result


def matrix(rank, world, dtype, gas):
    """Runs the whole matrix in one set of ranks; returns what differed from stage 0."""
    torch.set_num_threads(1)
    base = {}
    wrong = []
    cases = [*itertools.product(STAGES, (False, True), (1e3, 5e8)), (3, False, 1e3), (3, True, 5e8)]
    for stage, overlap, bucket in cases:
        reference = 2 if gas > 1 and stage >= 2 else 0  # several micro-steps: 0 equals 1, and 2 equals 3
        if reference not in base:
            base[reference] = run(rank, reference, dtype, gas, False, 5e8)[:2]
        got = run(rank, stage, dtype, gas, overlap, bucket)[:2]
        if got != base[reference]:
            wrong.append((stage, overlap, bucket))
    return wrong, [(hash_of(b), norm) for b, norm in base.values()]


def hash_of(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world", [2, 4])
def test_stages_overlap_and_bucket_size_change_no_bit(ranks, world, dtype):
    results = ranks(world, matrix, dtype, 1, timeout=120)
    assert [wrong for wrong, _ in results] == [[]] * world
    assert len({str(r[1]) for r in results}) == 1, "ranks ended with different parameters"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world", [2, 4])
def test_three_micro_steps_change_no_bit_between_stages_0_and_1_and_between_2_and_3(ranks, world, dtype):
    results = ranks(world, matrix, dtype, 3, timeout=180)
    assert [wrong for wrong, _ in results] == [[]] * world


def micro_steps_agree_to_rounding(rank, world):
    torch.set_num_threads(1)
    norms = [run(rank, stage, "fp32", 3, False, 5e8)[1] for stage in STAGES]
    return max(norms) / min(norms) - 1


def test_stages_agree_to_rounding_with_several_micro_steps(ranks):
    assert max(ranks(2, micro_steps_agree_to_rounding)) < 1e-5


def overlap_counters(rank, world):
    torch.set_num_threads(1)
    counters = {}
    for stage, overlap, bucket in ((2, True, 5e8), (2, True, 1e3), (1, True, 5e8), (1, False, 5e8)):
        module = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=module.parameters(),
            config=models.config(stage, zero={"overlap_comm": overlap, "reduce_bucket_size": bucket}))
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 64) + rank).square().mean())
            engine.step()
        counters[stage, overlap, bucket] = engine._core.counters()
        engine.destroy()
    return counters


def total(results, key, name):
    return sum(r[key][name] for r in results)


def test_overlap_settles_most_gradient_bytes_before_backward_returns(ranks):
    results = ranks(2, overlap_counters)
    for key in ((2, True, 1e3), (2, True, 5e8), (1, True, 5e8)):
        assert 2 * total(results, key, "n_bytes_settled_in_backward") >= total(results, key, "n_bytes_settled") > 0
    assert total(results, (1, False, 5e8), "n_bytes_settled_in_backward") == 0


def test_bucket_size_changes_the_number_of_settlements(ranks):
    results = ranks(2, overlap_counters)
    assert total(results, (2, True, 1e3), "n_settled") > total(results, (2, True, 5e8), "n_settled")


def two_spaces(rank, world):
    torch.set_num_threads(1)
    found = []
    for stage, overlap in itertools.product(STAGES, (False, True)):
        module = models.make(models.MixedDtypes)
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                          config=models.config(stage, zero={"overlap_comm": overlap}))
        for step in range(3):
            torch.manual_seed(100 * rank + step)
            engine.backward(engine(torch.randn(4, 6)))
            engine.step()
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16, torch.float32}
        found.append(models.bits(module))
        engine.destroy()
    return len(set(found))


def test_a_model_of_two_dtypes_gives_equal_bits_at_every_stage(ranks):
    assert ranks(2, two_spaces) == [1, 1]


class Checkpointed(torch.nn.Module):
    """A module used twice per forward under torch's checkpointing (gradients arrive more than once)."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(12, 12)
        self.out = torch.nn.Linear(12, 3)

    def forward(self, x, reentrant):
        from torch.utils.checkpoint import checkpoint
        for _ in range(2):
            x = checkpoint(lambda y: torch.tanh(self.inner(y)), x, use_reentrant=reentrant)
        return self.out(x).float().square().mean()


def checkpointed(rank, world, reentrant, dtype):
    torch.set_num_threads(1)
    found = []
    for stage, overlap in itertools.product(STAGES, (False, True)):
        module = models.make(Checkpointed)
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                          config=models.config(stage, dtype, zero={"overlap_comm": overlap}))
        for step in range(3):
            torch.manual_seed(100 * rank + step)
            x = torch.randn(4, 12).to(models.DTYPES[dtype]).requires_grad_()
            engine.backward(engine(x, reentrant))
            engine.step()
        found.append(torch.cat([p.detach().float().flatten() for p in module.parameters()]))
        engine.destroy()
    return [(f - found[0]).abs().max().item() for f in found]


def test_module_called_twice_per_forward_stage_2_bf16_2_ranks_equals_stage_0(ranks):
    for differences in ranks(2, checkpointed, False, "bf16"):
        assert differences == [0.0] * 6


def test_gradients_that_arrive_twice_in_a_backward_are_both_counted(ranks):
    # Reentrant checkpointing runs backward inside backward; the second gradient is added a round later, so fp32
    # sums may differ in rounding.
    for differences in ranks(2, checkpointed, True, "fp32"):
        assert max(differences) < 1e-6
