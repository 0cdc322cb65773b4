"""Adam and AdamW."""
from ..optimizer import CoreOptimizer

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]


class _Adam(CoreOptimizer):
    """state: step (int), exp_avg, exp_avg_sq. A group's own adam_w_mode or decoupled_weight_decay wins."""

    kind = "adam"
    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(self, params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adam_w_mode):
        if amsgrad:
            raise NotImplementedError(f"{type(self).__name__}: amsgrad is {amsgrad!r}: not there; allowed: False")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "bias_correction": bias_correction, "adam_w_mode": bool(adam_w_mode)})


class FusedAdam(_Adam):
    """Adam with decoupled weight decay (AdamW), or with L2 where adam_w_mode is False."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True):
        super().__init__(params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adam_w_mode)
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.set_grad_none = set_grad_none


class DeepSpeedCPUAdam(_Adam):
    """The same rule under the name that offloading scripts use. fp32_optimizer_states False: states have the
    parameter's dtype."""

    def __init__(self, model_params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0,
                 amsgrad=False, adamw_mode=True, fp32_optimizer_states=True):
        super().__init__(model_params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adamw_mode)
        self.adam_w_mode = adamw_mode
        self.fp32_optimizer_states = fp32_optimizer_states
