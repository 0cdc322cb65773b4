"""Lion: the sign of an interpolated momentum."""
from ..optimizer import CoreOptimizer

__all__ = ["DeepSpeedCPULion", "FusedLion"]


class _Lion(CoreOptimizer):
    """u = beta1 * m + (1 - beta1) * g; p -= lr * (sign(u) + weight_decay * p); m = beta2 * m + (1 - beta2) * g.
    sign(0) is 0, as published. state: step (int), exp_avg."""

    kind = "lion"
    state_names = ("exp_avg",)


class FusedLion(_Lion):
    """Lion."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, set_grad_none=True):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.set_grad_none = set_grad_none


class DeepSpeedCPULion(_Lion):
    """The same rule under the name that offloading scripts use. adamw_mode is accepted and has no meaning.
    fp32_optimizer_states False: states have the parameter's dtype."""

    def __init__(self, model_params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0, fp32_optimizer_states=True,
                 adamw_mode=False):
        super().__init__(model_params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.fp32_optimizer_states = fp32_optimizer_states
