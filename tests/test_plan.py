"""python -m deepspeed_c.plan: what it says is what the engine then allocates, and its errors name the argument."""
import copy
import gc
import json
import os
import pathlib
import shlex
import subprocess
import types

import models
import pytest
import test_memory
import torch
import torch.nn as nn
from test_delegate import FORCED

import deepspeed_c as deepspeed
from deepspeed_c import _core
from deepspeed_c.moe.layer import MoE
from deepspeed_c.plan import PlanError, machine_memory, main, make_model, plan, report

HELD = ("sums over micro-steps", "reduced sums", "masters", "optimizer states", "staging")
OPTIMIZERS = {"lamb": {"type": "Lamb", "params": {"lr": 1e-2}}, "sgd": {"type": "SGD", "params": {"lr": 1e-2}},
              "momentum": {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}},
              "rmsprop": {"type": "RMSprop", "params": {"lr": 1e-2}}}


class Experts(nn.Module):
    """A layer whose experts two ranks share out."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(24, 24)
        self.moe = MoE(24, nn.Linear(24, 24), num_experts=4, ep_size=2)

    def forward(self, x):
        out, loss, _ = self.moe(self.inside(x))
        return out.float().square().mean() + 0.01 * loss


class Chain(nn.Sequential):
    """Linear layers, one of them frozen."""

    def __init__(self):
        super().__init__(*(nn.Linear(24, 24) for _ in range(8)))
        self[3].requires_grad_(False)

    def forward(self, x):
        return super().forward(x).float().square().mean()


@pytest.fixture(autouse=True, scope="module")
def no_job():
    """A layer with experts looks at the ranks of the job that it is made in: here there is none."""
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


def nothing():
    return 3


def trains_nothing():
    return nn.Linear(2, 2).requires_grad_(False)


def computes():
    return nn.Linear(int(torch.ones(1).item()), 2)


def wide():
    return nn.Linear(4, 4, dtype=torch.float64)


def other_groups():
    module = Experts()
    for p in module.moe.deepspeed_moe.experts.parameters():
        p.group_name = "mine"
    return module


def named(kind):
    return {"awkward": models.Awkward, "mixed": models.MixedDtypes, "experts": Experts, "chain": Chain}[kind]


CASES = [("awkward", models.config(stage, dtype, gas, zero={"overlap_comm": overlap, "reduce_bucket_size": 3000}))
         for stage in (0, 1, 2) for dtype, gas, overlap in (("fp32", 2, True), ("fp32", 1, False), ("bf16", 2, False),
                                                            ("bf16", 1, True))]
CASES += [("awkward", models.config(stage, dtype, optimizer=optimizer)) for optimizer in OPTIMIZERS.values()
          for stage, dtype in ((0, "fp32"), (2, "fp16"))]
CASES += [("awkward", models.config(3, dtype, gas)) for dtype, gas in (("fp32", 1), ("bf16", 2))]
CASES += [("mixed", models.config(stage)) for stage in (0, 2, 3)]
CASES += [("awkward", models.config(1, "bf16", 2, bf16={"enabled": True, "bf16_master_weights_and_grads": True}))]
WITH_EXPERTS = [("experts", models.config(stage, dtype)) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


def held(rank, world, cases):
    """What an engine says that it holds, after a step where something comes with it: bytes, but for peak."""
    torch.set_num_threads(1)
    found = []
    for kind, config in cases:
        module = named(kind)()
        engine, *_ = deepspeed.initialize(model=module, config=copy.deepcopy(config))
        if config["optimizer"]["type"] in ("SGD", "RMSprop") or config["zero_optimization"]["stage"] == 3:
            for _ in range(config["gradient_accumulation_steps"]):
                engine.backward(engine(*batch_of(kind, engine)))
                engine.step()
        counters = engine._core.counters()
        foreign = config["optimizer"]["type"] == "RMSprop"
        homes = engine._shards._homes if engine._shards is not None else ()
        shared = [home for home in homes if not home.early]
        found.append({
            "private": counters["private_bytes"], "shared": counters["shared_bytes"], "file": counters["file_bytes"],
            "padding": 4 * counters["padded_elems"],
            "foreign": sum(t.nbytes for state in engine.basic_optimizer.state.values() if foreign
                           for t in state.values() if torch.is_tensor(t) and t.dim()),
            "stores": sum(home._store.counters()["n_bytes"] for home in shared if home.comm.rank == 0),
            "parts": sum(slot.part.nbytes for home in homes if home.early for slot in home._slots),
            "peak": max((home.counters()["peak"] for home in homes if home.early), default=0)})
        engine.destroy()
    return found


def batch_of(kind, engine):
    dtype = models.DTYPES[engine._model_dtype()]
    if kind == "awkward":
        return models.batch(0, 0, 0, dtype)
    return (torch.randn(8, 6 if kind == "mixed" else 24).to(dtype),)


def planned(kind, config, world, nodes=1):
    with torch.device("meta"):
        module = named(kind)()
    return plan(module, _core.Config(copy.deepcopy(config), world), world, nodes)


def compare(per_rank, cases, world, nodes=1):
    for i, (kind, config) in enumerate(cases):
        found, engines, where = planned(kind, config, world, nodes), [rank[i] for rank in per_rank], (kind, config)
        of_comm = 8 << 20 if nodes > 1 else 0
        private = sum(found["private"][k] for k in HELD) - of_comm
        # torch's states have no padding.
        most = max(engines, key=lambda e: e["private"] + e["foreign"])
        assert 0 <= private - most["private"] - most["foreign"] <= (most["foreign"] and most["padding"]), where
        sums, staging = found["shared"]["reduced sums"], found["shared"]["staging"]
        assert sums <= sum(e["shared"] for e in engines) <= sums + staging, where
        assert sum(found["file"].values()) == sum(e["file"] for e in engines) / nodes, where
        if config["zero_optimization"]["stage"] == 3:
            compare_stage3(found, engines, world, nodes, where)


def compare_stage3(found, engines, world, nodes, where):
    kinds = "parameters", "frozen parameters"
    if nodes == 1:
        of_all = sum(found["private"][k] * world + found["shared"][k] for k in kinds)
        assert of_all == sum(e["stores"] for e in engines), where
        return
    assert sum(found["private"][k] for k in kinds) == max(e["parts"] for e in engines), where
    if where[0] != "mixed":  # where all elements have one size
        elem_size = 2 if "bf16" in where[1] else 4
        most = found["private"]["gathered parameters"] / elem_size
        assert 0.6 * most <= max(e["peak"] for e in engines) <= most, where


@pytest.mark.parametrize("world", [1, 3])
def test_what_is_planned_is_what_the_engine_holds(ranks, world):
    cases = CASES if world > 1 else CASES[::4]
    compare(ranks(world, held, cases), cases, world)


def test_plans_with_experts(ranks):
    compare(ranks(2, held, WITH_EXPERTS), WITH_EXPERTS, 2)


def test_plans_with_states_in_files(ranks, tmp_path):
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    cases = [("awkward", models.config(stage, dtype, optimizer=OPTIMIZERS[name], zero=offload))
             for stage, dtype, name in ((1, "fp32", "momentum"), (2, "bf16", "momentum"), (3, "bf16", "lamb"))]
    compare(ranks(2, held, cases), cases, 2)
    config = models.config(3, "bf16", zero={"offload_param": offload["offload_optimizer"]})
    found = planned("awkward", config, 2)
    stores = sum(rank[0]["stores"] for rank in ranks(2, held, [("awkward", config)]))
    assert found["file"]["parameters"] + found["file"]["frozen parameters"] == stores > 0
    assert found["private"]["parameters"] == found["shared"]["parameters"] == 0


def to_files(*folders):
    sections = zip(("offload_optimizer", "offload_param"), folders)
    return models.config(3, "bf16", zero={name: {"device": "nvme", "nvme_path": str(f)} for name, f in sections})


def test_plans_compare_files_with_the_room_for_them(tmp_path, monkeypatch):
    assert planned("awkward", models.config(3), 1)["rooms"] == []
    found = planned("awkward", to_files(tmp_path / "a", tmp_path / "not" / "there"), 2)
    room, = found["rooms"]  # one file system
    assert room["folders"] == [str(tmp_path / "a"), str(tmp_path / "not" / "there")] and not os.listdir(tmp_path)
    assert room["needed"] == sum(found["file"].values()) and room["free"] > 0
    for free, fails in ((room["needed"], False), (room["needed"] - 1, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        found = planned("awkward", to_files(tmp_path / "a", tmp_path / "b"), 2)
        line, = [line for line in report(found, 2, 1) if line.startswith("files of a node in")]
        assert line.endswith(", so initialize fails") == fails and "free here: 64." in line, line


def error_of_initialize(rank, world, config):
    try:
        deepspeed.initialize(model=models.Awkward(), config=config)[0].destroy()
    except OSError as error:
        return str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_initialize_reserves_what_is_planned_for_files(ranks, tmp_path):
    needed = planned("awkward", to_files(tmp_path, tmp_path), 1)["rooms"][0]["needed"]
    for size in needed, needed - 4096:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", tmp_path],
                          capture_output=True).returncode:
            pytest.skip("mounting a small file system is not allowed here")
        try:
            said, = ranks(1, error_of_initialize, to_files(tmp_path, tmp_path))
            assert "No space left on device" in said if size < needed else said is None
        finally:
            subprocess.run(["umount", tmp_path], check=True)


def test_plans_where_ranks_share_no_memory(ranks):
    cases = [case for case in CASES if not case[1]["zero_optimization"].get("overlap_comm")]
    little = {"stage3_max_live_parameters": 2500, "stage3_param_persistence_threshold": 24,
              "stage3_prefetch_bucket_size": 600}
    cases += [("chain", models.config(3, dtype, zero=little)) for dtype in ("fp32", "bf16")]
    compare(ranks(2, held, cases, env=FORCED), cases, 2, nodes=2)


def held_on_two_nodes(rank, world, cases):
    os.environ["DSC_COMM_NODE"] = "aabb"[rank]  # pretended
    return held(rank, world, cases)


def test_copies_of_an_expert_on_one_node_share_its_memory(ranks):
    config = models.config(3, "bf16", use_data_before_expert_parallelism=True)
    found = planned("experts", config, 4, nodes=2)
    engines = [rank[0] for rank in ranks(4, held_on_two_nodes, [("experts", config)])]
    assert found["private"]["parameters"] == max(e["parts"] for e in engines)
    assert found["shared"]["parameters"] == sum(e["stores"] for e in engines[:2]) > 0
    assert sum(found["private"][k] for k in HELD) - (8 << 20) == max(e["private"] for e in engines)


def test_gradients_of_experts_travel_between_the_nodes_that_hold_copies():
    there, here = (planned("experts", models.config(1, use_data_before_expert_parallelism=first), 4, nodes=2)["traffic"]
                   for first in (False, True))
    n_elems = 2048  # of a rank's experts, in whole blocks; half of them go from each of a node's two ranks
    for what in "gradients to their owners", "new values to all ranks":
        assert there[what]["between nodes"] - here[what]["between nodes"] == 2 * n_elems // 2 * 4
        assert here[what]["between nodes"] > 0


def resident(rank, world, cases):
    """What the kernel counts for this rank, with its part of shared memory: after initialize, where gradients are
    there, and after a step."""
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    found = []
    for config in [*cases[:2], *cases]:  # what torch, the communicator and the interpreter keep is there then
        gc.collect()
        deepspeed.comm.barrier()  # all have let go of what they shared
        test_memory.trimmed_kib()
        before = sum(test_memory.private_kib())
        module = test_memory.Deep()
        engine = deepspeed.initialize(model=module, config=copy.deepcopy(config))[0]
        x = torch.randn(2, test_memory.WIDTH).to(models.DTYPES[engine._model_dtype()])
        gc.collect()
        deepspeed.comm.barrier()  # who has touched shared memory counts his part of it
        sizes = [1024 * (sum(test_memory.private_kib()) - before)]  # as initialize left it
        deepspeed.comm.barrier()
        for phase in "backward", "step":
            if phase == "step":
                engine.step()
            else:
                engine.backward(engine(x))
            deepspeed.comm.barrier()
            test_memory.trimmed_kib()
            sizes.append(1024 * (sum(test_memory.private_kib()) - before))
            deepspeed.comm.barrier()
        # Slots beyond those that are there from the start: this rank was ahead.
        slots = engine._core.counters()["shared_bytes"] - 4 * test_memory.N_ELEMS // world - (16 << 20)
        early = world > 1 and config["zero_optimization"]["stage"] > 1
        found.append([size - (max(slots, 0) if early else 0) for size in sizes])
        engine.destroy()
        del engine, module
    return found[2:]


@pytest.mark.parametrize("world", [1, 2])
def test_the_kernel_agrees_within_two_percent(ranks, world):
    stages = ((3, "bf16"), (1, "bf16"), (2, "fp32"), (0, "fp32")) if world > 1 else ((3, "fp32"), (0, "bf16"))
    cases = [models.config(stage, dtype) for stage, dtype in stages]
    per_rank = ranks(world, resident, cases)
    for i, config in enumerate(cases):
        with torch.device("meta"):
            module = test_memory.Deep()
        found = plan(module, _core.Config(config, world), world)
        # Gradients are there after backward as in a step; before and after it there is what a forward begins with.
        for seen, phase in enumerate(("forward", "step", "forward")):
            if seen == 0 and world > 1 and config["zero_optimization"]["stage"] > 1:
                continue  # the kernel may have left out slots that nobody has touched
            node = sum(rank[i][seen] for rank in per_rank)
            assert abs(node - found["node"][phase]) < 0.02 * found["node"][phase], (config, phase, node, found["node"])


# ---- the command ----

@pytest.fixture
def run(tmp_path, capsys):
    def call(model, *options, config=None):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(config or models.config(2, "bf16", 2)))
        code = main(["--model", model, "--config", str(path), *map(str, options)])
        return code, *capsys.readouterr()

    return call


def test_the_command_prints_tables_and_json(run):
    code, text, _ = run("test_memory:Deep", "--world-size", 4, "--memory", "1.5G")
    assert code == 0 and text.startswith("10.50 M trained parameters; 4 ranks on 1 node; optimizer AdamW\n")
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].split("  ") for line in text.splitlines() if "  " in line}
    rows = {name: [cell.strip() for cell in cells if cell.strip()] for name, cells in rows.items()}
    assert rows["optimizer states"] == ["20.0 MiB", "-"] and rows["reduced sums"] == ["-", "40.0 MiB"]
    code, text, _ = run("test_memory:Deep", "--world-size", 4, "--memory", "1.5G", "--json")
    found = json.loads(text)
    assert found["elements"] == {"trained": test_memory.N_ELEMS, "frozen": 0} and found["memory"] == 3 << 29
    assert found["private"]["parameters"] == 2 * test_memory.N_ELEMS
    assert found["traffic"]["gradients to their owners"]["times"] == 2


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_page_shows_what_the_command_prints(run):
    parts = (pathlib.Path(__file__).parent.parent / "docs" / "planning.md").read_text().split("```")
    command, config, said = parts[1].replace("\\\n", ""), parts[3].removeprefix("json"), parts[5].lstrip("\n")
    words = shlex.split(command)[3:]
    options = dict(zip(words[::2], words[1::2]))
    model, _ = options.pop("--model"), options.pop("--config")
    code, text, _ = run(model, *(word for pair in options.items() for word in pair), config=json.loads(config))
    assert code == 0 and text == said


def test_the_largest_model_fits_and_nothing_larger(run):
    options = "--world-size", 4, "--nodes", 2, "--memory", "2G", "--json"
    scale = json.loads(run("models:grown", "--kwargs", '{"width": 512}', *options)[1])["scale"]
    for factor, fits in ((0.98, True), (1.02, False)):
        width = round(512 * (factor * scale) ** 0.5)
        found = json.loads(run("models:grown", "--kwargs", json.dumps({"width": width}), *options)[1])
        assert (max(found["node"].values()) <= 2 << 30) == fits


@pytest.mark.parametrize("model, options, said", [
    ("no.such:factory", (), "module 'no.such' cannot be imported"),
    ("models", (), "--model is 'models'; allowed: import.path:factory"),
    ("models:nosuch", (), "models has no 'nosuch'"),
    ("models:DTYPES", (), "models:DTYPES is a dict; allowed: a callable"),
    ("test_plan:nothing", (), "returned a int; allowed: an nn.Module"),
    ("test_plan:computes", (), "test_plan:computes raised RuntimeError on the meta device"),
    ("test_plan:trains_nothing", (), "no parameter requires a gradient"),
    ("test_plan:wide", (), "trainable parameter weight is float64; allowed: float32, bfloat16, float16"),
    ("test_plan:other_groups", (), "group_name 'mine'; allowed: 'ep_size_N'"),
    ("test_plan:Experts", ("--world-size", 3), "--world-size is 3, which ep_size_2 of parameter moe."),
    ("models:Awkward", ("--world-size", 0), "--world-size is 0; allowed: 1 to 1048576"),
    ("models:Awkward", ("--world-size", 3000000000), "--world-size is 3000000000; allowed: 1 to 1048576"),
    ("models:Awkward", ("--world-size", 4, "--zero-init"), "--zero-init with zero_optimization.stage 2; allowed: 3"),
    ("models:Awkward", ("--world-size", 4, "--nodes", 3), "--nodes is 3 and --world-size 4"),
])
def test_errors_name_the_argument(run, model, options, said):
    config = models.config(0) if model == "test_plan:wide" else None
    code, out, err = run(model, *(options or ("--world-size", 2)), config=config)
    assert code == 2 and out == "" and said in err, err


def test_wrong_configurations_and_options_end_the_command(run, capsys):
    code, _, err = run("models:Awkward", "--world-size", 2, config={"train_batch_size": 3})
    assert code == 2 and "train_batch_size" in err
    with pytest.raises(SystemExit):
        run("models:Awkward", "--world-size", 2, "--memory", "many")
    assert "'many'; allowed: a number of bytes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("models:Awkward", "--world-size", 2, "--memory", "99999999999T")
    assert "'99999999999T'; allowed: at most" in capsys.readouterr().err


def test_a_plan_needs_no_memory_of_the_models_size():
    module = make_model("models:grown", {"width": 1 << 18})  # 256 GiB
    found = plan(module, _core.Config(models.config(1, "bf16"), 8), 8)
    assert found["elements"]["trained"] > 1 << 36 and 0 < found["scale"] < 1 and machine_memory() > 0
    with pytest.raises(PlanError, match="--nodes"):
        plan(module, _core.Config(models.config(1, "bf16"), 8), 8, 3)
