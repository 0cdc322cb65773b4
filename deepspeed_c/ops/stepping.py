"""step() of an optimizer that no engine runs: the core's rule on CPU parameters, in place."""
import torch

from .. import _core
from ..model import conform, is_dense


class Stepping:
    """Steps the parameters of one optimizer. A parameter without .grad is left alone, as torch does.

    States are made at a parameter's first step: fp32, or of the parameter's dtype where the optimizer's
    fp32_optimizer_states is False. trust_ratios: of the last step, one per parameter (LAMB).
    """

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self._core = _core.Stepper(optimizer.kind, torch.get_num_threads())
        self.trust_ratios = []

    @torch.no_grad()
    def step(self):
        """One step. TypeError or ValueError for a parameter that is not a CPU tensor of fp32, bf16 or fp16."""
        self.trust_ratios = []
        for group in self._optimizer.param_groups:
            by_step = {}
            for p in group["params"]:
                if p.grad is not None:
                    state = self._state_of(p)
                    by_step.setdefault(int(state["step"]) + 1, []).append(p)
            for step, params in by_step.items():
                self._step_params(group, step, params)

    def _step_params(self, group, step, params):
        names = self._optimizer.state_names
        laid = [self._laid(p) for p in params]
        rows = [(work, _in_layout(work, p.grad), *(self._optimizer.state[p][name] for name in names))
                for p, work in zip(params, laid)]
        self.trust_ratios += self._core.step(group, step, rows)
        for p, work in zip(params, laid):
            self._optimizer.state[p]["step"] = step
            if work is not p:
                p.copy_(work)
        torch.autograd.graph.increment_version([p for p, work in zip(params, laid) if work is p])

    def _laid(self, p):
        """What the core steps for p: itself, or a dense copy; LAMB needs fp32."""
        if self._optimizer.kind == "lamb" and p.dtype in (torch.bfloat16, torch.float16):
            return p.to(torch.float32, memory_format=torch.contiguous_format)
        return p if is_dense(p) else p.contiguous()

    def _state_of(self, p):
        state = self._optimizer.state[p]
        if len(state) == 0:
            narrow = not getattr(self._optimizer, "fp32_optimizer_states", True)
            state["step"] = 0
            for name in self._optimizer.state_names:
                state[name] = torch.zeros_like(self._laid(p), dtype=p.dtype if narrow else torch.float32,
                                               requires_grad=False)
        return state


def _in_layout(work, grad):
    """grad in the memory order of `work`."""
    return grad if grad.layout == torch.strided and grad.stride() == work.stride() else conform(work, grad)
