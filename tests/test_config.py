"""Configuration from Python: sources, values, errors, the page docs/config.md, and random configurations."""
import base64
import copy
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_c import _core

Config, ConfigError = _core.Config, _core.DeepSpeedConfigError
ROWS = _core.config_keys()
BASE = {"train_batch_size": 8}


def refused(source, *parts, world_size=1):
    """The text of the error that a configuration gives; every part must be in it."""
    with pytest.raises(ConfigError) as caught:
        Config(source, world_size)
    text = str(caught.value)
    for part in parts:
        assert part in text
    return text


# ---- bad arguments ----

@pytest.mark.parametrize("source", [None, 3, [1], b"{}", object()])
def test_a_source_of_another_type_is_a_type_error(source):
    with pytest.raises(TypeError):
        Config(source)


@pytest.mark.parametrize("world_size", [0, -1])
def test_a_world_without_ranks_is_an_error(world_size):
    with pytest.raises(ValueError, match="world_size"):
        Config(BASE, world_size)


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, b"x", int, pytest])
def test_an_object_that_is_no_value_is_named_by_its_path(value):
    refused({**BASE, "optimizer": {"type": "Adam", "params": {"betas": [0.9, value]}}}, "optimizer.params.betas.[1]: ",
            type(value).__name__)


def test_a_torch_dtype_is_no_value():
    torch = pytest.importorskip("torch")
    refused({**BASE, "tensor_parallel": {"dtype": torch.float16}}, "tensor_parallel.dtype: ", "dtype")


def test_keys_are_strings():
    refused({**BASE, "optimizer": {"type": "Adam", "params": {3: 4}}},
            "optimizer.params: a key that is not a string (int)")


def test_text_that_c_cannot_hold_is_refused():
    refused({**BASE, "wandb": {"team": "a\0b"}}, "wandb.team: text with a zero byte")
    refused({**BASE, "wandb": {"team": "\ud800"}}, "wandb.team: text with a lone surrogate")
    refused({**BASE, "wandb\0": 1}, "zero byte")


def test_a_dict_that_contains_itself_is_refused():
    loop = dict(BASE)
    loop["notes"] = loop
    refused(loop, "nested too deeply")


def test_a_number_that_no_float_holds_is_refused():
    refused({**BASE, "seed": 10**400}, "seed: ")


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    refused(str(tmp_path / "no.json"), "no.json", "No such file")
    refused(tmp_path, str(tmp_path))


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.json"
    path.write_bytes(b'{"train_batch_size": 8, "x": "\xe9"}')
    refused(path, "latin.json: not JSON")


def test_a_broken_file_is_placed_by_line_and_column(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{\n  "train_batch_size": 8,\n}\n')
    refused(path, "broken.json: not JSON at line 3, column 1")


EMPTYING = """
from deepspeed_c._core import Config

class Number:
    def __float__(self):
        container.clear()
        return 0.5

container = {"train_batch_size": 2}
container["".join(["gradient_", "clipping"])] = Number()
config = Config(container)
assert config.get("gradient_clipping") == 0.5 and not config.warnings, config.warnings
container = [Number(), 0.75]
Config({"train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"betas": container}}})
"""


def test_a_container_that_a_number_empties_while_it_is_read_is_no_fault_in_memory():
    done = subprocess.run([sys.executable, "-c", EMPTYING], env={**os.environ, "PYTHONMALLOC": "debug"},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_base64_of_json_is_a_configuration_and_what_is_wrong_in_it_is_told():
    text = json.dumps({"train_batch_size": 8, "note": "\u00fe\u00ff?>"}, ensure_ascii=False).encode()
    for encode in base64.urlsafe_b64encode, base64.b64encode:
        assert Config(encode(text).decode()).source == json.loads(text)
    assert Config(base64.encodebytes(text).decode()).source == json.loads(text)  # lines, as the command writes them
    refused(base64.b64encode(b'{"train_batch_size": 0}').decode(), "train_batch_size is 0")
    refused(base64.b64encode(b'{"train_batch_size": }').decode(), "the configuration in base64: not JSON at line 1")
    refused(base64.b64encode(b"no object").decode(), "cannot read the configuration")


def test_origin_is_the_path_that_the_user_wrote():
    config = Config({"train_batch_size": 8, "bfloat16": {"enabled": True}, "gradient_clipping": "auto",
                     "zero_optimization": {"prefetch_bucket_size": 1, "cpu_offload": False}, "seed": None})
    assert config.origin("bf16.enabled") == ("bfloat16.enabled", "given")
    assert config.origin("zero_optimization.stage3_prefetch_bucket_size") == (
        "zero_optimization.prefetch_bucket_size", "given")
    assert config.origin("zero_optimization.offload_optimizer.device") == ("zero_optimization.cpu_offload", "given")
    assert config.origin("gradient_clipping") == ("gradient_clipping", "auto")
    assert config.origin("seed") == ("seed", "null") and config.origin("steps_per_print") is None
    assert Config({**BASE, "zero_optimization": True}).origin("zero_optimization.stage") == (
        "zero_optimization", "given")
    with pytest.raises(KeyError, match="nearest: seed"):
        config.origin("sed")


def test_an_error_has_the_warnings_of_the_same_reading():
    with pytest.raises(ConfigError) as caught:
        Config({"train_batch_size": 0, "bfloat16": {"enabled": True}})
    assert caught.value.warnings == ["bfloat16 is a deprecated name; write bf16"]


def test_keys_that_stand_twice_are_named(tmp_path):
    refused('{"fp16": {"enabled": true, "enabled": false}}', "the key fp16.enabled stands twice")


def test_a_path_that_is_no_key_is_a_key_error():
    config = Config(BASE)
    for method in (config.get, config.given, config.subtree):
        with pytest.raises(KeyError, match="nearest: zero_optimization.stage"):
            method("zero_optimization.stag")
        with pytest.raises(TypeError):
            method(3)


# ---- the faults that users reported ----

def test_a_slip_in_gradient_clipping_is_an_error():
    refused({"gradient_clipp1ng": 1, **BASE},
            "unknown key gradient_clipp1ng (value 1); did you mean gradient_clipping?")


def test_all_errors_come_at_once_however_many():
    zero = {f"stage_{i}": i for i in range(40)}
    text = refused({**BASE, "gradient_clipping": -1, "zero_optimization": zero, "fp16": {"enabled": "yes"}})
    assert text.startswith("the configuration has 42 errors:\n  1. gradient_clipping is -1")
    assert "\n  42. fp16.enabled is \"yes\"" in text
    assert all(f"zero_optimization.stage_{i} " in text for i in range(40))


def test_unknown_top_level_keys_warn_and_are_errors_when_strict(monkeypatch):
    source = {**BASE, "msamp": {"enabled": True}, "zero_optimization.reduce_bucket_size": 5e7}
    warnings = Config(source).warnings
    assert len(warnings) == 2 and "msamp" in warnings[0] and "zero_optimization.reduce_bucket_size" in warnings[1]
    monkeypatch.setenv("DS_CONFIG_STRICT", "0")
    assert len(Config(source).warnings) == 2
    monkeypatch.setenv("DS_CONFIG_STRICT", "1")
    refused(source, "2 errors", "unknown key msamp", "unknown key zero_optimization.reduce_bucket_size")


def test_batch_sizes_that_do_not_fit_show_all_four_numbers():
    refused({"train_batch_size": 33, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            "(33)", "(4)", "(2)", "world size (3)", world_size=3)


def test_the_name_of_an_optimizer_stays_as_it_was_written():
    assert Config({**BASE, "optimizer": {"type": "adam"}}).get("optimizer.type") == "adam"


# ---- what clients write ----

def test_what_accelerate_writes_is_accepted():
    offload = {"device": "none", "nvme_path": None}
    config = Config({
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0, "steps_per_print": float("inf"), "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "offload_optimizer": offload, "offload_param": offload,
                              "stage3_gather_16bit_weights_on_model_save": False},
        "fp16": {"enabled": False}, "bf16": {"enabled": True}}, 2)
    assert config.warnings == []
    assert config.get("steps_per_print") == math.inf
    assert config.get("zero_optimization.offload_param.device") == "none"


def test_what_lightning_writes_is_accepted():
    config = Config({
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False,
                                     "contiguous_memory_optimization": False, "synchronize_checkpoint_boundary": False},
        "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True,
                "thread_count": 1},
        "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1, "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16,
                                                   "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
        "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": True,
                              "allgather_partitions": True, "reduce_scatter": True, "sub_group_size": 1e12,
                              "allgather_bucket_size": 200_000_000, "reduce_bucket_size": 200_000_000}})
    assert config.warnings == [] and config.get("zero_optimization.sub_group_size") == 10**12


def test_what_the_cifar_tutorial_writes_is_accepted():
    config = Config({
        "train_batch_size": 16, "steps_per_print": 2000, "prescale_gradients": False, "wall_clock_breakdown": False,
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8,
                                                 "weight_decay": 3e-7}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001,
                                                     "warmup_num_steps": 1000}},
        "gradient_clipping": 1.0, "bf16": {"enabled": False},
        "fp16": {"enabled": True, "fp16_master_weights_and_grads": False, "loss_scale": 0, "loss_scale_window": 500,
                 "hysteresis": 2, "min_loss_scale": 1, "initial_scale_power": 15},
        "zero_optimization": {"stage": 1, "allgather_partitions": True, "reduce_scatter": True,
                              "allgather_bucket_size": 50000000, "reduce_bucket_size": 50000000, "overlap_comm": True,
                              "contiguous_gradients": True, "cpu_offload": False}}, 2)
    assert [w for w in config.warnings if "cpu_offload" not in w] == []
    assert config.subtree("scheduler.params")["warmup_num_steps"] == 1000


# ---- values ----

def test_values_have_the_types_of_the_table():
    config = Config({**BASE, "zero_optimization": {"reduce_bucket_size": 5e8}, "gradient_clipping": 1})
    assert type(config.get("zero_optimization.reduce_bucket_size")) is int
    assert type(config.get("gradient_clipping")) is float
    assert config.get("zero_optimization.overlap_comm") is None
    assert config.get("fp16.enabled") is False
    assert config.get("wandb.team") is None and config.get("wandb.project") == "deepspeed"
    assert config.get("optimizer.params") is None
    assert config.get("fp32.check_grad_overflow") is False


def test_numpy_numbers_and_paths_count_as_what_they_hold():
    import numpy as np
    config = Config({"train_batch_size": np.int64(8), "gradient_clipping": np.float32(0.5),
                     "tensorboard": {"output_path": pathlib.Path("runs")}})
    assert config.get("train_batch_size") == 8 and config.get("gradient_clipping") == 0.5
    assert config.get("tensorboard.output_path") == "runs"


def test_a_section_gives_its_settings_in_effect():
    config = Config({**BASE, "bfloat16": {"enabled": True}})
    assert config.get("bf16")["enabled"] is True and config.get("bf16")["check_grad_overflow"] is True
    assert config.get("bfloat16.enabled") is True and config.given("bf16.enabled") and not config.given("fp16.enabled")
    assert config.subtree("bf16") == {"enabled": True}


def test_params_keep_python_types_and_lose_auto():
    params = {"lr": 1, "betas": (0.9, 0.999), "eps": "auto", "inner": {"a": "auto", "b": [1, 2.0]}}
    config = Config({**BASE, "optimizer": {"type": "AdamW", "params": params}})
    got = config.subtree("optimizer.params")
    assert got == {"lr": 1, "betas": (0.9, 0.999), "inner": {"b": [1, 2.0]}}
    assert type(got["lr"]) is int and type(got["betas"]) is tuple
    assert config.get("optimizer.params.lr") == 1 and config.get("optimizer.params.eps") is None
    assert config.given("optimizer.params.lr") and not config.given("optimizer.params.eps")


def test_what_is_given_out_is_nobodys_but_the_callers():
    source = {**BASE, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.99]}}}
    config = Config(source)
    assert config.source is source
    config.subtree("optimizer.params")["betas"].append(7)
    config.to_dict()["fp16"]["enabled"] = True
    config.warnings.append("x")
    source["optimizer"]["params"]["lr"] = 3
    assert config.subtree("optimizer.params") == {"betas": [0.9, 0.99]}
    assert config.get("fp16.enabled") is False and config.warnings == []


def test_the_parsed_dict_is_left_as_it_was():
    source = {**BASE, "bfloat16": {"enabled": True}, "zero_optimization": True, "gradient_clipping": "auto"}
    before = copy.deepcopy(source)
    Config(source)
    assert source == before


def test_effective_settings_parse_to_themselves():
    config = Config({"train_batch_size": 16, "zero_optimization": {"stage": 2, "stage3_max_live_parameters": 7},
                     "optimizer": {"type": "sgd", "params": {"lr": 0.1}}, "fp16": {"enabled": True}}, 2)
    assert Config(config.to_dict(), 2).to_dict() == config.to_dict()


def test_many_threads_read_and_parse_at_once():
    source = {**BASE, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.99]}}, "msamp": 1}
    shared, wrong = Config(source), []

    def work(batch):
        for _ in range(200):
            own = Config({**source, "train_batch_size": batch})
            with pytest.raises(ConfigError, match=f"is -{batch}"):
                Config({"train_batch_size": -batch})
            if own.get("train_batch_size") != batch or shared.subtree("optimizer.params") != {"betas": [0.9, 0.99]}:
                wrong.append(batch)

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- the table and its page ----

def test_every_default_parses_to_itself():
    for row in ROWS:
        if row["default"] is None or row["type"] == "section" or "[]" in row["path"]:
            continue
        tree = value = {}
        *sections, name = row["path"].split(".")
        for section in sections:
            value[section] = {}
            value = value[section]
        value[name] = row["default"]
        config = Config({**BASE, **tree})
        assert config.get(row["path"]) == row["default"], row["path"]


def test_every_key_that_is_not_yet_there_refuses_something():
    other = {"bool": lambda d: not d, "int": lambda d: (d or 1) + 1, "float": lambda d: d + 1,
             "string": lambda d: "other", "enum": lambda d: "fp16", "list": lambda d: [1], "dict": lambda d: {"a": 1},
             "any": lambda d: 7}
    for row in ROWS:
        if row["status"] != "not yet":
            continue
        value = other[row["type"]](row["default"])
        for name in reversed(row["path"].split(".")):
            value = {name: value}
        refused({**BASE, **value}, row["path"], "not yet")


@pytest.mark.parametrize("given, parts", [
    ({"data_types": {"grad_accum_dtype": "bf16"}}, ("data_types.grad_accum_dtype", "fp32")),
    ({"data_types": {"param_dtype": "fp16"}, "bf16": {"enabled": True}}, ("data_types.param_dtype", "bf16")),
    ({"fp16": {"fp16_master_weights_and_grads": True}}, ("fp16.fp16_master_weights_and_grads", "fp16.enabled")),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, ("bf16.bf16_master_weights_and_grads", "bf16.enabled")),
    ({"torch_autocast": {"enabled": True}, "bf16": {"enabled": True}}, ("torch_autocast.enabled", "bf16")),
    ({"data_parallel_size": 3}, ("data_parallel_size is 3", "ranks over data")),
    ({"sequence_parallel_size": 2}, ("sequence_parallel_size is 2", "no mpu", "initialize_parallel_state_from_config")),
    ({"num_distributed_optimizer_instances": 2}, ("num_distributed_optimizer_instances is 2", "no mpu")),
    ({"gradient_predivide_factor": 0}, ("gradient_predivide_factor", "> 0")),
    ({"gradient_allreduce_op": "max"}, ("gradient_allreduce_op", "sum")),
])
def test_types_that_do_not_go_together_are_an_error_that_names_them(given, parts):
    refused({**BASE, **given}, *parts)


def test_no_accessor_stands_twice():
    names = [row["accessor"] for row in ROWS if row["accessor"]]
    assert len(names) == len(set(names)) and {"fp16_enabled", "bfloat16_enabled", "zero_reduce_bucket_size",
                                              "gradient_clipping", "zero_optimization_stage"} <= set(names)


def test_the_page_has_exactly_the_rows_of_the_table(root):
    spec = importlib.util.spec_from_file_location("config_table", root / "docs" / "config_table.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = (root / "docs" / "config.md").read_text()
    lines = text.split(page.BEGIN)[1].split(page.END)[0].splitlines(keepends=True)
    expected = page.table(ROWS).splitlines(keepends=True)
    for got, row in zip(lines, expected):
        assert got == row, "run: python docs/config_table.py"
    assert len(lines) == len(expected) == len(ROWS) + 2


def test_the_page_shows_messages_as_they_are(root):
    text = (root / "docs" / "config.md").read_text()
    said = refused({**BASE, "gradient_clipping": -1,
                    "zero_optimization": {"stge": 1, "zero_quantized_weights": True}})
    assert said in text


# ---- random configurations ----

def value_for(row):
    """A strategy of values that the row allows today."""
    default = st.just(row["default"])
    if row["status"] == "not yet":
        return default
    if row["path"] == "zero_optimization.stage":
        return st.integers(0, 2)
    if row["path"].endswith(("_batch_size", "_per_gpu", "_steps")) or row["type"] in ("enum", "any", "list"):
        return default
    return {"bool": st.booleans(), "bool or null": st.sampled_from([None, True, False]),
            "int": st.sampled_from([row["default"], 2, 100, "auto"]), "float": st.floats(2**-10, 1),
            "string": st.text(max_size=8).filter(lambda s: "\0" not in s and s.isprintable()),
            "dict": st.dictionaries(st.text("abc", max_size=3), st.integers(), max_size=2)}[row["type"]]


LEAVES = [row for row in ROWS if row["type"] != "section" and "[]" not in row["path"]
          and not row["path"].startswith(("optimizer.", "scheduler.", "fp16.enabled", "train_", "gradient_acc",
                                          "fp16.initial", "fp16.min", "bf16.enabled", "torch_autocast.enabled",
                                          "fp16.fp16_master", "bf16.bf16_master", "num_distributed",
                                          "tensor_parallel.autotp"))
          and not row["path"].endswith("_parallel_size")]


@st.composite
def configurations(draw):
    """A dict that must be accepted: some keys, each with a value that it allows."""
    tree = {"train_batch_size": draw(st.integers(1, 1000))}
    for row in draw(st.lists(st.sampled_from(LEAVES), max_size=12, unique_by=lambda row: row["path"])):
        *sections, name = row["path"].split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = draw(value_for(row))
    return tree


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tree=configurations())
def test_dict_text_and_file_read_alike(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(tree, indent=1))
    from_dict, from_text, from_file = Config(tree), Config(json.dumps(tree)), Config(path)
    assert from_dict.to_dict() == from_text.to_dict() == from_file.to_dict()
    assert from_dict.source == from_text.source == from_file.source
    assert from_dict.warnings == from_text.warnings == from_file.warnings
    assert all("not yet" in warning or "no mpu" in warning for warning in from_dict.warnings)
    for row in LEAVES:
        assert from_dict.given(row["path"]) == from_file.given(row["path"])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=5) | st.just("auto"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)
PATHS = st.sampled_from([row["path"] for row in ROWS] + ["bfloat16", "zero_optimization.cpu_offload", "nobody.knows"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tree=configurations(), changes=st.lists(st.tuples(PATHS, ANYTHING), min_size=1, max_size=4))
def test_a_mutated_dict_is_read_or_refused_but_never_crashes(tree, changes):
    for path, value in changes:
        *sections, name = path.split(".")
        at = tree
        for section in sections:
            if not isinstance(at.get(section), dict):
                at[section] = {}
            at = at[section]
        at[name] = value
    try:
        config = Config(tree)
    except ConfigError as error:
        assert str(error).startswith(("the configuration ", *[path.split(".")[0] for path, _ in changes]))
        return
    batch, micro, steps = map(config.get, ("train_batch_size", "train_micro_batch_size_per_gpu",
                                           "gradient_accumulation_steps"))
    assert batch == micro * steps
    config.to_dict()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tree=configurations(), cut=st.integers(0, 400),
       noise=st.text('{}[]",:\\ 019eE.-+truefalsn\x00\x01é', max_size=4))
def test_mutated_text_is_accepted_exactly_when_json_accepts_it(tree, cut, noise):
    text = json.dumps(tree)
    text = "{" + text[1:cut + 1] + noise + text[cut + 1:]

    def unique(pairs):
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("twice")
        return dict(pairs)

    def constant(name):
        raise ValueError(name)

    try:
        expected = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except ValueError:
        expected = None
    try:
        assert Config(text).source == expected
    except ConfigError as error:
        wrong_json = any(part in str(error) for part in ("not JSON", "stands twice"))
        assert wrong_json == (expected is None)


@pytest.mark.parametrize("given, key", [({"wandb": {"enabled": True}}, "wandb.enabled"),
                                        ({"tensorboard": {"enabled": True}}, "tensorboard.enabled"),
                                        ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled")])
def test_what_would_only_print_is_a_warning_that_says_not_yet(given, key):
    config = _core.Config({"train_batch_size": 1, **given})
    assert any(key in line and "not yet" in line for line in config.warnings)
