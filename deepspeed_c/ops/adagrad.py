"""Adagrad with DeepSpeed's CPU rule: the numerator is the gradient without weight decay."""
from ..optimizer import CoreOptimizer

__all__ = ["DeepSpeedCPUAdagrad"]


class DeepSpeedCPUAdagrad(CoreOptimizer):
    """v += (g + weight_decay * p)^2; p -= lr * g / (sqrt(v) + eps). state: step (int), exp_avg_sq (v).

    torch's rule, which `"type": "Adagrad"` and torch.optim.Adagrad have, divides g + weight_decay * p instead.
    adamw_mode is accepted and has no meaning. fp32_optimizer_states False: states have the parameter's dtype.
    """

    kind = "adagrad"
    state_names = ("exp_avg_sq",)

    def __init__(self, model_params, lr=1e-2, eps=1e-10, weight_decay=0, amsgrad=False, fp32_optimizer_states=True,
                 adamw_mode=False):
        if amsgrad:
            raise NotImplementedError(f"DeepSpeedCPUAdagrad: amsgrad is {amsgrad!r}: not there; allowed: False")
        super().__init__(model_params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "raw_numerator": True})
        self.fp32_optimizer_states = fp32_optimizer_states
