"""Small modules that hold the awkward cases, and the loop that trains them, for the tests of the engine."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from deepspeed_c import zero

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Awkward(nn.Module):
    """A tied weight, a module used twice, frozen, unused, zero-element and non-contiguous parameters, odd sizes,
    batch norm, a convolution in channels_last, a table in a module without parameters."""

    def __init__(self):
        super().__init__()
        # No bias: batch norm takes it out again, and a gradient of nothing but rounding is amplified by Adam.
        self.conv = nn.Conv2d(2, 5, 3, bias=False).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.embed = nn.Embedding(11, 20)
        self.twice = nn.Linear(20, 20)
        self.transposed = nn.Parameter(torch.randn(7, 20).t() * 0.1)
        self.frozen = nn.Linear(20, 20)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.head = nn.Linear(20, 11, bias=False)
        self.head.weight = self.embed.weight
        self.table = Table()

    def forward(self, images, tokens):
        x = F.relu(self.norm(self.conv(images.to(memory_format=torch.channels_last)))).mean((2, 3))
        h = self.embed(tokens) + self.table(tokens.shape[1]).to(x.dtype)
        h = self.twice(F.relu(self.twice(h)))
        h = self.frozen(h) + h
        h = h + F.pad(h @ self.transposed, (0, 13)) + x.sum() * 0.01
        return F.cross_entropy(self.head(h).float().flatten(0, 1), tokens.flatten())


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("angles", torch.arange(8.0)[:, None] / 100)

    def forward(self, n):
        return self.angles[:n]


class MixedDtypes(nn.Module):
    """A model with parameters of two dtypes: two spaces."""

    def __init__(self):
        super().__init__()
        self.low = nn.Linear(6, 9).to(torch.bfloat16)
        self.high = nn.Linear(9, 4)

    def forward(self, x):
        return self.high(F.gelu(self.low(x.to(torch.bfloat16)).float())).square().mean()


def make(kind=Awkward, seed=3):
    torch.manual_seed(seed)
    return kind()


def batch(rank, step, micro=0, dtype=torch.float32):
    """Inputs as a function of their place: other data on each rank."""
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + micro)
    images = torch.randn(2, 2, 6, 6, generator=generator).to(dtype)
    return images, torch.randint(0, 11, (2, 5), generator=generator)


def config(stage=0, dtype="fp32", gas=1, micro=2, **more):
    """A configuration; `zero` and `optimizer` in `more` are merged into their sections."""
    zero = {"stage": stage, **more.pop("zero", {})}
    optimizer = more.pop("optimizer", {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}})
    result = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": gas, "optimizer": optimizer,
              "zero_optimization": zero, "gradient_clipping": 0.5}
    if dtype == "bf16":
        result["bf16"] = {"enabled": True}
    if dtype == "fp16":
        result["fp16"] = {"enabled": True, "initial_scale_power": 8}
    result.update(more)
    return result


def train(engine, rank, n_steps, gas=1, dtype="fp32"):
    """Micro-steps with step() after each; returns the losses."""
    losses = []
    for step in range(n_steps):
        for micro in range(gas):
            loss = engine(*batch(rank, step, micro, DTYPES[dtype]))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def bits(module):
    """The exact values of all parameters, as bytes. Collective at stage 3 where ranks share no memory."""
    with zero.GatheredParameters(list(module.parameters())):
        return b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in module.parameters()
                        if p.numel())


def grown(width):
    """A model whose size goes with the square of width."""
    return nn.Linear(width, width)
