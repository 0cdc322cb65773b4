"""The MoE layer's name and signature; building one is not there yet."""
from torch import nn


class MoE(nn.Module):
    """Not yet: the constructor says so."""

    def __init__(self, hidden_size, expert, num_experts=1, ep_size=1, k=1, capacity_factor=1.0,
                 eval_capacity_factor=1.0, min_capacity=4, use_residual=False, noisy_gate_policy=None, drop_tokens=True,
                 use_rts=True, use_tutel=False, enable_expert_tensor_parallelism=False,
                 top2_2nd_expert_sampling=True):
        raise NotImplementedError("deepspeed_c.moe.layer.MoE is not there yet")
