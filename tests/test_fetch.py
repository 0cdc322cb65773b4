"""Fetching where ranks share no memory: parts of many tensors in one operation, and when (ZeRO-3 over `delegate`)."""
import os

import pytest
import torch

from deepspeed_c import distributed

NODES = {2: None, 3: None, 4: "aabb"}


def opened(rank, world):
    """The communicator of ranks that share no memory; four ranks on two pretended nodes of two."""
    if NODES[world]:
        os.environ["DSC_COMM_NODE"] = NODES[world][rank]
    else:
        os.environ["DSC_COMM_BACKEND"] = "delegate"
    torch.set_num_threads(1)
    distributed.init_distributed("gloo", verbose=False)
    return distributed.world_comm()


def gathered(rank, world):
    comm = opened(rank, world)
    torch.manual_seed(0)
    shapes = ((7, 5), (), (300, 1000), (0,), (64,), (3, 8, 4, 4))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.complex64, torch.int8)
    for turn, is_async in enumerate((False, True, True)):
        wholes, fulls, parts, cuts = [], [], [], []
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            whole = (torch.randn(shape) * 5).to(dtype)
            full = torch.zeros_like(whole)
            if whole.dim() == 4:
                whole = whole.to(memory_format=torch.channels_last)
                full = torch.zeros_like(whole)
            n = whole.numel()
            edges = [n] * (world - 1)
            if (i + turn) % 2:
                edges = sorted(int(x) for x in torch.randint(0, n + 1, (world - 1,)))
            cut = torch.tensor([0, *edges, n])
            flat = torch.as_strided(whole, (n,), (1,))
            wholes.append(whole)
            fulls.append(full)
            parts.append(flat[cut[rank]:cut[rank + 1]].clone())
            cuts.append(cut)
        work = comm.gather_parts(fulls, parts, cuts, f"turn {turn}", is_async)
        if is_async:
            parts = None  # the operation keeps what it needs
            work.wait()
        for whole, full in zip(wholes, fulls, strict=True):
            assert torch.equal(whole, full)
    for wrong in (([fulls[0]], [], [cuts[0]]), ([fulls[2]], [torch.zeros(1)], [cuts[2]]),
                  ([fulls[0]], [torch.zeros(1, dtype=torch.bool)], [cuts[0]]),
                  ([torch.zeros(4)], [torch.zeros(2)], [torch.tensor([4] * (world + 1))])):
        with pytest.raises(ValueError, match="gather_parts"):
            comm.gather_parts(*wrong)
    comm.barrier()
    return comm.backend


@pytest.mark.parametrize("n", [2, 4])
def test_parts_of_many_tensors_come_in_one_operation(ranks, n):
    assert ranks(n, gathered) == ["delegate"] * n
