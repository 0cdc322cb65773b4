"""Data in an order that is a function of (seed, epoch, position): nothing global is drawn, any rank count resumes it.

Position p of an epoch holds sample shuffle(seed, epoch)[p mod n], computed in C one by one (`csrc/shuffle.c`), so no
permutation is ever stored. Rank r of W reads positions r, r + W, ...; after k batches of b the job as a whole has
consumed positions 0 to k*b*W, so (epoch, cursor) is the whole state, on another world size too.
"""
import os
import select
import threading

from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from deepspeed_c import _core

__all__ = ["DeepSpeedDataLoader", "DistributedOrder", "RepeatingLoader", "make_loader"]

_CHUNK = 8192  # positions computed per call into C


class DistributedOrder(Sampler):
    """The samples of one rank, epoch after epoch.

    The epoch (positions rounded up to a multiple of `world_size` by wrapping around, or down with `drop_last`) goes
    round the ranks. Each new iteration is the next epoch; `set_epoch` says which one the next iteration is.
    """

    def __init__(self, n_samples, rank=0, world_size=1, seed=0, shuffle=True, drop_last=False):
        if n_samples < 1:
            raise ValueError("Training data is empty: a data loader needs at least one sample")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
        if drop_last and n_samples < world_size:
            raise ValueError(f"{n_samples} samples on {world_size} ranks with drop_last leave every rank without any")
        self.n_samples = n_samples
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0  # of the next iteration
        self.cursor = 0  # positions of that epoch that the job has already consumed

    def set_epoch(self, epoch):
        """The next iteration is this epoch, from its start."""
        self.epoch, self.cursor = epoch, 0

    def n_left(self, cursor=0):
        """Samples of this rank in an epoch from `cursor` on."""
        left = max(0, self.n_samples - cursor)
        return left // self.world_size if self.drop_last else -(-left // self.world_size)

    def __len__(self):
        """Samples of this rank in a whole epoch."""
        return self.n_left()

    def __iter__(self):
        epoch, cursor = self.epoch, self.cursor
        self.epoch, self.cursor = epoch + 1, 0
        return self._samples(epoch, cursor)

    def _samples(self, epoch, cursor):
        count, start = self.n_left(cursor), cursor + self.rank
        for k in range(0, count, _CHUNK):
            first, n = start + k * self.world_size, min(_CHUNK, count - k)
            if self.shuffle:
                yield from _core.shuffle(_as_uint64(self.seed), _as_uint64(epoch), self.n_samples, first,
                                         self.world_size, n).tolist()
            else:
                yield from (p % self.n_samples for p in range(first, first + n * self.world_size, self.world_size))


class _Epoch:
    """One epoch of an order, from a position on."""

    def __init__(self, order, epoch, cursor):
        self._order, self._epoch, self._cursor = order, epoch, cursor

    def __iter__(self):
        return self._order._samples(self._epoch, self._cursor)

    def __len__(self):
        return self._order.n_left(self._cursor)


class DeepSpeedDataLoader(DataLoader):
    """A torch DataLoader with an (epoch, cursor) and a generator of its own.

    torch's loader draws the workers' base seed from the global generator unless it is given another; ours is set anew
    for each iteration from (seed, epoch, rank), so that a loader neither changes nor depends on the script's draws.
    """

    def __init__(self, dataset, *, seed, rank, **kwargs):
        super().__init__(dataset, generator=Generator(), **kwargs)
        self._seed, self._rank = seed, rank
        self.epoch = 0  # the one in progress, or the next if none is
        self.cursor = 0  # positions of it that the job has consumed
        self._next_epoch = 0  # where no order of ours counts epochs

    def set_epoch(self, epoch):
        """The next iteration is this epoch, from its start."""
        self.epoch, self.cursor, self._next_epoch = epoch, 0, epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self):
        order = self.sampler if isinstance(self.sampler, DistributedOrder) else None
        if order is not None:
            self.epoch, self.cursor = order.epoch, order.cursor
        else:
            self.epoch, self.cursor = self._next_epoch, 0
            self._next_epoch += 1
        self.generator.manual_seed(_workers_seed(self._seed, self.epoch, self._rank))
        if order is None:
            return _Consumed(self, super().__iter__(), order)
        # torch opens a sampler at the first batch; this iteration is of this epoch whatever comes until then.
        order.epoch, order.cursor = self.epoch + 1, 0
        mine, self.__dict__["batch_sampler"] = self.batch_sampler, BatchSampler(
            _Epoch(order, self.epoch, self.cursor), self.batch_size, self.drop_last)
        try:
            return _Consumed(self, super().__iter__(), order)
        finally:
            self.__dict__["batch_sampler"] = mine

    def state_dict(self):
        """{'epoch', 'cursor'}: what the job has consumed, equal on all ranks after the same number of batches."""
        self._require_order("state_dict")
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state):
        """The next iteration goes on where `state` was taken, whatever the world size was there."""
        order = self._require_order("load_state_dict")
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        if self._n_batches(order.n_left(self.cursor)) == 0:
            self.epoch, self.cursor = self.epoch + 1, 0
        order.epoch, order.cursor = self.epoch, self.cursor

    def _require_order(self, what):
        if not isinstance(self.sampler, DistributedOrder):
            raise NotImplementedError(f"{what} of a data loader with a sampler or an IterableDataset of the user's is "
                                      "not there yet")
        return self.sampler

    def _n_batches(self, n_samples):
        return n_samples // self.batch_size if self.drop_last else -(-n_samples // self.batch_size)


class _Consumed:
    """Iterates a loader and moves its cursor when a batch is handed over (workers fetch ahead of that)."""

    def __init__(self, loader, batches, order):
        self._loader, self._batches = loader, batches
        self._epoch = loader.epoch
        self._per_batch = loader.batch_size * order.world_size if order is not None else 1
        self._end = loader.cursor + loader._n_batches(order.n_left(loader.cursor)) * self._per_batch \
            if order is not None else None
        self._cursor = loader.cursor

    def __iter__(self):
        return self

    def __len__(self):
        return len(self._batches)

    def __next__(self):
        try:
            batch = next(self._batches)
        except StopIteration:
            self._move(None)
            raise
        self._move(self._cursor + self._per_batch)
        return batch

    def _move(self, cursor):
        if cursor is None or cursor == self._end:
            self._loader.epoch, self._loader.cursor = self._epoch + 1, 0
        else:
            self._loader.epoch, self._loader.cursor = self._epoch, cursor
        self._cursor = cursor if cursor is not None else self._cursor


class RepeatingLoader:
    """Iterates a loader for ever, beginning anew when it is exhausted; ends only if the loader is empty."""

    def __init__(self, loader):
        self.loader = loader
        self._batches = None

    def __iter__(self):
        return self

    def __next__(self):
        if self._batches is None:
            self._batches = iter(self.loader)
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self.loader)
            return next(self._batches)


def make_loader(dataset, batch_size, rank=0, world_size=1, seed=0, collate_fn=None, drop_last=False, num_workers=0,
                data_sampler=None, shuffle=True, pin_memory=False):
    """A DeepSpeedDataLoader over this rank's part of `dataset`, `batch_size` samples per batch and rank.

    A map-style dataset (`__getitem__` and `__len__`) is read in a DistributedOrder, or by `data_sampler` where given;
    an IterableDataset is read as it is, so dividing it among ranks is its own affair. Anything else is a ValueError.
    """
    if isinstance(dataset, IterableDataset):
        if data_sampler is not None:
            raise ValueError("data_sampler: an IterableDataset has an order of its own and takes no sampler")
        sampler = None
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        sampler = data_sampler
        if sampler is None:
            sampler = DistributedOrder(len(dataset), rank, world_size, seed, shuffle, drop_last)
    else:
        raise ValueError(f"Training data must be a torch Dataset, got {type(dataset).__name__}")
    return DeepSpeedDataLoader(dataset, seed=seed, rank=rank, batch_size=batch_size, sampler=sampler,
                               collate_fn=collate_fn, drop_last=drop_last, num_workers=num_workers,
                               worker_init_fn=_end_with_rank if num_workers else None, pin_memory=pin_memory)


def _end_with_rank(worker):
    """In a loader's worker: ends it the moment its rank dies (torch's own watch looks every 5 seconds)."""
    parent = os.pidfd_open(os.getppid())

    def watch():
        select.select([parent], [], [])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_uint64(number):
    return int(number) & 0xFFFFFFFFFFFFFFFF


def _workers_seed(seed, epoch, rank):
    """A 63-bit base seed: one position of a shuffle far larger than any data set."""
    return int(_core.shuffle(_as_uint64(seed), _as_uint64(epoch), 2**63 - 1, rank, 1, 1)[0])
