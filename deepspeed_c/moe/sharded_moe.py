"""The gates of a mixture of experts, and the layer that sends tokens to experts and brings their answers back.

Shapes: S tokens, E experts, k choices of a token, C places of an expert (the capacity), M features. The arithmetic is
csrc/moe.h; here stand autograd, randomness and the exchange between ranks. docs/moe.md has the rules.
"""
import math
from functools import lru_cache, partial

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ReduceOp

from .. import _core
from ..comm import all_reduce, all_to_all_single
from ..utils import groups
from ..utils.logging import logger
from .mappings import drop_tokens, gather_tokens

__all__ = ["MOELayer", "TopKGate", "top1gating", "top2gating", "topkgating"]

POLICIES = (None, "None", "Jitter", "RSample")
DROPS = ("probs", "position")


@lru_cache(maxsize=1)
def _router_of(n_threads):
    return _core.Router(n_threads)


def _router():
    """The C object, with as many threads as torch has now."""
    return _router_of(torch.get_num_threads())


# ---- randomness, drawn as DeepSpeed draws it: the same seed chooses the same tokens ----


def _uniform(logits):
    """Uniform numbers in [0, 1) of the logits' shape."""
    return torch.rand(logits.shape, dtype=torch.float32)


def _gumbel(logits):
    """Gumbel(0, 1) noise of the logits' shape from torch's generator, as torch.distributions.Gumbel draws it."""
    limits = torch.finfo(torch.float32)
    low, high = torch.tensor([limits.tiny, 1 - limits.eps], dtype=torch.float32)
    uniform = _uniform(logits).mul_(high - low).add_(low)
    return uniform.log_().neg_().log_().neg_()


def _jittered(input):
    """Each element times its own factor from [0.99, 1.01)."""
    low, high = torch.tensor(1 - 1e-2, dtype=input.dtype), torch.tensor(1 + 1e-2, dtype=input.dtype)
    return input * torch.rand(input.shape, dtype=input.dtype).mul_(high - low).add_(low)


# ---- routes ----


class Routes:
    """Where tokens go, without any dense tensor.

    l_aux: scalar. weights: (S, k) float32, 0 where dropped; both differentiable. slots: (S, k) int32, expert * C +
    position, -1 where dropped. entries: (E * C,) int32, the choice s * k + j in each place, -1 where it is empty.
    counts: (E,) int64 choices before any was dropped. capacity: C. tokens: (S, M) what the layer dispatches, where a
    TopKGate made this, else None.
    """

    __slots__ = ("l_aux", "weights", "slots", "entries", "counts", "capacity", "tokens")

    def __init__(self, l_aux, weights, slots, entries, counts, capacity):
        self.l_aux, self.weights, self.slots, self.entries = l_aux, weights, slots, entries
        self.counts, self.capacity, self.tokens = counts, capacity, None

    def dense(self):
        """(l_aux, combine_weights (S, E, C) float32, dispatch_mask (S, E, C) bool, exp_counts (E,) int64)."""
        n_tokens, n_experts = self.slots.shape[0], self.counts.numel()
        shape = (n_tokens, n_experts, self.capacity)
        combined = self.weights.new_zeros(n_tokens, n_experts * self.capacity)
        mask = torch.zeros_like(combined, dtype=torch.bool)
        if combined.numel():
            places = self.slots.clamp(min=0).long()
            kept = self.slots >= 0
            # A dropped choice adds nothing, wherever.
            combined = combined.scatter_add(1, places, self.weights * kept)
            mask = mask.to(torch.int8).scatter_add_(1, places, kept.to(torch.int8)).bool()
        return self.l_aux, combined.view(shape), mask.view(shape), self.counts

    def sparse(self):
        """(l_aux, capacity, E, experts, positions, weights, exp_counts): the middle three (k, S), the first choices
        first; experts -1 and positions 0 where dropped; capacity an int64 scalar."""
        dropped, size = self.slots < 0, max(self.capacity, 1)
        experts = (self.slots // size).masked_fill_(dropped, -1)
        positions = (self.slots % size).masked_fill_(dropped, 0)
        return (self.l_aux, torch.tensor(self.capacity), self.counts.numel(), experts.t().contiguous(),
                positions.t().contiguous(), self.weights.t().contiguous(), self.counts)


class _Logits(Function):
    """(S, M) tokens of any training dtype and weight (E, M) float32 to logits (S, E) float32, and the tokens again: who
    uses these in its place hands their gradient back through here, where the logits' part is added to it."""

    @staticmethod
    def forward(ctx, tokens, weight):
        logits = weight.new_empty(tokens.shape[0], weight.shape[0])
        _router().logits(tokens, weight, logits)
        ctx.save_for_backward(tokens, weight)
        ctx.set_materialize_grads(False)
        return logits, tokens.view_as(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logits, d_tokens):
        tokens, weight = ctx.saved_tensors
        if d_logits is None:
            return d_tokens, None
        wanted, weight_wanted = ctx.needs_input_grad
        d_weight = torch.empty_like(weight) if weight_wanted else None
        add = d_tokens is not None
        if wanted:
            # A gradient that came is _Dispatch's: nobody else holds it.
            d_tokens = d_tokens.contiguous() if add else torch.empty_like(tokens)
        _router().logits_backward(tokens, weight, d_logits.contiguous(), d_tokens if wanted else None, add, d_weight)
        return d_tokens if wanted else None, d_weight


class _Gate(Function):
    """Logits to weights and l_aux; what is chosen and dropped are constants of the gradient."""

    @staticmethod
    def forward(ctx, logits, rule, noise, used, capacity_of, priority_of):
        n_tokens, n_experts = logits.shape
        name, k = rule
        router, whole = _router(), {"dtype": torch.int32}
        gates, slope, l_aux = torch.empty_like(logits), logits.new_empty(n_experts), logits.new_empty(())
        experts, slots = torch.empty(n_tokens, k, **whole), torch.empty(n_tokens, k, **whole)
        counts, weights = torch.empty(n_experts, dtype=torch.int64), logits.new_empty(n_tokens, k)
        router.choose(name, k, logits, noise, used, gates, experts, counts, slope, l_aux)
        capacity = capacity_of(counts)
        entries = torch.empty(n_experts * capacity, **whole)
        router.place(name, k, capacity, gates, experts, counts, priority_of(gates), slots, entries, weights)
        ctx.rule = rule
        ctx.save_for_backward(gates, experts, slots, slope)
        ctx.mark_non_differentiable(slots, entries, counts)
        ctx.set_materialize_grads(False)
        return l_aux, weights, slots, entries, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, d_l_aux, d_weights, *_):
        gates, experts, slots, slope = ctx.saved_tensors
        d_logits = torch.empty_like(gates)
        d_weights = None if d_weights is None else d_weights.contiguous()
        _router().differentiate(*ctx.rule, gates, experts, slots, slope, d_weights, d_l_aux, d_logits)
        return d_logits, None, None, None, None, None


def _no_priority(gates):
    return None


def _routes(logits, rule, capacity_of, noise=None, used=None, priority_of=_no_priority):
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected: (tokens, experts)")
    logits = logits.float().contiguous()
    l_aux, weights, slots, entries, counts = _Gate.apply(logits, rule, noise, used, capacity_of, priority_of)
    return Routes(l_aux, weights, slots, entries, counts, entries.numel() // counts.numel())


def _capacity_of(logits, k, factor, min_capacity, drop_tokens, group):
    """A function from the choices of each expert to the capacity, which the ranks of the expert group agree on."""
    if drop_tokens:
        return lambda counts: _agreed(_capacity(logits, k, factor, min_capacity), group)
    return lambda counts: _agreed(int(counts.max()), group)


def _capacity(logits, k, factor, min_capacity):
    """max(ceil(S / E * k * factor), min_capacity); the product is rounded to float32, as DeepSpeed's is."""
    if not (math.isfinite(factor) and min_capacity >= 0):
        raise ValueError(f"capacity factor {factor!r}, min_capacity {min_capacity!r}; allowed: finite, and >= 0")
    n_tokens, n_experts = logits.shape
    each = torch.tensor(float(factor * k), dtype=torch.float32) * (n_tokens / n_experts)
    return max(int(torch.ceil(each)), int(min_capacity))


def _agreed(capacity, group):
    """The largest capacity of the expert group's ranks, which may have different numbers of tokens; a multiple of the
    tensor-parallel ranks, which share the places out."""
    if group is not None:
        largest = torch.tensor([capacity])
        all_reduce(largest, ReduceOp.MAX, group)
        capacity = int(largest)
    n_ranks = groups.get_tensor_model_parallel_world_size()
    return -(-capacity // n_ranks) * n_ranks


def _check_tutel(use_tutel):
    if use_tutel:
        raise NotImplementedError("use_tutel=True: Tutel's kernels are not there; allowed: False")


def _check_policy(policy):
    if policy not in POLICIES:
        raise ValueError(f"noisy_gate_policy {policy!r}; allowed: {', '.join(map(repr, POLICIES))}")


def _top1(logits, capacity_factor, min_capacity, used_token, noisy_gate_policy, drop_tokens, use_rts, ep_group):
    _check_policy(noisy_gate_policy)
    noise = _gumbel(logits) if noisy_gate_policy == "RSample" else None
    used = None if used_token is None else (used_token.reshape(-1) != 0).to(torch.int32)
    # Drawn wherever DeepSpeed draws it, so that what is drawn next is the same.
    uniform = _uniform(logits) if use_rts else None
    capacity_of = _capacity_of(logits, 1, capacity_factor, min_capacity, drop_tokens, ep_group)
    return _routes(logits, ("top1", 1), capacity_of, noise, used, lambda gates: uniform)


def _top2(logits, capacity_factor, min_capacity, drop_tokens, ep_group, top2_2nd_expert_sampling):
    capacity_of = _capacity_of(logits, 2, capacity_factor, min_capacity, drop_tokens, ep_group)
    return _routes(logits, ("top2", 2), capacity_of, _gumbel(logits) if top2_2nd_expert_sampling else None)


def _topk(logits, k, capacity_factor, min_capacity, drop_tokens, ep_group, drop_policy):
    if drop_policy not in DROPS:
        raise ValueError(f"Invalid drop_policy: {drop_policy!r}; allowed: {', '.join(map(repr, DROPS))}")
    if k < 1:
        raise ValueError(f"a token goes to k = {k} of {logits.shape[-1]} experts; allowed: 1 to {logits.shape[-1]}")
    capacity_of = _capacity_of(logits, k, capacity_factor, min_capacity, drop_tokens, ep_group)
    by_gate = (lambda gates: gates) if drop_policy == "probs" else _no_priority
    return _routes(logits, ("topk", k), capacity_of, priority_of=by_gate)


def _result(routes, sparse_routes):
    return routes.sparse() if sparse_routes else routes.dense()


def top1gating(logits, capacity_factor, min_capacity, used_token=None, noisy_gate_policy=None, drop_tokens=True,
               use_rts=True, ep_group=None, sparse_routes=False, use_tutel=False):
    """Each token to one expert: (l_aux, combine_weights, dispatch_mask, exp_counts) as Routes.dense() has them, or what
    Routes.sparse() has (sparse_routes).

    logits: (S, E). used_token: (S,), 0 where a token takes no part. noisy_gate_policy 'RSample' chooses by the logits
    plus Gumbel noise. use_rts: who stays where there are too many is drawn at random, else the first. ep_group: ranks
    that agree on the capacity, the largest of theirs. use_tutel: NotImplementedError if True.
    """
    _check_tutel(use_tutel)
    return _result(_top1(logits, capacity_factor, min_capacity, used_token, noisy_gate_policy, drop_tokens, use_rts,
                         ep_group), sparse_routes)


def top2gating(logits, capacity_factor, min_capacity, drop_tokens=True, ep_group=None, top2_2nd_expert_sampling=True,
               sparse_routes=False):
    """Each token to two experts, results as top1gating's. The second expert is chosen by the logits plus Gumbel noise
    (top2_2nd_expert_sampling) or by the logits. Unlike DeepSpeed's, logits stay as they are."""
    return _result(_top2(logits, capacity_factor, min_capacity, drop_tokens, ep_group, top2_2nd_expert_sampling),
                   sparse_routes)


def topkgating(logits, k, capacity_factor, min_capacity, drop_tokens=True, ep_group=None, drop_policy="probs",
               sparse_routes=False):
    """Each token to its k best experts, results as top1gating's. drop_policy: who stays where there are too many, those
    with the largest gates ('probs') or the first ('position')."""
    return _result(_topk(logits, k, capacity_factor, min_capacity, drop_tokens, ep_group, drop_policy), sparse_routes)


class TopKGate(nn.Module):
    """Chooses k of num_experts for every token. `wg` is a Linear(model_dim, num_experts) without bias; logits are
    float32 whatever the model's dtype, autocast or not."""

    def __init__(self, model_dim, num_experts, k=1, capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=8,
                 noisy_gate_policy=None, drop_tokens=True, use_rts=True, ep_group=None, top2_2nd_expert_sampling=True):
        super().__init__()
        _check_policy(noisy_gate_policy)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k = {k} of num_experts = {num_experts}; allowed: 1 to {num_experts}")
        self.wg = nn.Linear(model_dim, num_experts, bias=False)
        self.ep_group, self.k = ep_group, k
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.noisy_gate_policy = min_capacity, noisy_gate_policy
        self.drop_tokens, self.use_rts = drop_tokens, use_rts
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling

    def _set_ep_group(self, ep_group):
        """The group over which the capacity is agreed."""
        self.ep_group = ep_group

    def __getstate__(self):
        return {**self.__dict__, "ep_group": None}  # a process group is neither copied nor pickled

    def _routes(self, input, used_token):
        if input.dim() != 2 or input.shape[1] != self.wg.in_features:
            raise ValueError(f"tokens have shape {tuple(input.shape)}; expected: (tokens, {self.wg.in_features})")
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        input = input.contiguous()
        if self.noisy_gate_policy == "Jitter" and self.training:
            logits, tokens = _Logits.apply(_jittered(input.float()), self.wg.weight.float())[0], input
        else:
            logits, tokens = _Logits.apply(input, self.wg.weight.float())
        routes = self._routes_of(logits, used_token, factor)
        routes.tokens = tokens
        return routes

    def _routes_of(self, logits, used_token, factor):
        if self.k == 1:
            return _top1(logits, factor, self.min_capacity, used_token,
                         self.noisy_gate_policy if self.training else None, self.drop_tokens, self.use_rts,
                         self.ep_group)
        if self.k == 2:
            return _top2(logits, factor, self.min_capacity, self.drop_tokens, self.ep_group,
                         self.top2_2nd_expert_sampling)
        return _topk(logits, self.k, factor, self.min_capacity, self.drop_tokens, self.ep_group, "probs")

    def forward(self, input, used_token=None, sparse_routes=False, use_tutel=False, as_routes=False):
        """(S, M) tokens to what top1gating, top2gating or topkgating returns, or to a Routes (as_routes).
        used_token: (S,), top-1 only."""
        _check_tutel(use_tutel)
        routes = self._routes(input, used_token)
        return routes if as_routes else _result(routes, sparse_routes)


# ---- the layer ----


class _Dispatch(Function):
    """Rows of tokens to the experts' places: one tensor (n_ranks, 1, C, M) for each local expert."""

    @staticmethod
    def forward(ctx, x, slots, entries, n_ranks, n_parts):
        n_experts = n_ranks * n_parts
        capacity = entries.numel() // n_experts
        parts = [x.new_empty(n_ranks, 1, capacity, x.shape[1]) for _ in range(n_parts)]
        _router().dispatch(n_experts, capacity, x, slots, entries, parts)
        ctx.save_for_backward(slots, entries)
        ctx.sizes = x.shape, n_experts, capacity
        return tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_parts):
        slots, entries = ctx.saved_tensors
        shape, n_experts, capacity = ctx.sizes
        d_x = d_parts[0].new_empty(shape)
        parts = [d.contiguous() for d in d_parts]
        _router().combine(n_experts, capacity, None, slots, entries, parts, d_x)
        return d_x, None, None, None, None


class _Exchange(Function):
    """Each part (n_ranks, 1, C, M): piece r goes to rank r, and the gradient the same way back. One node for all
    parts, so that all ranks exchange in one order."""

    @staticmethod
    def forward(ctx, group, *parts):
        ctx.group = group
        return tuple(_exchanged(part, group) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_parts):
        return None, *(_exchanged(d, ctx.group) for d in d_parts)


def _exchanged(part, group):
    part = part.contiguous()
    received = torch.empty_like(part)
    all_to_all_single(received, part, group=group)
    return received


class _Combine(Function):
    """Each token's row from those of its experts, by weights, in the tokens' dtype."""

    @staticmethod
    def forward(ctx, weights, slots, entries, n_ranks, dtype, *parts):
        n_experts, n_columns = n_ranks * len(parts), parts[0].shape[-1]
        capacity = entries.numel() // n_experts
        parts = [part.contiguous() for part in parts]
        out = torch.empty(slots.shape[0], n_columns, dtype=dtype)
        _router().combine(n_experts, capacity, weights, slots, entries, parts, out)
        ctx.save_for_backward(weights, slots, entries, *parts)
        ctx.sizes = n_experts, capacity
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        weights, slots, entries, *parts = ctx.saved_tensors
        d_weights = torch.empty_like(weights) if ctx.needs_input_grad[0] else None
        d_parts = [torch.empty_like(part) for part in parts] if any(ctx.needs_input_grad[5:]) else None
        _router().combine_backward(*ctx.sizes, weights, slots, entries, parts, d_out.contiguous(), d_parts, d_weights)
        return d_weights, None, None, None, None, *(d_parts or [None] * len(parts))


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
        if use_tutel:
            logger.warning("MOELayer: use_tutel=True has no effect: Tutel's kernels are not there")
        self.gate, self.experts = gate, experts
        self.ep_group_name, self.ep_size, self.num_local_experts = ep_group_name, ep_size, num_local_experts
        self.ep_group = None
        self.l_aux, self.exp_counts = torch.tensor(0.0, dtype=torch.float32), None

    def _set_ep_group(self, ep_group):
        """The process group of ep_size ranks, each with num_local_experts of the experts."""
        self.ep_group = ep_group
        self.gate._set_ep_group(ep_group)

    def __getstate__(self):
        # A copy has no graph, and finds its group by the name at its first forward.
        return {**self.__dict__, "ep_group": None, "l_aux": self.l_aux.detach()}

    def forward(self, input, used_token=None):
        """(..., M) -> (..., M'). used_token: (S,), 0 where a token takes no part (top-1 only)."""
        if self.ep_size > 1 and self.ep_group is None:
            self._set_ep_group(groups._get_expert_parallel_group(self.ep_group_name))
        routes = self.gate(input.reshape(-1, input.shape[-1]), used_token, as_routes=True)
        n_experts = self.ep_size * self.num_local_experts
        if routes.counts.numel() != n_experts:
            raise ValueError(f"the gate chooses among {routes.counts.numel()} experts, and there are {n_experts}: "
                             f"{self.num_local_experts} on each of {self.ep_size} ranks")
        self.l_aux, self.exp_counts = routes.l_aux, routes.counts
        parts = _Dispatch.apply(routes.tokens, routes.slots, routes.entries, self.ep_size, self.num_local_experts)
        outputs = self._share_tokens(parts) if groups.get_tensor_model_parallel_world_size() > 1 else self._visit(parts)
        out = _Combine.apply(routes.weights, routes.slots, routes.entries, self.ep_size, input.dtype, *outputs)
        return out.reshape(*input.shape[:-1], out.shape[-1])

    def _share_tokens(self, parts):
        """Tensor-parallel ranks hold the same tokens: each sends its share of the places. Experts that are cut over
        these ranks need all places again, and give their share of the answers."""
        cut = groups._are_cut(self.ep_group_name)
        parts = [drop_tokens(part, 2) for part in parts]
        outputs = self._visit(parts, *((partial(gather_tokens, dim=2), partial(drop_tokens, dim=2)) if cut else ()))
        return [gather_tokens(output, 2) for output in outputs]

    def _visit(self, parts, before=None, after=None):
        """What this layer's experts, wherever they are, make of the parts; before and after, where given, change what
        goes into and comes from this rank's."""
        if self.ep_size > 1 and torch.is_grad_enabled():
            # Gradients go back to all ranks if to one, whatever each of them has frozen.
            parts = [part if part.requires_grad else part.requires_grad_() for part in parts]
        parts = self._exchange(parts)
        if before is not None:
            parts = [before(part) for part in parts]
        if getattr(self.experts, "takes_parts", False):
            outputs = self.experts(list(parts))
        else:
            outputs = self.experts(torch.cat(parts, dim=1)).chunk(self.num_local_experts, dim=1)
        if len(outputs) != self.num_local_experts:
            raise ValueError(f"{self.num_local_experts} experts gave {len(outputs)} outputs; expected: one of each")
        if after is not None:
            outputs = [after(output) for output in outputs]
        return self._exchange(outputs)

    def _exchange(self, parts):
        return parts if self.ep_size == 1 else _Exchange.apply(self.ep_group, *parts)
