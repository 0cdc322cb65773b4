"""A checkpoint's weights in fp32, joined over ranks: of this engine's own format and of DeepSpeed's, at every stage.

A script of the same name lies beside checkpoints and calls main().
"""
import argparse
import os
import sys

import torch

from ..checkpoint.consolidated import export, size_of, weights_of
from ..checkpoint.save import latest_tag, source_of

__all__ = ["convert_zero_checkpoint_to_fp32_state_dict", "convert_zero_checkpoint_to_state_dict",
           "get_fp32_state_dict_from_zero_checkpoint", "get_model_state_file", "get_optim_files",
           "load_state_dict_from_zero_checkpoint"]

# What lies beside checkpoints.
SCRIPT = '''#!/usr/bin/env python
"""Joins the weights of a checkpoint beside this file over ranks: zero_to_fp32.py . output_dir"""
import sys

from deepspeed_c.utils.zero_to_fp32 import main

sys.exit(main())
'''
_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "fp16": torch.float16, "float16": torch.float16,
           "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def _source(checkpoint_dir, tag):
    checkpoint_dir = os.fspath(checkpoint_dir)
    if tag is None:
        tag = latest_tag(checkpoint_dir)
        if tag is None:
            raise ValueError(f"there is no 'latest' in {checkpoint_dir}; allowed: a folder that has it, or tag=")
    return source_of(checkpoint_dir, str(tag))


def get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag=None, exclude_frozen_parameters=False,
                                             lazy_mode=False):
    """OrderedDict {name: tensor on the CPU} of parameters and buffers, what is floating as fp32, for load_state_dict().

    checkpoint_dir: the folder with `latest`. tag: which checkpoint in it. lazy_mode: instead of tensors objects with
    `shape`, `dtype`, `numel()` and `contiguous()`, which reads the tensor. ValueError without tag and `latest`,
    FileNotFoundError for a tag that is not there, CheckpointError for what is damaged.
    """
    weights = weights_of(_source(checkpoint_dir, tag), torch.float32, exclude_frozen_parameters)
    if lazy_mode:
        return weights
    read = {}
    for name, weight in weights.items():
        if id(weight) not in read:
            read[id(weight)] = weight.contiguous()
        weights[name] = read[id(weight)]
    return weights


def convert_zero_checkpoint_to_state_dict(checkpoint_dir, output_dir, dtype=torch.float32, max_shard_size="5GB",
                                          safe_serialization=False, tag=None, exclude_frozen_parameters=False):
    """Writes the weights to output_dir/pytorch_model.bin, or model.safetensors with safe_serialization; to several
    files and an index where they are larger than max_shard_size ("5GB"; None: one file). dtype: torch's or its name.

    """
    found = _DTYPES.get(dtype, dtype)
    if found not in _DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}")
    export(weights_of(_source(checkpoint_dir, tag), found, exclude_frozen_parameters), os.fspath(output_dir),
           safe_serialization, size_of(max_shard_size))


def convert_zero_checkpoint_to_fp32_state_dict(checkpoint_dir, output_dir, max_shard_size="5GB",
                                               safe_serialization=False, tag=None, exclude_frozen_parameters=False):
    """convert_zero_checkpoint_to_state_dict() in fp32."""
    convert_zero_checkpoint_to_state_dict(checkpoint_dir, output_dir, torch.float32, max_shard_size,
                                          safe_serialization, tag, exclude_frozen_parameters)


def load_state_dict_from_zero_checkpoint(model, checkpoint_dir, tag=None):
    """Loads the fp32 weights into the model, which is moved to the CPU, and returns it; names that only one of them has
    stay out."""
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model = model.cpu()
    model.load_state_dict(state, strict=False)
    return model


def get_model_state_file(checkpoint_dir, zero_stage):
    """Path of the first rank's file with the module's values in a checkpoint in DeepSpeed's layout.
    FileNotFoundError."""
    name = f"{'zero_pp_rank_0_' if zero_stage == 3 else ''}mp_rank_00_model_states.pt"
    path = os.path.join(checkpoint_dir, name)
    if not os.path.exists(path):
        raise FileNotFoundError(2, "there is no such file (only checkpoints in DeepSpeed's layout have it)", path)
    return path


def get_optim_files(checkpoint_dir):
    """Paths of the files with the optimizer's parts in a checkpoint in DeepSpeed's layout, by rank.
    FileNotFoundError."""
    from ..checkpoint.deepspeed_files import OPTIMIZER_FILE

    found = sorted((match for match in map(OPTIMIZER_FILE.fullmatch, os.listdir(checkpoint_dir)) if match),
                   key=lambda match: (int(match["place"]), int(match["rank"])))
    if not found:
        raise FileNotFoundError(2, "there are no *_optim_states.pt (only checkpoints in DeepSpeed's layout have them)",
                                os.fspath(checkpoint_dir))
    return [os.path.join(checkpoint_dir, match.string) for match in found]


def main(arguments=None):
    """The command line of the script beside checkpoints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="zero_to_fp32.py", description="Joins a checkpoint's weights over ranks.")
    parser.add_argument("checkpoint_dir", help="the folder with 'latest'")
    parser.add_argument("output_dir", help="folder for pytorch_model.bin or model.safetensors")
    parser.add_argument("--max_shard_size", default="5GB", help="size of a file (default: %(default)s)")
    parser.add_argument("--safe_serialization", action="store_true", help="safetensors instead of torch.save")
    parser.add_argument("-t", "--tag", help="which checkpoint; without it the one that 'latest' names")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="without what is not trained")
    parser.add_argument("-d", "--debug", action="store_true", help="changes nothing")
    options = parser.parse_args(arguments)
    convert_zero_checkpoint_to_fp32_state_dict(
        options.checkpoint_dir, options.output_dir, options.max_shard_size, options.safe_serialization, options.tag,
        options.exclude_frozen_parameters)
    return 0


if __name__ == "__main__":
    sys.exit(main())
