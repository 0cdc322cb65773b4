"""Loss scales for a training loop of one's own; an engine has its own in the core, by the same rule (`csrc/scaler.c`).

A scaler holds the scale and counts; update_scale(overflow), once per optimizer step, moves them. They are ordinary
attributes, so that a scaler can be pickled.
"""
import torch

from deepspeed_c import _core

INITIAL_LOSS_SCALE = "init_scale"
SCALE_WINDOW = "scale_window"
DELAYED_SHIFT = "delayed_shift"
CONSECUTIVE_HYSTERESIS = "consecutive_hysteresis"
MIN_LOSS_SCALE = "min_scale"

AT_MINIMUM = "Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."


class LossScalerBase:
    """What the two scalers have in common: `cur_scale`, and what is multiplied by it."""

    dynamic = False

    def __init__(self, scale):
        if not scale > 0 or scale == float("inf"):
            raise ValueError(f"a loss scale must be positive and finite, got {scale}")
        self.cur_scale = scale
        self.dtype = None

    @property
    def loss_scale(self):
        return self.cur_scale

    def scale_gradient(self, module, grad_in, grad_out):
        """The gradients (a tuple of tensors or None) times the scale: a backward hook."""
        return tuple(None if grad is None else grad * self.cur_scale for grad in grad_in)

    def scale_loss(self, loss):
        """The loss times the scale."""
        return loss * self.cur_scale

    def backward(self, loss, retain_graph=False):
        """Runs autograd from the scaled loss."""
        self.scale_loss(loss).backward(retain_graph=retain_graph)

    def update_scale(self, overflow):
        """Goes on by one optimizer step; a scale that is not dynamic stays."""

    def has_overflow(self, params):
        """Whether a gradient among `params` is not finite; False where the scale is not dynamic."""
        return False


class LossScaler(LossScalerBase):
    """A scale that stays. `scale`: a positive number."""

    def __init__(self, scale=1):
        super().__init__(scale)


class DynamicLossScaler(LossScalerBase):
    """A scale that halves after `delayed_shift` overflows and doubles after `scale_window` clean steps.

    delayed_shift: overflows that it takes (hysteresis); with consecutive_hysteresis a clean step refills them, else
    the next growth does. min_scale: the least scale; an overflow there is a RuntimeError, or with
    raise_error_at_min_scale false changes nothing. dtype: that of the gradients; it changes nothing here.
    """

    dynamic = True

    def __init__(self, init_scale, scale_window, min_scale, delayed_shift, consecutive_hysteresis,
                 raise_error_at_min_scale=True, dtype=torch.float16):
        super().__init__(init_scale)
        for name, value in (("scale_window", scale_window), ("delayed_shift", delayed_shift)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not min_scale > 0:
            raise ValueError(f"min_scale must be positive, got {min_scale}")
        self.scale_window = scale_window
        self.min_scale = min_scale
        self.delayed_shift = delayed_shift
        self.consecutive_hysteresis = consecutive_hysteresis
        self.raise_error_at_min_scale = raise_error_at_min_scale
        self.dtype = dtype
        self.scale_factor = 2.0
        self.cur_hysteresis = delayed_shift
        self.cur_iter = 0
        self.last_overflow_iter = -1

    def update_scale(self, overflow):
        """Goes on by one optimizer step, which overflowed or not. RuntimeError at min_scale."""
        try:
            self.cur_scale, self.cur_hysteresis, self.cur_iter, self.last_overflow_iter = _core.scaler_update(
                bool(overflow), self.cur_scale, self.min_scale, self.scale_window, self.delayed_shift,
                bool(self.consecutive_hysteresis), not self.raise_error_at_min_scale, self.cur_hysteresis,
                self.cur_iter, self.last_overflow_iter)
        except RuntimeError as error:
            raise RuntimeError(AT_MINIMUM) from error

    def has_overflow(self, params):
        """Whether a gradient among `params` is not finite on this rank; ranks have to agree before update_scale."""
        return any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in params)

    has_overflow_serial = has_overflow


def CreateLossScaler(dtype, static_loss_scale, dynamic_scaling, dynamic_loss_args):
    """The scaler that a training dtype needs: dynamic or static in fp16, else 1.0.

    dynamic_loss_args: keywords of DynamicLossScaler. ValueError where fp16 is to scale by itself without them.
    """
    if dtype != torch.float16:
        scaler = LossScaler(1.0)
    elif not dynamic_scaling:
        scaler = LossScaler(static_loss_scale)
    elif dynamic_loss_args is None:
        raise ValueError("dynamic loss scaling needs dynamic_loss_args: init_scale, scale_window, min_scale, "
                         "delayed_shift, consecutive_hysteresis")
    else:
        return DynamicLossScaler(dtype=dtype, **dynamic_loss_args)
    scaler.dtype = dtype
    return scaler
