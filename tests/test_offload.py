"""Offload: where masters and optimizer states lie changes no bit, and a file that fails is an error on every rank."""
import errno
import gc
import hashlib
import itertools
import os
import re
import resource
import subprocess

import models
import pytest
import test_memory
import torch
import torch.nn.functional as F
from ranks import die
from torch import nn

import deepspeed_c as deepspeed
from deepspeed_c import _core
from deepspeed_c.plan import machine_memory, plan
from deepspeed_c.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)

WINDOW = 524288
SIDE = 1100  # squared: several windows on each of two ranks, the last one short


class Wide(nn.Module):
    """Enough elements for states to be streamed in several windows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(SIDE, SIDE), nn.Linear(SIDE, 3)])

    def forward(self, x):
        return self.layers[1](F.gelu(self.layers[0](x))).float().square().mean()


def open_engine(stage, dtype, offload, kind=Wide, offload_param=None, **more):
    module = models.make(kind)
    zero = {"offload_optimizer": offload} if offload else {}
    if offload_param:
        zero.update(offload_param=offload_param, stage3_param_persistence_threshold=0)
    config = models.config(stage, dtype, zero=zero, **more)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    return engine


def train(engine, rank, dtype, steps):
    for step in steps:
        x = torch.randn(1, SIDE, generator=torch.Generator().manual_seed(10 * step + rank))
        engine.backward(engine(x.to(models.DTYPES[dtype])))
        engine.step()


def digest(engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        values = hashlib.sha256(models.bits(engine.module))
    for p in (p for p in engine.module.parameters() if p.requires_grad):
        values.update(safe_get_full_fp32_param(p).numpy().tobytes())
    return values.hexdigest(), engine.get_global_grad_norm()


def nvme(path, **more):
    return {"device": "nvme", "nvme_path": str(path), **more}


def run(rank, stage, dtype, offload, n_steps=3, **more):
    engine = open_engine(stage, dtype, offload, **more)
    train(engine, rank, dtype, range(n_steps))
    result = digest(engine), engine._core.counters()
    engine.destroy()
    return result


# ---- the same bits ----

AIO = ({}, {"block_size": 100000, "queue_depth": 3, "single_submit": True}, {"overlap_events": False}, {})


def matrix(rank, world, dtype, path):
    torch.set_num_threads(1)
    wrong = []
    for stage, buffers, aio in zip((0, 1, 2, 3), (2, 1, 4, 2), AIO):
        expected, in_memory = run(rank, stage, dtype, None)
        got, counters = run(rank, stage, dtype, {"device": "cpu"})
        if got != expected or counters["private_bytes"] != in_memory["private_bytes"] or counters["file_bytes"]:
            wrong.append((stage, "cpu", got, counters))
        got, counters = run(rank, stage, dtype, nvme(path, buffer_count=buffers), aio=aio)
        states = (3 if dtype == "bf16" else 2) * 4
        owned = counters["owned_elems"]
        windows = min(buffers, -(-owned // WINDOW)) * min(WINDOW, owned) * states
        if (got != expected or counters["file_bytes"] != owned * states or
                counters["private_bytes"] != in_memory["private_bytes"] - counters["file_bytes"] + windows):
            wrong.append((stage, buffers, aio, counters, in_memory))
    for device in ({"device": "cpu"}, nvme(path)):  # parameters too, at stage 3
        if run(rank, 3, dtype, nvme(path), offload_param=device)[0] != expected:
            wrong.append(("offload_param", device))
    return wrong, os.listdir(path)


@pytest.mark.parametrize("world, dtype", [
    (2, "fp32"), (2, "bf16"), pytest.param(4, "fp32", marks=pytest.mark.long),
    pytest.param(4, "bf16", marks=pytest.mark.long)])
def test_offload_changes_no_bit_at_any_stage(ranks, tmp_path, world, dtype):
    assert ranks(world, matrix, dtype, str(tmp_path), timeout=240) == [([], [])] * world


OPTIMIZERS = ({"type": "Lamb", "params": {"lr": 1e-2}}, {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}},
              {"type": "SGD", "params": {"lr": 1e-2}}, {"type": "Adagrad", "params": {"lr": 1e-2}},
              {"type": "Lion", "params": {"lr": 1e-3}})


def optimizers(rank, world, path):
    torch.set_num_threads(1)
    wrong = []
    for optimizer, dtype in itertools.product(OPTIMIZERS, ("fp32", "bf16")):
        expected = run(rank, 1, dtype, None, 2, optimizer=optimizer)[0]
        if run(rank, 1, dtype, nvme(path), 2, optimizer=optimizer)[0] != expected:
            wrong.append((optimizer, dtype))
    return wrong


def test_every_optimizer_gives_the_same_bits_from_files(ranks, tmp_path):
    assert ranks(2, optimizers, str(tmp_path), timeout=120) == [[], []]


def test_an_optimizer_that_torch_runs_keeps_its_masters_in_files(tmp_path):
    def trained(offload):
        module = models.make(Wide).bfloat16()
        optimizer = torch.optim.RMSprop(module.parameters(), lr=1e-3)
        config = models.config(1, "bf16", zero={"offload_optimizer": offload})
        del config["optimizer"]
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        train(engine, 0, "bf16", range(2))
        result = digest(engine), engine._core.counters()["file_bytes"] // engine._core.counters()["owned_elems"]
        engine.destroy()
        return result

    expected, got = trained({"device": "none"}), trained(nvme(tmp_path))
    assert got[0] == expected[0] and (expected[1], got[1]) == (0, 4)


# ---- reading and writing between steps ----


def edited(offload):
    """Trains, edits a state and a master, saves, trains on; a second engine goes on from what was saved."""
    engine = open_engine(1, "bf16", offload)
    train(engine, 0, "bf16", range(2))
    weight = engine.module.layers[0].weight
    safe_set_full_optimizer_state(weight, safe_get_full_optimizer_state(weight, "exp_avg") * 2, "exp_avg")
    saved = {key: torch.clone(value) if isinstance(value, torch.Tensor) else value
             for key, value in engine.optimizer.state_dict().items()}
    saved["state"] = {i: {k: v.clone() for k, v in state.items()} for i, state in saved["state"].items()}
    saved["masters"] = {i: master.clone() for i, master in saved["masters"].items()}
    values = [p.detach().clone() for p in engine.module.parameters()]
    train(engine, 0, "bf16", range(2, 4))
    first = digest(engine)
    engine.destroy()
    engine = open_engine(1, "bf16", offload)
    with torch.no_grad():
        for p, value in zip(engine.module.parameters(), values):
            p.copy_(value)
    engine.optimizer.load_state_dict(saved)
    train(engine, 0, "bf16", range(2, 4))
    second = digest(engine)
    engine.destroy()
    return first, second


def test_states_are_read_edited_saved_and_loaded_through_the_files(tmp_path):
    expected, again = edited(None)
    assert expected == again and edited(nvme(tmp_path, buffer_count=2)) == (expected, expected)


def test_a_skipped_step_leaves_files_as_they_were(tmp_path):
    def skips(offload):
        engine = open_engine(1, "fp16", offload)
        train(engine, 0, "fp16", range(2))
        x = torch.full((1, SIDE), float("inf"), dtype=torch.float16)
        engine.backward(engine(x))
        engine.step()
        assert not engine.was_step_applied()
        train(engine, 0, "fp16", range(2, 4))
        result = digest(engine)
        engine.destroy()
        return result

    assert skips(nvme(tmp_path)) == skips(None)


# ---- what goes wrong ----


def test_nvme_needs_a_path_and_parameters_stage_3():
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="offload_optimizer.nvme_path is not given"):
        open_engine(1, "fp32", {"device": "nvme"})
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="offload_param.nvme_path is not given"):
        open_engine(3, "fp32", None, offload_param={"device": "nvme"})
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="stage is 2; parameters are shared out at stage 3 only"):
        open_engine(2, "fp32", None, offload_param=nvme("here"))
    with pytest.raises(ValueError, match="nvme_path of the configuration is not given"):
        deepspeed.zero.Init(remote_device="nvme")


def test_init_places_parameters_in_files_which_all_ranks_map(tmp_path):
    config = models.config(3, zero={"offload_param": nvme(tmp_path)})
    with deepspeed.zero.Init(config_dict_or_path=config):
        module = models.make(Wide)
    weight = module.layers[0].weight.ds_full
    names = [line.split(maxsplit=5)[5] for line in open("/proc/self/maps")
             if int(line.split("-")[0], 16) <= weight.data_ptr() < int(line.split("-")[1].split()[0], 16)]
    assert names[0].startswith(str(tmp_path)) and os.listdir(tmp_path) == []


def descriptors():
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                  if os.path.exists(f"/proc/self/fd/{fd}"))


def test_many_engines_leave_no_descriptor_mapping_or_file(tmp_path):
    counts = []
    for i in range(12):
        engine = open_engine(1, "bf16", nvme(tmp_path), kind=models.Awkward)
        models.train(engine, 0, 1, dtype="bf16")
        if i % 2:
            engine.destroy()
        del engine
        gc.collect()
        counts.append((len(descriptors()), str(tmp_path) in open("/proc/self/maps").read()))
    assert counts[-1] == counts[3] and not counts[-1][1] and os.listdir(tmp_path) == []


def start_without_space(rank, world, path):
    """Rank 0 cannot make its states' file, then nobody the parameters'."""
    errors = []
    for stage, own, shared in ((1, path if rank else "/dev/null", None), (3, None, nvme("/dev/null"))):
        try:
            open_engine(stage, "fp32", own and nvme(own), offload_param=shared)
        except OSError as error:
            errors.append(str(error))
    engine = open_engine(1, "fp32", None)  # nothing is broken
    train(engine, rank, "fp32", range(1))
    return errors


def start_without_space_for_parts(rank, world, path):
    """Rank 0 cannot make a file for its parts."""
    module, texts = models.make(Wide), []
    before = models.bits(module)
    zero = {"offload_param": nvme(path if rank else "/dev/null")}
    try:
        deepspeed.initialize(model=module, config=models.config(3, zero=zero))
    except OSError as error:
        texts.append(str(error))
    same = models.bits(module) == before and type(module.layers[0].weight) is nn.Parameter
    train(deepspeed.initialize(model=module, config=models.config(3))[0], rank, "fp32", range(1))
    return texts, same


def test_a_rank_without_space_for_its_parts_fails_all_at_start_and_breaks_nothing(ranks, tmp_path):
    (own, same), (others, same_too) = ranks(2, start_without_space_for_parts, str(tmp_path), env=FORCED)
    assert same and same_too and "/dev/null" in own[0] and "Not a directory" in own[0]
    assert "rank 0 has no room for its parts of parameters" in others[0] and os.listdir(tmp_path) == []


def test_a_rank_that_cannot_make_its_files_fails_all_at_start_and_breaks_nothing(ranks, tmp_path):
    (own, params), (others, others_params) = ranks(2, start_without_space, str(tmp_path))
    for text in (own, params):
        assert "/dev/null" in text and "Not a directory" in text
    assert "rank 0 has no files" in others and "rank 0 has no file for parameters" in others_params


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_an_exception_at_start(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(OSError, match="could not reserve .* bytes for .*No space left on device") as caught:
            open_engine(1, "fp32", nvme(tmp_path))
        assert str(tmp_path) in str(caught.value) and caught.value.errno == errno.ENOSPC
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def limit_in_step(rank, world, path, stage):
    """Rank 1 may suddenly not write beyond 2 MiB; what each rank gets, and what it gets then."""
    torch.set_num_threads(1)
    engine = open_engine(stage, "bf16", nvme(path))
    train(engine, rank, "bf16", range(2))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))
    errors = []
    for step in range(2):
        try:
            train(engine, rank, "bf16", [step])
        except (OSError, RuntimeError) as error:
            errors.append((type(error).__name__, str(error), getattr(error, "errno", None)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    engine.destroy()
    return errors


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_write_that_fails_in_a_step_is_an_error_on_every_rank_and_the_engine_stops(ranks, tmp_path, stage):
    outcomes = ranks.outcomes(2, limit_in_step, str(tmp_path), stage, timeout=30)
    (*_, other), (own, then) = [outcome.value for outcome in outcomes]  # the other one may have ended its part
    assert own[0] == "OSError" and f" of {tmp_path}/(rank 1, bf16 masters and states) failed at" in own[1]
    assert own[2] == errno.EFBIG
    assert "File too large" in own[1] and "step 3 is half done" in own[1]
    assert other[0] == "CommError" and "File too large" in other[1]
    assert then[0] in ("RuntimeError", "CommError")
    assert max(outcome.seconds for outcome in outcomes) < 20 and os.listdir(tmp_path) == []


FORCED = {"DSC_COMM_BACKEND": "delegate"}


class PartlyFrozen(Wide):
    def __init__(self):
        super().__init__()
        self.layers.insert(1, nn.Linear(SIDE, SIDE).requires_grad_(False))

    def forward(self, x):
        return self.layers[2](self.layers[1](F.gelu(self.layers[0](x)))).float().square().mean()


def mapped(path):
    """Bytes of files below path that this process has mapped."""
    found = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            if str(path) in line:
                begin, end = line.split()[0].split("-")
                found += int(end, 16) - int(begin, 16)
    return found


def parts_in_files(rank, world, path):
    """ZeRO-3 whose ranks share no memory: a digest with parts in memory, and in files, and where these are then."""
    torch.set_num_threads(1)
    expected = run(rank, 3, "bf16", None, kind=PartlyFrozen)[0]
    found = []
    for offload, under_init in ((None, False), (nvme(path), True)):
        config = models.config(3, "bf16", zero={"offload_param": nvme(path), "offload_optimizer": offload or {},
                                                "stage3_param_persistence_threshold": 0})
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=under_init):
            made = PartlyFrozen()
        with deepspeed.zero.GatheredParameters(list(made.parameters()), modifier_rank=0):
            for p, q in zip(made.parameters(), models.make(PartlyFrozen).parameters()):
                p.data.copy_(q)
        engine = deepspeed.initialize(model=made, model_parameters=made.parameters(), config=config)[0]
        train(engine, rank, "bf16", range(3))
        parts = [made.layers[i].weight.ds_tensor for i in (0, 1)]
        lies = [str(path) in mapping_of(part.data_ptr()) for part in parts]
        del parts
        home = made.layers[0].weight.ds_home
        same = digest(engine) == expected
        engine.destroy()
        found.append((same, lies, home._store.counters()["n_bytes"]))
        del home
        gc.collect()
        found.append((mapped(path), os.listdir(path)))
    return found


def mapping_of(address):
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = line.split()[0].split("-")
            if int(begin, 16) <= address < int(end, 16):
                return line
    return ""


def test_parts_of_parameters_lie_in_files_where_ranks_share_no_memory(ranks, tmp_path):
    per_rank = ranks(2, parts_in_files, str(tmp_path), env=FORCED)
    config = models.config(3, "bf16", zero={"offload_param": nvme(tmp_path), "stage3_param_persistence_threshold": 0})
    found = plan(PartlyFrozen(), _core.Config(config, 2), 2, 2)
    planned = found["file"]["parameters"] + found["file"]["frozen parameters"]
    assert found["private"]["parameters"] == found["private"]["frozen parameters"] == 0
    for one, gone, other, gone_too in per_rank:
        for same, lies, _ in (one, other):
            assert same and lies == [True, True]
        assert gone == gone_too == (0, [])
        assert one[2] == other[2]
    assert planned in {rank[0][2] for rank in per_rank}  # each is a node; the planner shows the one with most memory


def killed_in_step(rank, world, path):
    engine = open_engine(2, "bf16", nvme(path))
    train(engine, rank, "bf16", range(1))
    if rank == 1:
        x = torch.randn(1, SIDE).bfloat16()
        engine.backward(engine(x))
        die()
    train(engine, rank, "bf16", range(1, 3))


def test_a_killed_job_leaves_nothing_and_the_next_one_starts(ranks, tmp_path):
    outcomes = ranks.outcomes(2, killed_in_step, str(tmp_path))
    assert outcomes[1].exit_code == -9 and outcomes[0].error == "CommError"
    assert os.listdir(tmp_path) == []


def a_removed_folder(rank, world, path):
    engine = open_engine(1, "bf16", nvme(path))
    train(engine, rank, "bf16", range(1))
    if rank == 0:
        os.rmdir(path)
    train(engine, rank, "bf16", range(1, 3))
    return digest(engine)


def without_files(rank, world):
    return run(rank, 1, "bf16", None)[0]


def test_a_folder_that_is_removed_takes_nothing_away(ranks, tmp_path):
    assert ranks(2, a_removed_folder, str(tmp_path / "a" / "b")) == ranks(2, without_files)


# ---- more states than memory ----

LIMIT = 220 << 20


class Group:
    """A memory control group of either version, by its folder. It can be pickled."""

    def __init__(self, folder, version):
        self.folder, self.version = folder, version

    def _read(self, name):
        with open(os.path.join(self.folder, name)) as file:
            return file.read()

    def _write(self, name, value):
        with open(os.path.join(self.folder, name), "w") as file:
            file.write(str(value))

    def limit(self, n_bytes):
        """Of memory; no swap is left, where the kernel limits that."""
        if self.version == 2:
            self._write("memory.max", n_bytes)
            names, n_bytes = ["memory.swap.max"], 0
        else:  # the second is of memory and swap, and never less than the first
            names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
            names = names if n_bytes < int(self._read(names[0])) else names[::-1]
        for name in names:
            if os.path.exists(os.path.join(self.folder, name)):
                self._write(name, n_bytes)

    def join(self):
        """Memory that this process takes from here on counts in the group."""
        self._write("cgroup.procs", os.getpid())

    def used(self):
        """Bytes that the kernel cannot take back: page cache is left out."""
        stat = dict(line.split() for line in self._read("memory.stat").splitlines())
        total = int(self._read("memory.current" if self.version == 2 else "memory.usage_in_bytes"))
        return total - int(stat["file" if self.version == 2 else "cache"]) + int(stat["shmem"])


@pytest.fixture
def memory_group():
    """A Group with a limit of LIMIT bytes."""
    name = f"deepspeed_c_test_{os.getpid()}"
    for root, version in (("/sys/fs/cgroup/memory", 1), ("/sys/fs/cgroup", 2)):
        group = Group(os.path.join(root, name), version)
        try:
            os.mkdir(group.folder)
        except OSError:
            continue
        try:
            group.limit(LIMIT)
            yield group
            return
        except OSError:
            continue
        finally:
            os.rmdir(group.folder)
    pytest.skip("a memory control group needs root and a writable /sys/fs/cgroup")


def deep(n_layers=24, device=None):
    return nn.Sequential(*[nn.Linear(1024, 1024, dtype=torch.bfloat16, device=device) for _ in range(n_layers)])


def values_of(module):
    """A digest of its parameters that takes no copy of them all."""
    values = hashlib.sha256()
    for p in module.parameters():
        values.update(p.detach().view(torch.uint8).numpy())
    return values.hexdigest()


def offloading(offload):
    return models.config(1, "bf16", zero={"offload_optimizer": offload})


def steps_of(module, offload, n_steps):
    """An engine over module that has taken n_steps."""
    engine = deepspeed.initialize(model=module, config=offloading(offload))[0]
    for step in range(n_steps):
        x = torch.full((1, 1024), 1.0 + step, dtype=torch.bfloat16)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    return engine


def in_memory(rank, world):
    """What the kernel counts for a model and its states, and the model after two steps."""
    torch.set_num_threads(1)
    steps_of(deep(1), {"device": "none"}, 1).destroy()
    before, _ = test_memory.trimmed_kib()
    torch.manual_seed(0)
    module = deep()
    engine = steps_of(module, {"device": "none"}, 2)
    n_bytes = (test_memory.trimmed_kib()[0] - before) * 1024
    assert engine.was_step_applied()
    return n_bytes, values_of(module)


def in_little_memory(rank, world, group, path, planned, measured):
    """Trains under a limit between the planner's figure and measured states, beside what this process needs without
    a model."""
    torch.set_num_threads(1)
    group.limit(1 << 40)
    group.join()
    steps_of(deep(1), nvme(path), 1).destroy()
    test_memory.trimmed_kib()
    base = group.used()
    limit = (base + planned + (measured - base - planned) // 8) // 4096 * 4096
    group.limit(limit)
    torch.manual_seed(0)
    module = deep()
    before = values_of(module)
    with pytest.raises(MemoryError) as caught:
        steps_of(module, {"device": "none"}, 0)
    same = values_of(module) == before
    engine = steps_of(module, nvme(path), 2)
    return base, limit, str(caught.value), same, engine._core.counters()["file_bytes"], values_of(module)


def test_states_beyond_a_memory_limit_train_from_files_and_are_refused_in_memory(ranks, tmp_path, memory_group):
    found = plan(deep(device="meta"), _core.Config(offloading(nvme(tmp_path)), 1), 1)
    planned = max(found["node"].values())
    (measured, expected), = ranks(1, in_memory)
    (base, limit, text, same, file_bytes, got), = ranks(
        1, in_little_memory, memory_group, str(tmp_path), planned, measured, timeout=120)
    assert base + planned < limit < measured, (base, planned, limit, measured)
    assert f"left of its limit of {limit}; nothing has changed" in text and '"nvme" keeps' in text
    assert same and got == expected and file_bytes == sum(found["file"].values())


def refused(rank, world, group):
    """What each stage with sharded states says that it takes on rank 0."""
    torch.set_num_threads(1)
    group.join()
    module, texts = deep(16), []
    for stage in 1, 2:
        with pytest.raises(MemoryError) as caught:
            deepspeed.initialize(model=module, config=models.config(stage, "bf16"))
        texts.append(str(caught.value))
    return [re.search(r"take (\d+) bytes on rank 0", text)[1] for text in texts]


def test_reduced_sums_count_where_memory_is_limited(ranks, memory_group):
    expected = []
    for stage in 1, 2:
        found = plan(deep(16, "meta"), _core.Config(models.config(stage, "bf16"), 2), 2)
        sums = found["private"]["reduced sums"] + found["shared"]["reduced sums"] // 2
        expected.append(str(sums + found["private"]["masters"] + found["private"]["optimizer states"]))
    assert ranks(2, refused, memory_group) == [expected] * 2


def limit_of_this_process(rank, world, group):
    group.join()
    return machine_memory()


def test_the_planner_knows_the_control_group_of_its_process(ranks, memory_group):
    assert ranks(1, limit_of_this_process, memory_group) == [LIMIT]


def shallow(rank, world, folder):
    """Small blocks through a queue that holds one or two: every request that is under way may have ended when the next
    wait begins."""
    for depth in (1, 2):
        torch.manual_seed(0)
        module = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config={
            "train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": folder}},
            "aio": {"queue_depth": depth, "block_size": 4096}})
        for _ in range(3):
            engine.backward(engine(torch.ones(2, 64)).square().mean())
            engine.step()
        engine.destroy()


def test_a_shallow_queue_ends(ranks, tmp_path):
    ranks(1, shallow, str(tmp_path))
