"""The loss scaler classes, against the rule written down a second time, over any sequence of overflows."""
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from deepspeed_c.runtime.fp16.loss_scaler import CreateLossScaler, DynamicLossScaler, LossScaler

MESSAGE = "^Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.$"


def make(init_scale=16.0, scale_window=2, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False, **more):
    return DynamicLossScaler(init_scale, scale_window, min_scale, delayed_shift, consecutive_hysteresis, **more)


class Rule:
    """semantics: scale S, budget h, step k, last overflow."""

    def __init__(self, scale, window, least, hysteresis, consecutive, raises):
        self.scale, self.window, self.least, self.hysteresis = scale, window, least, hysteresis
        self.consecutive, self.raises = consecutive, raises
        self.h, self.k, self.last = hysteresis, 0, -1

    def update(self, overflow):
        if overflow:
            if self.hysteresis == 1 or self.h == 1:
                if self.scale == self.least and self.raises:
                    raise Exception("at minimum")
                self.scale = max(self.scale / 2, self.least)
            else:
                self.h -= 1
            self.last = self.k
        else:
            n = self.k - self.last - 1
            if self.consecutive:
                self.h = self.hysteresis
            if n > 0 and n % self.window == 0:
                self.h = self.hysteresis
                self.scale *= 2
        self.k += 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([False, False, False, True]), max_size=120), st.integers(0, 20), st.integers(1, 7),
       st.integers(0, 4), st.integers(1, 4), st.booleans(), st.booleans())
def test_every_sequence_of_overflows_follows_the_rule(overflows, power, window, least, hysteresis, consecutive, raises):
    least = 2.0 ** min(least, power)
    rule = Rule(2.0 ** power, window, least, hysteresis, consecutive, raises)
    scaler = DynamicLossScaler(2.0 ** power, window, least, hysteresis, consecutive, raise_error_at_min_scale=raises)
    for overflow in overflows:
        try:
            rule.update(overflow)
        except Exception:
            before = dict(vars(scaler))
            with pytest.raises(RuntimeError, match=MESSAGE):
                scaler.update_scale(overflow)
            assert vars(scaler) == before
            return
        scaler.update_scale(overflow)
        assert (scaler.loss_scale, scaler.cur_hysteresis, scaler.cur_iter, scaler.last_overflow_iter) == \
            (rule.scale, rule.h, rule.k, rule.last)


def test_a_minimum_that_is_no_power_of_two_bounds_the_halving():
    scaler = make(init_scale=10, min_scale=6, delayed_shift=1)
    scaler.update_scale(True)
    assert scaler.cur_scale == 6


def test_a_pickled_scaler_goes_on_where_it_was():
    scaler = make()
    for overflow in (True, False, True):
        scaler.update_scale(overflow)
    copy = pickle.loads(pickle.dumps(scaler))
    for overflow in (False, False, True, False):
        scaler.update_scale(overflow), copy.update_scale(overflow)
        assert vars(copy) == vars(scaler)


def test_a_static_scale_stays_and_sees_no_overflow():
    scaler = LossScaler(128)
    for _ in range(5):
        scaler.update_scale(True)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, float("nan")])
    assert scaler.loss_scale == 128 and not scaler.dynamic and not scaler.has_overflow([p])


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_has_overflow_looks_at_every_gradient(bad):
    p, q, r = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    p.grad = torch.ones(3)
    assert not make().has_overflow([p, q, r])
    r.grad = torch.tensor([0.0, 1.0, bad])
    assert make().has_overflow([p, q, r])


def test_backward_and_scale_gradient_multiply_by_the_scale():
    p = torch.nn.Parameter(torch.tensor(2.0))
    scaler = make(init_scale=8.0)
    scaler.backward(3 * p)
    assert p.grad == 24 and scaler.scale_loss(p).item() == 16
    assert scaler.scale_gradient(None, (p.grad, None), None) == (192, None)


def test_create_chooses_by_dtype_and_says_what_is_missing():
    arguments = {"init_scale": 4.0, "scale_window": 3, "min_scale": 1, "delayed_shift": 1,
                 "consecutive_hysteresis": False}
    dynamic = CreateLossScaler(torch.float16, 7.0, True, arguments)
    assert isinstance(dynamic, DynamicLossScaler) and (dynamic.cur_scale, dynamic.scale_window) == (4.0, 3)
    static = CreateLossScaler(torch.float16, 7.0, False, None)
    assert isinstance(static, LossScaler) and static.loss_scale == 7.0
    assert CreateLossScaler(torch.bfloat16, 7.0, True, arguments).loss_scale == 1.0
    with pytest.raises(ValueError, match="needs dynamic_loss_args: init_scale"):
        CreateLossScaler(torch.float16, 7.0, True, None)


@pytest.mark.parametrize("wrong, text", [
    ({"init_scale": 0}, "must be positive and finite, got 0"), ({"init_scale": float("inf")}, "got inf"),
    ({"scale_window": 0}, "scale_window must be a positive integer, got 0"),
    ({"delayed_shift": True}, "delayed_shift must be a positive integer, got True"),
    ({"min_scale": 0}, "min_scale must be positive, got 0"),
])
def test_bad_arguments_are_named(wrong, text):
    with pytest.raises(ValueError, match=text):
        make(**wrong)
