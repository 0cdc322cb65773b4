"""The accelerator object, and the parameter groups of experts."""
import os
import re
import subprocess
import sys

import pytest
import torch

from deepspeed_c import accelerator
from deepspeed_c.accelerator import get_accelerator
from deepspeed_c.accelerator.cpu import CPU_Accelerator
from deepspeed_c.accelerator.cuda import CUDA_Accelerator
from deepspeed_c.accelerator.interface import DeepSpeedAccelerator
from deepspeed_c.moe import utils as moe
from deepspeed_c.moe.layer import MoE

MEMBERS = """
is_synchronized_device use_host_timers resolves_data_dependency handles_memory_backpressure device_name device
set_device current_device current_device_name device_count synchronize random set_rng_state get_rng_state manual_seed
manual_seed_all initial_seed default_generator Stream stream current_stream default_stream Event empty_cache
memory_allocated max_memory_allocated reset_max_memory_allocated memory_cached max_memory_cached
reset_max_memory_cached memory_stats reset_peak_memory_stats memory_reserved max_memory_reserved total_memory
available_memory is_bf16_supported is_fp16_supported is_fp64_supported supported_dtypes is_available range_push
range_pop lazy_call communication_backend_name is_triton_supported prefer_triton_grouped_mm
is_current_stream_capturing create_graph capture_to_graph replay_graph BFloat16Tensor ByteTensor DoubleTensor
FloatTensor HalfTensor IntTensor LongTensor register_host_memory unregister_host_memory pin_memory_alignment
pin_memory pin_empty pin_empty_like is_pinned unpin_memory on_accelerator op_builder_dir create_op_builder
get_op_builder build_extension export_envs visible_devices_envs set_visible_devices_envs get_compile_backend
set_compile_backend
""".split()


def run(code, **environ):
    kept = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    return subprocess.run([sys.executable, "-c", code], env={**kept, **environ}, capture_output=True, text=True,
                          timeout=60)


# ---- choosing ----

@pytest.mark.parametrize("name, text", [("tpu", "DS_ACCELERATOR='tpu' is not one of 'cpu', 'cuda'"),
                                        ("CPU", "DS_ACCELERATOR='CPU' is not one of")])
def test_unknown_name_is_an_error(name, text, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", name)
    with pytest.raises(ValueError, match=re.escape(text)):
        accelerator._choose()


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU")
def test_cuda_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(RuntimeError, match="torch sees no GPU"):
        accelerator._choose()


def test_set_accelerator_takes_accelerators_only(monkeypatch):
    monkeypatch.setattr(accelerator, "_current", None)
    with pytest.raises(TypeError, match="needs a DeepSpeedAccelerator, got str"):
        accelerator.set_accelerator("cpu")
    mine = CPU_Accelerator()
    accelerator.set_accelerator(mine)
    assert get_accelerator() is mine and accelerator.is_current_accelerator_supported()


def test_choice_is_made_once_and_forced_by_the_environment(monkeypatch):
    monkeypatch.setattr(accelerator, "_current", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert isinstance(get_accelerator(), CPU_Accelerator) and get_accelerator() is get_accelerator()


def test_choice_follows_what_torch_sees(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for count, cls in ((0, CPU_Accelerator), (2, CUDA_Accelerator)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert type(accelerator._choose()) is cls


def test_choosing_opens_no_cuda_context_and_prints_nothing():
    done = run("import torch; from deepspeed_c.accelerator import get_accelerator; get_accelerator(); "
               "assert not torch.cuda.is_initialized()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- members ----

@pytest.mark.parametrize("cls", [CPU_Accelerator, CUDA_Accelerator])
def test_every_documented_member_is_there(cls):
    assert issubclass(cls, DeepSpeedAccelerator)
    assert [name for name in MEMBERS if not hasattr(cls, name)] == []
    cls()  # nothing abstract is left


def test_names_of_devices_and_back_ends(monkeypatch):
    cpu, cuda = CPU_Accelerator(), CUDA_Accelerator()
    assert [cpu.device_name(), cpu.device_name(1), cpu.current_device_name()] == ["cpu"] * 3
    assert [cuda.device_name(), cuda.device_name(1)] == ["cuda", "cuda:1"]
    assert [cpu.communication_backend_name(), cuda.communication_backend_name()] == ["gloo", "nccl"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert (cpu.current_device(), cpu.device_count()) == (3, 4)
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("LOCAL_SIZE")
    assert (cpu.current_device(), cpu.device_count()) == (0, 1)


def test_cpu_computes_in_every_training_type():
    cpu = CPU_Accelerator()
    assert cpu.is_bf16_supported() and cpu.is_fp16_supported() and cpu.is_fp64_supported()
    assert set(cpu.supported_dtypes()) == {torch.float32, torch.float16, torch.bfloat16}
    for dtype in cpu.supported_dtypes():
        x = torch.ones(2, 2, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()
        assert x.grad.tolist() == [[4, 4], [4, 4]]


def test_cpu_memory_counters_follow_the_process():
    cpu = CPU_Accelerator()
    cpu.reset_peak_memory_stats()
    before = cpu.memory_allocated()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert cpu.memory_allocated() - before > 60 << 20
    del block
    assert cpu.max_memory_allocated() - before > 60 << 20
    cpu.reset_max_memory_allocated()
    assert cpu.max_memory_allocated() - before < 30 << 20
    assert cpu.memory_stats()["allocated_bytes.all.current"] > 0
    assert 0 < cpu.available_memory() <= cpu.total_memory()


def test_cpu_streams_do_nothing_and_graphs_are_errors():
    cpu = CPU_Accelerator()
    with cpu.stream(cpu.current_stream()), cpu.device(0):
        cpu.synchronize()
    assert cpu.Stream is None is cpu.Event is cpu.create_graph() is cpu.default_stream()
    for call in (cpu.capture_to_graph, cpu.replay_graph):
        with pytest.raises(RuntimeError, match="a CPU has no graphs"):
            call(None)


def test_cpu_generator_is_torchs():
    cpu = CPU_Accelerator()
    state = cpu.get_rng_state()
    cpu.manual_seed(3)
    first = torch.rand(2).tolist()
    assert cpu.initial_seed() == 3 and cpu.default_generator(0) is torch.default_generator
    torch.manual_seed(3)
    assert torch.rand(2).tolist() == first
    cpu.set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)


def test_cpu_pinning_keeps_the_tensor():
    cpu, x = CPU_Accelerator(), torch.zeros(3)
    assert cpu.pin_memory(x) is x is cpu.unpin_memory(x) and not cpu.is_pinned(x) and cpu.on_accelerator(x)
    assert cpu.pin_empty(2, 3, dtype=torch.int8).shape == (2, 3)
    assert cpu.pin_empty_like(x, dtype=torch.float16).dtype == torch.float16


def test_tensor_types_and_lazy_call():
    cpu = CPU_Accelerator()
    assert cpu.HalfTensor([1]).dtype == torch.float16 and cpu.BFloat16Tensor([1]).dtype == torch.bfloat16
    assert cpu.lazy_call(lambda: 5) == 5


def test_op_builders_are_errors_that_say_why():
    cpu = CPU_Accelerator()
    for call in (cpu.op_builder_dir, cpu.build_extension, lambda: cpu.create_op_builder("CPUAdamBuilder"),
                 lambda: cpu.get_op_builder("CPUAdamBuilder")):
        with pytest.raises(NotImplementedError, match="op builders are not there"):
            call()


def test_compile_backend_must_be_known():
    cpu = CPU_Accelerator()
    assert cpu.get_compile_backend() == "inductor"
    with pytest.raises(ValueError, match="nonesuch not supported by cpu. Supported Backends are"):
        cpu.set_compile_backend("nonesuch")
    cpu.set_compile_backend("eager")
    assert cpu.get_compile_backend() == "eager"


def test_environment_variables_of_devices():
    environ = {}
    CPU_Accelerator().set_visible_devices_envs(environ, [0, 2])
    assert environ == {"CUDA_VISIBLE_DEVICES": "0,2"} and CUDA_Accelerator().export_envs() == ["NCCL"]


@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU")
def test_cuda_members_work_on_a_gpu():
    cuda = CUDA_Accelerator()
    cuda.set_device(0)
    assert cuda.current_device_name() == "cuda:0" and cuda.is_bf16_supported() in (True, False)
    x = torch.ones(1 << 20, device=cuda.device_name(0))
    assert cuda.memory_allocated() >= 4 << 20 and cuda.on_accelerator(x)
    assert 0 < cuda.available_memory() <= cuda.total_memory()
    with cuda.stream(cuda.Stream()):
        event = cuda.Event()
        event.record()
    cuda.synchronize()
    assert event.query()
    host = torch.ones(4096)
    assert cuda.is_pinned(cuda.pin_memory(host)) and not cuda.is_pinned(host)
    cuda.pin_memory(host, make_copy=False)
    cuda.unpin_memory(host)
    assert cuda.pin_empty_like(host).is_pinned()
    state = cuda.get_rng_state()
    cuda.manual_seed(1), cuda.set_rng_state(state)
    assert torch.equal(cuda.get_rng_state(), state)


# ---- experts' parameter groups ----

def params(n, group=None):
    made = [torch.nn.Parameter(torch.zeros(3)) for _ in range(n)]
    for p in made:
        if group:
            p.allreduce, p.group_name = False, group
    return made


@pytest.mark.parametrize("given, error, text", [
    (5, ValueError, "Unknown param group type of <class 'int'>"),
    ([torch.zeros(1)], ValueError, "parameter group 0 must be a dict, got Tensor"),
    ({"params": params(1, "ep_size_2")}, KeyError, "group 0 holds experts and needs a 'name'"),
])
def test_bad_groups_are_named(given, error, text):
    with pytest.raises(error, match=re.escape(text)):
        moe.split_params_into_different_moe_groups_for_optimizer(given)


def test_groups_without_experts_come_back_as_they_are():
    own = params(3)
    group = {"params": iter(own), "lr": 0.5}
    (back,) = moe.split_params_into_different_moe_groups_for_optimizer(group)
    assert back is group and back["lr"] == 0.5 and list(map(id, back["params"])) == list(map(id, own))
    assert moe.split_params_into_different_moe_groups_for_optimizer(({"params": own},)) == [{"params": own}]


def test_experts_stand_apart_by_group_and_size():
    shared, two, four = params(2), params(3, "ep_size_2"), params(1, "ep_size_4")
    group = {"params": [*two, *shared, *four], "lr": 1, "name": "mine"}
    groups = moe.split_params_into_different_moe_groups_for_optimizer(group, max_group_size=6)
    assert [(g["name"], g.get("moe"), g["lr"], len(g["params"])) for g in groups] == [
        ("mine", None, 1, 2), ("ep_size_2", True, 1, 2), ("ep_size_2", True, 1, 1), ("ep_size_4", True, 1, 1)]
    assert [len(g["params"]) for g in moe.split_params_into_different_moe_groups_for_optimizer(
        {"params": two, "name": "x"}, max_group_size=2)] == [0, 1, 1, 1]
    assert [len(g["params"]) for g in moe.split_params_into_different_moe_groups_for_optimizer(
        {"params": two, "name": "x"}, max_group_size=None)] == [0, 3]
    assert moe.is_moe_param_group(groups[1]) and not moe.is_moe_param_group(groups[0])


def test_refused_groups_are_unchanged():
    good = {"params": [*params(1), *params(1, "ep_size_2")], "name": "x"}
    bad = {"params": params(1, "ep_size_2")}
    with pytest.raises(KeyError):
        moe.split_params_into_different_moe_groups_for_optimizer([good, bad])
    assert len(good["params"]) == 2


def test_users_parameters_become_groups():
    flat = moe.configure_moe_param_groups([*params(2), *params(1, "ep_size_2")])
    assert [(g["name"], len(g["params"])) for g in flat] == [("dense-params", 2), ("ep_size_2", 1)]
    done = [{"params": params(1), "moe": True}]
    assert moe.configure_moe_param_groups(done) is done
    with pytest.raises(AssertionError, match="must be a list"):
        moe.configure_moe_param_groups(tuple(params(1)))
    with pytest.raises(ValueError, match="either tensors only or group dicts only"):
        moe.configure_moe_param_groups([*params(1), {"params": []}])


def test_experts_are_known_by_their_attribute():
    shared, expert = params(1)[0], params(1, "ep_size_2")[0]
    assert moe.is_moe_param(expert) and not moe.is_moe_param(shared)
    split = moe.split_params_into_shared_and_expert_params(iter([expert, shared]))
    assert split[0][0] is shared and split[1][0] is expert
    expert.grad = torch.ones(3)
    grads = moe.split_params_grads_into_shared_and_expert_params([shared, expert])
    assert grads[0] == [] and grads[1][0].tolist() == [1, 1, 1]
    assert moe.has_moe_layers(torch.nn.Linear(2, 2)) == (False, 0)
    assert moe.has_moe_layers(torch.nn.ModuleList([MoE(2, torch.nn.Linear(2, 2), num_experts=3)])) == (True, 3)
