"""PEFT's LoRA in Transformers' Trainer: a frozen base, at stage 3 sharded as it is loaded; and plain torch."""
import sys

import plain
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

RATE, STEPS, STAGES = 5e-2, 10, (2, 3)


def adapted(base):
    """LoRA over a model, the same values on every call."""
    torch.manual_seed(9)
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))


def evaluate(model):
    ids = plain.tokens(8)
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids).loss.item()


def train(folder, stage, seen):
    """This rank's batches go into `seen`. Returns (loss of each step over all ranks, an evaluation, another one of
    the saved adapter in an ordinary model, the trained model)."""
    def collate(rows):
        seen.append({"input_ids": torch.stack(rows), "labels": torch.stack(rows)})
        return seen[-1]

    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, per_device_train_batch_size=2, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        optim="adamw_torch", remove_unused_columns=False, deepspeed={
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0,
                                  "stage3_gather_16bit_weights_on_model_save": True}})
    model = adapted(plain.tiny_llama() if stage < 3 else plain.loaded_llama(folder))
    trainer = Trainer(model=model, args=arguments, data_collator=collate, train_dataset=list(plain.tokens(64)))
    trainer.train()
    evaluated = evaluate(trainer.model)
    trainer.save_model()
    dist.barrier()
    unset_hf_deepspeed_config()
    saved = evaluate(PeftModel.from_pretrained(plain.tiny_llama(), folder))
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], evaluated, saved, model


def main(folder):
    results = []
    plain.keep_llama(folder)
    for stage in STAGES:
        seen = []
        losses, evaluated, saved, model = train(folder, stage, seen)
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, seen[:STEPS])
        reference = adapted(plain.tiny_llama())
        untrained = evaluate(reference)
        expected, _ = plain.train(reference, everyones, 1, lambda model: torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0), lambda i: 1.0)
        results.append({"stage": stage, "losses": losses, "expected": expected, "untrained": untrained,
                        "evaluations": [evaluate(reference), evaluated, saved],
                        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
                        "held": sum(p.numel() for p in model.parameters())})
    plain.write(folder, results)


if __name__ == "__main__":
    main(sys.argv[1])
