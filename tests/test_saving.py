"""save_checkpoint and load_checkpoint as a script calls them: files and names, ranks that differ or are gone, saving
behind training's back, and everything that may stand in the way of a load."""
import argparse
import atexit
import collections
import contextlib
import copy
import json
import logging
import os
import random
import resource
import shutil
import signal
import threading

import models
import pytest
import torch
from checkpoints import state_of
from deepspeed_c._core import CheckpointError, CommError
from ranks import die
from test_checkpoint import made

import deepspeed_c as deepspeed
from deepspeed_c.checkpoint.native import NativeSource
from deepspeed_c.checkpoint.save import Bar
from deepspeed_c.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state, safe_set_local_optimizer_state


@contextlib.contextmanager
def lines():
    """What the log says inside."""
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def listed(folder):
    """What lies in a folder of checkpoints, but for the script that is put beside them."""
    return sorted({*os.listdir(folder)} - {"zero_to_fp32.py"})


def trained(stage=1, steps=2, **more):
    engine = made(stage, **more)
    models.train(engine, engine.global_rank, steps)
    return engine


# ---- files and names ----


def test_names_of_what_is_written(tmp_path):
    engine = trained()
    assert engine.save_checkpoint(tmp_path) is True
    assert (tmp_path / "latest").read_bytes() == b"global_step2"
    assert sorted(os.listdir(tmp_path / "global_step2")) == ["manifest.json", "rank_00000.safetensors"]
    engine.save_checkpoint(str(tmp_path), 3.5, client_sd={"epoch": 1}, save_latest=False)
    assert (tmp_path / "latest").read_bytes() == b"global_step2"
    path, client = made(2, seed=4).load_checkpoint(tmp_path, "3.5")
    assert path == str(tmp_path / "3.5") and client == {"epoch": 1}
    assert listed(tmp_path) == ["3.5", "global_step2", "latest"]
    assert os.access(tmp_path / "zero_to_fp32.py", os.X_OK)


def test_any_tool_can_open_the_file(tmp_path):
    engine = trained()
    engine.save_checkpoint(tmp_path, "a")
    data = (tmp_path / "a" / "rank_00000.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    row = json.loads(data[8:8 + n])["model/twice.weight"]
    assert row["dtype"] == "F32" and row["shape"] == [20, 20]
    begin, end = row["data_offsets"]
    assert data[8 + n + begin:8 + n + end] == engine.module.twice.weight.detach().numpy().tobytes()


def test_client_state_of_every_kind(tmp_path):
    engine = trained()
    state = {"step": 3, "best": float("inf"), "tensor": torch.arange(5.0), "pair": (1, "a"), "names": {"a", "b"},
             "nested": {"x": [torch.tensor(2)]}, "arguments": argparse.Namespace(lr=0.1),
             "counted": collections.Counter("aab")}
    engine.save_checkpoint(tmp_path, client_state=state)
    back = made(seed=4).load_checkpoint(tmp_path)[1]
    assert torch.equal(back.pop("tensor"), state.pop("tensor")) and back == state
    assert "objects.pt" in os.listdir(tmp_path / "global_step2")  # a Counter is none of what JSON tells


class Evil:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return os.system, ("true",)


def test_an_object_that_would_run_code_is_refused(tmp_path):
    engine = trained()
    with lines() as said:
        engine.save_checkpoint(tmp_path, client_state={"evil": Evil()})
    assert any("system" in line and "add_safe_globals" in line for line in said)
    second = made(seed=4)
    before = state_of(second)
    with pytest.raises(CheckpointError, match="objects.pt.*system"):
        second.load_checkpoint(tmp_path)
    assert state_of(second) == before


def test_wrong_arguments(tmp_path):
    engine = trained()
    for args, said in ((("",), "save_dir is empty"), ((3,), "save_dir is a int"), ((tmp_path, "a/b"), "tag is 'a/b'"),
                       ((tmp_path, ".."), "tag is"), ((tmp_path, "a", [1]), "client_state is a list")):
        with pytest.raises((ValueError, TypeError), match=said):
            engine.save_checkpoint(*args)
    assert os.listdir(tmp_path) == []


# ---- what is missing or damaged ----


def test_no_latest_and_no_tag_is_said_and_returns_nothing(tmp_path):
    engine = made()
    with lines() as said:
        assert engine.load_checkpoint(tmp_path) == (None, None)
    assert any("latest is not there" in line for line in said)


def test_a_tag_that_is_not_there(tmp_path):
    engine = trained()
    engine.save_checkpoint(tmp_path, "a")
    for latest in (b"b", b"../a", b"\xff\0", b""):
        (tmp_path / "latest").write_bytes(latest)
        with pytest.raises(FileNotFoundError, match="it has 'a'"):
            engine.load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint 'c'"):
        engine.load_checkpoint(tmp_path, "c")
    os.mkdir(tmp_path / "d")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        engine.load_checkpoint(tmp_path, "d")


def test_damage_is_named_and_changes_nothing(tmp_path):
    engine = trained(dtype="bf16", steps=0)
    engine.save_checkpoint(tmp_path, "a")
    second = made(2, "bf16", seed=4)
    before = state_of(second)
    path = tmp_path / "a" / "rank_00000.safetensors"
    whole = path.read_bytes()
    middle = whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]
    for damaged, said in ((middle, "rank_00000.safetensors.*(model|master|state|buffer|client|rng)"),
                          (whole[:-1], "rank_00000.safetensors"), (whole[:100], "rank_00000.safetensors"),
                          (whole[:30] + b"?" + whole[31:], "rank_00000.safetensors"), (None, "rank_00000.safetensors")):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises((CheckpointError, OSError), match=said):
            second.load_checkpoint(tmp_path, "a")
        assert state_of(second) == before
    path.write_bytes(whole)
    second.load_checkpoint(tmp_path, "a")
    assert state_of(second) == state_of(engine)


def fail_on_one(rank, world, folder):
    """Rank 1's file is damaged; at stage 1 only rank 1 reads its own optimizer states there."""
    engine = trained(1)
    engine.save_checkpoint(folder, "a")
    engine._comm.barrier("saved")
    if rank == 0:
        path = os.path.join(folder, "a", "rank_00001.safetensors")
        with open(path, "r+b") as file:
            header = file.read(1 << 16)
            n = int.from_bytes(header[:8], "little")
            table = json.loads(header[8:8 + n])
            key = next(key for key in table if key.startswith("state.exp_avg_sq"))
            file.seek(8 + n + table[key]["data_offsets"][0])
            file.write(b"\x7f")
    engine._comm.barrier("damaged")
    second = made(1, seed=4)
    before = state_of(second)
    try:
        second.load_checkpoint(folder, "a")
    except CheckpointError as error:
        said = str(error)
    assert state_of(second) == before
    models.train(second, rank, 1)
    return said


def test_damage_that_one_rank_finds_is_an_error_on_all(ranks, tmp_path):
    said = ranks(2, fail_on_one, str(tmp_path))
    assert all("rank_00001.safetensors" in text and "state.exp_avg_sq" in text for text in said)
    assert "rank 1 failed" in said[0]


# ---- ranks ----


def tags(rank, world, folder):
    found = []
    for mode in ("Ignore", "Warn", "Fail"):
        engine = trained(0, checkpoint={"tag_validation": mode})
        with lines() as said:
            try:
                engine.save_checkpoint(folder, f"{mode}{rank}")
            except ValueError as error:
                said.append(str(error))
        found.append([line for line in said if "tag" in line])
        engine.destroy()
    return found


def test_ranks_that_give_different_tags(ranks, tmp_path):
    first, second = ranks(2, tags, str(tmp_path))
    text = "the checkpoint's tag is '{}0' on rank 0 and '{}1' on rank 1"
    assert first[0] == second[0] == second[1] == []
    assert text.format("Warn", "Warn") in first[1][0]
    assert first[2][0] == second[2][0] and text.format("Fail", "Fail") in first[2][0]
    assert sorted(os.listdir(tmp_path / "Warn0"))[1:] == ["rank_00000.safetensors", "rank_00001.safetensors"]
    assert not (tmp_path / "Fail0").exists()


def stay_away(rank, world, folder, how):
    engine = trained(1)
    engine.save_checkpoint(folder, "before")
    if rank == 1 and how == "dies":
        die()
    if rank == 1 and how == "steps":
        return models.train(engine, rank, 1)
    engine.save_checkpoint(folder, "after")


@pytest.mark.parametrize("how", ["dies", "steps"])
def test_a_rank_that_does_not_come_is_an_error(ranks, tmp_path, how):
    outcomes = ranks.outcomes(2, stay_away, str(tmp_path), how, timeout=30)
    assert outcomes[0].error == "CommError"
    assert how == "dies" or outcomes[1].error == "CommError"
    assert (tmp_path / "latest").read_bytes() == b"before" and not (tmp_path / "after").exists()


def save_until_killed(rank, world, folder, victim, delay, behind):
    """Saves on and on; `returned` has the number of the last save that is done. The victim dies in the middle."""
    engine = made(1, checkpoint={"async": behind})
    returned = os.path.join(folder, "returned")
    first = int(open(returned).read()) + 1 if os.path.exists(returned) else 0
    for i in range(first, first + 10**6):
        if i == first + 2 and rank == victim:
            threading.Timer(delay, die).start()
        engine.save_checkpoint(folder, f"save{i}", {"number": i})
        engine.checkpoint_commit()
        if rank == 0:
            with open(f"{returned}.new", "w") as file:
                file.write(str(i))
            os.rename(f"{returned}.new", returned)


def check_kills(ranks, folder, n, seed):
    draw = random.Random(seed)
    for i in range(n):
        victim = i % 2
        outcomes = ranks.outcomes(2, save_until_killed, str(folder), victim, draw.uniform(0, 0.1), i % 4 > 1,
                                  timeout=60)
        assert outcomes[victim].exit_code == -signal.SIGKILL
        assert outcomes[1 - victim].error in ("CommError", "CheckpointError"), outcomes[1 - victim].describe()
        last, latest = int((folder / "returned").read_text()), (folder / "latest").read_text()
        assert int(latest.removeprefix("save")) >= last
        whole = NativeSource(folder / latest)
        whole.verify()
        assert whole.sections.get("client") == {"number": int(latest.removeprefix("save"))}
        for entry in folder.iterdir():  # what the next save does not need; debris stays for it to clean
            if entry.is_dir() and entry.name.startswith("save") and entry.name != latest:
                shutil.rmtree(entry)
    made().save_checkpoint(folder, "end")
    assert set(listed(folder)) <= {"returned", "returned.new", "latest", latest, "end"}


def test_a_kill_at_any_moment_leaves_the_newest_checkpoint_whole(ranks, tmp_path):
    check_kills(ranks, tmp_path, 4, 1)


@pytest.mark.long
def test_a_hundred_kills(ranks, tmp_path):
    check_kills(ranks, tmp_path, 100, 2)


def fill_disk(rank, world, folder, behind):
    """Rank 1 may write no more than a few bytes to a file."""
    engine = trained(1, checkpoint={"async": behind})
    engine.save_checkpoint(folder, "before", save_latest=True)
    engine.checkpoint_commit()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    said = None
    try:
        engine.save_checkpoint(folder, "after")
        engine.checkpoint_commit()
    except (OSError, CheckpointError) as error:
        said = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    engine.save_checkpoint(folder, "again")
    engine.destroy()
    return said


@pytest.mark.parametrize("behind", [False, True])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_loses_nothing(ranks, tmp_path, behind):
    first, second = ranks(2, fill_disk, str(tmp_path), behind)
    assert second.startswith("OSError: [Errno 27]") and "rank_00001" in second
    assert first.startswith("CheckpointError") and "rank_00001" in first
    assert listed(tmp_path) == ["again", "before", "latest"]
    assert (tmp_path / "latest").read_bytes() == b"again"


# ---- behind training's back ----


def test_what_is_saved_behind_training_is_the_state_at_the_call(tmp_path):
    engine = trained(2, checkpoint={"async": True})
    engine.save_checkpoint(tmp_path, "a")
    then = state_of(engine)
    models.train(engine, 0, 2)
    engine.save_checkpoint(tmp_path, "b")  # waits for the first
    assert (tmp_path / "a" / "manifest.json").exists()
    assert engine.checkpoint_commit() is True
    assert (tmp_path / "latest").read_bytes() == b"b"
    second = made(1, seed=4)
    second.load_checkpoint(tmp_path, "a")
    assert state_of(second) == then
    engine.save_checkpoint(tmp_path, "c")
    engine.destroy()
    assert (tmp_path / "latest").read_bytes() == b"c"


def test_what_scripts_change_before_the_next_step_is_not_in_it(tmp_path):
    engine = trained(1, dtype="bf16", steps=0, checkpoint={"async": True})
    models.train(engine, 0, 2, dtype="bf16")
    then, weight = state_of(engine), engine.module.twice.weight
    engine.save_checkpoint(tmp_path, "a")
    with torch.no_grad():
        for p in engine.module.parameters():
            p.data.mul_(2)  # an average for an evaluation, for example
    engine.module.norm.running_mean.add_(1)
    safe_set_full_fp32_param(weight, torch.ones(20, 20))
    safe_set_full_optimizer_state(weight, torch.ones(20, 20), "exp_avg")
    engine.checkpoint_commit()
    second = made(2, "bf16", seed=4)
    second.load_checkpoint(tmp_path)
    assert state_of(second) == then
    assert sorted(os.listdir(tmp_path / "a")) == ["manifest.json", "rank_00000.safetensors"]


def a_step(engine):
    weight = next(engine.module.parameters())
    engine.backward((weight.float() ** 2).sum())
    engine.step()


def other_states(engine):
    state = copy.deepcopy(engine.optimizer.state_dict())
    engine.optimizer.load_state_dict({**state, "masters": {k: v + 1 for k, v in state["masters"].items()}})


def another_parameter(engine):
    engine.module.weight = torch.nn.Parameter(torch.ones_like(engine.module.weight))
    engine._take_replaced()


@pytest.mark.parametrize("change", [
    a_step, other_states, another_parameter,
    lambda engine: safe_set_local_optimizer_state(engine.module.weight, torch.zeros(engine.module.weight.numel()),
                                                  "exp_avg")])
def test_what_changes_while_it_is_being_saved_is_saved_as_it_was(tmp_path, change):
    """A model that takes longer to write than the change to begin."""
    def big():
        config = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
                  "optimizer": {"type": "Adam", "params": {"lr": 0.1}}, "checkpoint": {"async": True}}
        return deepspeed.initialize(model=torch.nn.Linear(3000, 1000, bias=False), config=config)[0]

    engine = big()
    a_step(engine)
    then = state_of(engine)
    engine.save_checkpoint(tmp_path, "a")
    change(engine)
    engine.checkpoint_commit()
    assert sorted(os.listdir(tmp_path / "a")) == ["manifest.json", "rank_00000.safetensors"]
    assert state_of(engine) != then
    engine.load_checkpoint(tmp_path, "a")
    assert state_of(engine) == then
    engine.destroy()


def fail_behind(rank, world, folder):
    """The failure of rank 1's thread comes up in its next step."""
    engine = trained(1, checkpoint={"async": True})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    engine.save_checkpoint(folder, "a")
    if rank == 1:
        while not engine._saving._writer.done():
            pass
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    engine._comm.barrier("written")
    found = []
    for call in (lambda: models.train(engine, rank, 1), engine.checkpoint_commit):
        try:
            call()
        except Exception as error:
            found.append(type(error).__name__)
    models.train(engine, rank, 1)
    engine.save_checkpoint(folder, "b")
    engine.destroy()
    return found


def test_a_failure_behind_training_surfaces_at_the_next_call(ranks, tmp_path):
    first, second = ranks(2, fail_behind, str(tmp_path))
    assert second == ["OSError", "OSError"] and first[1] == "CheckpointError"
    assert listed(tmp_path) == ["b", "latest"]


def end_without_waiting(rank, world, folder):
    engine = trained(1, checkpoint={"async": True})
    engine.save_checkpoint(folder, "a")
    atexit._run_exitfuncs()  # the fixture's processes end without


def test_a_script_that_ends_has_its_checkpoint(ranks, tmp_path):
    ranks(2, end_without_waiting, str(tmp_path))
    assert (tmp_path / "latest").read_bytes() == b"a"


def abandoned(rank, world, folder):
    """Rank 1 is gone before it has written its file; rank 0's end does not wait for it for long."""
    engine = trained(1, checkpoint={"async": True})
    engine.save_checkpoint(folder, "a")
    if rank == 1:
        die()
    engine._saving._names.append("of nobody")
    engine.save_checkpoint(folder, "b")


def test_a_rank_that_dies_behind_training_is_an_error(ranks, tmp_path):
    first = ranks.outcomes(2, abandoned, str(tmp_path), timeout=30)[0]
    assert first.error == "CommError" and first.seconds < 20
    assert listed(tmp_path) in ([], ["a", "latest"])


def test_a_long_save_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("deepspeed_c.checkpoint.save._BAR_AFTER", 0)
    bar = Bar(trained()._comm, 100)
    bar(60)
    bar.close()
    out, err = capsys.readouterr()
    assert out == "" and "checkpoint (rank 0)" in err


# ---- the loader ----


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, i):
        return torch.tensor(i)


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))

    def forward(self, numbers):
        return (self.w * numbers.float().mean()).square().mean()


def loaded_engine(micro):
    return deepspeed.initialize(model=Tiny(), config=models.config(1, micro=micro), training_data=Numbers())[0]


def read_on(rank, world, folder, resume, n):
    """The sample numbers of up to n batches."""
    engine = loaded_engine(24 // (world * 2))
    if resume:
        engine.load_checkpoint(folder)
    seen = []
    for _, numbers in zip(range(n), engine.training_dataloader):
        seen += numbers.tolist()
        engine.backward(engine(numbers))
        engine.step()
    if not resume:
        engine.save_checkpoint(folder)
    return seen


def test_each_sample_once_on_another_number_of_ranks(ranks, tmp_path):
    first = ranks(2, read_on, str(tmp_path), False, 2)
    rest = ranks(3, read_on, str(tmp_path), True, 100)
    assert sorted(sum(first + rest, [])) == list(range(48))


def test_losing_the_communicator_is_no_checkpoint_error():
    assert issubclass(CheckpointError, RuntimeError) and not issubclass(CommError, CheckpointError)
