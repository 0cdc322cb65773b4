"""Trains the network of PyTorch's CIFAR-10 tutorial, with deepspeed_c or, without --deepspeed, in plain PyTorch.

    deepspeed --num_gpus 2 cifar10_deepspeed.py --deepspeed            # two ranks of this machine
    deepspeed --num_gpus 2 cifar10_deepspeed.py --deepspeed --moe --ep-world-size 2 --num-experts 2
    python cifar10_deepspeed.py                                        # the baseline, one process

Settings come in layers: the command line over the JSON file (--deepspeed_config) over the defaults below.
"""
import argparse
import json
import math
import os
import time

import images
import torch
import torch.nn as nn
import torch.nn.functional as F
from network import Net
from tqdm import tqdm

import deepspeed_c as deepspeed
from deepspeed_c.moe.utils import split_params_into_different_moe_groups_for_optimizer

HERE = os.path.dirname(os.path.abspath(__file__))
DEFAULTS = {
    "train_batch_size": 16,
    "steps_per_print": 2000,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
    },
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 0},
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def parse_arguments():
    parser = argparse.ArgumentParser(description="CIFAR-10 with deepspeed_c, or in plain PyTorch without --deepspeed")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("-e", "--epochs", type=int, default=10)
    parser.add_argument("--log-interval", type=int, default=100, help="steps between two points of the loss curve")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model; default: what the JSON file says, else fp16")
    parser.add_argument("--stage", type=int, choices=range(4), help="ZeRO stage; default: the JSON file's, else 0")
    parser.add_argument("--data-dir", help="CIFAR-10: a folder of its files, its parent, or a .tar.gz")
    parser.add_argument("--train-samples", type=int, metavar="N", help="train on the first N images at most")
    parser.add_argument("--test-samples", type=int, metavar="N", help="test on the first N images at most")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of images")
    parser.add_argument("--out", default=os.path.join(HERE, "out"), metavar="DIR", help="where curve.png goes")
    add_moe_arguments(parser.add_argument_group("mixture of experts"))
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    for name in ("epochs", "log_interval", "train_samples", "test_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; at least 1 is needed")
    if args.moe and not args.deepspeed and args.ep_world_size != 1:
        parser.error(f"--ep-world-size is {args.ep_world_size}; the one process without --deepspeed needs 1")
    return args


def add_moe_arguments(group):
    group.add_argument("--moe", action="store_true", help="layers of experts before the last linear layer")
    group.add_argument("--ep-world-size", type=int, default=1, metavar="N", help="ranks that share the experts out")
    group.add_argument("--num-experts", type=int, nargs="+", default=[1], metavar="N",
                       help="experts of each MoE layer: as many layers as numbers")
    group.add_argument("--mlp-type", choices=("standard", "residual"), default="standard",
                       help="residual: PR-MoE, a linear layer for all images beside the experts, and a learned mix")
    group.add_argument("--top-k", type=int, default=1, metavar="K", help="experts of an image")
    group.add_argument("--min-capacity", type=int, default=0, metavar="N", help="images that an expert takes at least")
    group.add_argument("--noisy-gate-policy", choices=("None", "RSample", "Jitter"), default="None",
                       help="noise in the choice of experts")
    group.add_argument("--moe-param-group", action="store_true",
                       help="divide the parameters into optimizer groups here; without, initialize() does")
    group.add_argument("--balance-loss", type=float, default=0.01, metavar="W",
                       help="weight of the loss of unequal load")


def network(args):
    """The network that the options ask for."""
    if not args.moe:
        return Net()
    return Net(args.num_experts, ep_size=args.ep_world_size, use_residual=args.mlp_type == "residual", k=args.top_k,
               min_capacity=args.min_capacity, noisy_gate_policy=args.noisy_gate_policy)


def merge(under, over):
    """`over` laid over `under`, section by section."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def settings(args):
    """(configuration for deepspeed.initialize, dtype name)."""
    config = DEFAULTS
    if args.deepspeed_config:
        with open(args.deepspeed_config) as text:
            config = merge(config, json.load(text))
        # initialize() takes the merged dict; a path in args as well would be a second answer to one question.
        args.deepspeed_config = None
    in_file = [name for name in ("fp16", "bf16") if name in config]
    enabled = [name for name in in_file if config[name].get("enabled")]
    dtype = args.dtype or (enabled[0] if enabled else "fp32" if in_file else "fp16")
    config = merge(config, {"seed": args.seed})
    config = merge(config, {name: {"enabled": name == dtype} for name in ("fp16", "bf16")})
    if args.stage is not None:
        config = merge(config, {"zero_optimization": {"stage": args.stage}})
    return config, dtype


class WithEngine:
    """Training and testing with deepspeed_c."""

    def __init__(self, args, config, train_set):
        self.net = network(args)
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        if args.moe_param_group:
            parameters = split_params_into_different_moe_groups_for_optimizer({"params": parameters, "name": "all"})
        self.engine, _, self.loader, _ = deepspeed.initialize(
            args=args, model=self.net, model_parameters=parameters, training_data=train_set,
            collate_fn=images.whole_batch, config=config)
        self.rank, self.world = self.engine.global_rank, deepspeed.comm.get_world_size()
        self.device = deepspeed.accelerator.get_accelerator().device_name(self.engine.local_rank)
        self.dtype = torch.float32
        if self.engine.bfloat16_enabled():
            self.dtype = torch.bfloat16
        elif self.engine.fp16_enabled():
            self.dtype = torch.float16

    def forward(self, pixels):
        return self.engine(images.to_input(pixels, self.device, self.dtype)).float()

    def update(self, loss):
        self.engine.backward(loss)
        self.engine.step()

    def train(self, mode):
        self.engine.train(mode)

    def total(self, counts):
        """Sum over ranks."""
        deepspeed.comm.all_reduce(counts)
        return counts

    def skipped(self):
        return self.engine.skipped_steps


class PlainTorch:
    """The same in PyTorch alone, one process: 16-bit types through autocast, as PyTorch's own guide has it."""

    rank, world = 0, 1

    def __init__(self, args, config, dtype, train_set):
        self.net = network(args)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net.to(self.device)
        adam, warmup = config["optimizer"]["params"], config["scheduler"]["params"]
        self.optimizer = torch.optim.AdamW(self.net.parameters(), **{**adam, "betas": tuple(adam["betas"])})
        self.clip, self.dtype = config["gradient_clipping"], DTYPES[dtype]
        n_warmup, low = warmup["warmup_num_steps"], warmup["warmup_min_lr"] / adam["lr"]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: low + (1 - low) * min(1.0, math.log(max(i, 1)) / math.log(max(2, n_warmup))))
        self.scaler = torch.amp.GradScaler(self.device, init_scale=2.0**16, enabled=dtype == "fp16")
        self.n_skipped = 0
        self.loader = torch.utils.data.DataLoader(
            train_set, config["train_batch_size"], shuffle=True, collate_fn=images.whole_batch,
            generator=torch.Generator().manual_seed(args.seed))

    def forward(self, pixels):
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return self.net(images.to_input(pixels, self.device, torch.float32)).float()

    def update(self, loss):
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < before:
            self.n_skipped += 1
        else:
            self.schedule.step()

    def train(self, mode):
        self.net.train(mode)

    def total(self, counts):
        return counts

    def skipped(self):
        return self.n_skipped


def train(trainer, args, test_set):
    """Returns points (samples, loss), points (samples, accuracy), points (samples, [share of each expert] for each
    layer), correct and total per class, samples per second."""
    losses, accuracies, loads, recent = [], [], [], []
    batch = trainer.loader.batch_size * trainer.world
    n_seen, seconds = 0, 0.0
    with tqdm(total=args.epochs * len(trainer.loader), unit="step", disable=trainer.rank != 0) as bar:
        for epoch in range(args.epochs):
            start = time.perf_counter()
            trainer.train(True)
            for pixels, labels in trainer.loader:
                loss = F.cross_entropy(trainer.forward(pixels), labels.to(trainer.device))
                trainer.update(loss + args.balance_loss * trainer.net.balance_loss if args.moe else loss)
                recent.append(float(loss.detach()))
                n_seen += batch
                bar.update()
                if len(recent) == args.log_interval:
                    losses.append((n_seen, sum(recent) / len(recent)))
                    bar.set_postfix(epoch=epoch + 1, loss=f"{losses[-1][1]:.3f}", refresh=False)
                    recent.clear()
                    if args.moe:
                        loads.append((n_seen, shares(trainer)))
                        if trainer.rank == 0:
                            bar.write(load_line(*loads[-1]))
            seconds += time.perf_counter() - start
            correct, total = test(trainer, test_set)
            accuracies.append((n_seen, correct.sum().item() / total.sum().item()))
    if recent:
        losses.append((n_seen, sum(recent) / len(recent)))
        if args.moe and not loads:  # a run of less than an interval
            loads.append((n_seen, shares(trainer)))
            if trainer.rank == 0:
                tqdm.write(load_line(*loads[-1]))
    return losses, accuracies, loads, correct, total, n_seen / seconds


def shares(trainer):
    """For each MoE layer the share of choices that each expert got on all ranks, since the last call."""
    sizes = [len(counts) for counts in trainer.net.counts]
    parts = trainer.total(trainer.net.take_counts()).split(sizes)
    return [(part / part.sum().clamp(min=1)).tolist() for part in parts]


def load_line(n_seen, layers):
    texts = (" ".join(f"{100 * share:.0f} %" for share in layer) for layer in layers)
    return f"{n_seen} images, load of the experts: " + "; ".join(f"layer {i}: {t}" for i, t in enumerate(texts, 1))


@torch.no_grad()
def test(trainer, test_set):
    """Correct answers and images per class. Every rank tests its share; the counts are added.

    Ranks that share experts run the same batches: where the images do not divide, some ranks have one again, uncounted.
    """
    trainer.train(False)
    counts = torch.zeros(2, len(test_set.classes), dtype=torch.int64)
    mine = torch.arange(trainer.rank, -(-len(test_set) // trainer.world) * trainer.world, trainer.world)
    for indices in mine.split(100):
        pixels, labels = test_set.__getitems__(indices % len(test_set))
        hit = trainer.forward(pixels).argmax(1).cpu() == labels
        first = indices < len(test_set)
        counts[0] += torch.bincount(labels[hit & first], minlength=counts.shape[1])
        counts[1] += torch.bincount(labels[first], minlength=counts.shape[1])
    return trainer.total(counts)


def draw(losses, accuracies, loads, title, path):
    """The loss and accuracy curve as a PNG file, with a map of expert load beside them for each MoE layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n_layers = len(loads[0][1]) if loads else 0
    rows = [["loss", "accuracy", i] for i in range(n_layers)] or [["loss", "accuracy"]]
    figure, axes = plt.subplot_mosaic(rows, figsize=(15 if loads else 10, max(4, 2 * n_layers)), layout="constrained")
    axes["loss"].plot(*zip(*losses), marker="o" if len(losses) < 10 else None)  # one point alone has no line
    axes["loss"].set(xlabel="images seen", ylabel="training loss (rank 0)", ylim=(0, None))
    axes["accuracy"].plot(*zip(*((n, 100 * a) for n, a in accuracies)), marker="o")
    axes["accuracy"].set(xlabel="images seen", ylabel="test accuracy (%)", ylim=(0, 100))
    for i in range(n_layers):
        share = [layers[i] for _, layers in loads]
        n_experts = len(share[0])
        picture = axes[i].imshow(list(zip(*share)), aspect="auto", vmin=0, vmax=1, interpolation="nearest",
                                 extent=(0, loads[-1][0], n_experts - 0.5, -0.5))
        axes[i].set(xlabel="images seen", ylabel=f"expert, layer {i + 1}", yticks=range(n_experts))
        figure.colorbar(picture, ax=axes[i], label="share of images")
    figure.suptitle(title)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    args = parse_arguments()
    config, dtype = settings(args)
    if args.deepspeed:
        deepspeed.init_distributed()
    rank = int(os.environ.get("RANK", 0)) if args.deepspeed else 0

    def say(text):
        if rank == 0:
            tqdm.write(text)

    cache = os.path.join(HERE, "data")
    if args.deepspeed and not args.data_dir:
        # One rank downloads; what lies in the cache afterwards is what all of them read.
        if rank == 0:
            images.fetch(cache, say)
        deepspeed.comm.barrier()
    train_set, test_set = images.load(args.data_dir, cache, may_download=not args.deepspeed, say=say)
    train_set, test_set = train_set.first(args.train_samples), test_set.first(args.test_samples)

    torch.manual_seed(args.seed)
    if args.deepspeed:
        trainer = WithEngine(args, config, train_set)
    else:
        trainer = PlainTorch(args, config, dtype, train_set)
    how = f"deepspeed_c, ZeRO stage {config['zero_optimization']['stage']}" if args.deepspeed else "plain PyTorch"
    if args.moe:
        kind = "residual layers" if args.mlp_type == "residual" else "layers"
        how += f", {kind} of {' and '.join(map(str, args.num_experts))} experts, top-{args.top_k}"
    title = f"{train_set.source}: {how}, {dtype}, {trainer.world} rank{'s' if trainer.world > 1 else ''}"
    say(f"{title}; {len(train_set)} images to train, {len(test_set)} to test")

    losses, accuracies, loads, correct, total, speed = train(trainer, args, test_set)
    if rank == 0:
        for name, right, n in zip(test_set.classes, correct.tolist(), total.tolist()):
            print(f"Accuracy of {name:>5s}: {100 * right / n:5.1f} %" if n else f"Accuracy of {name:>5s}: no images")
        print(f"Accuracy on {len(test_set)} test images: {100 * accuracies[-1][1]:.1f} %")
        print(f"Training loss, mean of the last {args.log_interval} steps: {losses[-1][1]:.3f}; "
              f"{trainer.skipped()} steps skipped for overflow")
        print(f"{speed:.0f} samples per second")
        path = os.path.join(os.path.abspath(args.out), "curve.png")
        draw(losses, accuracies, loads, title, path)
        print(f"Curve: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
