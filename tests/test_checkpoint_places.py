"""Checkpoints of engines whose parameters lie in places of their own: experts over ranks, files, zero.Init, an mpu."""
import os

import models
import pytest
import torch
from moe_cases import E
from test_checkpoint import all_of, made
from test_moe_ranks import Net, digest, tokens

import deepspeed_c as deepspeed
from deepspeed_c.checkpoint.native import NativeSource
from deepspeed_c.utils.parallel_state_deepspeed import initialize_parallel_state_from_config


def with_experts(rank, world, folder, runs):
    """[(ep_size, stage, checkpoint to load or None, steps, tag to save as or None)] -> digests of all experts."""
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    found = []
    for ep_size, stage, load, steps, save in runs:
        torch.manual_seed(1)
        net = Net(ep_size)
        if load:
            for p in net.parameters():
                p.data.add_(1)
        engine, *_ = deepspeed.initialize(model=net, config={
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "gradient_clipping": 1.0,
            "optimizer": {"type": "Adam", "params": {"lr": 0.05}}})
        if load:
            engine.load_checkpoint(folder, load)
        for step in range(engine.global_steps, engine.global_steps + steps):
            engine.backward(engine(tokens(rank + 10 * step, 4)))
            engine.step()
        if save:
            engine.save_checkpoint(folder, save)
        engine.destroy()
        found.append(digest(net.whole(lambda p: p.detach())))
    return found


def test_experts_are_known_by_their_number_among_all(ranks, tmp_path):
    runs = [(2, 1, None, 2, "a"), (2, 1, None, 4, None),  # without a break
            (2, 2, "a", 2, None), (2, 3, "a", 0, "b"), (1, 1, "a", 0, "c"), (1, 0, "a", 2, None), (2, 0, "c", 2, None)]
    found = ranks(2, with_experts, str(tmp_path), runs, timeout=120)
    for _, straight, resumed, _, _, _, back in found:
        assert straight == resumed == back
    names = {name for _, name, _ in NativeSource(tmp_path / "a").tensors if "deepspeed_experts" in name}
    assert {int(name.split("deepspeed_experts.")[1].split(".")[0]) for name in names} == set(range(E))
    held = all_of(tmp_path, "a")[0]
    for tag in ("b", "c"):  # groups of parameters are those of ep_size
        assert {key: value for (key, *_), value in all_of(tmp_path, tag)[0].items()} == {
            key: value for (key, *_), value in held.items()}


def through_files(rank, world, folder, files):
    """NVMe for masters, states and parameters, and a model made under zero.Init; into stages without, and back."""
    nvme = {"device": "nvme", "nvme_path": files}
    zero = {"offload_optimizer": nvme, "offload_param": nvme, "stage3_param_persistence_threshold": 0}

    def resumed(tag, stage, zero, init=False):
        config = models.config(stage, "bf16", zero=zero)
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=init):
            module = models.make(seed=7)
        engine = deepspeed.initialize(model=module, config=config)[0]
        engine.load_checkpoint(folder, tag)
        return engine

    first = deepspeed.initialize(model=models.make(), config=models.config(3, "bf16", zero=zero))[0]
    models.train(first, rank, 2, dtype="bf16")
    first.save_checkpoint(folder, "files")
    models.train(first, rank, 2, dtype="bf16")
    ends = [models.bits(first.module)]
    first.destroy()
    memory = resumed("files", 1, {})
    memory.save_checkpoint(folder, "memory")
    again = resumed("memory", 3, zero, init=True)
    again.save_checkpoint(folder, "again")
    kept = resumed("again", 3, {})  # small parameters stay gathered
    for engine in (memory, again, kept):
        models.train(engine, rank, 2, dtype="bf16")
        ends.append(models.bits(engine.module))
        engine.destroy()
    assert all(end == ends[0] for end in ends)


def test_files_and_init_take_part(ranks, tmp_path):
    ranks(2, through_files, str(tmp_path / "checkpoints"), str(tmp_path / "files"))
    held, memory, again = (  # zero.Init gives buffers another dtype
        {key: value for key, value in all_of(tmp_path / "checkpoints", tag)[0].items() if key[0][0] != "buffer"}
        for tag in ("files", "memory", "again"))
    assert held == memory == again


def with_an_mpu(rank, world, folder):
    """Tensor-parallel ranks have models of their own, of the same names."""
    layout = {"tensor_parallel": {"autotp_size": 2}}
    deepspeed.init_distributed()
    mpu = initialize_parallel_state_from_config(layout, "saving")

    def engine_of(stage, seed):
        module = models.make(seed=seed + mpu.get_tensor_model_parallel_rank())
        return deepspeed.initialize(model=module, config=models.config(stage, "bf16", **layout), mpu=mpu)[0]

    first = engine_of(1, 3)
    models.train(first, rank // 2, 2, dtype="bf16")
    first.save_checkpoint(folder, "a")
    models.train(first, rank // 2, 2, dtype="bf16")
    for stage in (0, 3):
        second = engine_of(stage, 30)
        second.load_checkpoint(folder, "a")
        models.train(second, rank // 2, 2, dtype="bf16")
        assert models.bits(second.module) == models.bits(first.module)
    plain = made(1, "bf16")
    with pytest.raises(ValueError, match="2 tensor-parallel x 1 pipeline-parallel"):
        plain.load_checkpoint(folder, "a")


def test_an_mpus_ranks_have_their_own(ranks, tmp_path):
    ranks(4, with_an_mpu, str(tmp_path), timeout=120)
    assert {place for kind, _, place in NativeSource(tmp_path / "a").tensors if kind == "model"} == {(0, 0), (1, 0)}


def on_two_nodes(rank, world, folder):
    """Each node has a folder that the other one does not see."""
    os.environ["DSC_COMM_NODE"] = "aabb"[rank]
    mine = os.path.join(folder, "aabb"[rank])
    first = made(1, "bf16", checkpoint={"use_node_local_storage": True})
    models.train(first, rank, 2, dtype="bf16")
    first.save_checkpoint(mine, "a")
    had = sorted(os.listdir(os.path.join(mine, "a")))
    first._comm.barrier("looked")
    models.train(first, rank, 2, dtype="bf16")
    second = made(3, "bf16", seed=7, checkpoint={"use_node_local_storage": True})
    second.load_checkpoint(mine)
    models.train(second, rank, 2, dtype="bf16")
    assert models.bits(second.module) == models.bits(first.module)
    return had


def test_nodes_with_storage_of_their_own(ranks, tmp_path):
    found = ranks(4, on_two_nodes, str(tmp_path), timeout=120)
    assert found[0] == ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
    assert found[3] == ["manifest.json", "rank_00002.safetensors", "rank_00003.safetensors"]
