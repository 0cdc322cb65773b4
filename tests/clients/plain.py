"""What the clients' runs are held against: a tiny model, and a loop in plain torch over all ranks' batches.

The loop computes what DDP means (gradients averaged over ranks and micro-steps, clipped, one optimizer) in one process,
from the batches that each rank says it saw. Nothing of it goes through the code under test.
"""
import json
import os
import pathlib
import subprocess
import sys

import torch

TESTS = pathlib.Path(__file__).resolve().parent
VOCABULARY, LENGTH = 32, 8
STAGES = (0, 1, 2, 3)


def tiny_llama():
    """A causal language model from a configuration, the same values on every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, tie_word_embeddings=True))


def keep_llama(folder):
    """Saves the same model for loaded_llama(), before anything is configured."""
    tiny_llama().save_pretrained(pathlib.Path(folder, f"initial{os.environ['RANK']}"))


def loaded_llama(folder):
    """What keep_llama() saved, by from_pretrained(), which at stage 3 shards it while it loads."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(pathlib.Path(folder, f"initial{os.environ['RANK']}"))
    assert all(hasattr(p, "ds_id") for p in model.parameters())
    return model


def same_weights(ordinary, trained):
    """Whether an ordinary model has the values of one that an engine trains. Every rank calls."""
    import deepspeed

    same = []
    for a, b in zip(ordinary.parameters(), trained.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters(b):
            same.append(torch.equal(a, b))
    return all(same)


def tokens(n):
    """n sequences with something to learn: each counts up from its own start."""
    generator = torch.Generator().manual_seed(11)
    start = torch.randint(0, VOCABULARY, (n, 1), generator=generator)
    return (start + torch.arange(LENGTH) * torch.randint(1, 4, (n, 1), generator=generator)) % VOCABULARY


def train(model, batches, accumulation, make_optimizer, rate, clip=1.0):
    """(mean loss, norm before clipping) of each step, in plain torch.

    batches: [rank][micro-step] of keyword arguments to the model. rate: the factor on each group's own learning rate
    at optimizer step i, from 0.
    """
    model.train()
    n_ranks, n_micro = len(batches), len(batches[0])
    optimizer = make_optimizer(model)
    base = [group["lr"] for group in optimizer.param_groups]
    losses, norms = [], []
    for micro in range(n_micro):
        for rank in range(n_ranks):
            loss = model(**batches[rank][micro]).loss
            (loss / accumulation / n_ranks).backward()
            losses.append(loss.item())
        if (micro + 1) % accumulation == 0:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
            for group, lr in zip(optimizer.param_groups, base):
                group["lr"] = lr * rate(micro // accumulation)
            optimizer.step()
            optimizer.zero_grad()
    per_step = accumulation * n_ranks
    return [sum(losses[i:i + per_step]) / per_step for i in range(0, len(losses), per_step)], norms


def start(launcher, script, folder, timeout=200):
    """Runs a script of this folder on two ranks: the list of what each wrote to FOLDER/RANK.json.

    launcher: words behind `python -m`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-m", *launcher.split(), TESTS / script, str(folder)], env=environment,
                          capture_output=True, text=True, timeout=timeout, cwd=folder)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-12000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def write(folder, results):
    """For such a script: leaves this rank's results."""
    pathlib.Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(results))
