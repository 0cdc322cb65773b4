"""Where each documented import path leads: one table, and the finder that makes `import` follow it.

A path is one that DeepSpeed documents or that a client imports. Invariant: whatever name a module was imported by,
under `deepspeed_c` or (with the distribution in compat/) under `deepspeed`, it is one object, made once, whose own
name is its home's. What a path has not yet is an error at the name that is asked for.
"""
import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec

PACKAGE = __name__.partition(".")[0]
FILE, MADE = "a file of its own", "no file: its names are in NAMES"

# Path -> FILE, MADE, or the path whose module it is.
PATHS = {
    "accelerator": FILE,
    "accelerator.abstract_accelerator": "accelerator.interface",
    "accelerator.interface": FILE,
    "accelerator.real_accelerator": "accelerator",
    "checkpoint": FILE,
    "checkpoint.utils": FILE,
    "checkpointing": "runtime.activation_checkpointing.checkpointing",
    "comm": FILE,
    "comm.comm": "comm",
    "dataloader": FILE,
    "env_report": FILE,
    "launcher": FILE,
    "launcher.runner": FILE,
    "moe": FILE,
    "moe.experts": FILE,
    "moe.layer": FILE,
    "moe.mappings": FILE,
    "moe.sharded_moe": FILE,
    "moe.utils": FILE,
    "ops": FILE,
    "ops.adagrad": FILE,
    "ops.adam": FILE,
    "ops.aio": FILE,
    "ops.lamb": FILE,
    "ops.lion": FILE,
    "optimizer": FILE,
    "pipe": "runtime.pipe",
    "profiling": MADE,
    "profiling.flops_profiler": MADE,
    "runtime": FILE,
    "runtime.activation_checkpointing": FILE,
    "runtime.activation_checkpointing.checkpointing": FILE,
    "runtime.base_optimizer": "optimizer",
    "runtime.dataloader": "dataloader",
    "runtime.engine": "engine",
    "runtime.fp16": FILE,
    "runtime.fp16.loss_scaler": FILE,
    "runtime.lr_schedules": FILE,
    "runtime.pipe": FILE,
    "runtime.pipe.engine": MADE,
    "runtime.pipe.module": MADE,
    "runtime.pipe.topology": FILE,
    "runtime.sequence_parallel": MADE,
    "runtime.sequence_parallel.ulysses_sp": MADE,
    "runtime.utils": FILE,
    "runtime.zero": FILE,
    "runtime.zero.config": MADE,
    "runtime.zero.muon": MADE,
    "runtime.zero.muon.original_muon": MADE,
    "runtime.zero.offload_config": FILE,
    "runtime.zero.partition_parameters": FILE,
    "runtime.zero.stage3": MADE,
    "runtime.zero.stage_1_and_2": MADE,
    "sequence": MADE,
    "sequence.layer": MADE,
    "utils": FILE,
    "utils.groups": FILE,
    "utils.logging": FILE,
    "utils.parallel_state": FILE,
    "utils.parallel_state_deepspeed": FILE,
    "utils.tensor_fragment": FILE,
    "utils.timer": FILE,
    "utils.zero_to_fp32": FILE,
    "zero": "runtime.zero",
}


class _Later(str):
    """What has to be there before a name is."""


def _later(what, *names):
    return dict.fromkeys(names, _Later(what))


# Path -> {name: the path of a module and a name in it, or what it waits for}, beside what a path's own file has.
NAMES = {
    "": {
        "CheckpointError": "_core.CheckpointError",
        "CommError": "_core.CommError",
        "DeepSpeedConfigError": "_core.DeepSpeedConfigError",
        "DeepSpeedEngine": "engine.DeepSpeedEngine",
        "DeepSpeedOptimizer": "optimizer.DeepSpeedOptimizer",
        "OnDevice": "utils.init_on_device.OnDevice",
        "add_config_arguments": "api.add_config_arguments",
        "get_accelerator": "accelerator.get_accelerator",
        "init_distributed": "distributed.init_distributed",
        "init_inference": "api.init_inference",
        "initialize": "api.initialize",
        "log_dist": "utils.logging.log_dist",
        "logger": "utils.logging.logger",
        "tp_model_init": "api.tp_model_init",
        **_later("pipeline parallelism", "PipelineModule"),
    },
    "profiling.flops_profiler": _later("the flops profiler", "FlopsProfiler", "get_model_profile"),
    "runtime.pipe": _later("pipeline parallelism", "LayerSpec", "PipelineModule", "TiedLayerSpec"),
    "runtime.pipe.engine": _later("pipeline parallelism", "PipelineEngine"),
    "runtime.pipe.module": _later("pipeline parallelism", "LayerSpec", "PipelineModule", "TiedLayerSpec"),
    "runtime.sequence_parallel.ulysses_sp": _later("sequence parallelism", "UlyssesSPAttentionHF",
                                                   "UlyssesSPDataLoaderAdapter"),
    "runtime.zero.config": {"ZeroStageEnum": "checkpoint.deepspeed_files.ZeroStageEnum"},  # checkpoints name it
    "runtime.zero.muon.original_muon": _later("the Muon optimizer", "MuonWithAuxAdam"),
    "runtime.zero.stage3": {
        "DeepSpeedZeroOptimizer_Stage3": "optimizer.DeepSpeedOptimizer",
        **{name: f"runtime.zero.estimates.{name}" for name in (
            "estimate_zero3_model_states_mem_needs", "estimate_zero3_model_states_mem_needs_all_cold",
            "estimate_zero3_model_states_mem_needs_all_live")},
    },
    "runtime.zero.stage_1_and_2": {
        "DeepSpeedZeroOptimizer": "optimizer.DeepSpeedOptimizer",
        **{name: f"runtime.zero.estimates.{name}" for name in (
            "estimate_zero2_model_states_mem_needs", "estimate_zero2_model_states_mem_needs_all_cold",
            "estimate_zero2_model_states_mem_needs_all_live")},
    },
    "sequence.layer": _later("sequence parallelism", "DistributedAttention"),
    "utils": {
        "OnDevice": "utils.init_on_device.OnDevice",
        "RepeatingLoader": "dataloader.RepeatingLoader",
        "instrument_w_nvtx": "utils.nvtx.instrument_w_nvtx",
        **{name: f"utils.leaf_modules.{name}" for name in (
            "get_z3_leaf_modules", "set_z3_leaf_module", "set_z3_leaf_modules", "set_z3_leaf_modules_by_name",
            "set_z3_leaf_modules_by_suffix", "unset_z3_leaf_modules", "z3_leaf_module", "z3_leaf_parameter")},
        **{name: f"utils.tensor_fragment.{name}" for name in (
            "safe_get_full_fp32_param", "safe_get_full_grad", "safe_get_full_optimizer_state",
            "safe_get_local_fp32_param", "safe_get_local_grad", "safe_get_local_optimizer_state",
            "safe_set_full_fp32_param", "safe_set_full_grad", "safe_set_full_optimizer_state",
            "safe_set_local_fp32_param", "safe_set_local_grad", "safe_set_local_optimizer_state",
            "safe_update_full_grad_vectorized")},
    },
    "utils.tensor_fragment": {"fragment_address": "checkpoint.deepspeed_files.fragment_address"},
}


def _children(path):
    """The last part of each path that lies directly in this one."""
    before = path + "." if path else ""
    return {p[len(before):] for p in PATHS if p.startswith(before) and "." not in p[len(before):]} - {""}


def attributes(module):
    """(__getattr__, __dir__) for a module of the package: its names in NAMES and its submodules in PATHS, each loaded
    when it is first asked for.

    module: its __name__. A name that is not there yet raises NotImplementedError, any other AttributeError.
    """
    path = module.partition(".")[2]
    names, children = NAMES.get(path, {}), _children(path)

    def find(name):
        if name in children:
            return importlib.import_module(f"{module}.{name}")
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if isinstance(names[name], _Later):
            raise NotImplementedError(f"{module}.{name} is not yet: {names[name]} is not there")
        home, _, attribute = names[name].rpartition(".")
        value = getattr(importlib.import_module(f"{PACKAGE}.{home}"), attribute)
        setattr(sys.modules[module], name, value)
        return value

    def listing():
        there = {name for name, home in names.items() if not isinstance(home, _Later)}
        return sorted({*vars(sys.modules[module]), *there, *children})

    return find, listing


def home_of(name):
    """The name under which the module called `name` is made: that name, or another's where PATHS says so."""
    parts = name.split(".")[1:]
    for n in range(len(parts), 0, -1):
        home = PATHS.get(".".join(parts[:n]), FILE)
        if home not in (FILE, MADE):
            return home_of(".".join([PACKAGE, home, *parts[n:]]))
    return ".".join([PACKAGE, *parts])


class _Finder:
    """Finds the modules below the packages called `roots` that PathFinder would not find, or would make twice."""

    def __init__(self):
        self.roots = {PACKAGE}

    def find_spec(self, name, path=None, target=None):
        root, _, rest = name.partition(".")
        if not rest or root not in self.roots:
            return None
        home = home_of(name)
        if home != name:
            found = importlib.util.find_spec(home)
            return found and ModuleSpec(name, _Same(home), origin=found.origin,
                                        is_package=found.submodule_search_locations is not None)
        if PATHS.get(rest) == MADE:
            return ModuleSpec(name, _Made(), is_package=bool(_children(rest)))
        return None


class _Same:
    """Loads a module by another name: sys.modules gets the same object, and the import system takes what is there."""

    def __init__(self, home):
        self.home = home

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        sys.modules[module.__spec__.name] = importlib.import_module(self.home)

    def get_code(self, name):
        """For `python -m` with the other name."""
        return importlib.util.find_spec(self.home).loader.get_code(self.home)


class _Made:
    """Makes a module that has nothing but its names in NAMES and its submodules in PATHS."""

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__getattr__, module.__dir__ = attributes(module.__name__)


_finder = _Finder()


def install():
    """Has `import` follow the table. First in line, because a folder's own finder would make some modules twice."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def is_known_as(name):
    """Whether the package is imported by this other name too."""
    return name in _finder.roots


def also_as(root):
    """Every module of the package can be imported below `root` too, as the same object."""
    _finder.roots.add(root)
