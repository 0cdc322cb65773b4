"""Import paths: every one that clients use, as statement and as attribute, by both names, leads to one object.

The lists here are written from what clients import, not from the package's table. Each check runs in a process of its
own, forked from one that has torch and nothing of ours, with the distribution of compat/ built and installed.
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What is imported as a module. The last column of names: what clients take from it.
MODULES = {
    "accelerator": ["get_accelerator"],
    "checkpoint.utils": ["clone_tensors_for_torch_save"],
    "checkpointing": ["checkpoint", "configure", "is_configured", "reset"],
    "comm": ["barrier", "get_rank", "init_distributed", "is_initialized"],
    "comm.comm": ["all_reduce", "init_distributed"],
    "launcher.runner": ["DEEPSPEED_ENVIRONMENT_NAME", "main"],
    "moe": [],
    "moe.experts": ["Experts"],
    "moe.layer": ["MoE"],
    "moe.mappings": ["drop_tokens", "gather_tokens"],
    "moe.sharded_moe": ["MOELayer", "TopKGate", "top1gating", "top2gating", "topkgating"],
    "moe.utils": ["is_moe_param", "split_params_into_different_moe_groups_for_optimizer"],
    "ops": ["__compatible_ops__"],
    "ops.adagrad": ["DeepSpeedCPUAdagrad"],
    "ops.adam": ["DeepSpeedCPUAdam", "FusedAdam"],
    "ops.aio": ["AsyncIOBuilder"],
    "ops.lamb": ["FusedLamb"],
    "ops.lion": ["DeepSpeedCPULion", "FusedLion"],
    "runtime": [],
    "runtime.activation_checkpointing.checkpointing": ["configure"],
    "runtime.base_optimizer": ["DeepSpeedOptimizer"],
    "runtime.engine": ["DeepSpeedEngine"],
    "runtime.fp16.loss_scaler": ["CreateLossScaler", "DynamicLossScaler", "LossScaler"],
    "runtime.lr_schedules": ["LRRangeTest", "OneCycle", "VALID_LR_SCHEDULES", "WarmupCosineLR", "WarmupDecayLR",
                             "WarmupLR", "add_tuning_arguments"],
    "runtime.pipe.topology": ["PipeDataParallelTopology", "PipeModelDataParallelTopology", "PipelineParallelGrid",
                              "ProcessTopology"],
    "runtime.utils": ["move_to_device"],
    "runtime.zero": ["GatheredParameters", "Init", "register_external_parameter"],
    "runtime.zero.config": ["ZeroStageEnum"],
    "runtime.zero.offload_config": ["OffloadDeviceEnum", "OffloadStateTypeEnum"],
    "runtime.zero.partition_parameters": ["GatheredParameters", "Init", "ZeroParamStatus",
                                          "register_external_parameter", "zero_wrapper_for_fp_tensor_constructor"],
    "runtime.zero.stage_1_and_2": ["DeepSpeedZeroOptimizer", "estimate_zero2_model_states_mem_needs_all_cold",
                                   "estimate_zero2_model_states_mem_needs_all_live"],
    "utils": ["OnDevice", "RepeatingLoader", "get_z3_leaf_modules", "groups", "instrument_w_nvtx", "log_dist",
              "logger", "safe_get_full_grad", "safe_set_full_fp32_param", "set_z3_leaf_modules"],
    "utils.groups": ["_get_sequence_parallel_group", "_get_sequence_parallel_rank",
                     "_get_sequence_parallel_world_size"],
    "utils.logging": ["log_dist", "logger"],
    "utils.parallel_state": ["ParallelState"],
    "utils.parallel_state_deepspeed": [
        "get_current_parallel_state", "get_data_parallel_group", "get_parallel_state_instance",
        "initialize_parallel_state_from_config", "is_initialized", "set_current_parallel_state"],
    "utils.tensor_fragment": ["fragment_address"],
    "utils.zero_to_fp32": ["convert_zero_checkpoint_to_fp32_state_dict", "get_fp32_state_dict_from_zero_checkpoint",
                           "get_model_state_file", "get_optim_files", "load_state_dict_from_zero_checkpoint"],
    "zero": ["GatheredParameters", "Init"],
}
# Paths that lead to what is not there: importable, and an error that says so at the name.
NOT_YET = {
    "pipe": ["LayerSpec", "PipelineModule", "TiedLayerSpec"],
    "profiling.flops_profiler": ["FlopsProfiler", "get_model_profile"],
    "runtime.pipe.engine": ["PipelineEngine"],
    "runtime.sequence_parallel.ulysses_sp": ["UlyssesSPAttentionHF", "UlyssesSPDataLoaderAdapter"],
    "runtime.zero.muon.original_muon": ["MuonWithAuxAdam"],
    "sequence.layer": ["DistributedAttention"],
}
# What is reached by dots after a bare `import deepspeed`, beside the modules above and their names.
TOP_LEVEL = ["DeepSpeedEngine", "__version__", "add_config_arguments", "init_distributed", "init_inference",
             "initialize", "tp_model_init"]

# Reads {key: code}, writes {key: the code's error or ""}.
RUN_EACH = """
import json, os, sys, torch, torch.distributed, torch.optim
results = {}
for key, code in json.load(sys.stdin).items():
    reader, writer = os.pipe()
    if os.fork() == 0:
        said = ""
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with open(reader) as text:
        results[key] = text.read()
    os.wait()
json.dump(results, sys.stdout)
"""


def environment(*folders):
    """This process's, with these folders and the tree first on the path of Python."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT)))}


def python(code, *folders, stdin=None, cwd=None):
    """A fresh Python over folders and the tree: what it wrote to stdout."""
    done = subprocess.run([sys.executable, "-c", code], env=environment(*folders), input=stdin, cwd=cwd,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the distribution `deepspeed` installed from a wheel of compat/."""
    folder = tmp_path_factory.mktemp("compat")
    shutil.copytree(ROOT / "compat", folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index",
                    "--target", folder / "site", folder / "source"], check=True, capture_output=True, text=True)
    return folder / "site"


def checks():
    """{key: code} of all that is asked of the import system."""
    found = {}
    for path in {**MODULES, **NOT_YET}:
        for one, other in (("deepspeed", "deepspeed_c"), ("deepspeed_c", "deepspeed")):
            found[f"statement {one}.{path}"] = (
                f"import {one}, importlib.util, sys\n"
                f"assert importlib.util.find_spec('{one}.{path}') is not None\n"
                f"import {one}.{path} as first\n"
                f"assert first.__spec__ is not None and first.__spec__.name == first.__name__\n"
                f"import deepspeed\n"
                f"import {other}.{path} as second\n"
                f"assert first is second is sys.modules['{one}.{path}'] is sys.modules['{other}.{path}']\n"
                f"assert importlib.util.find_spec('{one}.{path}') is not None\n"
                f"from {one} import {path.partition('.')[0]}\n")
    for path, names in MODULES.items():
        found[f"names of {path}"] = "".join(
            f"from deepspeed.{path} import {name} as first\nfrom deepspeed_c.{path} import {name} as second\n"
            "assert first is second\n" for name in names)
    for root in ("deepspeed", "deepspeed_c"):
        for path, names in {"": TOP_LEVEL, **MODULES}.items():
            found[f"attributes {root}.{path}".rstrip(".")] = f"import {root}\n" + "".join(
                f"assert {'.'.join(filter(None, (root, path, name)))} is not None\n" for name in [*names, ""])
    for path, names in NOT_YET.items():
        found[f"not yet {path}"] = f"import deepspeed.{path} as module\n" + "".join(
            f"assert '{name}' not in dir(module)\n"
            f"try:\n    from deepspeed.{path} import {name}\n"
            f"except NotImplementedError as error:\n    assert '{name} is not yet' in str(error), error\n"
            f"else:\n    raise SystemExit('{name} is there')\n" for name in names) + (
            "assert not hasattr(module, 'no_such_name')\n")
    return found


@pytest.fixture(scope="module")
def results(site):
    return json.loads(python(RUN_EACH, site, stdin=json.dumps(checks())))


@pytest.mark.parametrize("key", checks())
def test_path(results, key):
    assert results[key] == ""


@pytest.mark.parametrize("first, second", [("deepspeed", "deepspeed_c"), ("deepspeed_c", "deepspeed")])
def test_the_package_is_one_object_in_either_order(site, first, second):
    assert python(f"import {first}, {second}, sys; assert deepspeed is deepspeed_c; "
                  "assert sys.modules['deepspeed'] is deepspeed_c; "
                  "assert deepspeed.__spec__.name == 'deepspeed_c'", site) == ""


def test_what_clients_ask_of_the_metadata(site):
    out = python("import importlib.metadata as m, importlib.util as u; print(u.find_spec('deepspeed') is not None, "
                 "m.metadata('deepspeed')['Name'], m.version('deepspeed')); import deepspeed; "
                 "print(u.find_spec('deepspeed') is not None, list(m.distribution('deepspeed').entry_points))", site)
    assert re.fullmatch(r"True deepspeed 0\.19\.8\+deepspeed\.c\.[0-9.]+\nTrue \[\]\n", out)


def test_the_versions_agree():
    ours = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    text = (ROOT / "compat" / "pyproject.toml").read_text()
    assert f'version = "0.19.8+deepspeed.c.{ours}"' in text
    assert f'dependencies = ["deepspeed_c=={ours}"]' in text
    assert f'__version__ = "{ours}"' in (ROOT / "deepspeed_c" / "__init__.py").read_text()


def test_import_loads_no_torch_and_says_nothing(site):
    assert python("import deepspeed, sys; assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules",
                  site) == ""


def test_a_path_that_nobody_has_is_not_found(site):
    python("import deepspeed, importlib.util as u\n"
           "assert u.find_spec('deepspeed.nothing') is None and u.find_spec('deepspeed.comm.nothing') is None\n"
           "try:\n    import deepspeed.nothing\n"
           "except ModuleNotFoundError as error:\n    assert error.name == 'deepspeed.nothing'\n"
           "try:\n    deepspeed.nothing\nexcept AttributeError as error:\n    assert 'nothing' in str(error)\n", site)


def test_a_module_can_be_run_by_its_other_name(site):
    for name in ("deepspeed.launcher.runner", "deepspeed_c.launcher.runner"):
        done = subprocess.run([sys.executable, "-m", name, "--help"], env=environment(site), capture_output=True,
                              text=True, timeout=60)
        assert done.returncode == 0 and "--num_gpus" in done.stdout, done.stderr


def test_everything_that_dir_names_can_be_had(site):
    """inspect.getmembers and mock's autospec ask for all of it."""
    python("""
import inspect
import deepspeed
for module in (deepspeed, deepspeed.utils, deepspeed.runtime, deepspeed.runtime.zero, deepspeed.ops, deepspeed.pipe):
    assert "__name__" in dict(inspect.getmembers(module))
""", site)


def test_replaced_names_work_across_both(site):
    """mock.patch by dotted name, with the options that clients' own tests use, and module globals set by hand."""
    python("""
from unittest import mock
import deepspeed, deepspeed_c
with mock.patch("deepspeed.initialize") as fake:
    assert deepspeed_c.initialize is fake
assert deepspeed.initialize is deepspeed_c.api.initialize
with mock.patch("deepspeed.init_distributed", autospec=True) as fake:
    deepspeed.init_distributed("gloo", distributed_port=1)
    fake.assert_called_once()
with mock.patch("deepspeed.DeepSpeedEngine", autospec=True):
    pass
with mock.patch("deepspeed.zero.Init") as fake:
    assert deepspeed_c.runtime.zero.Init is fake
import deepspeed.runtime.zero.partition_parameters as parameters
parameters.something = 5
assert deepspeed_c.runtime.zero.partition_parameters.something == 5
""", site)


def test_pickles_and_classes_are_the_same_by_both_names(site):
    python("""
import copyreg, pickle
import deepspeed, deepspeed_c, torch
from deepspeed.runtime.engine import DeepSpeedEngine
assert DeepSpeedEngine is deepspeed_c.DeepSpeedEngine
assert pickle.loads(pickle.dumps(deepspeed.runtime.lr_schedules.WarmupLR)) is deepspeed_c.runtime.lr_schedules.WarmupLR
# What was pickled where DeepSpeed itself was installed.
assert pickle.loads(b"cdeepspeed.runtime.lr_schedules\\nWarmupLR\\n.") is deepspeed_c.runtime.lr_schedules.WarmupLR
model = torch.nn.Linear(2, 2)
engine, *_ = deepspeed.initialize(model=model, config={"train_batch_size": 1})
assert isinstance(engine, deepspeed.DeepSpeedEngine) and type(engine) == deepspeed_c.DeepSpeedEngine
""", site)


def test_files_of_real_deepspeed_in_the_same_folder_are_an_error(site, tmp_path):
    shutil.copytree(site, tmp_path / "both")
    (tmp_path / "both" / "deepspeed" / "runtime").mkdir()
    out = python("try:\n    import deepspeed\nexcept ImportError as error:\n    print(error)", tmp_path / "both")
    assert "holds files of another deepspeed (runtime)" in out and "pip uninstall deepspeed" in out


SAVES = """
import json, os, sys, torch, deepspeed
from deepspeed.utils.zero_to_fp32 import get_model_state_file, get_optim_files
module = torch.nn.Linear(3, 2)
config = {"train_batch_size": 1, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}
engine, *_ = deepspeed.initialize(model=module, config=config)
engine.save_checkpoint(sys.argv[1], client_state={"epoch": 3})
path, client = engine.load_checkpoint(sys.argv[1])
folder = os.path.join(sys.argv[1], "global_step0")
optimizer = torch.load(get_optim_files(folder)[0], weights_only=False)["optimizer_state_dict"]
print(json.dumps([path == get_model_state_file(folder, optimizer["zero_stage"]), client, optimizer["zero_stage"],
                  type(optimizer["loss_scaler"]).__module__, sorted(os.listdir(sys.argv[1]))]))
"""


def test_under_the_name_deepspeed_checkpoints_have_deepspeeds_files(site, tmp_path):
    """Pickled by names that are ours then; see docs/deepspeed_layout.md."""
    done = subprocess.run([sys.executable, "-c", SAVES, tmp_path], env=environment(site), capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, {"epoch": 3}, 2, "deepspeed_c.runtime.fp16.loss_scaler",
                                       ["global_step0", "latest", "zero_to_fp32.py"]]
