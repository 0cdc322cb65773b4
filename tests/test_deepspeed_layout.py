"""Checkpoints in DeepSpeed's own layout: read, written, read by DeepSpeed; and the tools over both formats."""
import json
import math
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile

import models
import pytest
import torch
from moe_cases import E
from peer import make_checkpoints as peer
from test_moe_ranks import Net, tokens

import deepspeed_c
from deepspeed_c import CheckpointError
from deepspeed_c.checkpoint import __main__ as tools
from deepspeed_c.checkpoint.deepspeed_layout import part_of_group, spans_of_group, spans_of_subgroup, subgroups
from deepspeed_c.checkpoint.deepspeed_reader import DeepSpeedSource
from deepspeed_c.moe.layer import MoE
from deepspeed_c.utils import zero_to_fp32

KEPT = pathlib.Path(__file__).parent / "peer" / "deepspeed-0.19.8.tar.gz"  # checkpoints that DeepSpeed has written
EXPERTS = ["experts1-fp32", "experts2-fp32"]
STORED = ["experts1-fp32", "stage0-fp32", "stage0-bf16", "stage1-fp32", "stage1-bf16", "stage2-bf16", "stage3-fp32",
          "stage3-bf16"]
LATEST = f"global_step{peer.N_STEPS}"


# ---- arithmetic ----


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
def test_spans_cover_every_element_once(n_ranks):
    shapes = {"a": (3, 5), "b": (1,), "c": (7,), "d": (4, 4), "e": (0, 2)}
    n_elems = sum(math.prod(shape) for shape in shapes.values())
    part = part_of_group(n_elems, n_ranks)
    assert part % 2 == 0 and (part - 2) * n_ranks < n_elems <= part * n_ranks
    for spans in (spans_of_group(shapes, part), spans_of_subgroup(shapes, n_ranks)):
        places = set()
        for name, shape in shapes.items():
            at = 0
            for span in spans[name]:
                assert span.begin == at and span.n > 0 and 0 <= span.rank < n_ranks
                places |= {(span.rank, span.offset + i) for i in range(span.n)}
                at += span.n
            assert at == math.prod(shape)
        assert len(places) == n_elems


def test_gaps_between_parameters_count():
    spans = spans_of_group({"a": (3,), "b": (4,)}, 5, [2, 0])
    assert spans["a"] == [(0, 0, 0, 3)] and spans["b"] == [(1, 0, 0, 4)]


def test_subgroups_close_at_the_limit():
    assert subgroups([10, 10, 10, 10], 2, 9) == [[0, 1], [2, 3]]
    assert subgroups([10, 10, 10], 2, 100) == [[0, 1, 2]]
    assert subgroups([10], 2, 0) == [[0]]


# ---- what DeepSpeed has written ----


def ours(case, seed=2, **changes):
    """An engine of ours on the same model and configuration."""
    config = {**peer.config(case), **changes}
    if case.startswith("experts"):
        torch.manual_seed(seed)
        module = peer.ModelWithExperts(MoE)
        return deepspeed_c.initialize(model=module, model_parameters=list(module.parameters()), config=config)[0]
    module = peer.model(seed)
    return deepspeed_c.initialize(model=module, model_parameters=peer.groups(module), config=config)[0]


def differences(engine, wanted):
    """What differs from {name: {"fp32", slots}} of whole tensors. Collective."""
    found = peer.values(engine, deepspeed_c.utils)
    assert found.keys() == wanted.keys()
    return [f"{name} {what}" for name in wanted for what in wanted[name]
            if not torch.equal(found[name][what].flatten(), wanted[name][what].float().flatten())]


def load_stored(rank, world, folder, case, ours_as):
    engine = ours(ours_as)
    path, client = engine.load_checkpoint(os.path.join(folder, case))
    wanted = torch.load(os.path.join(folder, case, peer.named(case, "values", rank) or "values.pt"))
    assert os.path.dirname(path) == os.path.join(folder, case, LATEST), path
    assert client.keys() == {"epoch", "seen"} and client["epoch"] == 3 and torch.equal(client["seen"], torch.ones(2))
    assert engine.global_steps == peer.N_STEPS and engine.get_lr() == wanted["lr"]
    assert engine.lr_scheduler.last_batch_iteration == peer.N_STEPS - 1
    assert differences(engine, wanted["values"]) == []
    if case.startswith("stage"):
        assert engine.module.head.weight is engine.module.embed.weight
        reference = peer.model(1)
        with deepspeed_c.zero.GatheredParameters(list(engine.module.frozen.parameters())):
            for p, q in zip(engine.module.frozen.parameters(), reference.frozen.parameters()):
                assert torch.equal(p.float(), q.to(p.dtype).float())
    peer.train(engine, rank, peer.N_STEPS, peer.N_MORE)  # it goes on
    return float(engine.get_global_grad_norm())


def load_all_stored(rank, world, folder, pairs):
    torch.set_num_threads(1)
    return [load_stored(rank, world, folder, case, ours_as) for case, ours_as in pairs]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of what DeepSpeed has written, by two ranks."""
    folder = tmp_path_factory.mktemp("kept")
    with tarfile.open(KEPT) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_what_deepspeed_wrote_loads_with_equal_weights_and_moments(ranks, kept, world):
    stages = {2: {"stage0": 1, "stage1": 3, "stage2": 1, "stage3": 3}, 3: {f"stage{i}": 2 for i in range(4)}}[world]
    pairs = [(case, f"stage{stages[case[:6]]}-{case[7:]}") for case in STORED if case.startswith("stage")]
    if world == 2:
        pairs += [("experts1-fp32", case) for case in EXPERTS]
    ranks(world, load_all_stored, str(kept), pairs, timeout=120)


def test_a_checkpoint_of_deepspeed_holds_only_the_classes_that_are_read(kept, tmp_path):
    case = "stage0-fp32"
    shutil.copytree(kept / case, tmp_path / case)
    path = next((tmp_path / case / LATEST).glob("*_model_states.pt"))
    state = torch.load(path)
    state["argument"] = Evil()
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="run_evil"):
        DeepSpeedSource(path.parent)
    assert not Evil.ran


class Evil:
    ran = False

    def __reduce__(self):
        return run_evil, ()


def run_evil():
    Evil.ran = True


def test_a_flipped_byte_of_a_tensor_is_found_and_named(kept, tmp_path):
    case = "stage1-fp32"
    shutil.copytree(kept / case, tmp_path / case)
    folder = tmp_path / case / LATEST
    path = next(folder.glob("zero_pp_rank_1*_optim_states.pt"))
    data = bytearray(path.read_bytes())
    wanted = torch.load(tmp_path / case / "values.pt")["values"]
    needle = wanted["down.weight"]["exp_avg"].flatten()[-8:].numpy().tobytes()
    at = data.find(needle)
    assert at > 0
    data[at] ^= 1
    path.write_bytes(data)
    source = DeepSpeedSource(folder)
    source.check("state.exp_avg", "embed.weight", (0, 0), 0, 1)
    with pytest.raises(CheckpointError, match=f"{path.name}.*down.weight"):
        source.check("state.exp_avg", "down.weight", (0, 0), 0, 42)
    with pytest.raises(CheckpointError, match=path.name):
        source.verify()


def everything(folder):
    source, found = DeepSpeedSource(folder), {}
    for key, tensor in source.tensors.items():
        values = torch.empty(tensor.numel, dtype=tensor.dtype)
        source.read(*key, 0, tensor.numel, values)
        found[key] = tensor, values.view(torch.uint8).numpy().tobytes()
    return found, repr(source.sections)


@pytest.mark.parametrize("case", ["stage0-bf16", "stage2-bf16", "stage3-fp32"])
def test_a_flipped_bit_anywhere_is_an_error_or_changes_nothing(kept, tmp_path, case):
    shutil.copytree(kept / case, tmp_path / case)
    folder, errors = tmp_path / case / LATEST, 0
    wanted = everything(folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        data = path.read_bytes()
        for at in range(number, len(data), 211):
            path.unlink()  # not in place: the file may be mapped
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1:])
            try:
                assert everything(folder) == wanted, (path.name, at)
            except CheckpointError as error:
                errors += 1
                assert path.name in str(error)
        path.unlink()
        path.write_bytes(data)
    assert errors > 40 and everything(folder) == wanted


def test_a_missing_or_cut_file_is_named(kept, tmp_path):
    case = "stage3-fp32"
    shutil.copytree(kept / case, tmp_path / case)
    folder = tmp_path / case / LATEST
    path = next(folder.glob("zero_pp_rank_1*_optim_states.pt"))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=path.name):
        DeepSpeedSource(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="rank 1 is missing"):
        DeepSpeedSource(folder)


# ---- what we write ----


def write_and_read(rank, world, folder, cases):
    """Saves in DeepSpeed's layout at each case, loads at each other of the dtype, compares bits, trains on alike."""
    torch.set_num_threads(1)
    for case in cases:
        engine = ours(case, 1, checkpoint={"format": "deepspeed"})
        peer.train(engine, rank, 0, peer.N_STEPS)
        engine.save_checkpoint(os.path.join(folder, case), client_state={"epoch": 3, "seen": torch.ones(2)})
        state, drawn, lr = peer.values(engine, deepspeed_c.utils), torch.rand(3), engine.get_lr()
        peer.train(engine, rank, peer.N_STEPS, peer.N_MORE)
        trained = peer.values(engine, deepspeed_c.utils)
        if rank == 0:
            torch.save({"values": state, "lr": lr, "trained": trained}, os.path.join(folder, case, "values.pt"))
        if case == "stage1-fp32":
            native = ours(case, 1, checkpoint={"format": "native"})
            peer.train(native, rank, 0, peer.N_STEPS)
            native.save_checkpoint(os.path.join(folder, "native"), client_state={"epoch": 3, "seen": torch.ones(2)})
            native.destroy()
        engine.destroy()
        for other in cases:
            if other.partition("-")[2] != case.partition("-")[2]:
                continue
            engine = ours(other)
            _, client = engine.load_checkpoint(os.path.join(folder, case))
            assert client.keys() == {"epoch", "seen"} and client["epoch"] == 3
            assert torch.equal(torch.rand(3), drawn) and engine.micro_steps == peer.N_STEPS
            assert differences(engine, state) == [], (case, other)
            peer.train(engine, rank, peer.N_STEPS, peer.N_MORE)
            assert differences(engine, trained) == [], (case, other)
            engine.destroy()
    return True


CASES = [f"stage{stage}-{dtype}" for dtype in ("fp32", "bf16") for stage in range(4)]


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory):
    """A folder with a checkpoint of ours for each of CASES, by two ranks; every pair of stages was tried."""
    folder = tmp_path_factory.mktemp("written")
    ranks(2, write_and_read, str(folder), CASES, timeout=200)
    return folder


def test_what_we_write_in_deepspeeds_layout_loads_at_every_stage(written):
    for case in CASES:
        stage, dtype = case.split("-")
        names = {path.name for path in (written / case / LATEST).iterdir()}
        model = {"mp_rank_00_model_states.pt"} if stage != "stage3" else {
            f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2)}
        optimizer = set() if stage == "stage0" else {
            f"{'bf16_' if dtype == 'bf16' else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)}
        assert names == model | optimizer
        assert (written / case / "latest").read_text() == LATEST
        assert {path.name for path in (written / case).iterdir()} == {
            LATEST, "latest", "zero_to_fp32.py", "values.pt"}


def test_files_name_deepspeeds_classes(written):
    path = written / "stage2-fp32" / LATEST / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    assert sorted(named) == [f"deepspeed.{name}" for name in (
        "runtime.fp16.loss_scaler.LossScaler", "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address")]


def awkward_there_and_back(rank, world, folder, cases):
    """Elements in another order, none at all, a scale, several optimizers; written while training goes on."""
    torch.set_num_threads(1)

    def engine(stage, dtype, optimizer, **more):
        config = models.config(stage, dtype, checkpoint={"format": "deepspeed", **more}, optimizer=optimizer)
        module = models.make()
        return deepspeed_c.initialize(model=module, model_parameters=module.parameters(), config=config)[0]

    def everything(engine):
        """Bits of weights and buffers, masters, states, scale."""
        found = {"scale": engine.loss_scale(), "steps": engine.global_steps, "module": models.bits(engine.module)}
        for name, p in engine.module.named_parameters():
            for slot in engine._run.state_names if p.requires_grad and name != "empty" else ():
                found[name, slot] = deepspeed_c.utils.safe_get_full_optimizer_state(p, slot).tolist()
            if p.requires_grad:
                found[name] = deepspeed_c.utils.safe_get_full_fp32_param(p).tolist()
        return found

    for dtype, optimizer in cases:
        for stage in range(4):
            path = os.path.join(folder, f"{dtype}-{stage}")
            saved = engine(stage, dtype, optimizer, **{"async": stage % 2 == 1})
            models.train(saved, rank, 2, dtype=dtype)
            at = everything(saved)
            saved.save_checkpoint(path, tag=7.5, save_latest=stage > 1)
            models.train(saved, rank, 1, dtype=dtype)
            saved.checkpoint_commit()
            after = everything(saved)
            saved.destroy()
            for other in (stage, (stage + 1) % 4):
                loaded = engine(other, dtype, optimizer)
                models.train(loaded, rank, 1, dtype=dtype)
                loaded.load_checkpoint(path, 7.5)
                assert everything(loaded) == at, (path, other)
                models.train(loaded, rank, 1, dtype=dtype)
                assert everything(loaded) == after, (path, other)
                loaded.destroy()


def test_awkward_modules_come_back_in_deepspeeds_layout(ranks, tmp_path):
    cases = [("fp16", {"type": "Adam", "params": {"lr": 1e-2}}),
             ("fp32", {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}})]
    ranks(2, awkward_there_and_back, str(tmp_path), cases, timeout=200)


def experts_there_and_back(rank, world, folder):
    """Stages below 3: experts over two ranks, saved in DeepSpeed's layout, loaded over two ranks and over one."""
    torch.set_num_threads(1)
    deepspeed_c.init_distributed()

    def engine(ep_size, stage):
        net = Net(ep_size)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
                  "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
                  "checkpoint": {"format": "deepspeed"}}
        return deepspeed_c.initialize(model=net, model_parameters=list(net.parameters()), config=config)[0]

    def step(engine, n):
        for i in range(n):
            engine.backward(engine(tokens(rank + i, 8)))
            engine.step()

    def state(engine):
        """Weights, and moments in their place."""
        found = engine.module.whole(lambda p: p.detach().clone())
        for slot in peer.SLOTS:
            moments = engine.module.whole(lambda p, slot=slot: deepspeed_c.utils.safe_get_full_optimizer_state(p, slot))
            found.update((f"{name} {slot}", value) for name, value in moments.items())
        return found

    for stage in range(3):
        path, saved = os.path.join(folder, str(stage)), engine(2, stage)
        step(saved, 2)
        saved.save_checkpoint(path)
        at, _ = state(saved), step(saved, 2)
        after = state(saved)
        for ep_size, onto in ((2, stage), (2, 1), (1, 2)):
            loaded = engine(ep_size, onto)
            loaded.load_checkpoint(path)
            found = state(loaded)
            scale = 1 if ep_size == 2 else world  # whole() adds an expert over the ranks that hold it
            other = {n for n in at if not torch.equal(found[n], at[n] * (scale if "expert" in n else 1))}
            assert not other, (stage, ep_size, sorted(other))
            step(loaded, 2)
            if ep_size == 2:
                found = state(loaded)
                assert all(torch.equal(found[name], after[name]) for name in after)
        saved.destroy()
    return sorted(os.listdir(os.path.join(folder, "0", "global_step2")))


def test_experts_in_deepspeeds_layout_keep_their_numbers(ranks, tmp_path):
    names = ranks(2, experts_there_and_back, str(tmp_path), timeout=120)[0]
    assert names == sorted(["mp_rank_00_model_states.pt",
                            *(f"expp_rank_{e}_mp_rank_00_optim_states.pt" for e in range(2)),
                            *(f"layer_0_expert_{n}_mp_rank_00_model_states.pt" for n in range(E))])


# ---- the tools ----


def stored_weights(folder, case):
    return {name: each["fp32"] for name, each in torch.load(folder / case / "values.pt")["values"].items()}


@pytest.mark.parametrize("case", ["stage0-bf16", "stage0-fp32"])
def test_tools_know_no_names_of_masters_at_stage_0(written, kept, case, tmp_path, capsys):
    for folder in (written / case, kept / case):
        assert tools.main(["inspect", str(folder), "-v"]) == tools.main(["verify", str(folder)]) == 0
        assert re.search(r"state\.exp_avg +\(parameter 0\)", capsys.readouterr().out)
        state = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder)
        assert set(state) == set(peer.model().state_dict()) and state["up.weight"].dtype == torch.float32


@pytest.mark.parametrize("case", ["stage1-bf16", "stage3-fp32", "stage2-fp32"])
def test_zero_to_fp32_gives_the_masters(written, case):
    wanted = stored_weights(written, case)
    state = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(written / case)
    lazy = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(written / case, LATEST, lazy_mode=True)
    model = zero_to_fp32.load_state_dict_from_zero_checkpoint(peer.model(5), str(written / case))
    assert set(state) == set(model.state_dict()) == set(lazy)
    assert state["head.weight"] is state["embed.weight"]
    for name, value in wanted.items():
        assert torch.equal(state[name], value) and torch.equal(lazy[name].contiguous(), value), name
        assert torch.equal(model.state_dict()[name], value), name
    lean = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(written / case, exclude_frozen_parameters=True)
    assert set(state) - set(lean) == {"frozen.weight", "frozen.bias"}


def test_the_script_beside_a_checkpoint_joins_its_weights(written, tmp_path, root):
    script = written / "native" / "zero_to_fp32.py"
    assert os.access(script, os.X_OK) and (written / "stage2-bf16" / script.name).read_bytes() == script.read_bytes()
    subprocess.run([sys.executable, script.name, ".", tmp_path], cwd=script.parent, check=True, timeout=60,
                   env={**os.environ, "PYTHONPATH": str(root)})
    state = torch.load(tmp_path / "pytorch_model.bin")
    assert all(torch.equal(state[name], value) for name, value in stored_weights(written, "stage1-fp32").items())


def test_export_cuts_files_at_the_limit(written, tmp_path, capsys):
    wanted = stored_weights(written, "stage3-bf16")
    assert tools.main(["export", str(written / "stage3-bf16"), str(tmp_path / "safe"), "--max-shard-size", "400B"]) == 0
    index = json.loads((tmp_path / "safe" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        data = (tmp_path / "safe" / file).read_bytes()
        n, = struct.unpack("<Q", data[:8])
        header = json.loads(data[8:8 + n])
        begin, end = header[name]["data_offsets"]
        if name in wanted:
            assert header[name]["dtype"] == "F32"
            assert data[8 + n + begin:8 + n + end] == wanted[name].numpy().tobytes(), name
    assert tools.main(["export", str(written / "stage3-bf16" / LATEST), str(tmp_path / "torch"), "--torch", "--dtype",
                       "bf16"]) == 0
    state = torch.load(tmp_path / "torch" / "pytorch_model.bin")
    assert all(torch.equal(state[name], value.bfloat16()) for name, value in wanted.items())


def test_inspect_verify_and_diff(written, capsys):
    folder = str(written / "stage1-fp32")
    assert tools.main(["inspect", folder, "-v"]) == 0
    text = capsys.readouterr().out
    assert "state.exp_avg" in text and "frozen.weight" in text and "global_steps" in text
    assert tools.main(["verify", folder]) == 0
    assert tools.main(["diff", folder, str(written / "stage2-fp32")]) == 1  # the configurations differ
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("model", "state", "buffer"))] == []
    assert any("zero_optimization.stage" in line for line in lines)
    assert tools.main(["diff", folder, str(written / "stage1-bf16")]) == 1
    assert "model up.weight: dtype" in capsys.readouterr().out
    assert tools.main(["diff", folder, folder]) == 0
    assert tools.main(["diff", folder, str(written / "native")]) == 1
    assert capsys.readouterr().out.splitlines() == ["config.checkpoint.format: 'deepspeed' and 'native'"]
    assert tools.main(["verify", str(written / "native")]) == 0
    assert tools.main(["inspect", str(written / "native")]) == 0
    assert tools.main(["verify", folder, "--tag", "nothing"]) == 1


# ---- with DeepSpeed itself ----


@pytest.fixture(scope="module")
def deepspeed_python():
    python = os.environ.get("PEER")
    if not python:
        pytest.skip("PEER does not name the python of an environment that has DeepSpeed")
    return python


def run_peer(python, *arguments, n=2):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
           "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    command = [python, peer.__file__, *map(str, arguments)]
    started = [subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(n)]
    try:
        told = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(text[-3000:] for text in told)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_deepspeed_loads_what_we_write_and_trains_on(deepspeed_python, written, tmp_path, dtype):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    cases = [case for case in CASES if case.endswith(dtype)]
    run_peer(deepspeed_python, "load", tmp_path, *cases)
    for case in cases:
        wanted, loaded, trained = (torch.load(tmp_path / case / f"{what}.pt") for what in (
            "values", "loaded", "trained"))
        assert loaded["steps"] == peer.N_STEPS and loaded["lr"] == pytest.approx(wanted["lr"])
        assert loaded["client"]["epoch"] == 3 and loaded["path"].endswith("_model_states.pt")
        for name, each in wanted["values"].items():
            for what, value in each.items():
                assert torch.equal(loaded["values"][name][what].flatten(), value.flatten()), (case, name, what)
                ours_after, theirs = (each[name][what].flatten() for each in (wanted["trained"], trained["values"]))
                # bf16: the same but for the order of sums and of rounding
                torch.testing.assert_close(ours_after, theirs, rtol=1e-4 if case.endswith("fp32") else 0.05,
                                           atol=1e-6 if case.endswith("fp32") else 2e-3, msg=f"{case} {name} {what}")


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_deepspeed_writes_now_loads(deepspeed_python, ranks, tmp_path, dtype):
    cases = [case for case in [*CASES, *EXPERTS] if case.endswith(dtype)]
    run_peer(deepspeed_python, "make", tmp_path, *cases)
    ranks(2, load_all_stored, str(tmp_path), [(case, case) for case in cases], timeout=120)


def update_kept(python):
    """Writes KEPT anew."""
    with tempfile.TemporaryDirectory() as folder:
        run_peer(python, "make", folder, *STORED)
        for script in pathlib.Path(folder).glob("*/*.py"):
            script.unlink()
        with tarfile.open(KEPT, "w:gz") as archive:
            for case in STORED:
                archive.add(os.path.join(folder, case), case)


if __name__ == "__main__":
    update_kept(os.environ["PEER"])
