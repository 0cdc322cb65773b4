"""Transformers' Trainer, as its documentation shows it, over every case; and plain torch over the same batches."""
import math
import sys

import plain
import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

RATE, DECAY, WARMUP, ACCUMULATION, STEPS = 5e-3, 0.1, 3, 2, 8
OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
SCHEDULER = {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                 "warmup_num_steps": "auto", "total_num_steps": "auto"}}
# Name -> (sections of the configuration, whether in bf16).
CASES = {
    "both from the JSON": ({"optimizer": OPTIMIZER, "scheduler": SCHEDULER}, False),
    "scheduler from Transformers": ({"optimizer": OPTIMIZER}, False),
    "both from Transformers": ({}, False),
    "bf16": ({"optimizer": OPTIMIZER, "scheduler": SCHEDULER}, True),
}


class Sequences(torch.utils.data.Dataset):
    """All sequences, each as what a causal model takes."""

    def __init__(self, n):
        self.tokens = plain.tokens(n)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def train(folder, stage, sections, bf16, seen):
    """This rank's batches go into `seen`. Returns (loss of each step over all ranks, norm of each step, the
    parameters' dtype, loss of an evaluation, whether the saved model has the values of the trained one)."""
    config = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
                              "stage3_param_persistence_threshold": "auto",
                              "stage3_gather_16bit_weights_on_model_save": True}, **sections,
    }

    def collate(rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        seen.append(batch)
        return batch

    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, deepspeed=config, bf16=bf16, per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION, max_steps=STEPS, learning_rate=RATE, weight_decay=DECAY,
        warmup_steps=WARMUP, lr_scheduler_type="linear", logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, optim="adamw_torch")
    model = plain.tiny_llama() if stage < 3 else plain.loaded_llama(folder)  # sharded as it is loaded
    trainer = Trainer(model=model, args=arguments, data_collator=collate, train_dataset=Sequences(64))
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    evaluated = trainer.evaluate(Sequences(8))["eval_loss"]
    trainer.save_model()
    dist.barrier()
    unset_hf_deepspeed_config()
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    return [row["loss"] for row in steps], [row["grad_norm"] for row in steps], str(model.dtype), evaluated, \
        plain.same_weights(saved, model)


def decay_everything(model):
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)


def decay_matrices(model):
    """The groups that Trainer makes: no decay on norms."""
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE)


def linear(i):
    return i / WARMUP if i < WARMUP else (STEPS - i) / (STEPS - WARMUP)


def logarithmic(i):
    """DeepSpeed's schedule is one step behind: its first step has the rate of construction."""
    i -= 1
    return math.log(max(i, 0) + 1) / math.log(WARMUP) if i < WARMUP else (STEPS - i) / (STEPS - WARMUP)


def main(folder):
    results = []
    plain.keep_llama(folder)
    for case, (sections, bf16) in CASES.items():
        for stage in plain.STAGES:
            seen = []
            losses, norms, dtype, evaluated, saved = train(folder, stage, sections, bf16, seen)
            everyones = [None] * dist.get_world_size()
            # The loader looks ahead, and may have fetched more than was used.
            dist.all_gather_object(everyones, seen[:STEPS * ACCUMULATION])
            model = plain.tiny_llama()
            expected, expected_norms = plain.train(
                model, everyones, ACCUMULATION, decay_everything if "optimizer" in sections
                else decay_matrices, logarithmic if "scheduler" in sections else linear)
            with torch.no_grad():
                evaluation = plain.tokens(8)
                expected_evaluated = model.eval()(input_ids=evaluation, labels=evaluation).loss.item()
            results.append({"case": case, "stage": stage, "dtype": dtype, "losses": losses, "norms": norms,
                            "expected": expected, "expected_norms": expected_norms, "saved": saved,
                            "evaluated": evaluated, "expected_evaluated": expected_evaluated})
    plain.write(folder, results)


if __name__ == "__main__":
    main(sys.argv[1])
