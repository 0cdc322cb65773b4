"""Data order: what each rank sees, that nothing global is drawn, and resuming on another world size."""
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_c import _core
from deepspeed_c.dataloader import DistributedOrder, RepeatingLoader, make_loader


class Samples:
    """Sample i is the number i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(10))


class RandomSamples(Samples):
    """Draws from the worker's generator, as augmentation does."""

    def __getitem__(self, i):
        return torch.randint(1 << 60, ())


def job(loaders):
    """The samples of all ranks in the order of consumption, batch by batch."""
    return [sample for batches in zip(*loaders) for batch in batches for sample in batch.tolist()]


def loaders_of(world, n=103, batch=4, **kwargs):
    return [make_loader(Samples(n), batch, rank, world, **kwargs) for rank in range(world)]


@pytest.mark.parametrize("make, text", [
    (lambda: make_loader(5, 2), "Training data must be a torch Dataset, got int"),
    (lambda: make_loader(iter([1]), 2), "Training data must be a torch Dataset"),
    (lambda: make_loader([], 2), "Training data is empty"),
    (lambda: make_loader(Samples(3), 2, rank=2, world_size=2), "rank must be in"),
    (lambda: make_loader(Samples(3), 2, world_size=4, drop_last=True), "leave every rank without any"),
    (lambda: make_loader(Stream(), 2, data_sampler=[1]), "takes no sampler"),
    (lambda: _core.shuffle(0, 0, 0, 0, 1, 1), "no samples"),
    (lambda: _core.shuffle(0, 0, 5, 0, 1, -1), "count must not be negative"),
])
def test_bad_arguments_are_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_negative_key_is_refused_by_the_core_and_accepted_as_a_seed():
    with pytest.raises(OverflowError):
        _core.shuffle(-1, 0, 5, 0, 1, 5)
    assert sorted(DistributedOrder(9, seed=-1)) == list(range(9))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 7), st.integers(0, 2**70), st.booleans(), st.booleans())
def test_ranks_cover_every_sample_evenly(n, world, seed, shuffle, drop_last):
    if drop_last and n < world:
        return
    orders = [DistributedOrder(n, rank, world, seed, shuffle, drop_last) for rank in range(world)]
    parts = [list(order) for order in orders]
    assert {len(part) for part in parts} == {len(orders[0])} == {n // world if drop_last else -(-n // world)}
    seen = [part[k] for k in range(len(parts[0])) for part in parts]
    if drop_last:
        assert len(set(seen)) == len(seen)
    else:  # the padding starts over
        assert sorted(seen[:n]) == list(range(n)) and seen[n:] == [seen[k % n] for k in range(n, len(seen))]
    if not shuffle:
        assert seen == [p % n for p in range(len(seen))]


def test_order_is_that_of_the_core_beyond_one_chunk():
    n = 30011
    assert list(DistributedOrder(n, 1, 2, seed=5)) == _core.shuffle(5, 0, n, 1, 2, n // 2 + 1).tolist()


def test_world_size_changes_who_reads_a_sample_but_not_when():
    assert job(loaders_of(1, n=96, batch=12)) == list(DistributedOrder(96))
    for world in (2, 3, 4):
        parts = [list(DistributedOrder(96, rank, world)) for rank in range(world)]
        assert [s for row in zip(*parts) for s in row] == list(DistributedOrder(96))


def test_epochs_differ_and_advance_by_themselves():
    order = DistributedOrder(50)
    first, second = list(order), list(order)
    assert first != second and sorted(first) == sorted(second)
    order.set_epoch(0)
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) == second
    assert list(DistributedOrder(50, seed=1)) != first


def test_loader_has_a_length_and_goes_on_to_the_next_epoch():
    loader = make_loader(Samples(10), 4)
    assert len(loader) == 3 == len(iter(loader))
    loader.set_epoch(0)
    epochs = [torch.cat(list(loader)).tolist() for _ in range(2)]
    assert epochs == [list(DistributedOrder(10)), _core.shuffle(0, 1, 10, 0, 1, 10).tolist()]
    assert len(make_loader(Samples(10), 4, drop_last=True)) == 2
    assert len(make_loader(Samples(10), 4, world_size=2)) == 2


def test_user_sampler_iterable_and_collate_are_used_as_they_are():
    assert torch.cat(list(make_loader(Samples(9), 2, data_sampler=[3, 1, 2]))).tolist() == [3, 1, 2]
    assert torch.cat(list(make_loader(Stream(), 4))).tolist() == list(range(10))
    assert list(make_loader(Samples(4), 2, shuffle=False, collate_fn=tuple)) == [(0, 1), (2, 3)]


def test_whole_batches_are_fetched_at_once_where_the_dataset_can():
    class Fast(Samples):
        def __getitems__(self, indices):
            return [-i for i in indices]

    assert torch.cat(list(make_loader(Fast(5), 2, shuffle=False))).tolist() == [0, -1, -2, -3, -4]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dataset", [Samples(20), Stream()])
def test_nothing_is_drawn_from_global_generators(num_workers, dataset):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for _ in range(2):
        list(make_loader(dataset, 4, num_workers=num_workers))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_workers_draws_depend_on_seed_epoch_and_rank_only():
    def draws(seed=0, rank=0, n_epochs=1, noise=0):
        torch.manual_seed(noise)
        loader = make_loader(RandomSamples(8), 2, rank, 2, seed=seed, num_workers=2)
        return [torch.cat(list(loader)).tolist() for _ in range(n_epochs)][-1]

    assert draws(noise=1) == draws(noise=2)
    assert len({tuple(draws()), tuple(draws(seed=1)), tuple(draws(rank=1)), tuple(draws(n_epochs=2))}) == 4


@pytest.mark.parametrize("n_done, old, new", [(0, 2, 3), (1, 1, 2), (5, 2, 1), (3, 4, 2), (2, 3, 5), (12, 2, 4)])
def test_resuming_on_another_world_size_loses_and_repeats_nothing(n_done, old, new):
    loaders = loaders_of(old, n=96, batch=4)
    iterators = [iter(loader) for loader in loaders]
    seen = [s for _ in range(n_done) for it in iterators for s in next(it).tolist()]
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    resumed = loaders_of(new, n=96, batch=4)
    for loader in resumed:
        loader.load_state_dict(states[0])
    if states[0]["epoch"] == 0:
        rest = [s for batches in map(list, resumed) for batch in batches for s in batch.tolist()]
        n_padded = -(-(96 - len(seen)) // new) * new - (96 - len(seen))
        assert len(seen) + len(rest) - n_padded == 96
        assert set(seen) | set(rest) == set(range(96))
    else:
        assert n_done * old * 4 == 96
    fresh = loaders_of(new, n=96, batch=4)
    for loader in fresh:
        loader.set_epoch(1)
    assert job(resumed) == job(fresh)


def test_state_counts_what_was_handed_over_not_what_workers_fetched():
    loader = make_loader(Samples(64), 4, world_size=2, num_workers=2)
    it = iter(loader)
    next(it)
    assert loader.state_dict() == {"epoch": 0, "cursor": 8}
    del it
    assert loader.state_dict() == {"epoch": 0, "cursor": 8}


def test_state_after_the_last_batch_is_the_next_epoch():
    loader = make_loader(Samples(10), 4)
    it = iter(loader)
    next(it), next(it), next(it)
    assert loader.state_dict() == {"epoch": 1, "cursor": 0}
    assert next(it, None) is None
    assert loader.state_dict() == {"epoch": 1, "cursor": 0}


def test_state_of_a_foreign_order_is_an_error_that_says_so():
    with pytest.raises(NotImplementedError, match="not there yet"):
        make_loader(Samples(9), 2, data_sampler=[3, 1, 2]).state_dict()


def test_repeating_loader_goes_on_for_ever_with_new_orders():
    repeating = RepeatingLoader(make_loader(Samples(6), 3))
    assert iter(repeating) is repeating
    epochs = [torch.cat([next(repeating), next(repeating)]).tolist() for _ in range(3)]
    assert [sorted(e) for e in epochs] == [list(range(6))] * 3
    assert len({tuple(e) for e in epochs}) == 3
    assert list(RepeatingLoader([])) == []


def test_core_imports_numpy_only_when_an_array_is_asked_for():
    code = ("import sys, importlib.util as u; "
            f"spec = u.spec_from_file_location('deepspeed_c._core', {_core.__file__!r}); "
            "core = u.module_from_spec(spec); spec.loader.exec_module(core); "
            "assert 'numpy' not in sys.modules; core.shuffle(0, 0, 3, 0, 1, 3); assert 'numpy' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_an_iteration_is_of_the_epoch_in_which_it_was_made():
    loader = make_loader(torch.utils.data.TensorDataset(torch.arange(10)), 2, seed=3)
    first, second = iter(loader), iter(loader)
    later = [x.tolist() for (x,) in second]
    assert loader.state_dict()["epoch"] in (1, 2)
    earlier = [x.tolist() for (x,) in first]
    expected = [list(DistributedOrder(10, seed=3)._samples(epoch, 0)) for epoch in (0, 1)]
    assert [sum(earlier, []), sum(later, [])] == expected
