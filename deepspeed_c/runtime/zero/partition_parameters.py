"""Parameter sharding as scripts enter it: zero.Init, zero.GatheredParameters, register_external_parameter."""
import base64
import functools
import json
import os
from collections.abc import Iterable

import torch

from deepspeed_c import _core, _paths
from deepspeed_c.accelerator import get_accelerator
from deepspeed_c.distributed import engine_comm, init_distributed

from . import fetch as fetching
from .construction import ORIGINALS, Construction
from .fetch import register_external_parameter, unregister_external_parameter
from .homes import Homes
from .parameter import ZeroParamStatus, ZeroParamType, fetch, give_private_back, is_zero, release, take_private, unique
from .shards import materialize, prepare

__all__ = ["GatheredParameters", "Init", "ZeroParamStatus", "ZeroParamType", "get_accelerator", "is_zero_param",
           "register_external_parameter", "unregister_external_parameter", "zero_wrapper_for_fp_tensor_constructor"]
__getattr__, __dir__ = _paths.attributes(__name__)

_orig_torch_arange = ORIGINALS["arange"]  # clients compare with it
is_zero_param = is_zero


def zero_wrapper_for_fp_tensor_constructor(fn, target_fp_dtype, target_device=None):
    """fn, a function that makes a tensor, so that floating ones come out as target_fp_dtype. Init looks this name up
    when it is entered: clients put another function here. target_device: where nothing else says one."""

    @functools.wraps(fn)
    def made(*args, **kwargs):
        if target_device is not None and kwargs.get("device") is None:
            kwargs["device"] = target_device
        tensor = fn(*args, **kwargs)
        return _typed(tensor, target_fp_dtype)

    return made


def _typed(tensor, dtype):
    if tensor.is_floating_point() and tensor.dtype != dtype:
        return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
    return tensor


class GatheredParameters:
    """Makes sharded parameters whole inside.

    params: a parameter, or an iterable of parameters, None, buffers and anything else, in any mix: what is not sharded
    is left alone. modifier_rank: None to read (RuntimeError at the end where something was written), else, of the ranks
    that share the parameters, the one whose values everyone has afterwards; meanwhile each rank has private copies.
    All ranks enter and leave together, except to read where ranks share memory. fwd_module: uses these parameters in
    its forward though they are another's. enabled: False does nothing.
    """

    def __init__(self, params, modifier_rank=None, fwd_module=None, enabled=True):
        self._params, self._rank = [], modifier_rank
        if not enabled:
            return
        if isinstance(params, torch.Tensor) or params is None:
            params = [params]
        if not isinstance(params, Iterable):
            raise TypeError(f"GatheredParameters: params is {type(params).__name__}; allowed: a parameter or an "
                            "iterable of them")
        self._params = unique(params)
        if fwd_module is not None:
            for p in self._params:
                register_external_parameter(fwd_module, p)

    def __enter__(self):
        if self._rank is None:
            fetch(self._params, "GatheredParameters")
        else:
            take_private(self._params, "GatheredParameters")

    def __exit__(self, kind, error, trace):
        params = [p for p in self._params if is_zero(p)]  # others: their engine was destroyed inside
        if self._rank is not None:
            give_private_back(params, self._rank if kind is None else None)
        else:
            release(params, "GatheredParameters without modifier_rank")
        return False


class Init:
    """Context manager around model construction: parameters are sharded as soon as their module's __init__ is over.

    module: an existing module whose parameters are sharded at once. data_parallel_group, sequence_data_parallel_group,
    mpu: which ranks share them out (default: all). config_dict_or_path (config: its old name): a dict, file, JSON text
    or base64 of it, of which the dtype and the persistence thresholds are read. dtype: of floating tensors made inside,
    instead of the configuration's; without both, float16. remote_device: "none" or "cpu": parameters are in memory;
    "nvme": in files, in the configuration's offload_param.nvme_path; None: as its offload_param.device says. enabled:
    False does nothing. mem_efficient_linear, pin_memory: accepted, nothing to steer here.

    NotImplementedError for quantized weights, zero_param_parallel_group, param_swapper and tensor_overrides.
    Collective: all ranks build the same modules in the same order; the first rank's values count.
    """

    def __init__(self, module=None, data_parallel_group=None, mem_efficient_linear=True, remote_device=None,
                 pin_memory=False, config_dict_or_path=None, config=None, enabled=True, dtype=None, mpu=None,
                 zero_param_parallel_group=None, zero_quantized_weights=False,
                 zero_quantized_nontrainable_weights=False, sequence_data_parallel_group=None, param_swapper=None,
                 tensor_overrides=None):
        self._enabled = enabled
        if not enabled:
            return
        _refuse(zero_param_parallel_group=zero_param_parallel_group, param_swapper=param_swapper,
                tensor_overrides=tensor_overrides, zero_quantized_weights=zero_quantized_weights,
                zero_quantized_nontrainable_weights=zero_quantized_nontrainable_weights)
        _check_device(remote_device)
        self._config = _settings(config if config_dict_or_path is None else config_dict_or_path)
        self._dtype = dtype or _dtype_of(self._config)
        init_distributed()
        self._comm = engine_comm(_ranks(data_parallel_group, sequence_data_parallel_group, mpu))
        self._homes = Homes(self._config, remote_device)
        self._kept, self._left = [], None
        self._construction = Construction(self._done, _apply)
        if module is not None:
            for child in module.modules():
                self._done(child)

    def __enter__(self):
        if self._enabled:
            wrapper = zero_wrapper_for_fp_tensor_constructor
            self._construction.enter(lambda fn: wrapper(fn, self._dtype, target_device=None))
        return self

    def __exit__(self, *exc):
        if self._enabled:
            self._construction.leave()
        return False

    def _done(self, module):
        """A module is built: its own parameters take their places."""
        own = [p for p in module.parameters(recurse=False) if not is_zero(p)]
        if not own:
            return
        home, on_meta = self._homes.of(self._comm), any(p.is_meta for p in own)
        names = {id(p): name for name, p in module.named_parameters(recurse=False)}
        for p in own:
            prepare(p, self._dtype if p.is_floating_point() else p.dtype)
            home.add(p)
            p.ds_name = f"{type(module).__name__}.{names[id(p)]}"
        self._homes.settle()
        if on_meta:
            materialize(module)
        self._keep_small(home, own)
        fetching.attach(module)

    def _keep_small(self, home, own):
        """Small parameters stay gathered, as initialize() will decide with the same configuration."""
        if self._config is None:
            return
        if self._left is None:
            self._left = (self._config.get("zero_optimization.stage3_model_persistence_threshold")
                          // self._comm.size)
        small = self._config.get("zero_optimization.stage3_param_persistence_threshold")
        for p in own:
            if p.ds_numel <= small and p.ds_numel <= self._left:
                self._left -= p.ds_numel
                self._kept.append(p)
        home.keep(tuple(self._kept))


def _refuse(**given):
    for name, value in given.items():
        if value:
            raise NotImplementedError(f"zero.Init({name}={value!r}) is not yet")


def _check_device(remote_device):
    if remote_device not in (None, "none", "cpu", "nvme"):
        raise ValueError(f"zero.Init: remote_device is {remote_device!r}; allowed: None, 'none', 'cpu', 'nvme'")


def _settings(source):
    """A _core.Config of what Init reads; None without a configuration. Batch sizes may be missing or not fit yet."""
    if source is None:
        return None
    tree = source if isinstance(source, dict) else _read(source)
    read = {key: tree[key] for key in ("fp16", "bf16", "bfloat16", "zero_optimization") if key in tree}
    return _core.Config({"train_micro_batch_size_per_gpu": 1, **read}, 1, None)


def _read(source):
    if os.path.exists(source):
        with open(source) as text:
            return json.load(text)
    try:
        return json.loads(source)
    except ValueError:
        try:
            return json.loads(base64.urlsafe_b64decode(source))
        except ValueError:
            raise ValueError(f"zero.Init: config_dict_or_path is {source[:60]!r}, which is no file, no JSON and no "
                             "base64 of it") from None


def _dtype_of(config):
    if config is None:
        return torch.float16 if get_accelerator().is_fp16_supported() else torch.float32
    return (torch.float16 if config.get("fp16.enabled") else torch.bfloat16 if config.get("bf16.enabled")
            else torch.float32)


def _ranks(group, sequence_group, mpu):
    """The ranks that share parameters out, None for all."""
    groups = sequence_group, group, None if mpu is None else mpu.get_data_parallel_group()
    given = [g for g in groups if g is not None]
    return torch.distributed.get_process_group_ranks(given[0]) if given else None


def _apply(module, fn):
    """Module.apply inside Init: fn sees whole parameters and may write to them; the first rank's values count. The
    outermost one makes private copies, once for all modules below."""
    with GatheredParameters([p for p in module.parameters() if is_zero(p) and not p.ds_private], modifier_rank=0):
        for child in module.children():
            child.apply(fn)
        fn(module)
    return module
