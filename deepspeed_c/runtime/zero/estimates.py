"""The memory estimators that DeepSpeed publishes: tables for machines with GPUs, by its published formulas.

They know neither this engine nor this machine; `python -m deepspeed_c.plan` counts what is allocated here. Invariant:
numbers are DeepSpeed's, for the same arguments.
"""
import torch

_HEAD = "  per CPU  |  per GPU |   Options"


def _sizes(model):
    """(elements of all parameters, each memory once; elements of the largest module's own parameters).

    A parameter that ZeRO-3 has released counts with its whole size (ds_numel)."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module")
    total = {p.data_ptr() or id(p): _elements(p) for p in model.parameters()}
    largest = (sum(_elements(p) for p in child.parameters(recurse=False)) for child in model.modules())
    return sum(total.values()), max(largest)


def _elements(p):
    return getattr(p, "ds_numel", p.numel())


def _check(**numbers):
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"{name} is {value!r}; allowed: a number >= 0")
        if name.startswith("num_") and (value < 1 or value != int(value)):
            raise ValueError(f"{name} is {value!r}; allowed: an integer >= 1")


def _show(what, n_gpus, n_nodes, rows):
    """rows: (bytes per node's CPUs, bytes per GPU, options)."""
    print(f"Model states (parameters, gradients, optimizer states) of {what}, "
          f"{n_nodes} node{'s' * (n_nodes > 1)} with {n_gpus} GPU{'s' * (n_gpus > 1)} each:")
    print(_HEAD)
    for cpu, gpu, options in rows:
        print(f" {cpu / 2**30:7.2f}GB | {gpu / 2**30:6.2f}GB | {options}")


def estimate_zero2_model_states_mem_needs(total_params, num_gpus_per_node=1, num_nodes=1, cpu_offload=True,
                                          additional_buffer_factor=1.5):
    """(bytes per node's CPUs, bytes per GPU) of stage 2 with 16-bit parameters and Adam."""
    n_gpus = num_nodes * num_gpus_per_node
    if cpu_offload:
        return int(total_params * max(4 * n_gpus, 16) * additional_buffer_factor), int(2 * total_params)
    return (int(total_params * 4 * num_gpus_per_node * additional_buffer_factor),
            int(2 * total_params + int(18 * total_params / n_gpus)))


def estimate_zero2_model_states_mem_needs_all_live(model, num_gpus_per_node=1, num_nodes=1,
                                                   additional_buffer_factor=1.5):
    """Prints the table of stage 2 for a model: an nn.Module, on the meta device too."""
    estimate_zero2_model_states_mem_needs_all_cold(_sizes(model)[0], num_gpus_per_node, num_nodes,
                                                   additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_cold(total_params, num_gpus_per_node=1, num_nodes=1,
                                                   additional_buffer_factor=1.5):
    """Prints the table of stage 2 for a number of parameters: one row per offload_optimizer."""
    _check(total_params=total_params, num_gpus_per_node=num_gpus_per_node, num_nodes=num_nodes,
           additional_buffer_factor=additional_buffer_factor)
    rows = []
    for offload in (True, False):
        bytes_needed = estimate_zero2_model_states_mem_needs(total_params, num_gpus_per_node, num_nodes, offload,
                                                             additional_buffer_factor)
        rows.append((*bytes_needed, f"offload_optimizer={'cpu ' if offload else 'none'}"))
    _show(f"{int(total_params / 1e6)}M parameters at ZeRO stage 2", num_gpus_per_node, num_nodes, rows)


def estimate_zero3_model_states_mem_needs(total_params, largest_layer_params, num_gpus_per_node=1, num_nodes=1,
                                          cpu_offload=True, cpu_offload_params=True, zero_init=True,
                                          additional_buffer_factor=1.5):
    """(bytes per node's CPUs, bytes per GPU, bytes of the largest layer) of stage 3 with 16-bit parameters and Adam.

    zero_init: the model is made inside zero.Init, so that no process ever holds all of it."""
    n_gpus = num_nodes * num_gpus_per_node
    layer = 4 * largest_layer_params
    whole_copies = 4 * num_gpus_per_node  # bytes a parameter of a model that every process makes in fp32
    if cpu_offload:
        on_cpu = (18 if cpu_offload_params else 16) * (1 / num_nodes)
        cpu = total_params * (on_cpu if zero_init else max(whole_copies, on_cpu))
        gpu = layer + (0 if cpu_offload_params else int(2 * total_params / n_gpus))
    else:
        cpu = (largest_layer_params if zero_init else total_params) * whole_copies
        gpu = layer + int(18 * total_params / n_gpus)
    return int(cpu * additional_buffer_factor), int(gpu), layer


def estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=1, num_nodes=1,
                                                   additional_buffer_factor=1.5):
    """Prints the table of stage 3 for a model: an nn.Module, on the meta device too."""
    estimate_zero3_model_states_mem_needs_all_cold(*_sizes(model), num_gpus_per_node, num_nodes,
                                                   additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_cold(total_params, largest_layer_params, num_gpus_per_node=1,
                                                   num_nodes=1, additional_buffer_factor=1.5):
    """Prints the table of stage 3 for numbers of parameters: one row per offload and use of zero.Init."""
    _check(total_params=total_params, largest_layer_params=largest_layer_params, num_gpus_per_node=num_gpus_per_node,
           num_nodes=num_nodes, additional_buffer_factor=additional_buffer_factor)
    rows = []
    for offload, offload_params in ((True, True), (True, False), (False, False)):
        for zero_init in (True, False):
            cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
                total_params, largest_layer_params, num_gpus_per_node, num_nodes, offload, offload_params, zero_init,
                additional_buffer_factor)
            rows.append((cpu, gpu, f"offload_param={'cpu ' if offload_params else 'none'}, "
                                   f"offload_optimizer={'cpu ' if offload else 'none'}, zero_init={int(zero_init)}"))
    _show(f"{int(total_params / 1e6)}M parameters, {int(largest_layer_params / 1e6)}M in the largest layer, "
          "at ZeRO stage 3", num_gpus_per_node, num_nodes, rows)
