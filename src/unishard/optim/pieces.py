"""From what users pass as parameters of an optimizer to this rank's pieces of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from unishard.errors import ShardingError
from unishard.optim.flat import Piece
from unishard.sharding.group import ShardGroup


def user_groups(model_parameters: Any, model: nn.Module) -> list[dict[str, Any]]:
    """Normalise what users pass as parameters to torch-style groups of the model's own `Parameter` objects.

    Accepts `None` (all parameters), parameters, groups, (name, parameter) pairs, or iterators of those.
    """
    entries: list[Any] = list(model.parameters() if model_parameters is None else model_parameters)
    if not entries:
        raise ShardingError("model_parameters is empty; pass model.parameters(), or leave it out")
    if isinstance(entries[0], dict):
        return [{**g, "params": _as_parameters(g["params"])} for g in entries]
    return [{"params": _as_parameters(entries)}]


def _as_parameters(entries: Any) -> list[nn.Parameter]:
    entries = [entries] if isinstance(entries, torch.Tensor) else list(entries)
    return [entry[1] if isinstance(entry, tuple) else entry for entry in entries]


class Pieces:
    """Where the user's parameters went: the local piece of each, made once."""

    def __init__(self, groups: Sequence[ShardGroup]) -> None:
        self._homes = {
            id(registration.visible): (group, index)
            for group in groups
            for index, registration in enumerate(group.registrations)
        }
        self.made: dict[int, Piece] = {}
        self.members: list[list[Piece]] = []
        """All pieces of each list that was asked for, empty ones too."""

    def of(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """This rank's non-empty pieces of `params`. Raises `ShardingError` for parameters of another model."""
        pieces: list[nn.Parameter] = []
        self.members.append([])
        for param in params:
            home = self._homes.get(id(param))
            if home is None:
                raise ShardingError(
                    f"the optimizer holds a parameter of shape {tuple(param.shape)} that is not part of the model; "
                    "build it from the parameters of the model that you pass to initialize"
                )
            if id(param) not in self.made:
                group, index = home
                local = group.buffer.local(index, group.buffer.shard)
                self.made[id(param)] = Piece(group, index, nn.Parameter(local))
            self.members[-1].append(self.made[id(param)])
            if self.made[id(param)].param.numel():
                pieces.append(self.made[id(param)].param)
        return pieces
