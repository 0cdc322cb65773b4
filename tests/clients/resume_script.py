"""Transformers' Trainer and Accelerate's save_state, stopped in the middle and resumed as their documentation shows."""
import os
import sys

import plain
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from trainer_script import ACCUMULATION, CASES, DECAY, RATE, STEPS, WARMUP, Sequences
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def trainer_of(folder, stage, sections, bf16):
    config = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage}, **sections}
    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, deepspeed=config, bf16=bf16, per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION, max_steps=STEPS, learning_rate=RATE, weight_decay=DECAY,
        warmup_steps=WARMUP, lr_scheduler_type="linear", logging_steps=1, save_strategy="steps", save_steps=STEPS // 2,
        report_to="none", disable_tqdm=True, optim="adamw_torch")
    return Trainer(model=plain.tiny_llama(), args=arguments, train_dataset=Sequences(64))


def losses_of(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def resume_trainer(folder, stage, sections, bf16):
    """(losses of all steps without a break, losses of all steps by a second Trainer that resumed in the middle)"""
    first = trainer_of(folder, stage, sections, bf16)
    first.train()
    dist.barrier()
    unset_hf_deepspeed_config()
    second = trainer_of(folder, stage, sections, bf16)
    second.train(resume_from_checkpoint=os.path.join(folder, f"checkpoint-{STEPS // 2}"))
    dist.barrier()
    unset_hf_deepspeed_config()
    return losses_of(first), losses_of(second)


def prepared(stage, precision):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage, gradient_clipping=0.5, zero3_init_flag=False),
        mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    model = plain.tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    loader = torch.utils.data.DataLoader(Sequences(32), batch_size=4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.9**i)
    return accelerator, *accelerator.prepare(model, optimizer, loader, schedule)


def resume_accelerate(folder, stage, precision):
    """(losses of an epoch without a break, losses of its second half by one that resumed in the middle)"""
    losses = []
    for resume in (False, True):
        accelerator, model, optimizer, loader, schedule = prepared(stage, precision)
        if resume:
            accelerator.load_state(folder)
            loader = accelerator.skip_first_batches(loader, 2)
        found = []
        for i, batch in enumerate(loader):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            found.append(loss.item())
            if i == 1 and not resume:
                accelerator.save_state(folder)
        losses.append(found)
        accelerator.free_memory()
    return losses


def main(folder):
    results = []
    for case, stages in (("both from the JSON", plain.STAGES), ("both from Transformers", (2,)), ("bf16", (1, 3))):
        for stage in stages:
            straight, resumed = resume_trainer(os.path.join(folder, f"{case} {stage}"), stage, *CASES[case])
            results.append({"case": f"Trainer, {case}", "stage": stage, "straight": straight, "resumed": resumed})
    for precision, stages in (("no", plain.STAGES), ("bf16", (2,))):
        for stage in stages:
            straight, resumed = resume_accelerate(os.path.join(folder, f"{precision} {stage}"), stage, precision)
            results.append({"case": f"Accelerate, {precision}", "stage": stage, "straight": straight[2:],
                            "resumed": resumed})
    plain.write(folder, results)


if __name__ == "__main__":
    main(sys.argv[1])
