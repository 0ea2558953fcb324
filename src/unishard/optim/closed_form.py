"""The base of the schedules whose rate is a closed form of the number of applied updates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unishard.errors import ConfigError, StateError

PerGroup: TypeAlias = float | Sequence[float]
"""One value for all parameter groups, or one for each."""

_STATE_KEYS = ("last_epoch", "base_lrs", "_last_lr", "_step_count")


class ClosedFormLR(LRScheduler):
    """A schedule given by `lrs_at`; the abstract base of unishard's own.

    Args:
        optimizer: any `torch.optim.Optimizer`; its groups' `lr` is set at once to the first update's value.
        last_batch_iteration: -1 to start afresh; k to go on after k + 1 applied updates.
    """

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int = -1) -> None:
        if last_batch_iteration >= 0:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        super().__init__(optimizer, last_epoch=last_batch_iteration)

    @abstractmethod
    def lrs_at(self, update: int) -> list[float]:
        """The learning rate of each parameter group for update `update`, counted from 0."""

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group for the coming update."""
        return list(self.lrs_at(self.last_epoch))

    def state_dict(self) -> dict[str, Any]:
        """Progress only: the shape of the schedule comes from the config, which may change between runs."""
        return {key: self.__dict__[key] for key in _STATE_KEYS}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, ours or DeepSpeed's (`last_batch_iteration`), and set the groups' rates.

        Raises:
            StateError: neither kind of state, or of another number of parameter groups.
        """
        if "last_batch_iteration" in state_dict:
            state_dict = {"last_epoch": state_dict["last_batch_iteration"] + 1, "base_lrs": self.base_lrs}
        groups = len(self.optimizer.param_groups)
        if "last_epoch" not in state_dict or len(state_dict.get("base_lrs", ())) != groups:
            raise StateError(
                f"{type(self).__name__} cannot load a state with the keys {sorted(state_dict)} for {groups} "
                f"parameter groups; it needs `last_epoch` and one of `base_lrs` for each group"
            )
        self.__dict__.update({key: state_dict[key] for key in _STATE_KEYS if key in state_dict})
        self._apply()

    def _apply(self) -> None:
        rates = self.lrs_at(self.last_epoch)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = list(rates)


def per_group(name: str, value: PerGroup, optimizer: Optimizer) -> list[float]:
    """`value` for each parameter group of `optimizer`.

    Raises:
        ConfigError: a list of another length.

    >>> import torch
    >>> optimizer = torch.optim.SGD([{"params": []}, {"params": []}])
    >>> per_group("warmup_max_lr", 0.1, optimizer)
    [0.1, 0.1]
    """
    groups = len(optimizer.param_groups)
    if not isinstance(value, Sequence):
        return [float(value)] * groups
    if len(value) != groups:
        raise ConfigError(
            f"{name} has {len(value)} values and the optimizer {groups} parameter groups; "
            "give one number, or one for each group"
        )
    return [float(item) for item in value]


def whole_number(name: str, value: float, least: int) -> int:
    """`value` as an int; `1e6` in JSON is a float.

    Raises:
        ConfigError: not a whole number, or below `least`.

    >>> whole_number("total_num_steps", 1e6, least=1)
    1000000
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    return int(value)
