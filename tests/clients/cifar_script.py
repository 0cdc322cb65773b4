"""A script of the kind that is written for DeepSpeed: CIFAR-10 sized pictures that are made up, `import deepspeed`
throughout, started by the `deepspeed` command, settings as DeepSpeed's own CIFAR-10 example gives them."""
import argparse

import deepspeed
import plain
import torch
import torch.nn as nn
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--moe", action="store_true")
    return deepspeed.add_config_arguments(parser).parse_args()


def settings(args):
    return {
        "train_batch_size": 16, "steps_per_print": 2000,
        "optimizer": {"type": "Adam",
                      "params": {"lr": 0.003, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
        "scheduler": {"type": "WarmupLR",
                      "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.003, "warmup_num_steps": 10}},
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "bf16": {"enabled": args.dtype == "bf16"},
        "fp16": {"enabled": args.dtype == "fp16", "fp16_master_weights_and_grads": False, "loss_scale": 0,
                 "loss_scale_window": 500, "hysteresis": 2, "min_loss_scale": 1, "initial_scale_power": 15},
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": args.stage, "allgather_partitions": True, "reduce_scatter": True,
            "allgather_bucket_size": 50000000, "reduce_bucket_size": 50000000, "overlap_comm": True,
            "contiguous_gradients": True, "cpu_offload": False, "stage3_param_persistence_threshold": 0},
    }


class Net(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5)
        self.last = nn.Linear(8 * 7 * 7, 10)
        if args.moe:
            self.experts = deepspeed.moe.layer.MoE(hidden_size=10, expert=nn.Linear(10, 10), num_experts=2, k=1)

    def forward(self, x):
        return self.last(F.max_pool2d(F.relu(self.conv(x)), 4).flatten(1))


def pictures(n):
    """Pictures of which the class shows as one bright row."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(n) % 10
    x = torch.randn(n, 3, 32, 32, generator=generator) * 0.5
    x[torch.arange(n), :, 3 * labels] += 2
    return torch.utils.data.TensorDataset(x, labels)


def parameters(model, args):
    found = [p for p in model.parameters() if p.requires_grad]
    if args.moe:
        found = split_params_into_different_moe_groups_for_optimizer({"params": found, "name": "parameters"})
    return found


def main(args):
    deepspeed.init_distributed()
    get_accelerator().set_device(args.local_rank)
    if torch.distributed.get_rank() != 0:
        torch.distributed.barrier()  # rank 0 would download first
    data = pictures(160)
    if torch.distributed.get_rank() == 0:
        torch.distributed.barrier()
    model = Net(args)
    engine, optimizer, loader, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=parameters(model, args), training_data=data, config=settings(args))
    device = get_accelerator().device_name(engine.local_rank)
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.half if engine.fp16_enabled() else None
    losses = []
    for _ in range(args.epochs):
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(engine(x if dtype is None else x.to(dtype)), y)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    with deepspeed.zero.GatheredParameters(model.last.weight):
        weights = model.last.weight.double().sum().item()
    plain.write(args.folder, {"losses": losses, "rank": engine.global_rank, "dtype": str(model.last.weight.dtype),
                              "weights": weights})


if __name__ == "__main__":
    main(arguments())
