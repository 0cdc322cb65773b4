"""Contracts M1 and M2: memory by the formula of docs/zero.md, held against the allocator and the kernel; flat over
steps and over lives of engines."""
import ctypes
import gc
import os

import models
import pytest
import torch
import torch.nn as nn

import deepspeed_c as deepspeed
from deepspeed_c import _core

N_LAYERS, WIDTH = 10, 1024
N_ELEMS = N_LAYERS * (WIDTH * WIDTH + WIDTH)
CHUNK = 131072 * 4


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(N_LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x)) + x
        return x.float().square().mean()


def private_kib():
    """Anonymous private memory of this process, and what it has touched of shared memory, in KiB."""
    fields = {}
    with open("/proc/self/smaps_rollup") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if rest.strip().endswith("kB"):
                fields[name] = int(rest.split()[0])
    return fields["Private_Dirty"], fields["Pss_Shmem"]


def formula(stage, dtype, world, gas):
    """(private, shared) bytes of the core's model-sized memory on one rank, by docs/zero.md."""
    part = N_ELEMS / world if stage > 0 else N_ELEMS
    private = 8 * part
    if dtype != "fp32":
        private += 4 * part
        if gas > 1 and stage < 2:
            private += 4 * N_ELEMS
    sums = 4 * N_ELEMS / world if world > 1 else 0
    return (private + sums, 0) if stage == 1 else (private, sums)


def measure(rank, world, cases):
    torch.set_num_threads(1)
    found = []
    for stage, dtype, gas in cases:
        torch.manual_seed(0)
        module = Deep()
        bytes_before = core_bytes()
        kib_before, shared_kib_before = trimmed_kib()
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                          config=models.config(stage, dtype, gas))
        kib_after, _ = trimmed_kib()
        x = torch.randn(2, WIDTH).to(models.DTYPES[dtype])
        for _ in range(2 * gas):
            engine.backward(engine(x))
            engine.step()
        counters = engine._core.counters()
        engine._comm.barrier()
        shared_kib = trimmed_kib()[1] - shared_kib_before
        engine._comm.barrier()  # a page that the other rank has let go of would be all this rank's
        found.append((counters["private_bytes"], counters["shared_bytes"], counters["alloc_bytes"] - bytes_before,
                      1024 * (kib_after - kib_before), 1024 * shared_kib, counters["padded_elems"]))
        engine.destroy()
        del engine, module
        gc.collect()
    return found


def trimmed_kib():
    """private_kib() without what free() keeps in the heap, which earlier cases left and a cast leaves."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return private_kib()


def core_bytes():
    """Live bytes of the allocator, through an engine-free door."""
    return _core.alloc_counters()["n_bytes"]


def check_shared(stage, dtype, gas, of_ranks):
    """What ranks share, each page counted once: sums, staging and, at stage 3, the parameters."""
    counted = sum(shared for _, shared, *_ in of_ranks)
    seen = sum(shmem for *_, shmem, _ in of_ranks)
    values = (4 if dtype == "fp32" else 2) * N_ELEMS if stage == 3 and len(of_ranks) > 1 else 0
    extra = seen - counted - values  # windows of communicators and of new values
    assert -2_000_000 <= extra <= 4_000_000, (stage, dtype, gas, seen, counted, values)


CASES = [(stage, dtype, gas) for stage in (0, 1, 2) for dtype in ("fp32", "bf16") for gas in (1, 2)]
CASES += [(3, "fp32", 1), (3, "bf16", 2)]


@pytest.mark.parametrize("world", [1, 2])
def test_memory_follows_the_formula(ranks, world):
    results = ranks(world, measure, CASES, timeout=120)
    for case, of_ranks in zip(CASES, zip(*results)):
        check_shared(*case, of_ranks)
    for per_rank in results:
        for (stage, dtype, gas), (private, shared, allocated, resident, _, padded) in zip(CASES, per_rank):
            # A world of one is as stage 0 whatever the stage says.
            expected_private, expected_shared = formula(stage if world > 1 else 0, dtype, world, gas)
            padding = 4 * 5 * (padded + 2 * 1024)
            where = (world, stage, dtype, gas)
            assert abs(private - expected_private) <= padding, where
            ahead = 4 * gas * (N_ELEMS + world * 262144) if stage >= 2 else 0  # in whole slots
            staging = 3 * (world - 1) * CHUNK + 2 * CHUNK + ahead
            assert expected_shared <= shared <= expected_shared + staging + padding, where
            # The allocator has nothing model-sized beyond that, and the kernel agrees (half-precision models free
            # 2 bytes an element when they are cast, so the kernel may have seen less). At stage 3 the module's own
            # parameters are gone, and those of several ranks are shared.
            small = 300_000
            assert private <= allocated <= private + small, where
            freed = 0 if dtype == "fp32" else 2 * N_ELEMS
            if stage == 3:
                values = (4 if dtype == "fp32" else 2) * N_ELEMS
                resident += 4 * N_ELEMS - (values if world == 1 else 0)
            # One fp32 array of this model is 42 MB: one too many or too few shows on two ranks too (21 MB a part).
            assert resident <= private + staging + small + 8_000_000, where
            assert resident >= private - freed - 8_000_000, where


def steady(rank, world, stage, dtype, overlap):
    torch.set_num_threads(1)
    module = Deep()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                      config=models.config(stage, dtype, 2, zero={"overlap_comm": overlap}))
    x = torch.randn(2, WIDTH).to(models.DTYPES[dtype])
    counts = []
    for _ in range(12):
        engine.backward(engine(x))
        engine.step()
        counts.append(engine._core.counters()["alloc_calls"])
    return counts[-1] - counts[5]


@pytest.mark.parametrize("stage, overlap", [
    (0, False), (1, False), (1, True), (2, False), (2, True), (3, False)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_in_the_steady_state_allocates_nothing_in_c(ranks, stage, overlap, dtype):
    assert ranks(2, steady, stage, dtype, overlap) == [0, 0]


def lives(rank, world, n):
    torch.set_num_threads(1)
    sizes, files = [], []
    for i in range(n):
        module = models.make()
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(),
                                          config=models.config(i % 4, ("fp32", "bf16")[i // 4 % 2]))
        models.train(engine, rank, 1, dtype=("fp32", "bf16")[i // 4 % 2])
        engine.destroy()
        del engine, module
        gc.collect()
        sizes.append(private_kib()[0])
        files.append(len(os.listdir("/proc/self/fd")))
    return sizes[-1] - sizes[n // 5], files[-1] - files[n // 5], core_bytes()


@pytest.mark.parametrize("world", [1, 2])
def test_fifty_engines_leave_memory_and_files_flat(ranks, world):
    for grown_kib, more_files, _ in ranks(world, lives, 50, timeout=120):
        assert grown_kib < 4096 and more_files <= 0


# ---- many engines ----


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.float().square().mean()


# (stage, dtype, masters and states in files, parameters in a file, zero.Init)
LIVES = [(stage, dtype, False, False, False) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]
LIVES += [(stage, "bf16", True, False, False) for stage in (1, 2, 3)]
LIVES += [(3, dtype, False, False, True) for dtype in ("fp32", "bf16")]
LIVES += [(3, "bf16", True, True, init) for init in (False, True)]


def live(folder, stage, dtype, filed, params_filed, init):
    """One engine from its model to its end."""
    file = {"device": "nvme", "nvme_path": folder}
    zero = {"stage3_param_persistence_threshold": 0, **({"offload_optimizer": file} if filed else {}),
            **({"offload_param": file} if params_filed else {})}
    config = models.config(stage, dtype, zero=zero)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=init):
        module = Small()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    engine.backward(engine(torch.ones(2, 256, dtype=models.DTYPES[dtype])))
    engine.step()
    engine.destroy()


def left(folder):
    """What a process has: (descriptors, mappings of files and shared memory, blocks of the core, its bytes, files in
    the folder), and private and shared KiB."""
    private, shared = trimmed_kib()
    with open("/proc/self/maps") as lines:
        named = sorted(line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6)
    counters = _core.alloc_counters()
    return (len(os.listdir("/proc/self/fd")), named, counters["n_live"], counters["n_bytes"],
            os.listdir(folder)), private + shared


def many_lives(rank, world, folder, lives, n_rounds):
    torch.set_num_threads(1)
    found = []
    for _ in range(n_rounds):
        for case in lives:
            live(folder, *case)
        found.append(left(folder))
    return found


@pytest.mark.parametrize("world, backend, n_rounds", [(1, "shm", 4), (2, "shm", 4), (2, "delegate", 2)])
def test_sixty_engines_made_and_closed_leave_nothing_in_their_process(ranks, tmp_path, world, backend, n_rounds):
    lives = LIVES if backend == "shm" else [case for case in LIVES if not case[3]]
    env = {"DSC_COMM_BACKEND": backend}
    for first, *others in ranks(world, many_lives, str(tmp_path), lives, n_rounds, timeout=120, env=env):
        for (n_open, *things), kib in others:
            assert n_open <= first[0][0] and things == [*first[0][1:-1], []]
            assert kib - first[1] < 4000  # a model of fp32 is 1,050 KiB, and there were 39 more
