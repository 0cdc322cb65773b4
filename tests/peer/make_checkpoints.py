"""Makes checkpoints with real DeepSpeed, and loads ours with it; run by test_deepspeed_layout.py with PEER's python.

    python make_checkpoints.py make FOLDER CASE...     FOLDER/CASE/: a checkpoint, and values.pt of what is in it
    python make_checkpoints.py load FOLDER CASE...     loads FOLDER/CASE/, writes loaded.pt, trains on, trained.pt

A case is "stage1-bf16", "stage3-fp32" and so on, or "experts1-fp32": stage 1, four experts on two ranks; what ranks
have there is in values0.pt and values1.pt, and so on. One process is one rank: RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT. Only torch is imported until a command runs, so that the model and the batches here serve the tests too.
"""
import os
import sys

import torch

N_STEPS, N_MORE = 3, 2
SLOTS = ("exp_avg", "exp_avg_sq")


class Model(torch.nn.Module):
    """Tied, frozen and trained parameters, buffers of two kinds."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.frozen = torch.nn.Linear(6, 5).requires_grad_(False)
        self.up, self.down = torch.nn.Linear(6, 7), torch.nn.Linear(7, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        hidden = self.embed(x)
        hidden = hidden + self.down(torch.relu(self.up(hidden))) + self.frozen(hidden).sum(-1, keepdim=True) * 0.1
        return self.head(self.norm(hidden))


class ModelWithExperts(torch.nn.Module):
    """Four experts, two on each of two ranks. moe: the class MoE of DeepSpeed or of ours."""

    def __init__(self, moe):
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 6), torch.nn.Linear(6, 11)
        expert = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 6))
        self.moe = moe(6, expert, num_experts=4, ep_size=2, k=1, min_capacity=4, capacity_factor=2.0)

    def forward(self, x):
        hidden = self.moe(torch.tanh(self.first(x[:, None] + torch.arange(6.0))))[0]
        return self.last(hidden)


def model(seed=1):
    torch.manual_seed(seed)
    return Model()


def groups(module):
    """Two groups of parameters, the second without weight decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]


def config(case):
    stage, dtype = case.split("-")
    return {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0,
            "zero_optimization": {"stage": int(stage[-1])},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}},
            **({"bf16": {"enabled": True}} if dtype == "bf16" else {})}


def train(engine, rank, first, n):
    for step in range(first, first + n):
        x = torch.randint(0, 11, (4,), generator=torch.Generator().manual_seed(100 * step + rank))
        loss = torch.nn.functional.cross_entropy(engine(x).float(), x)
        engine.backward(loss)
        engine.step()


def values(engine, utils):
    """{name: {"fp32", "exp_avg", "exp_avg_sq"}} of trained parameters; utils: deepspeed.utils, or ours."""
    found = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            found[name] = {"fp32": utils.safe_get_full_fp32_param(p).clone(),
                           **{slot: utils.safe_get_full_optimizer_state(p, slot).clone() for slot in SLOTS}}
    return found


def _values(engine):
    """The same of DeepSpeed's engine: at stage 0 it has no such functions, and at stages 1 and 2 those do not find the
    states of later groups."""
    from deepspeed import utils

    optimizer = engine.optimizer
    if engine.zero_optimization_stage():
        if hasattr(optimizer, "_hp_optimizer_states_linked"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        return values(engine, utils)
    inner, found = getattr(optimizer, "optimizer", optimizer), {}
    names = {id(p): name for name, p in engine.module.named_parameters()}
    held = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in inner.param_groups]
    masters = getattr(optimizer, "fp32_groups", held)
    for params, own in zip(held, masters):
        for p, master in zip(params, own):
            found[names[id(p)]] = {"fp32": master.detach().clone(), **{slot: inner.state[master][slot].clone()
                                                                       for slot in SLOTS}}
    return found


def _engine(case, seed):
    import deepspeed

    if case.startswith("experts"):
        from deepspeed.moe.layer import MoE
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

        torch.manual_seed(seed)
        module = ModelWithExperts(MoE)
        params = split({"params": list(module.parameters()), "name": "dense"})
    else:
        module = model(seed)
        params = groups(module)
    return deepspeed.initialize(model=module, model_parameters=params, config=config(case))[0]


def named(case, what, rank):
    """The name of a rank's file of values, None where another rank's has the same."""
    return f"{what}{rank}.pt" if case.startswith("experts") else None if rank else f"{what}.pt"


def _note(value, folder, case, what, rank):
    name = named(case, what, rank)
    if name is not None:
        torch.save(value, os.path.join(folder, case, name))


def _make(folder, case, rank):
    engine = _engine(case, 1)
    train(engine, rank, 0, N_STEPS)
    found = _values(engine)
    engine.save_checkpoint(os.path.join(folder, case), client_state={"epoch": 3, "seen": torch.ones(2)})
    _note({"values": found, "lr": engine.get_lr()}, folder, case, "values", rank)


def _load(folder, case, rank):
    engine = _engine(case, 2)
    path, client = engine.load_checkpoint(os.path.join(folder, case))
    if engine.zero_optimization_stage() in (1, 2) and hasattr(engine.optimizer, "_link_all_hp_params"):
        engine.optimizer._link_all_hp_params()
    found = _values(engine)
    _note({"values": found, "path": os.path.basename(path or ""), "steps": engine.global_steps, "lr": engine.get_lr(),
           "client": {key: client[key] for key in ("epoch", "seen") if key in client}}, folder, case, "loaded", rank)
    train(engine, rank, N_STEPS, N_MORE)
    found = _values(engine)
    _note({"values": found, "lr": engine.get_lr()}, folder, case, "trained", rank)


def main(command, folder, *cases):
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = int(os.environ["RANK"])
    for case in cases:
        {"make": _make, "load": _load}[command](folder, case, rank)


if __name__ == "__main__":
    main(*sys.argv[1:])
