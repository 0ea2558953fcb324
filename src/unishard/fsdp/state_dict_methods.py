"""The methods of FSDP1's wrapper that choose kinds of state dict, and those for optimizers' state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from unishard.errors import ShardingError, StateError, UnsupportedError
from unishard.fsdp.optim_state_dict import OptimState, export, rekey, to_load
from unishard.fsdp.state_dict_type import StateDictSettings, StateDictType, read_settings


class StateDictMethods(nn.Module):
    """State dicts of a wrapped model and of its optimizer, in whole or in parts."""

    _state_dict_settings: StateDictSettings
    _mesh: Any

    @staticmethod
    def set_state_dict_type(
        module: nn.Module,
        state_dict_type: Any,
        state_dict_config: Any = None,
        optim_state_dict_config: Any = None,
    ) -> StateDictSettings:
        """Choose what `state_dict()` and `optim_state_dict()` of all FSDP modules in `module` give and take.

        Returns the settings before. Raises `StateError` for options of another type.
        """
        chosen = read_settings(state_dict_type, state_dict_config, optim_state_dict_config)
        before = StateDictMethods.get_state_dict_type(module)
        for wrapped in _wrapped_in(module):
            wrapped._state_dict_settings = chosen
        return before

    @staticmethod
    def get_state_dict_type(module: nn.Module) -> StateDictSettings:
        """The settings of the FSDP modules in `module`. Raises `StateError` if they differ."""
        found = [wrapped._state_dict_settings for wrapped in _wrapped_in(module)]
        if any(each != found[0] for each in found):
            kinds = ", ".join(sorted({each.state_dict_type.name for each in found}))
            raise StateError(
                f"FSDP: modules inside {type(module).__name__} have different state dict settings ({kinds}); set them "
                "on the outermost module: FSDP.set_state_dict_type(model, ...)"
            )
        return replace(found[0])

    @staticmethod
    @contextmanager
    def state_dict_type(
        module: nn.Module,
        state_dict_type: Any,
        state_dict_config: Any = None,
        optim_state_dict_config: Any = None,
    ) -> Iterator[None]:
        """As `set_state_dict_type`, within the block.

        Full values are whole plain tensors in the dtype they rest in (fp32 masters under `MixedPrecision`), copied:
        training does not change them. Sharded values are DTensors, which `torch.save` writes and `torch.load` reads a
        rank, and which `unishard.checkpoint` loads at any number of ranks. Local values are the plain tensors of this
        rank.

        >>> from unishard.fsdp import FSDP, FullStateDictConfig
        >>> model = FSDP(nn.Linear(3, 2))
        >>> with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)):
        ...     sorted(model.state_dict())
        ['bias', 'weight']
        """
        before = StateDictMethods.set_state_dict_type(
            module, state_dict_type, state_dict_config, optim_state_dict_config
        )
        try:
            yield
        finally:
            for wrapped in _wrapped_in(module):
                wrapped._state_dict_settings = before

    # optimizers ----------------------------------------------------------------------------------------------

    @staticmethod
    def optim_state_dict(
        model: nn.Module,
        optim: torch.optim.Optimizer,
        optim_state_dict: OptimState | None = None,
        group: Any = None,
    ) -> OptimState:
        """The state of `optim` by parameter name, of the kind set by `state_dict_type`. All ranks call together.

        Args:
            optim_state_dict: what to convert; default `optim.state_dict()`.
            group: the ranks the model is sharded over; may be left out.

        Raises:
            StateError: a parameter that `model` does not have.
        """
        _require_own(model, group)
        settings = StateDictMethods.get_state_dict_type(model)
        return export(
            model,
            optim,
            optim_state_dict,
            settings.state_dict_type,
            rank0_only=settings.optim_rank0_only,
            to_cpu=settings.optim_state_dict_config.offload_to_cpu,
        )

    @staticmethod
    def optim_state_dict_to_load(
        model: nn.Module,
        optim: torch.optim.Optimizer,
        optim_state_dict: OptimState,
        is_named_optimizer: bool = False,
        load_directly: bool = False,
        group: Any = None,
    ) -> OptimState:
        """What `optim.load_state_dict` takes, from what `optim_state_dict` gave with the same kind set.

        All ranks call together. With `rank0_only=True` the first rank's dict counts, and other ranks may bring `{}`.

        Args:
            load_directly: call `optim.load_state_dict` too.
            group: as for `optim_state_dict`.

        Raises:
            CheckpointError: a table of parameters that do not match. UnsupportedError: `is_named_optimizer`.
        """
        if is_named_optimizer:
            raise UnsupportedError(
                "FSDP: is_named_optimizer=True is not available; pass a torch.optim optimizer on model.parameters()"
            )
        _require_own(model, group)
        settings = StateDictMethods.get_state_dict_type(model)
        made = to_load(
            model, optim, optim_state_dict, settings.state_dict_type, rank0_only=settings.optim_rank0_only
        )
        if load_directly:
            optim.load_state_dict(made)
        return made

    # the older names for the same ----------------------------------------------------------------------------

    @staticmethod
    def full_optim_state_dict(
        model: nn.Module,
        optim: torch.optim.Optimizer,
        optim_input: Any = None,
        rank0_only: bool = True,
        group: Any = None,
    ) -> OptimState:
        """Whole optimizer state by parameter name in host memory, on the first rank only unless told otherwise."""
        _require_own(model, group)
        kind = StateDictType.FULL_STATE_DICT
        return export(model, optim, None, kind, optim_input=optim_input, rank0_only=rank0_only, to_cpu=True)

    @staticmethod
    def sharded_optim_state_dict(
        model: nn.Module, optim: torch.optim.Optimizer, group: Any = None
    ) -> OptimState:
        """Optimizer state by parameter name, as DTensors."""
        _require_own(model, group)
        return export(model, optim, None, StateDictType.SHARDED_STATE_DICT, rank0_only=False, to_cpu=True)

    @staticmethod
    def shard_full_optim_state_dict(
        full_optim_state_dict: OptimState,
        model: nn.Module,
        optim_input: Any = None,
        optim: torch.optim.Optimizer | None = None,
    ) -> OptimState:
        """What `optim.load_state_dict` takes, from a full state dict on every rank."""
        kind = StateDictType.FULL_STATE_DICT
        return to_load(model, optim, full_optim_state_dict, kind, optim_input=optim_input, rank0_only=False)

    @staticmethod
    def scatter_full_optim_state_dict(
        full_optim_state_dict: OptimState | None,
        model: nn.Module,
        optim_input: Any = None,
        optim: torch.optim.Optimizer | None = None,
        group: Any = None,
    ) -> OptimState:
        """As `shard_full_optim_state_dict`, from a full state dict on the first rank. All ranks call together."""
        _require_own(model, group)
        kind = StateDictType.FULL_STATE_DICT
        return to_load(model, optim, full_optim_state_dict, kind, optim_input=optim_input, rank0_only=True)

    @staticmethod
    def flatten_sharded_optim_state_dict(
        sharded_optim_state_dict: OptimState, model: nn.Module, optim: torch.optim.Optimizer
    ) -> OptimState:
        """What `optim.load_state_dict` takes, from what `sharded_optim_state_dict` gave."""
        return to_load(
            model, optim, sharded_optim_state_dict, StateDictType.SHARDED_STATE_DICT, rank0_only=False
        )

    @staticmethod
    def rekey_optim_state_dict(
        optim_state_dict: OptimState,
        optim_state_key_type: Any,
        model: nn.Module,
        optim_input: Any = None,
        optim: torch.optim.Optimizer | None = None,
    ) -> Any:
        """The same full state by `OptimStateKeyType.PARAM_NAME` or `PARAM_ID`, the second for a model without FSDP.

        Without `optim`, its parameters are taken to be `model.parameters()`.
        """
        return rekey(optim_state_dict, optim_state_key_type, model, optim, optim_input)


def _wrapped_in(module: nn.Module) -> list[StateDictMethods]:
    found = [m for m in module.modules() if isinstance(m, StateDictMethods)]
    if not found:
        raise ShardingError(
            f"FSDP: there is no FSDP module in the {type(module).__name__}; wrap it first, model = FSDP(model)"
        )
    return found


def _require_own(model: nn.Module, group: Any) -> None:
    """Raise `ShardingError` for a process group that is not the one that `model` is sharded over."""
    if group is None:
        return
    mesh = _wrapped_in(model)[0]._mesh
    own = (
        sorted(mesh.mesh.flatten().tolist()),
        sorted(torch.distributed.get_process_group_ranks(mesh.get_group(-1))),
    )
    given = sorted(torch.distributed.get_process_group_ranks(group))
    if given not in own:
        raise ShardingError(
            f"FSDP: group={given} are not the ranks that the model is sharded over, {own[1]}; leave it out"
        )
