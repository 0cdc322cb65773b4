"""Accelerate's training loop, as its documentation shows it, over every case; and plain torch over the same batches."""
import sys

import plain
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DummyOptim, DummyScheduler

RATE, DECAY, CLIP, ACCUMULATION, STEPS, WARMUP = 5e-3, 0.1, 0.5, 2, 6, 4
JSON = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                 "warmup_num_steps": "auto", "warmup_type": "linear"}},
}
# Name -> (whether the configuration is a JSON with "auto", mixed precision).
CASES = {"JSON": (True, "no"), "torch's optimizer and schedule": (False, "no"), "bf16": (True, "bf16"),
         "fp16": (False, "fp16")}


def from_torch(i):
    return 0.9**i


def train(stage, from_json, precision):
    """(loss of each step over all ranks, norm of each step, all ranks' batches, the parameters' dtype, whether the
    state dict that Accelerate gives has the values of the trained model)."""
    if from_json:
        plugin = DeepSpeedPlugin(gradient_clipping=CLIP, hf_ds_config={
            **JSON, "gradient_accumulation_steps": ACCUMULATION, "zero_optimization": {
                "stage": stage, "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True}})
    else:
        plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=ACCUMULATION, gradient_clipping=CLIP,
                                 zero3_init_flag=False, zero3_save_16bit_model=True)
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision=precision,
                              kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    assert accelerator.num_processes == dist.get_world_size() == 2
    model = plain.tiny_llama()
    if from_json:
        optimizer = DummyOptim(model.parameters(), lr=RATE, weight_decay=DECAY)
        scheduler = DummyScheduler(optimizer, warmup_num_steps=WARMUP)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, from_torch)
    loader = torch.utils.data.DataLoader(plain.tokens(2 * 2 * ACCUMULATION * STEPS), batch_size=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses, norms, seen = [], [], []
    for ids in loader:
        seen.append({"input_ids": ids, "labels": ids})
        with accelerator.accumulate(model):
            loss = model(**seen[-1]).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), CLIP)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().float()).mean().item())
    everyones = [None, None]
    dist.all_gather_object(everyones, seen)
    dtype = str(accelerator.unwrap_model(model).dtype)
    state, whole = accelerator.get_state_dict(model), plain.tiny_llama()
    if accelerator.is_main_process:
        whole.to(accelerator.unwrap_model(model).dtype).load_state_dict(state)
    saved = plain.same_weights(whole, accelerator.unwrap_model(model)) or not accelerator.is_main_process
    accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)  # the next case is a script of its own
    return [sum(losses[i:i + ACCUMULATION]) / ACCUMULATION for i in range(0, len(losses), ACCUMULATION)], norms, \
        everyones, dtype, saved


def main(folder):
    results = []
    for case, (from_json, precision) in CASES.items():
        for stage in plain.STAGES:
            losses, norms, batches, dtype, saved = train(stage, from_json, precision)
            # From the JSON the engine steps the schedule, one behind; a schedule of torch's Accelerate steps as often
            # as there are ranks.
            rate = (lambda i: min(1.0, max(i - 1, 0) / WARMUP)) if from_json else (lambda i: from_torch(2 * i))
            expected, expected_norms = plain.train(
                plain.tiny_llama(), batches, ACCUMULATION,
                lambda model: torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY), rate, CLIP)
            results.append({"case": case, "stage": stage, "dtype": dtype, "losses": losses, "norms": norms,
                            "saved": saved, "expected": expected, "expected_norms": expected_norms})
    plain.write(folder, results)


if __name__ == "__main__":
    main(sys.argv[1])
