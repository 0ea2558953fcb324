"""Estimates of the memory that model states take, by the formulas of the ZeRO paper (arXiv:1910.02054).

Per parameter 2 bytes for 16-bit weights, 2 for gradients and 16 for fp32 weights, moments and gradients at the step,
times `additional_buffer_factor` on the side that the optimizer works on.
"""

from __future__ import annotations

from torch import nn

from unishard.sharding.single import full_shape

GB = 2**30


def _sizes(model: nn.Module) -> tuple[int, int]:
    """(all parameters, those of the largest layer), in elements."""
    from math import prod

    total = sum(prod(full_shape(p)) for p in {id(p): p for p in model.parameters()}.values())
    layers = [sum(prod(full_shape(p)) for p in m.parameters(recurse=False)) for m in model.modules()]
    return total, max(layers, default=0)


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """(bytes of host memory a node, bytes of each GPU) for ZeRO-2.

    >>> estimate_zero2_model_states_mem_needs(1000, 1, 1, cpu_offload=True)
    (24000, 2000)
    """
    ranks = num_gpus_per_node * num_nodes
    if cpu_offload:
        device = 2 * total_params
        host = total_params * max(4 * num_gpus_per_node, 16) * additional_buffer_factor
    else:
        device = 4 * total_params + 16 * total_params // ranks
        host = total_params * 4 * num_gpus_per_node * additional_buffer_factor
    return int(host), int(device)


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """(bytes of host memory a node, bytes of each GPU, bytes of the largest layer) for ZeRO-3."""
    ranks, share = num_gpus_per_node * num_nodes, 1 / num_nodes
    largest = 4 * largest_layer_params
    at_start = total_params * 4 * (1 if zero_init else num_gpus_per_node)
    if cpu_offload and cpu_offload_params:
        device, resting = largest, 18 * share
    elif cpu_offload:
        device, resting = largest + int(2 * total_params / ranks), 16 * share
    else:
        device, resting = largest + int(18 * total_params / ranks), 0.0
    host = max(at_start, total_params * resting) * additional_buffer_factor
    return int(host), int(device), largest


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the estimates for a model."""
    estimate_zero2_model_states_mem_needs_all_cold(
        _sizes(model)[0], num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the estimates for a model of `total_params` parameters."""
    _head(total_params, num_gpus_per_node, num_nodes)
    for offload in (True, False):
        host, device = estimate_zero2_model_states_mem_needs(
            total_params, num_gpus_per_node, num_nodes, offload, additional_buffer_factor
        )
        _row(host, device, f"offload_optimizer={'cpu' if offload else 'none'}")


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the estimates for a model."""
    estimate_zero3_model_states_mem_needs_all_cold(
        *_sizes(model), num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the estimates for a model of `total_params` parameters."""
    _head(total_params, num_gpus_per_node, num_nodes)
    for optimizer, params in ((True, True), (True, False), (False, False)):
        for init in (True, False):
            host, device, _ = estimate_zero3_model_states_mem_needs(
                total_params, largest_layer_params, num_gpus_per_node, num_nodes, optimizer, params, init,
                additional_buffer_factor,
            )  # fmt: skip
            names = [
                f"offload_param={'cpu' if params else 'none'}",
                f"offload_optimizer={'cpu' if optimizer else 'none'}",
            ]
            _row(host, device, ", ".join([*names, f"zero_init={int(init)}"]))


def _head(total_params: int, gpus: int, nodes: int) -> None:
    print(
        f"Parameters, gradients and optimizer state of {total_params / 1e6:.0f}M parameters on {nodes} x {gpus} GPUs:\n"
        "  per CPU  |  per GPU |   Options"
    )


def _row(host: int, device: int, options: str) -> None:
    print(f"{host / GB:7.2f}GB | {device / GB:6.2f}GB | {options}")
