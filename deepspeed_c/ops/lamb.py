"""LAMB: Adam's direction, scaled per parameter by the ratio of its norm to the direction's."""
from ..optimizer import CoreOptimizer

__all__ = ["FusedLamb"]


class FusedLamb(CoreOptimizer):
    """u = m / (sqrt(v) + eps) + weight_decay * p; p -= lr * sqrt(c2) / c1 * clamp(|p| / |u|, min_coeff, max_coeff) * u.

    state: step (int), exp_avg, exp_avg_sq. max_grad_norm: clip gradients before step() instead.
    """

    kind = "lamb"
    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, eps_inside_sqrt=False,
                 weight_decay=0.0, max_grad_norm=0.0, max_coeff=10.0, min_coeff=0.01, amsgrad=False):
        for name, value in (("amsgrad", amsgrad), ("max_grad_norm", max_grad_norm)):
            if value:
                raise NotImplementedError(f"FusedLamb: {name} is {value!r}: not there; allowed: {type(value)(0)!r}")
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
                                  "eps_inside_sqrt": eps_inside_sqrt, "weight_decay": weight_decay,
                                  "max_coeff": max_coeff, "min_coeff": min_coeff})

    def get_lamb_coeffs(self):
        """The ratios |p| / |u| that the last step() used, clamped, one per parameter that it stepped; [] where an
        engine runs the optimizer."""
        return [] if self._stepper is None else list(self._stepper.trust_ratios)
