"""Loss scaling for fp16 as state machines that see only whether gradients overflowed.

The engine multiplies the loss by `scale` before backward, divides the gradients by that same `scale`, agrees
with all ranks on `overflow`, skips the update if there was one, and only then calls `update`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, final, runtime_checkable

from unishard.errors import ConfigError, StateError

MAX_CONSECUTIVE_OVERFLOWS = 10
"""Overflows in a row, with no lower scale left to try, after which training has no point."""


@runtime_checkable
class LossScale(Protocol):
    """What the engine needs of a loss scale; every rank holds an equal copy.

    Attributes:
        scale: the factor for the next backward, and for unscaling what it produced.
        exhausted: whether overflows have gone on so long that training should stop.
    """

    @property
    def scale(self) -> float: ...
    @property
    def exhausted(self) -> bool: ...
    def update(self, overflow: bool) -> None:
        """Record one attempted update; `overflow` is the ranks' common verdict on its gradients."""
        ...

    def state_dict(self) -> dict[str, float]: ...
    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


@dataclass
class _FixedLossScale:
    """A scale that never moves, and the count of overflows in a row."""

    scale: float
    max_consecutive_overflows: int | None = MAX_CONSECUTIVE_OVERFLOWS
    _overflows: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.scale = float(self.scale)
        _require(0 < self.scale < float("inf"), "loss_scale", self.scale, "a positive number")
        _require_limit(self.max_consecutive_overflows)

    @property
    def exhausted(self) -> bool:
        """Whether as many overflows came in a row as are allowed."""
        return (
            self.max_consecutive_overflows is not None and self._overflows >= self.max_consecutive_overflows
        )

    def update(self, overflow: bool) -> None:
        """Count overflows in a row."""
        self._overflows = self._overflows + 1 if overflow else 0

    def state_dict(self) -> dict[str, float]:
        """The scale, for the record, and the count of overflows in a row."""
        return {"scale": self.scale, "overflows": self._overflows}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the count; the scale stays the configured one.

        Raises:
            StateError: the state is of another kind of loss scale.
        """
        _require_keys(self.state_dict(), state, type(self).__name__)
        self._overflows = int(state["overflows"])


@final
@dataclass
class StaticLossScale(_FixedLossScale):
    """A fixed scale; exhausted after `max_consecutive_overflows` overflows in a row (None: never).

    Raises:
        ConfigError: a scale that is not positive and finite, or a limit below 1.

    >>> fixed = StaticLossScale(128.0, max_consecutive_overflows=2)
    >>> fixed.update(overflow=True); fixed.update(overflow=True)
    >>> fixed.scale, fixed.exhausted
    (128.0, True)
    """


@final
@dataclass
class NoLossScale(_FixedLossScale):
    """A scale of 1, for bf16 and fp32; exhausted as `StaticLossScale` is, if overflows are reported at all.

    >>> NoLossScale().scale
    1.0
    """

    scale: float = field(default=1.0, init=False)


@final
@dataclass
class DynamicLossScale:
    """A scale that falls on overflow and grows without (Micikevicius et al. 2018, arXiv:1710.03740).

    On overflow: while more than one unit of hysteresis is left, spend one and keep the scale; after that
    multiply the scale by `backoff_factor`, down to `min_scale`. Without overflow: once `window` clean updates
    lie between this one and the last overflow (or the start), and after every `window` more, multiply by
    `growth_factor`. Hysteresis refills on growth, or on every clean update with `consecutive_hysteresis`.
    These are the rules of DeepSpeed's scaler under ZeRO: growth comes with clean update `window` + 1.

    Attributes:
        initial: the scale at the start.
        growth_factor: above 1.
        backoff_factor: between 0 and 1.
        window: clean updates before growth.
        hysteresis: the overflow, counted from 1, that lowers the scale.
        consecutive_hysteresis: refill on every clean update.
        min_scale: the floor.
        max_consecutive_overflows: overflows in a row at the floor that make it `exhausted` (None: never).

    Raises:
        ConfigError: a value out of range.

    >>> dynamic = DynamicLossScale(initial=8, hysteresis=1)
    >>> dynamic.update(overflow=True)
    >>> dynamic.scale
    4.0
    """

    initial: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_scale: float = 1.0
    max_consecutive_overflows: int | None = MAX_CONSECUTIVE_OVERFLOWS
    scale: float = field(init=False)
    _hysteresis_left: int = field(init=False)
    _clean: int = field(default=0, init=False)
    _overflows_at_floor: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        _require(self.min_scale > 0, "min_loss_scale", self.min_scale, "a positive number")
        _require(
            self.min_scale <= self.initial < float("inf"),
            "initial loss scale",
            self.initial,
            f"a finite number, not below min_loss_scale {self.min_scale} (raise initial_scale_power)",
        )
        _require(self.growth_factor > 1, "growth_factor", self.growth_factor, "above 1")
        _require(0 < self.backoff_factor < 1, "backoff_factor", self.backoff_factor, "between 0 and 1")
        _require(self.window >= 1, "loss_scale_window", self.window, "at least 1")
        _require(self.hysteresis >= 1, "hysteresis", self.hysteresis, "at least 1")
        _require_limit(self.max_consecutive_overflows)
        self.scale = float(self.initial)
        self._hysteresis_left = self.hysteresis

    @property
    def exhausted(self) -> bool:
        """Whether as many overflows came in a row at the floor as were allowed."""
        limit = self.max_consecutive_overflows
        return limit is not None and self._overflows_at_floor >= limit

    def update(self, overflow: bool) -> None:
        """Move the scale after one attempted update."""
        if overflow:
            self._on_overflow()
        else:
            self._on_clean()

    def _on_overflow(self) -> None:
        self._clean = 0
        self._overflows_at_floor += self.scale <= self.min_scale
        if self._hysteresis_left > 1:
            self._hysteresis_left -= 1
        else:
            self.scale = max(self.scale * self.backoff_factor, self.min_scale)

    def _on_clean(self) -> None:
        self._overflows_at_floor = 0
        grow = self._clean > 0 and self._clean % self.window == 0
        if grow or self.consecutive_hysteresis:
            self._hysteresis_left = self.hysteresis
        if grow:
            self.scale *= self.growth_factor
        self._clean += 1

    def state_dict(self) -> dict[str, float]:
        """The scale and the three counters; the settings come from the config."""
        return {
            "scale": self.scale,
            "hysteresis_left": self._hysteresis_left,
            "clean": self._clean,
            "overflows_at_floor": self._overflows_at_floor,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned; a scale below the configured floor is raised to it.

        Raises:
            StateError: the state is of another kind of loss scale.
        """
        _require_keys(self.state_dict(), state, "DynamicLossScale")
        self.scale = max(float(state["scale"]), self.min_scale)
        self._hysteresis_left = min(int(state["hysteresis_left"]), self.hysteresis)
        self._clean = int(state["clean"])
        self._overflows_at_floor = int(state["overflows_at_floor"])


def _require(holds: bool, name: str, value: float, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}; it must be {wanted}")


def _require_limit(limit: int | None) -> None:
    _require(
        limit is None or limit >= 1, "max_consecutive_overflows", limit or 0, "at least 1, or None for never"
    )


def _require_keys(own: Mapping[str, float], state: Mapping[str, float], kind: str) -> None:
    if own.keys() != state.keys():
        raise StateError(
            f"{kind} cannot load a state with the keys {sorted(state)}; it saves {sorted(own)}. "
            "If the run was saved with another fp16 setting, start afresh by not loading this state"
        )
