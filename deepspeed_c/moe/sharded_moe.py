"""The gates of a mixture of experts, and the layer that sends tokens to experts and brings their answers back.

Shapes: S tokens, E experts, C places per expert (the capacity), M features. docs/moe.md has the rules.
"""
import torch
from torch import nn

__all__ = ["MOELayer", "TopKGate", "top1gating", "top2gating", "topkgating"]


def top1gating(logits, capacity_factor, min_capacity, used_token=None, noisy_gate_policy=None, drop_tokens=True,
               use_rts=True, ep_group=None, sparse_routes=False, use_tutel=False):
    """Not yet: says so."""
    raise NotImplementedError("deepspeed_c.moe.sharded_moe.top1gating() is not yet")


def top2gating(logits, capacity_factor, min_capacity, drop_tokens=True, ep_group=None, top2_2nd_expert_sampling=True,
               sparse_routes=False):
    """Not yet: says so."""
    raise NotImplementedError("deepspeed_c.moe.sharded_moe.top2gating() is not yet")


def topkgating(logits, k, capacity_factor, min_capacity, drop_tokens=True, ep_group=None, drop_policy="probs",
               sparse_routes=False):
    """Not yet: says so."""
    raise NotImplementedError("deepspeed_c.moe.sharded_moe.topkgating() is not yet")


class TopKGate(nn.Module):
    """Chooses k of num_experts for every token. `wg` is a Linear(model_dim, num_experts) without bias."""

    def __init__(self, model_dim, num_experts, k=1, capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=8,
                 noisy_gate_policy=None, drop_tokens=True, use_rts=True, ep_group=None, top2_2nd_expert_sampling=True):
        super().__init__()
        self.wg = nn.Linear(model_dim, num_experts, bias=False)
        self.ep_group, self.k, self.capacity_factor, self.eval_capacity_factor = ep_group, k, capacity_factor, \
            eval_capacity_factor
        self.min_capacity, self.noisy_gate_policy, self.drop_tokens, self.use_rts = min_capacity, noisy_gate_policy, \
            drop_tokens, use_rts
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling

    def _set_ep_group(self, ep_group):
        """The group over which the capacity is agreed where no token is dropped."""
        self.ep_group = ep_group

    def forward(self, input, used_token=None, sparse_routes=False, use_tutel=False):
        """(l_aux, combine_weights, dispatch_mask, exp_counts) of (S, M) tokens."""
        raise NotImplementedError("deepspeed_c.moe.sharded_moe.TopKGate is not yet")


class MOELayer(nn.Module):
    """Routes (..., M) to experts and back: gate, dispatch, all-to-all over the expert group, experts, and back.

    gate: a TopKGate. experts: a module that holds this rank's num_local_experts. Where it has the attribute
    `takes_parts = True` (moe.experts.Experts), it is called with a list of num_local_experts tensors
    (ep_size, 1, C, M), one for each expert, and returns as many outputs (ep_size, 1, C, M') in a list, so that
    nothing is copied between; any other module is called with one tensor (ep_size, num_local_experts, C, M).
    After forward, `l_aux` is the loss of unequal load (a scalar), `exp_counts` (E,) int64 the tokens that chose each
    expert, before drops. `_set_ep_group` comes before the first forward where ep_size > 1.
    """

    def __init__(self, gate, experts, ep_group_name, ep_size, num_local_experts, use_tutel=False):
        super().__init__()
        self.gate, self.experts = gate, experts
        self.ep_group_name, self.ep_size, self.num_local_experts = ep_group_name, ep_size, num_local_experts
        self.ep_group = None
        self.l_aux, self.exp_counts = torch.tensor(0.0), None

    def _set_ep_group(self, ep_group):
        """The process group of ep_size ranks, each with num_local_experts of the experts."""
        self.ep_group = ep_group
        self.gate._set_ep_group(ep_group)

    def forward(self, input, used_token=None):
        """(..., M) -> (..., M). used_token: (S,), 0 where a token takes no part (top-1 only)."""
        raise NotImplementedError("deepspeed_c.moe.sharded_moe.MOELayer is not yet")
