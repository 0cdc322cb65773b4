"""python -m deepspeed_c.config: where each setting comes from, or everything that is wrong."""
import json
import subprocess
import sys

import pytest

from deepspeed_c import _core
from deepspeed_c.config import explain, lines_of, main

FILE = """{
  "train_batch_size": 16,
  "gradient_accumulation_steps": "auto",
  "optimizer": {"type": "adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
  "scheduler": {"type": "StepLR",
                "params": {"step_size": 10}},
  "bfloat16": {"enabled": true},
  "zero_optimization": {
    "stage": 2,
    "allgather_sequential": true,
    "cpu_offload": false
  },
  "steps_per_print": null
}
"""


@pytest.fixture
def run(tmp_path, capsys):
    """run(text, *options) -> (exit code, {key: (value, where from)}, lines on stderr)"""

    def call(text, *options):
        path = tmp_path / "ds_config.json"
        path.write_text(text)
        code = main([str(path), *options])
        out, err = capsys.readouterr()
        head, _, rows = out.partition("\n")
        ends = [head.find("value"), head.find("from")]
        table = {row[:ends[0]].strip(): (row[ends[0]:ends[1]].strip(), row[ends[1]:]) for row in rows.splitlines()}
        return code, table, err.splitlines()

    return call


def test_each_setting_has_its_value_and_where_it_comes_from(run):
    code, table, err = run(FILE, "--world-size", "2")
    assert code == 0 and table == {
        "train_batch_size": ("16", "line 2"),
        "train_micro_batch_size_per_gpu": ("8", "train_batch_size / gradient_accumulation_steps / 2 ranks"),
        "gradient_accumulation_steps": ("1", '1, because nothing says more ("auto" at line 3)'),
        "optimizer.type": ('"adam"', "line 4"),
        "optimizer.params.lr": ("0.001", "line 4"),
        "optimizer.params.betas": ("[0.9, 0.95]", "line 4"),
        "scheduler.type": ('"StepLR"', "line 5"),
        "scheduler.params.step_size": ("10", "line 6"),
        "bf16.enabled": ("true", "line 7, as bfloat16.enabled"),
        "zero_optimization.stage": ("2", "line 9"),
        "zero_optimization.stage3_allgather_sequential": table["zero_optimization.stage3_allgather_sequential"],
        "zero_optimization.offload_optimizer.device": ('"none"', "line 11, as zero_optimization.cpu_offload"),
        "steps_per_print": ("10", "default (null at line 13)"),
    }
    value, origin = table["zero_optimization.stage3_allgather_sequential"]
    assert value == "true" and origin.startswith("line 10, as zero_optimization.allgather_sequential; no effect: ")
    assert err == ["warning: bfloat16 is a deprecated name; write bf16",
                   "warning: zero_optimization.cpu_offload is a deprecated name; write "
                   "zero_optimization.offload_optimizer.device"]


def test_a_layout_is_explained_for_an_mpu(run):
    text = '{"train_batch_size": 4, "tensor_model_parallel_size": 2}'
    code, _, err = run(text)
    assert code == 1 and "there is no mpu" in err[0]
    code, table, err = run(text, "--mpu")
    assert code == 0 and not err and table["tensor_model_parallel_size"] == ("2", "line 1")


def test_all_shows_defaults_too_and_effects_what_keys_do(run):
    _, table, _ = run('{"train_batch_size": 1}', "--all", "--effects")
    keys = {row["path"] for row in _core.config_keys() if row["type"] != "section" and "[]" not in row["path"]}
    assert table.keys() == keys
    assert table["gradient_clipping"] == ("1.0", "default; largest global gradient norm; 0 turns clipping off")


def test_all_shows_what_the_classes_take_by_default(run):
    _, table, _ = run('{"train_batch_size": 1,\n "optimizer": {"type": "AdamW", "params": {"lr": 0.5}},\n'
                      ' "scheduler": {"type": "LRRangeTest"}}', "--all")
    assert table["optimizer.params.lr"] == ("0.5", "line 2")
    assert table["optimizer.params.adam_w_mode"] == ("true", "follows from AdamW")
    assert table["optimizer.params.eps"] == ("1e-08", "default of FusedAdam")
    assert table["scheduler.params.lr_range_test_step_size"] == ("2000", "default of LRRangeTest")


@pytest.mark.parametrize("sizes, derived", [
    ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3},
     {"gradient_accumulation_steps": ("4", "train_batch_size / train_micro_batch_size_per_gpu / 2 ranks")}),
    ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4},
     {"train_batch_size": ("24", "train_micro_batch_size_per_gpu * gradient_accumulation_steps * 2 ranks")}),
])
def test_batch_sizes_say_how_they_follow(run, sizes, derived):
    _, table, _ = run(json.dumps(sizes), "--world-size", "2")
    assert {key: row for key, row in table.items() if row[1] != "line 1"} == derived


def test_all_errors_and_warnings_come_at_once_with_exit_code_1(run):
    code, table, err = run('{"train_batch_size": 3, "gradient_clipping": -1, "bfloat16": {}, "fp16": {"enable": 1}}',
                           "--world-size", "2")
    text = "\n".join(err)
    assert code == 1 and table == {}
    for part in ("has 3 errors", "gradient_clipping is -1", "unknown key fp16.enable", "train_batch_size (3) must be",
                 "warning: bfloat16 is a deprecated name"):
        assert part in text


def test_what_only_the_named_classes_know_is_an_error_too(run):
    code, _, err = run('{"train_batch_size": 1, "optimizer": {"type": "Adam", "params": {"learning_rate": 1}},'
                       ' "scheduler": {"type": "warmupLR"}}')
    assert code == 1 and len(err) == 2
    assert "optimizer.params.learning_rate" in err[0] and "Did you mean 'WarmupLR'" in err[1]


@pytest.mark.parametrize("sections, text", [
    ('"optimizer": {"type": "Adam", "params": {"lr": -1}}', "lr is -1, allowed: a finite number >= 0"),
    ('"optimizer": {"type": "RMSprop", "params": {"alpha": -1}}', "Invalid alpha value: -1"),
    ('"optimizer": {"type": "Adafactor"}, "zero_optimization": {"stage": 1}', "set zero_allow_untested_optimizer"),
    ('"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}', "warmup_num_steps must be a positive"),
    ('"scheduler": {"type": "ConstantLR", "params": {"factor": 2}}', "multiplicative factor"),
])
def test_a_value_that_initialize_would_refuse_is_an_error(run, sections, text):
    code, _, err = run('{"train_batch_size": 1, ' + sections + "}")
    assert code == 1 and len(err) == 1 and text in err[0]


def test_what_initialize_would_take_is_no_error(run):
    assert run('{"train_batch_size": 1, "optimizer": {"type": "Adafactor"}, "zero_allow_untested_optimizer": true,'
               ' "zero_optimization": {"stage": 2}, "scheduler": {"type": "OneCycle", "params":'
               ' {"cycle_min_lr": [0.1, 0.2], "cycle_max_lr": 1.0}}}')[0] == 0
    assert run('{"train_batch_size": 1, "scheduler": {"type": "CyclicLR", "params": {"base_lr": 0.1, "max_lr": 1}}}'
               )[0] == 0


def test_faults_of_keys_and_of_classes_are_told_together(run):
    code, _, err = run('{"train_batch_siz": 2, "fp16": 3, "optimizer": {"type": "Adm", "params": "auto"},'
                       ' "scheduler": {"type": "StepLR", "params": {"step_siz": 3}}}')
    assert code == 1
    for text in "train_batch_siz ", "fp16 is 3", "optimizer.type is 'Adm'", "scheduler.params.step_siz":
        assert sum(text in line for line in err) == 1


@pytest.mark.parametrize("arguments, text", [
    ([], "give a file, or --keys"), (["no/such/file.json"], "No such file"),
    (["x", "--world-size", "0"], "allowed: >= 1"),
])
def test_wrong_options_and_files_that_cannot_be_read_exit_with_2(arguments, text, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and text in capsys.readouterr().err


def test_keys_lists_every_key(capsys):
    assert main(["--keys"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == [row["path"] for row in _core.config_keys() if row["type"] != "section"]


def test_lines_are_those_of_the_keys_whatever_strings_hold():
    text = '{"a": "}\\"{\\n",\n "b\\u0041": [\n{"c": 1}, {"c": 2, "d": {}}, [{"e": 1}]],\n\n "f": {"a": [], "g"\n: 1}}'
    assert lines_of(text) == {"a": 1, "bA": 2, "bA.[].c": 3, "bA.[].d": 3, "bA.[].[].e": 3, "f": 5, "f.a": 5, "f.g": 5}
    assert json.loads(text)["bA"]


def test_a_name_with_a_dot_is_not_the_key_that_it_looks_like(run):
    _, table, _ = run('{"train_batch_size": 1, "zero_optimization.stage": 2,\n "zero_optimization": {"stage": 1}}')
    assert table["zero_optimization.stage"] == ("1", "line 2")


def test_a_dict_can_be_explained_too():
    settings = {s.path: s for s in explain(_core.Config({"train_batch_size": 4, "bfloat16": {"enabled": True}}))}
    assert settings["train_batch_size"].origin == "given"
    assert settings["bf16.enabled"].origin == "given, as bfloat16.enabled"
    assert settings["gradient_clipping"][2:4] == ("default", True)


def test_it_runs_as_a_module_on_standard_input():
    run = subprocess.run([sys.executable, "-m", "deepspeed_c.config", "-"], input=FILE, capture_output=True, text=True)
    assert run.returncode == 0 and "zero_optimization.stage " in run.stdout and run.stderr.count("\n") == 2
