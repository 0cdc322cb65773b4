"""Tokens of a MoE layer between tensor-parallel ranks, which all hold the same ones.

Where experts are not cut over tensor ranks, each of these ranks takes its part of the tokens through the experts
(`drop_tokens`), and all get every answer back (`gather_tokens`). One is the other's backward.
"""
import torch
from torch.autograd.function import once_differentiable

from .. import comm
from ..utils import groups

__all__ = ["drop_tokens", "gather_tokens"]


def _drop(x, dim):
    """This tensor rank's of equal parts along dim."""
    size = groups.get_tensor_model_parallel_world_size()
    if x.shape[dim] % size:
        raise ValueError(f"drop_tokens: dimension {dim} of {tuple(x.shape)} has {x.shape[dim]} rows, which "
                         f"{size} tensor-parallel ranks do not divide")
    part = x.shape[dim] // size
    return x.narrow(dim, part * groups.get_tensor_model_parallel_rank(), part).contiguous()


def _gather(x, dim):
    """The tensor ranks' tensors, one behind the other along dim."""
    size = groups.get_tensor_model_parallel_world_size()
    parts = x.new_empty((size, *x.shape))
    comm.all_gather_into_tensor(parts.flatten(), x.detach().contiguous().flatten(),
                                group=groups.get_tensor_model_parallel_group())
    return torch.cat(parts.unbind(), dim)


class _Mapped(torch.autograd.Function):
    """there(x, dim), with back(gradient, dim) for its gradient."""

    @staticmethod
    def forward(ctx, x, dim, there, back):
        ctx.dim, ctx.back = dim, back
        return there(x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.back(grad, ctx.dim), None, None, None


def _mapped(x, dim, there, back):
    return x if groups.get_tensor_model_parallel_world_size() == 1 else _Mapped.apply(x, dim, there, back)


def drop_tokens(input_, dim=0):
    """This rank's of as many equal parts of `input_` along dim as there are tensor-parallel ranks; all of it where
    there is one. ValueError where they do not divide it. Collective in its backward."""
    return _mapped(input_, dim, _drop, _gather)


def gather_tokens(input_, dim=0):
    """The tensor-parallel ranks' parts, in their order along dim. Collective in its forward."""
    return _mapped(input_, dim, _gather, _drop)
