"""The experts that one rank holds: copies of one module, each with parameters of its own.

Invariant: every parameter below is marked as an expert's (`allreduce` False, `group_name`), also in a deep copy.
"""
import copy

import torch
from torch import nn

__all__ = ["Experts"]


def first_of(output):
    """A module's output, of a tuple its first item: an expert may return (output, bias) or (output, loss)."""
    return output[0] if isinstance(output, tuple) else output


class Experts(nn.Module):
    """num_local_experts deep copies of `expert`, any module from (..., M) to (..., M'); all start equal.

    expert_group_name: "ep_size_N", the groups over which these parameters' gradients are summed; their attribute
    `group_name`, while `allreduce` is False: what `moe.utils` and the engine know them by.
    """

    takes_parts = True  # MOELayer calls with a list: one tensor for each expert

    def __init__(self, expert, num_local_experts=1, expert_group_name=None):
        super().__init__()
        self.num_local_experts, self.expert_group_name = num_local_experts, expert_group_name
        self.deepspeed_experts = nn.ModuleList([copy.deepcopy(expert) for _ in range(num_local_experts)])
        self.mark()

    def mark(self):
        """Marks the parameters; again where a copy of a module, or new parameters, may have lost it."""
        for p in self.deepspeed_experts.parameters():
            p.allreduce, p.group_name = False, self.expert_group_name

    def __setstate__(self, state):
        super().__setstate__(state)
        self.mark()  # torch's deep copy of a parameter leaves its attributes behind

    def forward(self, inputs):
        """A list of one tensor (..., M) for each expert -> the list of what they return.

        One tensor (G, num_local_experts, C, M) is cut along dimension 1, and the outputs are joined again.
        """
        if not isinstance(inputs, torch.Tensor):
            return [first_of(expert(part)) for expert, part in zip(self.deepspeed_experts, inputs, strict=True)]
        return torch.cat(self(inputs.chunk(self.num_local_experts, dim=1)), dim=1)
