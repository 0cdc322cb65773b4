"""Parameters where ranks share no memory: each rank keeps a part, and a fetch gathers them, ahead of use where it can.

What is gathered when is csrc/fetch.h's decision; here it happens: a parameter's whole tensor has storage while it is
gathered and none while it is not, so that views which autograd saved see the values again and keep no memory alive.
Invariant: all ranks make the same calls in the same order; what differs (a module, a parameter, a cut) is a CommError
on every rank that names both sides, before any value has moved.
"""
import weakref

import torch
from torch.utils.dlpack import from_dlpack

from ... import _core
from ...model import flat
from .home import Home
from .parameter import OUTSIDE, make, zeros

_BATCH = 1 << 20  # elements after which an operation is long enough: who waits for its first waits for all of it


class _Slot:
    """Where a parameter is. full: the whole tensor, with storage or without. part: this rank's elements
    [cut[rank], cut[rank + 1]), in the order of memory. work: the gathering that is under way, or None."""

    __slots__ = ("full", "n_bytes", "part", "cut", "work", "param")

    def __init__(self, p, full):
        self.full, self.n_bytes = full, full.untyped_storage().nbytes()
        self.part = self.cut = self.work = None
        self.param = weakref.ref(p)

    def wait(self):
        if self.work is not None:
            self.work.wait()
            self.work = None

    def resize(self, n_bytes):
        """Gives the whole tensor its memory, or takes it. A storage that was lent to NumPy stays as it is, with the
        array; the tensor gets another."""
        storage = self.full.untyped_storage()
        if storage.nbytes() == n_bytes:
            return
        if not storage.resizable():
            storage = torch.UntypedStorage(self.n_bytes, device="cpu")
            self.full.set_(storage, 0, self.full.shape, self.full.stride())
        storage.resize_(n_bytes)

    def end(self):
        """Like wait(), for who does not need the values: a gathering that failed is over too, and every later one fails
        as it did."""
        try:
            self.wait()
        except Exception:
            if not self.work.done():
                raise
            self.work = None

    def part_of_whole(self, rank, cut):
        """(self, cut, the values of a rank's part of a whole that is here). cut: list of size + 1."""
        return self, cut, flat(self.full)[cut[rank]:cut[rank + 1]]


class RemoteHome(Home):
    """A Home of parts.

    settings: prefetch, max_live and max_reuse, in elements: ``stage3_prefetch_bucket_size`` and so on; folder: where
    files are made in which the parts lie, None: in memory.
    early: backward shall release what it fetched for a module as soon as that module's part of it is over.
    """

    early = True
    shared = False

    def __init__(self, comm, settings):
        super().__init__(comm)
        self._order = _core.Fetch(ahead=settings["prefetch"], live=settings["max_live"], reuse=settings["max_reuse"])
        self._folder = settings.get("folder")
        self._open_store()
        self._slots = []  # by number; None where a parameter was removed
        self._numbers = {}  # ds_id -> number
        self._batch = min(_BATCH, settings["max_live"])
        self._events = {}  # the modules' numbers -> ours, without holes
        self._new = []  # slots that hold what this rank thinks; settle() makes parts of it

    # ---- placing ----

    def add(self, p):
        """An ordinary Parameter takes its place; the first rank's values count. Collective in order; settle() after
        the last. One on the meta device starts as zeros. OSError, and p is as it was, where files have no room."""
        if sum(slot.full.numel() for slot in self._new) > self._batch:
            self.settle()
        with torch.inference_mode(False):
            full = zeros(p.numel(), p.dtype).as_strided(p.shape, p.stride())
            if self.comm.rank == 0 and not p.is_meta:
                full.copy_(p.data)
        make(p, self, full)
        self._numbers[p.ds_id] = self._order.add(p.ds_numel)
        self._slots.append(_Slot(p, full))
        self._new.append(self._slots[-1])

    def settle(self):
        """After add() of several: the first rank's values are in everybody's parts. Collective."""
        new, self._new = self._new, []
        if not new:
            return
        self._share(new, 0, f"placing parameters of ZeRO stage 3: {_names(new)}")
        parts = []
        for slot in new:
            size, n = self.comm.size, slot.full.numel()
            each = -(-n // size)
            parts.append(slot.part_of_whole(self.comm.rank, [min(r * each, n) for r in range(size + 1)]))
        try:
            self._keep_parts(parts)
        finally:
            for slot in new:
                self._drop_storage(slot)

    def _open_store(self):
        """Parts that are taken from now on lie in files of their own."""
        self._store = _core.Store(_core.Comm.self_(), self._folder) if self._folder else None

    def _keep_parts(self, parts):
        """[(slot, cut, values of this rank's part)]: these parts are kept, as copies. Where files have no room, OSError
        on every rank: slots keep what they had, new ones these parts in memory. Collective where parts lie in files."""
        error, copies = None, []
        try:
            copies = [self._copied(values) for _, _, values in parts]
        except (OSError, MemoryError) as e:
            error = e
        if self._store is not None:
            error = self._agree(error)
        for i, (slot, cut, values) in enumerate(parts):
            if error is None or slot.part is None:
                slot.cut = torch.tensor(cut, device="cpu")
                slot.part = copies[i] if error is None else values.clone()
        if error is not None:
            raise error

    def _copied(self, values):
        if self._store is None or values.numel() == 0:
            return values.clone()
        return from_dlpack(self._store.take(values.numel(), values.dtype)).copy_(values)

    def _agree(self, error):
        """One rank's error is everybody's. Collective."""
        size = self.comm.size
        failed = zeros(size, torch.bool)
        mine = torch.full_like(failed[:1], error is not None)
        self.comm.gather_parts([failed], [mine], [torch.tensor(range(size + 1), device="cpu")], "files of parameters")
        if error is None and failed.any():
            error = OSError(f"rank {int(failed.nonzero()[0])} has no room for its parts of parameters in "
                            f"{self._folder!r} (its own error says why)")
        return error

    def hand_over(self, p, homes):
        """p comes under the limits of another of these Homes, with the part that is here. Not while it is gathered."""
        if p.ds_count:
            return
        homes.of(self.comm)._receive(p, self._give_up(p))

    def _give_up(self, p):
        self.empty()
        number = self._numbers.pop(p.ds_id)
        slot, self._slots[number] = self._slots[number], None
        return slot

    def place_of(self, p):
        """What take_back() needs."""
        slot = self._slot(p)
        return slot, slot.part, slot.cut

    def take_back(self, p, place):
        """p comes back from another Home, or from nowhere, with the part that it had when place_of() was asked."""
        slot, slot.part, slot.cut = place
        if p.ds_home is not self:
            p.ds_home._give_up(p)
        if p.ds_id not in self._numbers:
            self._receive(p, slot)

    def _receive(self, p, slot):
        p.ds_home = self
        self._numbers[p.ds_id] = self._order.add(p.ds_numel)
        self._slots.append(slot)

    def _share(self, slots, rank, label):
        """One rank's whole values become those of all."""
        mine = self.comm.rank == rank
        wholes = [flat(slot.full) for slot in slots]
        cuts = [torch.tensor([0] * (rank + 1) + [whole.numel()] * (self.comm.size - rank), device="cpu")
                for whole in wholes]
        self.comm.gather_parts(wholes, [whole if mine else whole[:0] for whole in wholes], cuts, label)

    def bind(self, core, params):
        """`core` steps params, in its order, from now on: each rank keeps what it steps. Collective."""
        mine = [(i, p) for i, p in enumerate(params) if getattr(p, "ds_home", None) is self]
        others = set(self._slots) - {self._slot(p) for _, p in mine} - {None}
        self._open_store()  # the earlier one's files go with the parts in them
        while mine:
            batch, n = [], 0
            while mine and (not batch or n + mine[0][1].ds_numel <= self._batch):
                batch.append(mine.pop(0))
                n += batch[-1][1].ds_numel
            held = tuple(p for _, p in batch)
            self.fetch(OUTSIDE, held, "the engine's parts")
            try:
                self._keep_parts([self._slot(p).part_of_whole(self.comm.rank, self._cut_of(core, i, p))
                                  for i, p in batch])
            finally:
                self.release(held, "the engine's parts")
        if self._store is not None:
            self._keep_parts([(slot, slot.cut.tolist(), slot.part) for slot in self._slots if slot in others])

    def _cut_of(self, core, i, p):
        """What each rank steps of the core's parameter i, as size + 1 edges. Empty parts may say anything."""
        cut = [0]
        for rank in range(self.comm.size):
            begin, n = core.part(i, rank)
            cut.append(begin + n if n else cut[-1])
        assert cut[-1] == p.ds_numel
        return cut

    def stepped(self, p):
        """The part of p that this rank's engine steps."""
        return self._slot(p).part

    def held(self, p):
        """(first element, values) of what this rank has of p, to read and to write."""
        slot = self._slot(p)
        return int(slot.cut[self.comm.rank]), slot.part

    def part(self, p):
        """This rank's part of p: what its engine steps, which may be none of it, or all."""
        return self._slot(p).part

    # ---- fetching ----

    def _bring(self, event, params, label):
        """Gathers what is not here, and starts gathering what the recorded order says is next. Collective. CommError
        where ranks fetch different things."""
        if self._new:
            self.settle()
        numbers = [self._numbers[p.ds_id] for p in params]
        place = -1 if event == OUTSIDE else self._events.setdefault(event, len(self._events))
        plan = self._order.want(place, numbers)
        posted = False
        try:
            self._carry_out(*plan, label)
            posted = True
            for number in numbers:
                self._slots[number].wait()
        except BaseException:
            idle = self._order.release(numbers)  # all or nothing; other ranks need not see it alike
            if not posted:
                self._unplan(idle + self._order.forget())
            raise

    def _carry_out(self, drop, now, ahead, label):
        self._drop(drop)
        self._gather(now, label)
        while ahead:
            batch, n = [], 0
            while ahead and n < _BATCH:
                batch.append(ahead.pop(0))
                n += self._numel(batch[-1])
            self._gather(batch, f"ahead of {label}")

    def _unplan(self, numbers):
        """What a plan that was not carried out says is here may never come: none of it counts as gathered."""
        for number in numbers:
            slot = self._slots[number]
            if slot is not None and slot.work is None:
                slot.resize(0)

    def _let_go(self, params):
        self._drop(self._order.release([self._numbers[p.ds_id] for p in params]))

    def _slot(self, p):
        return self._slots[self._numbers[p.ds_id]]

    def _numel(self, number):
        slot = self._slots[number]
        return 0 if slot is None else slot.full.numel()

    def _gather(self, numbers, label):
        slots = [slot for slot in (self._slots[number] for number in numbers) if slot is not None]
        if not slots:
            return
        for slot in slots:
            slot.resize(slot.n_bytes)
        work = self.comm.gather_parts([slot.full for slot in slots], [slot.part for slot in slots],
                                      [slot.cut for slot in slots], f"{label}: {_names(slots)}", True)
        for slot in slots:
            slot.work = work

    def _drop(self, numbers):
        for number in numbers:
            if self._slots[number] is not None:
                self._drop_storage(self._slots[number])

    def _drop_storage(self, slot):
        slot.end()
        slot.resize(0)

    def counters(self, reset_peak=False):
        """{"live": elements gathered now, "peak": at most since the last reset, "fetched", "ahead", "reused",
        "evicted": parameters}."""
        return self._order.counters(reset_peak)

    # ---- values ----

    def after_step(self):
        """New values are in the parts: what is in use is gathered again, the rest dropped. Collective."""
        self._drop(self._order.forget())
        self._gather([number for number in range(len(self._slots)) if self._order.is_live(number)], "after the step")
        for slot in self._slots:
            if slot is not None:
                slot.wait()

    def empty(self):
        """Gives back what was gathered ahead, or stays to be used again. All ranks, as part of their order."""
        self._drop(self._order.forget())

    def copy(self, p):
        """A private copy of p's whole values. Collective where it is not gathered."""
        self.fetch(OUTSIDE, (p,), "a copy")
        try:
            return p.ds_full.clone(memory_format=torch.preserve_format)
        finally:
            self.release((p,), "a copy")

    def write(self, params, rank):
        """The given rank's p.data become the values of all, of parameters that are gathered. Collective."""
        slots = [self._slot(p) for p in params]
        if self.comm.rank == rank:
            for p in params:
                p.ds_full.copy_(p.data)
        self._share(slots, rank, f"GatheredParameters: {_names(slots)}")
        for slot in slots:
            begin = int(slot.cut[self.comm.rank])
            slot.part.copy_(flat(slot.full)[begin:begin + slot.part.numel()])

    def move(self, old, new):
        slot = self._slot(old)
        super().move(old, new)
        slot.param = weakref.ref(new)

    def remove(self, p):
        key = p.ds_id
        super().remove(p)
        number = self._numbers.pop(key)
        self._drop_storage(self._slots[number])
        self._slots[number] = None


def _names(slots):
    """Of parameters, for a text that ranks compare."""
    return ", ".join(p.ds_name if p is not None else "?" for p in (slot.param() for slot in slots))
