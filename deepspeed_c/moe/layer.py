"""The mixture-of-experts layer, as a model holds it: gate, experts and, in a residual layer, an expert for all tokens.

What goes where is decided in sharded_moe.py. Here: the arguments, the groups of ranks, and the residual mix.
"""
from numbers import Integral, Real

import torch.distributed as dist
from torch import nn

from ..mpu import ask
from ..utils import groups
from .experts import Experts, first_of
from .sharded_moe import POLICIES, MOELayer, TopKGate

__all__ = ["MoE"]


def _check(num_experts, ep_size, k, noisy_gate_policy, **sizes):
    for name, value in (("num_experts", num_experts), ("ep_size", ep_size), ("k", k)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"MoE: {name} is {value!r}; allowed: an integer >= 1")
    for name, value in sizes.items():
        if not (isinstance(value, Real) and 0 <= value < float("inf")):
            raise ValueError(f"MoE: {name} is {value!r}; allowed: a number >= 0")
    if num_experts % ep_size:
        raise ValueError(f"MoE: num_experts is {num_experts}, which ep_size, {ep_size}, does not divide: each of "
                         f"{ep_size} ranks holds equally many experts")
    if k > num_experts:
        raise ValueError(f"MoE: k is {k} and num_experts {num_experts}; a token goes to at most all of them")
    if noisy_gate_policy not in POLICIES:
        raise ValueError(f"MoE: noisy_gate_policy is {noisy_gate_policy!r}; allowed: None, 'None', 'Jitter', 'RSample'")
    if dist.is_initialized() and dist.get_world_size() % ep_size:
        raise ValueError(f"MoE: ep_size is {ep_size} and there are {dist.get_world_size()} ranks; ep_size must divide "
                         "them")


class MoE(nn.Module):
    """Sends every token to k of num_experts copies of `expert`, which lie on ep_size ranks.

    hidden_size: M, features of a token. expert: any module from (..., M) to (..., M); of a tuple that it returns the
        first item counts.
    num_experts, ep_size: experts in all, and ranks that share them out; ep_size divides both num_experts and the ranks.
    k: experts of a token. capacity_factor, eval_capacity_factor, min_capacity: how many tokens an expert takes.
    use_residual: PR-MoE. `expert` itself (`mlp`) sees every token too, and a learned softmax (`coefficient`) mixes.
    noisy_gate_policy: None, 'Jitter' or 'RSample'. drop_tokens: False: experts take as many tokens as choose them.
    use_rts: top-1 drops tokens at random, else the last ones. top2_2nd_expert_sampling: noise in the second choice.
    use_tutel: accepted, without effect (one log line).
    enable_expert_tensor_parallelism: each expert is cut over the tensor-parallel ranks, as `expert` itself must be;
        otherwise each tensor-parallel rank takes a part of the tokens.

    ValueError with the numbers where an argument does not fit. Submodules: deepspeed_moe, mlp, coefficient.
    """

    def __init__(self, hidden_size, expert, num_experts=1, ep_size=1, k=1, capacity_factor=1.0,
                 eval_capacity_factor=1.0, min_capacity=4, use_residual=False, noisy_gate_policy=None, drop_tokens=True,
                 use_rts=True, use_tutel=False, enable_expert_tensor_parallelism=False,
                 top2_2nd_expert_sampling=True):
        super().__init__()
        _check(num_experts, ep_size, k, noisy_gate_policy, capacity_factor=capacity_factor,
               eval_capacity_factor=eval_capacity_factor, min_capacity=min_capacity)
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.ep_size, self.num_experts, self.num_local_experts = ep_size, num_experts, num_experts // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        gate = TopKGate(hidden_size, num_experts, k, capacity_factor, eval_capacity_factor, min_capacity,
                        None if noisy_gate_policy == "None" else noisy_gate_policy, drop_tokens, use_rts, None,
                        top2_2nd_expert_sampling)
        self.deepspeed_moe = MOELayer(gate, Experts(expert, self.num_local_experts, self.expert_group_name),
                                      self.expert_group_name, ep_size, self.num_local_experts, use_tutel)
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_=False):
        """Makes the groups of ranks that share the experts out, unless they exist. Collective over all ranks.

        `initialize` calls it; who trains without an engine does before the first forward, if ep_size > 1. ValueError
        where ep_size does not divide the ranks, or layers of this ep_size have their groups laid out in another way.
        """
        self.deepspeed_moe.experts.mark()
        if not dist.is_initialized() and self.ep_size == 1:
            return  # one process: there is nobody to share with
        mpu = groups.mpu
        if self.enable_expert_tensor_parallelism and mpu is not None:
            groups._create_expert_data_and_model_parallel(self.ep_size, mpu, use_data_before_expert_parallel_)
        else:
            groups._create_expert_and_data_parallel(
                self.ep_size, pp_size=ask(mpu, "pipe size", 1),
                use_data_before_expert_parallel_=use_data_before_expert_parallel_)
        self.deepspeed_moe._set_ep_group(groups._get_expert_parallel_group(self.expert_group_name))

    def forward(self, hidden_states, used_token=None):
        """(..., M) -> (output (..., M), l_aux, exp_counts).

        used_token: one number per token, 0 where it is to be left out (k=1 only). l_aux: a scalar that grows with
        unequal load, for the loss. exp_counts: (num_experts,) int64, tokens that chose each expert, before drops.
        """
        output = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            weights = self.coefficient(hidden_states).softmax(dim=-1)
            output = output * weights[..., 0:1] + first_of(self.mlp(hidden_states)) * weights[..., 1:]
        return output, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts
