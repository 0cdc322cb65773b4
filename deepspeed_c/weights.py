"""The module's weights as plain tensors: state dicts, loading them, one file of them, at every ZeRO stage.

Decides in what order sharded weights are made whole, and how a file comes to be. Invariant: at most one parameter is
whole beside what is sharded and what is handed out; under a file's name there is a whole file, the old one or the new.
"""
import contextlib
import functools
import os
from collections import OrderedDict

import torch

from .aside import made_aside
from .offload_states import PARAMETERS
from .runtime.zero.partition_parameters import GatheredParameters
from .utils.logging import logger


class EngineWeights:
    """A base of DeepSpeedEngine, which has: module, _comm, global_rank, the accessors of EngineSettings."""

    def module_state_dict(self, destination=None, prefix="", keep_vars=False, exclude_frozen_parameters=False):
        """The module's own state_dict(), by reference: at stage 3 parameters are empty there, shape (0,), on every
        rank, but for those that stay whole. exclude_frozen_parameters: without those that require no gradient."""
        self._refuse_offloaded("module_state_dict", PARAMETERS)
        state = self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if exclude_frozen_parameters:
            for name in _frozen_names(self.module):
                state.pop(prefix + name, None)
        return state

    def load_module_state_dict(self, checkpoint, strict=True, custom_load_fn=None, fetch_z3_params=False,
                               z3_params_to_fetch=None, allowed_missing_keys=None):
        """Loads checkpoint["module"], a state dict, into the module; masters follow. The same on all ranks.

        strict: as torch's. custom_load_fn: called as custom_load_fn(src=state dict, dst=module) instead of the
        module's load_state_dict. fetch_z3_params: at stage 3 the state dict has whole parameters; without it they are
        empty there, as in module_state_dict(), and stay as they are. z3_params_to_fetch: only these of them.
        allowed_missing_keys: names that may be missing where strict. Collective at stage 3 where anything is fetched.
        ValueError where the checkpoint has no "module", or whole parameters that are not to be fetched; RuntimeError
        for names and shapes that do not fit.
        """
        self._refuse_offloaded("load_module_state_dict", PARAMETERS)
        if "module" not in checkpoint:
            raise ValueError(f"load_module_state_dict: the checkpoint has no 'module'; it has {sorted(checkpoint)}")
        if checkpoint.get("frozen_param_fragments"):
            raise NotImplementedError("load_module_state_dict: 'frozen_param_fragments' in a checkpoint are not yet; "
                                      "frozen parameters are taken from 'module'")
        state = checkpoint["module"]
        fetch = list(self.module.parameters()) if fetch_z3_params else []
        if z3_params_to_fetch is not None:
            fetch = list(z3_params_to_fetch)
        fetch += [p for p in self.module.parameters() if getattr(p, "ds_persist", False)]  # whole already
        if custom_load_fn is not None:
            with GatheredParameters(fetch, modifier_rank=0):
                custom_load_fn(src=state, dst=self.module)
            return
        _refuse_whole(self.module, state, {id(p) for p in fetch})
        with _whole_while_loading(self.module, fetch):
            result = self.module.load_state_dict(state, strict=strict and allowed_missing_keys is None)
        if strict and allowed_missing_keys is not None:
            missing = sorted(set(result.missing_keys) - set(allowed_missing_keys))
            if missing or result.unexpected_keys:
                raise RuntimeError(f"load_module_state_dict: missing in the checkpoint: {missing}; not in the module: "
                                   f"{sorted(result.unexpected_keys)}; allowed to be missing: "
                                   f"{sorted(allowed_missing_keys)}")

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters=False):
        """The module's whole state_dict() at stage 3: copies in the model's dtype in CPU memory on rank 0, None on
        the other ranks. Collective. What is tied is one tensor; of experts rank 0 has its own. ValueError below
        stage 3, where module_state_dict() has everything."""
        self._refuse_offloaded("_zero3_consolidated_16bit_state_dict", PARAMETERS)
        if not self.zero_optimization_partition_weights():
            raise ValueError("_zero3_consolidated_16bit_state_dict: zero_optimization.stage is "
                             f"{self.zero_optimization_stage()}; allowed: 3 (below, module_state_dict() has all)")
        left_out = set(_frozen_names(self.module)) if exclude_frozen_parameters else ()
        whole, copies = OrderedDict(), {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            if name in left_out:
                continue
            if not isinstance(value, torch.Tensor):
                whole[name] = value
                continue
            if id(value) not in copies:
                with GatheredParameters([value]):
                    copies[id(value)] = value.detach().to("cpu", copy=True) if self.global_rank == 0 else None
            whole[name] = copies[id(value)]
        return whole if self.global_rank == 0 else None

    def save_16bit_model(self, save_dir, save_filename="pytorch_model.bin", exclude_frozen_parameters=False):
        """Writes the module's state dict, in the model's dtype, to save_dir/save_filename, for torch.load: rank 0
        does, under another name first, so that there is never half a file. All ranks call; at stage 3 it is collective.

        Returns True; at stage 3 False, with nothing written, unless
        zero_optimization.stage3_gather_16bit_weights_on_model_save is set. OSError (at stage 3 on the other ranks
        RuntimeError) where the file cannot be written; a file that was there is there still.
        """
        path = os.path.join(save_dir, save_filename)
        sharded = self.zero_optimization_partition_weights()
        if sharded and not self.zero_gather_16bit_weights_on_model_save():
            if self.global_rank == 0:
                logger.warning("save_16bit_model: %s is not written, because the stage is 3 and "
                               "zero_optimization.stage3_gather_16bit_weights_on_model_save is false", path)
            return False
        take = self._zero3_consolidated_16bit_state_dict if sharded else self.module_state_dict
        state, problem = take(exclude_frozen_parameters=exclude_frozen_parameters), None
        if self.global_rank == 0:
            try:
                _write(state, path)
            except Exception as error:
                problem = error
        if sharded:  # who goes on expects the file
            fine = torch.tensor([problem is None], dtype=torch.int32)
            self._comm.all_reduce(fine, "min", "save_16bit_model")
            if not fine and problem is None:
                raise RuntimeError(f"save_16bit_model: rank 0 could not write {path}; its own error says why")
        if problem is not None:
            raise problem
        return True

    def save_fp16_model(self, save_dir, save_filename="pytorch_model.bin"):
        """The old name of save_16bit_model."""
        return self.save_16bit_model(save_dir, save_filename)

    def empty_partition_cache(self):
        """Gives back what gathered parameters occupy that are not in use: over several nodes at stage 3, where all
        ranks call it; nothing elsewhere."""
        if self._shards is not None:
            self._shards.empty()


def _frozen_names(module):
    return [name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]


def _refuse_whole(module, state, fetched):
    """ValueError where a whole value meets a sharded parameter that is not fetched."""
    for name, p in module.named_parameters(remove_duplicate=False):
        if hasattr(p, "ds_id") and id(p) not in fetched and isinstance(state.get(name), torch.Tensor) \
                and state[name].shape != p.shape:
            raise ValueError(f"load_module_state_dict: {name} is {tuple(state[name].shape)} in the checkpoint, and the "
                             f"engine shards it (stage 3), so that it is {tuple(p.shape)} here; allowed for whole "
                             "parameters: fetch_z3_params=True, or z3_params_to_fetch with it")


@contextlib.contextmanager
def _whole_while_loading(module, params):
    """Inside, module.load_state_dict finds these parameters whole, those of one submodule at a time."""
    wanted, wrapped = {id(p) for p in params}, []
    try:
        for child in module.modules():
            own = [p for p in child._parameters.values() if id(p) in wanted]
            if own:
                child._load_from_state_dict = functools.partial(_load_whole, own, child._load_from_state_dict)
                wrapped.append(child)
        yield
    finally:
        for child in wrapped:
            del child._load_from_state_dict


def _load_whole(own, load, *args, **kwargs):
    with GatheredParameters(own, modifier_rank=0):
        load(*args, **kwargs)


def _write(state, path):
    """torch.save into a folder that may not be there yet."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with made_aside(path) as aside, open(aside, "wb") as file:
        torch.save(state, file)
