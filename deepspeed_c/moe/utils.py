"""Which parameters are experts', and optimizer groups that keep them apart.

A parameter is an expert's if its attribute `allreduce` is False; `group_name` says which expert-parallel group it is
in. Expert gradients are reduced over fewer ranks, so an optimizer group holds experts of one such group or none.
"""
import torch

from deepspeed_c.moe.layer import MoE
from deepspeed_c.reduction import is_expert as is_moe_param
from deepspeed_c.whole import whole

__all__ = ["configure_moe_param_groups", "has_moe_layers", "is_moe_param", "is_moe_param_group",
           "split_params_grads_into_shared_and_expert_params",
           "split_params_into_different_moe_groups_for_optimizer", "split_params_into_shared_and_expert_params"]


def has_moe_layers(m):
    """(whether the module holds a MoE layer, the number of experts of the first one)."""
    for module in m.modules():
        if isinstance(module, MoE):
            return True, module.num_experts
    return False, 0


def is_moe_param_group(param_group):
    """Whether an optimizer group is one of experts, as the splitting functions mark it."""
    return bool(param_group.get("moe", False))


def split_params_into_shared_and_expert_params(params):
    """(shared, experts') parameters, each in their order."""
    params = list(params)
    return [p for p in params if not is_moe_param(p)], [p for p in params if is_moe_param(p)]


def split_params_grads_into_shared_and_expert_params(group):
    """(shared, experts') gradients of those parameters that have one, in their parameters' types."""
    with_grad = [p for p in group if p.grad is not None]
    shared, experts = split_params_into_shared_and_expert_params(with_grad)
    return [p.grad.to(p.dtype) for p in shared], [p.grad.to(p.dtype) for p in experts]


def split_params_into_different_moe_groups_for_optimizer(param_groups, max_group_size=178956971):
    """Optimizer groups in which experts stand apart: one or more new groups per (group, expert-parallel group).

    param_groups: a group, or a list or tuple of groups (dicts with 'params'; 'name' is needed where there are
    experts). The groups themselves keep their non-expert parameters, and 'params' becomes a list in each. A new group
    has the options of its origin, 'name' set to the expert-parallel group's, 'moe': True, and at most max_group_size
    elements (a larger parameter stands alone; None: no limit). Returns a list, the given groups first.
    """
    if isinstance(param_groups, dict):
        param_groups = [param_groups]
    elif isinstance(param_groups, tuple):
        param_groups = list(param_groups)
    elif not isinstance(param_groups, list):
        raise ValueError(f"Unknown param group type of {type(param_groups)}")
    parts = []
    for k, group in enumerate(param_groups):
        if not isinstance(group, dict):
            raise ValueError(f"parameter group {k} must be a dict, got {type(group).__name__}: a plain list of "
                             "parameters goes through configure_moe_param_groups")
        shared, experts = split_params_into_shared_and_expert_params(group["params"])
        if experts and "name" not in group:
            raise KeyError(f"parameter group {k} holds experts and needs a 'name'")
        parts.append((group, shared, experts))
    # Only now, when nothing can fail any more: the groups given are the caller's own objects.
    for group, shared, _ in parts:
        group["params"] = shared
    expert_groups = [{**group, "name": name, "moe": True, "params": chunk}
                     for group, _, experts in parts
                     for name in dict.fromkeys(p.group_name for p in experts)
                     for chunk in _chunks([p for p in experts if p.group_name == name], max_group_size)]
    return [*param_groups, *expert_groups]


def _chunks(params, max_elements):
    """Consecutive parts of at most max_elements elements, none empty."""
    chunks, size = [], 0
    for p in params:
        n_elems = whole(p).numel()
        if not chunks or (max_elements is not None and size + n_elems > max_elements):
            chunks.append([])
            size = 0
        chunks[-1].append(p)
        size += n_elems
    return chunks


def configure_moe_param_groups(model_parameters):
    """Groups for an optimizer from what a user passes as model_parameters, a list of tensors or of groups.

    Tensors become one group named 'dense-params', then experts are split off; groups of which one already has a
    'moe' key are the user's own division and stay as they are.
    """
    if not isinstance(model_parameters, list):
        raise AssertionError(f"model_parameters must be a list, got {type(model_parameters).__name__}")
    if all(isinstance(p, torch.Tensor) for p in model_parameters):
        return split_params_into_different_moe_groups_for_optimizer({"params": model_parameters,
                                                                     "name": "dense-params"})
    if not all(isinstance(group, dict) for group in model_parameters):
        raise ValueError("model_parameters must hold either tensors only or group dicts only")
    if any("moe" in group for group in model_parameters):
        return model_parameters
    return split_params_into_different_moe_groups_for_optimizer(model_parameters)
