"""Optimizer state dicts of wrapped models: keyed by parameter names; whole, sharded or local values, out and in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from unishard.dist.collectives import Communicator, communicator
from unishard.errors import CheckpointError, StateError, UnsupportedError
from unishard.fsdp.scatter import from_first_rank
from unishard.fsdp.state_dict import clean, fit, is_first, like, present
from unishard.fsdp.state_dict_type import OptimStateKeyType, StateDictType
from unishard.sharding.unit import units_under

OptimState = dict[str, Any]


class Members:
    """The parameters of an optimizer, in its order, and what the model calls them.

    Tied parameters are known under all their names and listed under the first. Raises `StateError` for a parameter that
    the model does not have.
    """

    def __init__(
        self, model: nn.Module, optim: torch.optim.Optimizer | None, optim_input: Any = None
    ) -> None:
        for unit in units_under(model):
            for group in unit.groups:
                group.show_sharded()
        first: dict[int, str] = {}
        self._of_name: dict[str, int] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            first.setdefault(id(param), clean(name))
            self._of_name[clean(name)] = id(param)
        self.groups = [list(params) for params in _groups(model, optim, optim_input)]
        self.params = [param for params in self.groups for param in params]
        for param in self.params:
            if id(param) not in first:
                raise StateError(
                    f"FSDP: the optimizer holds a parameter of shape {tuple(param.shape)} that is not the "
                    f"{type(model).__name__}'s; build the optimizer from model.parameters() after FSDP(...)"
                )
        self.names = [first[id(param)] for param in self.params]
        self._first = first
        self.ids = {name: index for index, name in enumerate(self.names)}

    def canonical(self, name: str) -> str:
        """The first name of a tied parameter; any other name as it is."""
        known = self._of_name.get(name)
        return name if known is None else self._first[known]

    def split(self, values: Sequence[Any]) -> list[list[Any]]:
        """`values`, one a parameter, by parameter group."""
        parts, start = [], 0
        for params in self.groups:
            parts.append(list(values[start : start + len(params)]))
            start += len(params)
        return parts


def _groups(model: nn.Module, optim: torch.optim.Optimizer | None, optim_input: Any) -> list[Iterable[Any]]:
    if optim is not None:
        return [group["params"] for group in optim.param_groups]
    given: list[Any] = list(model.parameters() if optim_input is None else optim_input)
    return [group["params"] for group in given] if given and isinstance(given[0], Mapping) else [given]


# out ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def export(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    stored: Mapping[str, Any] | None,
    kind: StateDictType,
    *,
    optim_input: Any = None,
    rank0_only: bool,
    to_cpu: bool,
) -> OptimState:
    """An optimizer's state by parameter name. All ranks call together."""
    members = Members(model, None if optim_input is not None else optim, optim_input)
    values = stored if stored is not None else optim.state_dict()
    left_out = rank0_only and not is_first(mesh_of(model))
    state: OptimState = {}
    for index, (name, param) in enumerate(zip(members.names, members.params, strict=True)):
        found = values["state"].get(index, values["state"].get(name))
        if not found:
            continue
        # By name, since ranks may have come to their state in different orders and gather one after the other.
        shown = {key: _shown(param, found[key], kind, to_cpu) for key in sorted(found, key=str)}
        if not left_out:
            state[name] = {key: shown[key] for key in found}
    if left_out:
        return {}
    groups = [
        {
            **{option: deepcopy(value) for option, value in group.items() if option != "params"},
            "params": names,
        }
        for group, names in zip(values["param_groups"], members.split(members.names), strict=True)
    ]
    return {"state": state, "param_groups": groups}


def _shown(param: torch.Tensor, value: Any, kind: StateDictType, to_cpu: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(param, DTensor) and not isinstance(value, DTensor) and value.dim():
        # Some optimizers keep the state of a DTensor as the plain tensor of this rank's part.
        value = like(param, value) if value.shape == param.to_local().shape else value
    if isinstance(value, DTensor):
        return present(value, kind, to_cpu=to_cpu)
    return value.detach().to("cpu" if to_cpu else value.device, copy=True)


def mesh_of(model: nn.Module) -> Any:
    """The mesh of the outermost wrapped module."""
    return next(m._mesh for m in model.modules() if hasattr(m, "_state_dict_settings"))


# in ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def to_load(
    model: nn.Module,
    optim: torch.optim.Optimizer | None,
    given: Mapping[str, Any] | None,
    kind: StateDictType,
    *,
    optim_input: Any = None,
    rank0_only: bool,
) -> OptimState:
    """What `optim.load_state_dict` takes, from state by parameter name. All ranks call together if `rank0_only`.

    Raises `CheckpointError` with a table of names that do not match.
    """
    members = Members(model, optim, optim_input)

    def keep(index: int, option: str, value: Any) -> Any:
        return _kept(
            members.params[index], value, kind, f"{members.names[index]}.{option}", _slot(index, option)
        )

    def _slot(index: int, option: str) -> Any:
        return None if optim is None else optim.state.get(members.params[index], {}).get(option)

    if rank0_only:
        flat, groups = _scattered(model, members, given, keep)
    else:
        flat, groups = _flat(members, given)
        flat = {place: keep(*place, value) for place, value in flat.items()}
    state: dict[int, OptimState] = {}
    for (index, option), value in flat.items():
        state.setdefault(index, {})[option] = value
    positions = members.split(range(len(members.params)))
    return {
        "state": state,
        "param_groups": [{**g, "params": ids} for g, ids in zip(groups, positions, strict=True)],
    }


Flat = dict[tuple[int, str], Any]


def _flat(members: Members, given: Mapping[str, Any] | None) -> tuple[Flat, list[OptimState]]:
    """State by position and option, and the options of each group in the optimizer's order."""
    if not given:
        raise CheckpointError(
            "FSDP: the optimizer state dict is empty; pass what FSDP.optim_state_dict returned"
        )
    named = {members.canonical(name): values for name, values in given["state"].items()}
    rows = [f"  state of {name}: unexpected" for name in named if name not in members.ids]
    saved = [{members.canonical(n) for n in group["params"]} for group in given["param_groups"]]
    here = [set(names) for names in members.split(members.names)]
    if len(saved) != len(here):
        rows.append(f"  parameter groups: {len(saved)} in the state dict, {len(here)} here")
    for position, (theirs, mine) in enumerate(zip(saved, here, strict=False)):
        rows += [f"  group {position}, {name}: missing in the state dict" for name in sorted(mine - theirs)]
        rows += [f"  group {position}, {name}: missing here" for name in sorted(theirs - mine)]
    if rows:
        raise CheckpointError("FSDP: the state dict is not this optimizer's:\n" + "\n".join(rows[:40]))
    flat = {
        (members.ids[name], option): value
        for name, values in named.items()
        for option, value in values.items()
    }
    groups = [{k: deepcopy(v) for k, v in group.items() if k != "params"} for group in given["param_groups"]]
    return flat, groups


def _scattered(
    model: nn.Module, members: Members, given: Mapping[str, Any] | None, keep: Callable[..., Any]
) -> tuple[Flat, list[OptimState]]:
    """As `_flat`, from the first rank's dict, of which each rank keeps its part."""
    mesh = mesh_of(model)
    axes: list[Communicator] = [communicator(mesh.get_group(dim)) for dim in range(mesh.ndim)]
    flat, groups, failure = {}, [], None
    if is_first(mesh):
        try:
            flat, groups = _flat(members, given)
        except Exception as error:
            failure = error
    for axis in axes:
        failure = axis.broadcast_object(failure)
    if failure is not None:
        raise failure
    for axis in axes:
        groups = axis.broadcast_object(groups)
    places: Any = {f"{index}/{option}": value for (index, option), value in flat.items()}

    def place(key: str) -> tuple[int, str]:
        index, _, option = key.partition("/")
        return int(index), option

    device = next((p.device for p in members.params), torch.device("cpu"))
    found = from_first_rank(places, axes, device, lambda key, value: keep(*place(key), value))
    return {place(key): value for key, value in found.items()}, groups


def _kept(param: Any, value: Any, kind: StateDictType, name: str, slot: Any) -> Any:
    """This rank's part of one state of a parameter, in memory of its own."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    if not isinstance(param, DTensor):
        return value.detach().to(param.device, copy=True)
    sharded = isinstance(value, DTensor) or type(value).__name__ == "ShardedTensor"
    shape = torch.Size(value.size())
    if kind is StateDictType.LOCAL_STATE_DICT and not sharded:
        found = fit(param, value, kind, name)
    elif shape == param.shape:
        found = fit(param, value, StateDictType.FULL_STATE_DICT, name)
    elif isinstance(slot, DTensor) and slot.shape == shape:
        found = fit(slot, value, StateDictType.FULL_STATE_DICT, name)
    else:
        raise UnsupportedError(
            f"FSDP: {name} of shape {tuple(shape)} belongs to a parameter of shape {tuple(param.shape)}, and the "
            "optimizer has no such state yet that would say how to shard it; take one step before loading"
        )
    kept = found.clone()
    if isinstance(kept, DTensor) and isinstance(slot, torch.Tensor) and not isinstance(slot, DTensor):
        return kept.to_local()  # an optimizer that works on this rank's part
    return kept


# keys --------------------------------------------------------------------------------------------------------


def rekey(
    given: Mapping[str, Any], key_type: Any, model: nn.Module, optim: Any, optim_input: Any
) -> Mapping[str, Any]:
    """The same state by names or by positions; `model` need not be wrapped.

    Raises `StateError` for keys of both kinds, or names that the optimizer does not have.
    """
    wanted = OptimStateKeyType.__members__.get(getattr(key_type, "name", str(key_type)))
    if wanted is None:
        raise StateError(f"FSDP: optim_state_key_type={key_type!r} is neither PARAM_NAME nor PARAM_ID")
    kinds = {type(key) for key in given["state"]} | {
        type(p) for g in given["param_groups"] for p in g["params"]
    }
    if not kinds <= {str} and not kinds <= {int}:
        raise StateError(f"FSDP: the optimizer state has keys of different types: {list(given['state'])[:8]}")
    if kinds <= {str if wanted is OptimStateKeyType.PARAM_NAME else int}:
        return given
    members = Members(model, None if optim_input is not None else optim, optim_input)
    by_name = wanted is OptimStateKeyType.PARAM_NAME

    def change(key: Any) -> Any:
        try:
            return members.names[key] if by_name else members.ids[members.canonical(key)]
        except (IndexError, KeyError):
            raise StateError(
                f"FSDP: the optimizer has no parameter {key!r}; it has {len(members.names)}: {members.names[:5]} ..."
            ) from None

    groups = [
        {
            **deepcopy({k: v for k, v in g.items() if k != "params"}),
            "params": sorted(map(change, g["params"])),
        }
        for g in given["param_groups"]
    ]
    return {"state": {change(key): value for key, value in given["state"].items()}, "param_groups": groups}
