"""deepspeed_c.ops: optimizers without an engine, and the same objects given to one."""
import copy
import os
import subprocess
import sys

import models
import pytest
import torch

import deepspeed_c as deepspeed
from deepspeed_c import _core
from deepspeed_c.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed_c.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed_c.ops.lamb import FusedLamb
from deepspeed_c.ops.lion import DeepSpeedCPULion, FusedLion

SHAPES = [(3, 5), (), (4099,), (2, 3, 4, 5), (0,)]


def parameters(dtype=torch.float32):
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    params.append(torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(dtype, memory_format=torch.channels_last)))
    params.append(torch.nn.Parameter(torch.randn(6, 7).to(dtype)[:, ::2]))  # has holes
    params.append(torch.nn.Parameter(torch.randn(8).to(dtype)))  # gets no gradient
    return params


def set_grads(params, step):
    torch.manual_seed(100 + step)
    for p in params[:-1]:
        p.grad = torch.randn(p.shape).to(p.dtype)


def follow(optimizer, params, n_steps=100):
    for step in range(n_steps):
        set_grads(params, step)
        optimizer.step()
    return params


class Lion64(torch.optim.Optimizer):
    def __init__(self, params, **options):
        super().__init__(params, options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = torch.sign(beta1 * m + (1 - beta1) * p.grad)
                p.sub_(lr * update + lr * group["weight_decay"] * p)
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


class Adagrad64(Lion64):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                v = self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p))
                v.add_((p.grad + group["weight_decay"] * p) ** 2)
                p.sub_(group["lr"] * p.grad / (v.sqrt() + group["eps"]))


class Lamb64(Lion64):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                m, v = (state.setdefault(name, torch.zeros_like(p)) for name in ("m", "v"))
                t = state["t"] = state.get("t", 0) + 1
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).add_(p.grad ** 2, alpha=1 - beta2)
                u = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
                norms = p.norm(), u.norm()
                ratio = (norms[0] / norms[1]).clamp(0.01, 10.0) if min(norms) > 0 else 1.0
                p.sub_(lr * (1 - beta2 ** t) ** 0.5 / (1 - beta1 ** t) * ratio * u)


PAIRS = {
    "FusedAdam": (lambda p: FusedAdam(p, lr=1e-3, weight_decay=0.1),
                  lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)),
    "FusedAdam L2": (lambda p: FusedAdam(p, lr=1e-3, weight_decay=0.1, adam_w_mode=False),
                     lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1)),
    "CPUAdam": (lambda p: DeepSpeedCPUAdam(p, lr=1e-3, weight_decay=0.1),
                lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)),
    "CPUAdagrad": (lambda p: DeepSpeedCPUAdagrad(p, weight_decay=0.1),
                   lambda p: Adagrad64(p, lr=1e-2, eps=1e-10, weight_decay=0.1)),
    "FusedLion": (lambda p: FusedLion(p, weight_decay=0.1),
                  lambda p: Lion64(p, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1)),
    "CPULion": (lambda p: DeepSpeedCPULion(p, betas=(0.9, 0.99), adamw_mode=True),
                lambda p: Lion64(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=0)),
    "FusedLamb": (lambda p: FusedLamb(p, weight_decay=0.1),
                  lambda p: Lamb64(p, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_100_steps_follow_the_rule_in_fp64(name):
    ours, theirs = PAIRS[name]
    params = parameters()
    peers = [torch.nn.Parameter(p.detach().double()) for p in params]
    optimizer = ours(params)
    follow(optimizer, params)
    for step in range(100):  # the same gradients: they are drawn in fp32
        set_grads(params, step)
        for p, peer in zip(params[:-1], peers):
            peer.grad = p.grad.double()
        if step == 0:
            other = theirs(peers)
        other.step()
    for p, peer in zip(params, peers):
        torch.testing.assert_close(p.detach().double(), peer.detach(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_16_bit_parameters_are_stepped_in_fp32_and_rounded(name, dtype):
    params = parameters(dtype)
    peers = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer, peer_optimizer = PAIRS[name][0](params), PAIRS[name][0](peers)
    for step in range(3):
        set_grads(params, step)
        for p, peer in zip(params[:-1], peers):
            peer.data = p.detach().float()
            peer.grad = p.grad.float()
        optimizer.step()
        peer_optimizer.step()
        for p, peer in zip(params, peers):
            assert torch.equal(p.detach(), peer.detach().to(dtype))
    state = optimizer.state[params[0]]
    assert all(state[key].dtype == torch.float32 for key in optimizer.state_names) and state["step"] == 3


def test_states_may_have_the_parameters_dtype():
    params = parameters(torch.bfloat16)
    optimizer = follow_one(DeepSpeedCPUAdam(params, fp32_optimizer_states=False), params)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16 and optimizer.state[params[0]]["exp_avg"].any()


def follow_one(optimizer, params):
    follow(optimizer, params, 1)
    return optimizer


def test_the_classes_are_torchs_and_import_no_dynamo():
    code = ("import sys, torch; from deepspeed_c.ops.adam import FusedAdam; p = torch.nn.Parameter(torch.ones(3)); "
            "p.grad = torch.ones(3); o = FusedAdam([p]); o.step(); assert isinstance(o, torch.optim.Optimizer); "
            "print('torch._dynamo' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_live_groups_of_a_torch_optimizer_are_taken():
    params = parameters()[:3]
    source = torch.optim.AdamW([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=0.1)
    torch.optim.lr_scheduler.StepLR(source, 1)  # leaves initial_lr behind
    optimizer = DeepSpeedCPUAdam(source.param_groups, lr=0.3, weight_decay=0.2, adamw_mode=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.param_groups[0] is source.param_groups[0]
    before = params[0].detach().clone()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(before * (1 - 0.5 * 0.01) - params[0].detach(), torch.full((3, 5), 0.5))
    for cls in (DeepSpeedCPUAdagrad, DeepSpeedCPULion):
        cls(torch.optim.Adagrad(parameters()[:2]).param_groups, lr=1e-3, weight_decay=0, adamw_mode=False)


def test_states_go_to_torchs_optimizer_and_back():
    params, peers = parameters()[:4], parameters()[:4]
    ours, theirs = FusedAdam(params, lr=1e-3), torch.optim.AdamW(peers, lr=1e-3, weight_decay=0)
    for optimizer, own in ((ours, params), (theirs, peers)):
        follow(optimizer, [*own, torch.nn.Parameter(torch.zeros(1))], 3)
    swapped_ours, swapped_theirs = FusedAdam(peers, lr=1e-3), torch.optim.AdamW(params, lr=1e-3, weight_decay=0)
    mine, other = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
    swapped_ours.load_state_dict({**other, "param_groups": mine["param_groups"]})
    for state in mine["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    swapped_theirs.load_state_dict({**mine, "param_groups": other["param_groups"]})
    for optimizer, own in ((swapped_ours, peers), (swapped_theirs, params)):
        follow(optimizer, [*own, torch.nn.Parameter(torch.zeros(1))], 3)
    for p, peer in zip(params, peers):
        torch.testing.assert_close(p, peer, rtol=1e-5, atol=1e-6)
    low = follow_one(DeepSpeedCPUAdam(half := parameters(torch.bfloat16)), half)
    again = DeepSpeedCPUAdam(half)
    again.load_state_dict(low.state_dict())
    assert torch.equal(again.state[half[0]]["exp_avg"], low.state[half[0]]["exp_avg"])


def test_lamb_tells_its_ratios():
    params = parameters()
    optimizer = follow_one(FusedLamb(params, max_coeff=2.0, min_coeff=0.5), params)
    ratios = optimizer.get_lamb_coeffs()
    assert len(ratios) == len(params) - 1 and all(0.5 <= r <= 2.0 for r in ratios)


def test_wrong_arguments_are_errors():
    p = torch.nn.Parameter(torch.zeros(3))
    for cls in (FusedAdam, DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, FusedLamb):
        with pytest.raises(NotImplementedError, match="amsgrad"):
            cls([p], amsgrad=True)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="betas"):
        FusedLion([p], betas=(1.5, 0.9)).step()
    wide = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    wide.grad = torch.ones_like(wide)
    with pytest.raises(TypeError, match="float32, bfloat16, float16"):
        FusedLion([wide]).step()
    stepper, x = _core.Stepper("adam", 1), torch.zeros(3)
    for rows, error in (([(x,)], TypeError), ([(x, x)], ValueError), ([(x, torch.zeros(4), x, x)], ValueError),
                        ([(x, x, x, x.half())], TypeError), ([3], TypeError), ([(x, x, x, 3)], TypeError)):
        with pytest.raises(error):
            stepper.step({"lr": 1.0}, 1, rows)
    with pytest.raises(ValueError, match="no optimizer 'adamm'"):
        _core.Stepper("adamm", 1)
    with pytest.raises(ValueError):
        stepper.step({"lr": 1.0}, 0, [])


def bits_after(optimizer_of, section=None):
    module = models.make(models.Awkward)
    config = models.config(1, "fp32")
    del config["optimizer"]
    if section:
        config["optimizer"] = section
    given = optimizer_of([p for p in module.parameters() if p.requires_grad]) if optimizer_of else None
    engine, *_ = deepspeed.initialize(model=module, optimizer=given, config=config)
    assert given is None or engine.basic_optimizer is given
    for step in range(3):
        engine.backward(engine(*models.batch(0, step)))
        (engine if given is None or step else given).step()  # the object's own step is the engine's
    assert engine.global_steps == 3
    return models.bits(module)


@pytest.mark.parametrize("make, section", [
    (lambda p: FusedAdam(p, lr=1e-2), {"type": "AdamW", "params": {"lr": 1e-2}}),
    (lambda p: DeepSpeedCPULion(p, weight_decay=0.1), {"type": "lion", "params": {"weight_decay": 0.1}}),
    (FusedLamb, {"type": "LAMB"}),
])
def test_an_object_given_to_initialize_runs_as_the_configurations(make, section):
    assert bits_after(make) == bits_after(None, section)


THREADS = """
import os, signal, sys, threading
import torch
from deepspeed_c import _core
from deepspeed_c.ops.adam import FusedAdam

def threads():
    return len(os.listdir("/proc/self/task"))

def stepped():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1 << 20))
    p.grad = torch.randn(1 << 20)
    optimizer = FusedAdam([p])
    optimizer.step()
    return optimizer, p

torch.set_num_threads(2)
assert _core.loop_threads() == "torch's", _core.loop_threads()
torch.ones(1 << 20).add_(1)
before = threads()
optimizer, p = stepped()
assert threads() == before, (before, threads())
first = p.detach().clone()
optimizer.step()

def in_a_new_thread():  # which has run no loop of torch's
    before = threads()
    optimizer.step()
    counts.append(threads() - before)

counts = []
torch.set_num_threads(1)
other = threading.Thread(target=in_a_new_thread)
other.start()
other.join()
torch.set_num_threads(2)
assert counts == [0], counts
pid = os.fork()
if pid == 0:
    signal.alarm(30)  # a wait for threads that a fork took away ends here
    torch.set_num_threads(1)
    ok = _core.loop_threads() == "its own" and torch.equal(stepped()[1], first)
    optimizer.step()
    os._exit(0 if ok else 3)
assert os.waitpid(pid, 0)[1] == 0
optimizer.step()
"""


def test_loops_run_on_torchs_threads_and_in_a_forked_child_without_them():
    run = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120,
                         env={**os.environ, "OMP_NUM_THREADS": "3"})
    assert run.returncode == 0, run.stderr


def test_clients_ask_whether_files_can_be_read_asynchronously():
    """As Transformers' tests do before they offload to files."""
    builder = deepspeed.ops.aio.AsyncIOBuilder
    assert deepspeed.ops.__compatible_ops__[builder.NAME] and builder().is_compatible()
    with pytest.raises(NotImplementedError, match="aio_handle is not yet"):
        builder().load()
