"""From the caller's module and parameters to what the core takes: dtypes, layout, groups, equal values."""
import hashlib

import torch

from . import _core
from .reduction import is_expert
from .whole import whole

ALIGNMENT = 64  # torch's own kernels give other bits for a weight that starts elsewhere (contract N1)
TRAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cast(module, dtype):
    """Casts floating parameters to dtype (None: nothing), frozen ones included, and the floating buffers of
    modules that have parameters of their own (batch statistics); tables of modules without stay."""
    if dtype is None:
        return
    for child in module.modules():
        own = [p for p in child.parameters(recurse=False) if p.is_floating_point()]
        for p in own:
            if whole(p) is not p:
                continue  # sharded: whoever placed it sees to its dtype
            p.data = p.data.to(dtype)
            if p.grad is not None:
                p.grad = None
        if own:
            for name, buffer in child.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    child._buffers[name] = buffer.to(dtype)


def is_dense(tensor):
    """True where some order of the dimensions makes the tensor contiguous: its memory is one run."""
    run = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != run:
            return False
        run *= size
    return True


def _span(p):
    """First and last byte of a parameter in memory."""
    length = sum((n - 1) * s for n, s in zip(p.shape, p.stride())) + 1
    return p.data_ptr(), p.data_ptr() + length * p.element_size()


def check_storages(module, parameters):
    """ValueError where two parameters overlap in memory and giving one a storage of its own would untie them."""
    names = {id(p): name for name, p in module.named_parameters()}
    found = {id(p): p for p in (*module.parameters(), *parameters) if p.layout == torch.strided and p.numel()}
    spans = sorted(((*_span(p), names.get(key, "(not in the model)"), p) for key, p in found.items()
                    if p.device.type == "cpu"), key=lambda span: span[:3])
    for (_, end, first, a), (begin, _, second, b) in zip(spans, spans[1:]):
        if begin < end and not all(is_dense(p) and p.data_ptr() % ALIGNMENT == 0 for p in (a, b)):
            raise ValueError(f"parameters {first} and {second} share memory, and one of them does not start at "
                             f"{ALIGNMENT} bytes; tie them as one nn.Parameter, or give each its own storage")


def check_whole(module, parameters):
    """ValueError where one of these is sharded, which only ZeRO stage 3 can train."""
    names = {id(p): name for name, p in module.named_parameters()}
    sharded = [names.get(id(p), "(not in the model)") for p in parameters if whole(p) is not p]
    if sharded:
        raise ValueError(f"parameter {sharded[0]} is sharded ({len(sharded)} such parameters): the model was made "
                         "under zero.Init, or an engine at ZeRO stage 3 has it that was not destroyed; allowed: "
                         "zero_optimization.stage 3")


def lay_out(parameters):
    """Gives each parameter a dense storage that starts at 64 bytes; most have one already."""
    for p in parameters:
        if p.layout != torch.strided:
            raise ValueError(f"a parameter of layout {p.layout} is not supported; allowed: torch.strided")
        if p.numel() == 0:
            continue
        if not is_dense(p):
            p.data = p.data.clone(memory_format=torch.contiguous_format)
        elif p.data_ptr() % ALIGNMENT:
            p.data = p.data.clone(memory_format=torch.preserve_format)


def conform(param, grad):
    """A copy of grad in param's memory order."""
    if grad.layout != torch.strided:
        raise NotImplementedError(f"a gradient of layout {grad.layout} (sparse=True?) is not yet; allowed: strided")
    return torch.empty_like(param, requires_grad=False).copy_(grad)


def flat(tensor):
    """A dense tensor's memory as one dimension, without a copy."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def every(module, parameters):
    """{name: Parameter}: the module's, and those of `parameters` that are not among them; each once."""
    found = dict(module.named_parameters())
    known = {id(p) for p in found.values()}
    found.update((f"(parameter {i}, not in the model)", p) for i, p in enumerate(parameters) if id(p) not in known)
    return found


def broadcast(reduction, parameters):
    """All ranks that hold the same parameter take the first one's values."""
    for p in parameters:
        if p.numel():
            reduction.comms[reduction.index(p)].broadcast(flat(p), 0)


def _check_marks(module, params):
    nameless = [p for p in params if is_expert(p) and getattr(p, "group_name", None) is None]
    if nameless:
        names = {id(p): name for name, p in module.named_parameters()}
        raise ValueError(f"parameter {names.get(id(nameless[0]), '(not in the model)')} is an expert's (allreduce is "
                         "False) and has no group_name; allowed: the name of its expert groups, such as 'ep_size_2'")


def make_groups(module, model_parameters):
    """[{"params": [...], ...}] of parameters that require a gradient; empty groups are dropped.

    model_parameters: None (all of the module's), an iterable of parameters, or one of group dicts. Experts get groups
    of their own, as moe.utils.configure_moe_param_groups makes them.
    """
    items = list(module.parameters() if model_parameters is None else model_parameters)
    if not (items and isinstance(items[0], dict)):
        items = [{"params": items}]
        if any(is_expert(p) for p in items[0]["params"]):
            items[0]["name"] = "dense-params"
    groups = []
    for item in items:
        if not isinstance(item, dict) or "params" not in item:
            raise TypeError("model_parameters must hold parameters, or only dicts with a 'params' key")
        params = item["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        for p in params:
            if not isinstance(p, torch.Tensor):
                raise TypeError(f"model_parameters holds a {type(p).__name__}; allowed: parameters, or group dicts")
        params = [p for p in params if p.requires_grad]
        _check_marks(module, params)
        if params:
            groups.append({**item, "params": params})
    if any(is_expert(p) for group in groups for p in group["params"]):
        from .moe.utils import configure_moe_param_groups  # who has no experts starts quicker without

        groups = [group for group in configure_moe_param_groups(groups) if group["params"]]
    return groups


def check_once(module, groups, what):
    """ValueError where a parameter stands in groups more than once."""
    names = {id(p): name for name, p in module.named_parameters()}
    counts = {}
    for group in groups:
        for p in group["params"]:
            counts[id(p)] = counts.get(id(p), 0) + 1
    twice = [names.get(key, "(not in the model)") for key, n in counts.items() if n > 1]
    if twice:
        raise ValueError(f"{what} holds parameters more than once: {', '.join(twice[:5])}")


class Parameters:
    """Trainable parameters in model order, with their names and groups. groups: dicts with "params"; those that
    require no gradient are left out.

    Attributes: tensors, names, group_of, n_groups; fulls, parts: see below, parallel to tensors."""

    def __init__(self, module, groups):
        names = {id(p): name for name, p in module.named_parameters()}
        order = {key: i for i, key in enumerate(names)}
        self.n_groups = len(groups)
        found = [(p, index) for index, group in enumerate(groups) for p in group["params"] if p.requires_grad]
        found.sort(key=lambda item: order.get(id(item[0]), len(order)))
        self.tensors = [p for p, _ in found]
        self.fulls = self.tensors  # at stage 3: tensors in the parameters' shapes, which a release leaves as they are
        self.parts = None  # where ranks share no memory there: this rank's part of each, None where it has the whole
        self.group_of = [g for _, g in found]
        self.names = [names.get(id(p), f"(parameter {i}, not in the model)") for i, p in enumerate(self.tensors)]

    def digest(self):
        """A 63-bit number that differs where names, shapes or strides differ."""
        text = ";".join(f"{n}{tuple(p.shape)}{p.stride()}{p.dtype}" for n, p in zip(self.names, self.fulls))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def open_core(reduction, config, parameters, kind, whole):
    """The C engine over these parameters; whole: none is cut between ranks. Collective."""
    places = [(group, reduction.index(p), reduction.counted(p))
              for p, group in zip(parameters.tensors, parameters.group_of)]
    return _core.Engine(reduction.for_core(), config, parameters.tensors, parameters.fulls, parameters.names, places,
                        parameters.n_groups, kind, whole, torch.get_num_threads(), parameters.digest(), conform,
                        torch.autograd.graph.increment_version)
