"""torch's state dict helpers, made right for modules that unishard sharded.

The functions of `torch.distributed.checkpoint.state_dict` do the work. Before, what is whole for the moment shows its
shards again, wrapped modules of `unishard.fsdp` give DTensors, and what torch gets wrong is refused or mended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict as torchs
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions as StateDictOptions

from unishard.errors import UnsupportedError
from unishard.sharding.parameter import SwappedParameter
from unishard.sharding.unit import units_under

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]


def get_state_dict(
    model: nn.Module,
    optimizers: Optimizers,
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of a model and its optimizers by parameter name, for `unishard.checkpoint.save`. All ranks call together.

    Values are DTensors that alias the model; whole plain tensors with `StateDictOptions(full_state_dict=True)`.

    >>> model = nn.Linear(2, 1)
    >>> state, optim = get_state_dict(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> list(state), optim["param_groups"][0]["params"]
    (['weight', 'bias'], ['weight', 'bias'])
    """
    with _showing_shards(model, submodules):
        return torchs.get_state_dict(model, optimizers, submodules=submodules, options=options)


def get_model_state_dict(
    model: nn.Module, *, submodules: set[nn.Module] | None = None, options: StateDictOptions | None = None
) -> dict[str, Any]:
    """The first half of `get_state_dict`."""
    with _showing_shards(model, submodules):
        return torchs.get_model_state_dict(model, submodules=submodules, options=options)


def get_optimizer_state_dict(
    model: nn.Module,
    optimizers: Optimizers,
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> dict[str, Any]:
    """The second half of `get_state_dict`."""
    with _showing_shards(model, submodules):
        return torchs.get_optimizer_state_dict(model, optimizers, submodules=submodules, options=options)


def set_state_dict(
    model: nn.Module,
    optimizers: Optimizers,
    *,
    model_state_dict: Mapping[str, Any],
    optim_state_dict: Mapping[str, Any],
    options: StateDictOptions | None = None,
) -> Any:
    """Put back what `get_state_dict` gave, with the same options; returns missing and unexpected keys of the model.

    All ranks call together. With `broadcast_from_rank0=True`, ranks other than the first may bring `{}`.
    """
    # One after the other: torch's function for both returns early on ranks that bring nothing, and the first one hangs.
    report = set_model_state_dict(model, model_state_dict, options=options)
    set_optimizer_state_dict(model, optimizers, optim_state_dict, options=options)
    return report


def set_model_state_dict(
    model: nn.Module, model_state_dict: Mapping[str, Any], *, options: StateDictOptions | None = None
) -> Any:
    """The first half of `set_state_dict`."""
    with _showing_shards(model):
        return torchs.set_model_state_dict(model, dict(model_state_dict), options=options)


def set_optimizer_state_dict(
    model: nn.Module,
    optimizers: Optimizers,
    optim_state_dict: Mapping[str, Any],
    *,
    options: StateDictOptions | None = None,
) -> None:
    """The second half of `set_state_dict`."""
    state: Any = dict(optim_state_dict)
    with _showing_shards(model):
        torchs.set_optimizer_state_dict(model, optimizers, state, options=options)


@contextmanager
def _showing_shards(model: nn.Module, submodules: set[nn.Module] | None = None) -> Iterator[None]:
    """Raises `UnsupportedError` for a model of `unishard.initialize`, whose shards are no DTensors."""
    for unit in units_under(model):
        for group in unit.groups:
            for registration in group.registrations:
                if not isinstance(registration, SwappedParameter):
                    raise UnsupportedError(
                        f"{group.name} belongs to an engine, and {type(model).__name__}'s parameters are whole only in "
                        "use; use engine.save_checkpoint and engine.load_checkpoint"
                    )
            group.show_sharded()
    with ExitStack() as stack:
        for module in model.modules():
            # Wrapped modules of the layer above, which give whole tensors unless told otherwise.
            chooses: Any = type(module)
            if getattr(module, "_state_dict_settings", None) is not None:
                if submodules:
                    raise UnsupportedError(
                        "submodules= with a model that FSDP(...) wrapped is not available; select entries by name"
                    )
                stack.enter_context(chooses.state_dict_type(model, "SHARDED_STATE_DICT"))
                break
        yield
