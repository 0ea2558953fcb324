"""Full state dicts of wrapped modules: clean names and whole plain tensors, out and in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from unishard.fsdp.units import original_buffer_dtypes
from unishard.sharding.unit import units_under

INNER = "_fsdp_wrapped_module"
MARK = f"{INNER}."
_CHECKPOINT_MARK = "_checkpoint_wrapped_module."


def _clean(name: str) -> str:
    return name.replace(MARK, "").replace(_CHECKPOINT_MARK, "")


@torch.no_grad()
def clean_state_dict(wrapper: nn.Module, state: Any, prefix: str) -> None:
    """Give the entries under `prefix` their names from before wrapping and whole values. All ranks call together."""
    dtypes = {prefix + _clean(name): dtype for name, dtype in original_buffer_dtypes(wrapper).items()}
    params = wrapper.named_parameters(remove_duplicate=False)
    identity = {prefix + _clean(name): id(param) for name, param in params}
    whole: dict[int | str, torch.Tensor] = {}
    for key in [key for key in state if key.startswith(prefix)]:
        # Taken out and put back one by one, which keeps the order.
        value, name = state.pop(key), _clean(key)
        if isinstance(value, DTensor):
            known = identity.get(name, name)
            value = whole[known] = whole[known] if known in whole else _whole(value)
        if name in dtypes and isinstance(value, torch.Tensor):
            value = value.to(dtypes[name])
        state[name] = value
    metadata = getattr(state, "_metadata", None) or {}
    for key in [key for key in metadata if INNER in key]:
        # The wrapped module's entry stands for its wrapper's, which says nothing.
        metadata[_clean(key + ".").removesuffix(".")] = metadata.pop(key)


def _whole(value: DTensor) -> torch.Tensor:
    """The whole of `value`; nothing aliases what training writes."""
    detached: Any = value.detach()
    full = detached.full_tensor()
    return full.clone() if full.data_ptr() == value.to_local().data_ptr() else full


def prepare_to_load(
    wrapper: Any, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *report: Any
) -> None:
    """A load pre-hook: rename entries to what the wrapped module is called here, and cut whole values into shards."""
    for unit in units_under(wrapper):
        for group in unit.groups:
            group.show_sharded()
    for key in [key for key in state if key.startswith(prefix)]:
        name = key[len(prefix) :].removeprefix(MARK)
        value = state.pop(key)
        target = _parameter(wrapper.module, name)
        if isinstance(target, DTensor) and isinstance(value, torch.Tensor) and target.shape == value.shape:
            value = cut_like(target, value)
        state[f"{prefix}{MARK}{name}"] = value


def _parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    try:
        return module.get_parameter(name.replace(MARK, ""))
    except AttributeError:
        return None


@torch.no_grad()
def cut_like(target: DTensor, whole: torch.Tensor) -> DTensor:
    """`whole`, the same on all ranks, distributed as `target` is, without communication."""
    if isinstance(whole, DTensor):
        return whole
    mesh = target.device_mesh
    replicated = DTensor.from_local(
        whole.detach().to(target.device), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    return replicated.redistribute(placements=target.placements)


def tidy_load_report(wrapper: nn.Module, incompatible: Any) -> None:
    """A load post-hook: missing and unexpected keys under the names users know."""
    keys: Sequence[list[str]] = (incompatible.missing_keys, incompatible.unexpected_keys)
    for names in keys:
        names[:] = [name.replace(MARK, "") for name in names]
