"""Model state dicts of wrapped modules: clean names; whole, sharded or local values, out and in."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from unishard.dist.agree import agree
from unishard.dist.collectives import Communicator, communicator
from unishard.errors import CheckpointError
from unishard.fsdp.scatter import from_first_rank
from unishard.fsdp.state_dict_type import StateDictSettings, StateDictType
from unishard.fsdp.units import original_buffer_dtypes
from unishard.sharding.unit import units_under

INNER = "_fsdp_wrapped_module"
MARK = f"{INNER}."
_CHECKPOINT_MARK = "_checkpoint_wrapped_module."


def clean(name: str) -> str:
    """A name as it was before wrapping."""
    return name.replace(MARK, "").replace(_CHECKPOINT_MARK, "")


def is_first(mesh: Any) -> bool:
    """Whether this rank is the first of a mesh."""
    return not any(mesh.get_local_rank(dim) for dim in range(mesh.ndim))


@torch.no_grad()
def finish_state_dict(wrapper: Any, state: Any, prefix: str, settings: StateDictSettings) -> None:
    """Give the entries under `prefix` their names from before wrapping, and the values that `settings` ask for.

    All ranks call together.
    """
    dtypes = {prefix + clean(name): dtype for name, dtype in original_buffer_dtypes(wrapper).items()}
    params = wrapper.named_parameters(remove_duplicate=False)
    identity = {prefix + clean(name): id(param) for name, param in params}
    to_cpu = settings.state_dict_config.offload_to_cpu
    left_out = settings.rank0_only and not is_first(wrapper._mesh)
    shown: dict[int | str, torch.Tensor] = {}
    for key in [key for key in state if key.startswith(prefix)]:
        # Taken out and put back one by one, which keeps the order.
        value, name = state.pop(key), clean(key)
        if isinstance(value, DTensor):
            known = identity.get(name, name)
            if known not in shown:
                made = present(value, settings.state_dict_type, to_cpu=to_cpu)
                shown[known] = made.new_empty(0) if left_out else made
            value = shown[known]
        if name in dtypes and isinstance(value, torch.Tensor):
            value = value.to(dtypes[name])
        if to_cpu and isinstance(value, torch.Tensor):
            value = value.cpu()
        if not left_out:
            state[name] = value
    metadata = getattr(state, "_metadata", None) or {}
    for key in [key for key in metadata if INNER in key]:
        # The wrapped module's entry stands for its wrapper's, which says nothing.
        metadata[clean(key + ".").removesuffix(".")] = metadata.pop(key)


def present(value: DTensor, kind: StateDictType, *, to_cpu: bool) -> torch.Tensor:
    """A sharded value as a state dict of `kind` shows it; nothing aliases what training writes."""
    detached: Any = value.detach()
    if kind is StateDictType.SHARDED_STATE_DICT:
        return detached.cpu() if to_cpu and detached.device.type != "cpu" else detached.clone()
    local = detached.to_local()
    made = local if kind is StateDictType.LOCAL_STATE_DICT else detached.full_tensor()
    if to_cpu and made.device.type != "cpu":
        return made.cpu()
    return made.clone() if made.data_ptr() == local.data_ptr() else made


# loading -----------------------------------------------------------------------------------------------------


def prepare_to_load(
    wrapper: Any, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *report: Any
) -> None:
    """A load pre-hook: rename entries to what the wrapped module is called here, and cut whole values into shards."""
    for unit in units_under(wrapper):
        for group in unit.groups:
            group.show_sharded()
    settings: StateDictSettings = wrapper._state_dict_settings
    outermost = wrapper.check_is_root() or not prefix
    if settings.rank0_only and outermost:
        _take_from_first(wrapper, state, prefix)
    with contextlib.ExitStack() as stack:
        if outermost and settings.state_dict_type is not StateDictType.FULL_STATE_DICT:
            # Each rank brings values of its own; where one's do not fit, nobody may go on.
            for axis in _axes(wrapper._mesh):
                stack.enter_context(agree(axis, "FSDP: load_state_dict"))
        for key in [key for key in state if key.startswith(prefix)]:
            name = key[len(prefix) :].removeprefix(MARK)
            value = state.pop(key)
            target = _parameter(wrapper.module, name)
            if isinstance(target, DTensor) and isinstance(value, torch.Tensor):
                value = fit(target, value, settings.state_dict_type, clean(prefix + name))
            state[f"{prefix}{MARK}{name}"] = value


def _axes(mesh: Any) -> list[Communicator]:
    return [communicator(mesh.get_group(dim)) for dim in range(mesh.ndim)]


def _parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    try:
        return module.get_parameter(name.replace(MARK, ""))
    except AttributeError:
        return None


def _take_from_first(wrapper: Any, state: dict[str, Any], prefix: str) -> None:
    """Let every rank have its part of the entries that the first rank has."""
    mesh = wrapper._mesh
    mine = {key: state.pop(key) for key in [key for key in state if key.startswith(prefix)]}

    def keep(key: str, value: torch.Tensor) -> torch.Tensor:
        target = _parameter(wrapper.module, key[len(prefix) :].removeprefix(MARK))
        return (
            cut_like(target, value) if isinstance(target, DTensor) and target.shape == value.shape else value
        )

    state.update(from_first_rank(mine if is_first(mesh) else {}, _axes(mesh), wrapper._device, keep))


def fit(target: DTensor, value: torch.Tensor, kind: StateDictType, name: str) -> torch.Tensor:
    """`value` distributed as `target` is; as it came if its shape is wrong, which torch reports.

    Raises `CheckpointError` for shards of another number of ranks.
    """
    if isinstance(value, DTensor):
        return _fit_sharded(target, value, name)
    if type(value).__name__ == "ShardedTensor":
        return _fit_sharded_tensor(target, value, name)
    if kind is StateDictType.LOCAL_STATE_DICT:
        local = target.to_local()
        if local.shape != value.shape:
            raise CheckpointError(
                f"{name}: this rank holds {tuple(local.shape)} of {tuple(target.shape)}, and the local state dict has "
                f"{tuple(value.shape)}; load it on the rank, and with the number of ranks, that wrote it"
            )
        return like(target, value.to(local.device))
    return cut_like(target, value) if target.shape == value.shape else value


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


def like(target: DTensor, local: torch.Tensor) -> DTensor:
    """`local` as this rank's part of a tensor that is distributed as `target` is, without communication."""
    return DTensor.from_local(
        local.detach(),
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


def _fit_sharded(target: DTensor, value: DTensor, name: str) -> torch.Tensor:
    if target.shape != value.shape:
        return value
    mine, other = target.device_mesh, value.device_mesh
    if mine.mesh.shape != other.mesh.shape or not torch.equal(mine.mesh, other.mesh):
        raise CheckpointError(
            f"{name}: the value is sharded over ranks {other.mesh.tolist()}, the parameter over {mine.mesh.tolist()}; "
            "save and load with unishard.checkpoint, or a full state dict, to change the number of ranks"
        )
    detached: Any = value.detach()
    if tuple(value.placements) != tuple(target.placements):
        detached = detached.redistribute(placements=target.placements)
    return like(target, detached.to_local().to(target.device))


def _fit_sharded_tensor(target: DTensor, value: Any, name: str) -> torch.Tensor:
    """From the values that FSDP1 gives without a device mesh."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(
        target.shape, target.device_mesh, target.placements
    )
    found = [(tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)) for s in value.local_shards()]
    empty = 0 in sizes
    if tuple(value.size()) != tuple(target.shape) or found != (
        [] if empty else [(tuple(offsets), tuple(sizes))]
    ):
        raise CheckpointError(
            f"{name}: the value's shards on this rank (offsets, sizes) {found} of {tuple(value.size())} are not the "
            f"parameter's {(tuple(offsets), tuple(sizes))} of {tuple(target.shape)}; to change the number of ranks, "
            "load it with torch.distributed.checkpoint, or use a full state dict"
        )
    local = target.to_local()
    return like(target, local.detach().clone() if empty else value.local_shards()[0].tensor.to(local.device))


def tidy_load_report(wrapper: nn.Module, incompatible: Any) -> None:
    """A load post-hook: missing and unexpected keys under the names users know."""
    keys: Sequence[list[str]] = (incompatible.missing_keys, incompatible.unexpected_keys)
    for names in keys:
        names[:] = [name.replace(MARK, "") for name in names]
