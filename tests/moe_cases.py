"""MoE layers with formula weights and input, run forward and backward: what tests compare, and how it was recorded.

moe_cases.json holds what DeepSpeed 0.19.8 gives for CASES; in an environment that has it:

    DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29655 \
        python tests/moe_cases.py deepspeed
"""
import importlib
import json
import pathlib
import sys

import numpy as np
import torch
from torch import nn

FILE = pathlib.Path(__file__).with_suffix(".json")
M, E, SHAPE = 4, 4, (3, 4)  # features, experts, tokens
PLENTY = {"capacity_factor": 4.0, "eval_capacity_factor": 4.0}  # no token is dropped
CASES = {
    "top1": {**PLENTY, "use_rts": False},
    "top1 dropping at random": {"min_capacity": 2, "capacity_factor": 0.5},
    "top1 RSample": {"min_capacity": 0, "noisy_gate_policy": "RSample"},
    "top1 Jitter": {**PLENTY, "use_rts": False, "noisy_gate_policy": "Jitter"},
    "top1 without dropping": {"drop_tokens": False, "use_rts": False},
    "top1 residual": {**PLENTY, "use_rts": False, "use_residual": True},
    "top1 eval": {"min_capacity": 0, "eval_capacity_factor": 4.0, "evaluate": True, "use_rts": False},
    "top1 used_token": {**PLENTY, "use_rts": False, "used_token": True},
    "top2": {"k": 2, **PLENTY, "top2_2nd_expert_sampling": False},
    "top2 dropping": {"k": 2, "min_capacity": 1, "capacity_factor": 0.5, "top2_2nd_expert_sampling": False},
    "top2 sampled": {"k": 2, "min_capacity": 1, "capacity_factor": 0.5},
    "top2 without dropping": {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False},
    "top2 residual eval": {"k": 2, "use_residual": True, "evaluate": True, "top2_2nd_expert_sampling": False},
    "top3": {"k": 3, "min_capacity": 1, "capacity_factor": 0.6},
    "top3 without dropping": {"k": 3, "drop_tokens": False},
}


def formula(shape, shift):
    """Numbers in (-1, 1) that depend on their place only."""
    n = int(np.prod(shape))
    return torch.from_numpy(np.sin(np.arange(n) * 1.7 + shift * 0.9 + 0.3).astype(np.float32).reshape(shape))


def expert():
    return nn.Sequential(nn.Linear(M, 5), nn.Tanh(), nn.Linear(5, M))


def build(layer, case):
    """A layer with weights by formula. layer: the class MoE."""
    options = {key: value for key, value in CASES[case].items() if key not in ("evaluate", "used_token")}
    moe = layer(hidden_size=M, expert=expert(), num_experts=E, **options)
    for i, p in enumerate(moe.parameters()):
        p.data.copy_(formula(p.shape, i))
    moe.set_deepspeed_parallelism()
    return moe.train(not CASES[case].get("evaluate"))


def outcome(moe, case, dtype=torch.float32):
    """{name: array}: the output, the loss of load, the counts, and all gradients, of input and parameters."""
    torch.manual_seed(7)
    x = formula((*SHAPE, M), 50).to(dtype).requires_grad_()
    used = torch.tensor([1.0, 0, 1, 1] * 3) if CASES[case].get("used_token") else None
    output, l_aux, counts = moe(x, used)
    (output.float() * formula(output.shape, 60)).sum().add(l_aux * 3).backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in moe.named_parameters()}
    found = {"output": output, "l_aux": l_aux, "counts": counts, "x": x.grad, **grads}
    return {name: value.detach().float().numpy() for name, value in found.items()}


def recorded(case, like):
    """What the file has for a case, in the shapes of `like`, an outcome."""
    flat = np.array(json.loads(FILE.read_text())[case], np.float32)
    ends = np.cumsum([value.size for value in like.values()])
    assert ends[-1] == flat.size, f"{case}: {flat.size} numbers are recorded, {ends[-1]} came"
    return {name: part.reshape(value.shape) for (name, value), part in zip(like.items(), np.split(flat, ends[:-1]))}


if __name__ == "__main__":
    library = sys.argv[1]
    importlib.import_module(library).init_distributed()
    MoE = importlib.import_module(f"{library}.moe.layer").MoE
    lines = []
    for case in CASES:
        flat = np.concatenate([value.ravel() for value in outcome(build(MoE, case), case).values()])
        lines.append(f"{json.dumps(case)}: [{','.join(f'{number:.7g}' for number in flat)}]")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
