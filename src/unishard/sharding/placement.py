"""Where each kind of model state rests: ZeRO's stages and FSDP's strategies as values.

Sources: ZeRO (Rajbhandari et al. 2020, sections 5 and 7), PyTorch FSDP (Zhao et al. 2023, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from unishard.errors import ShardingError


class Placement(Enum):
    """Who holds a state along the `dp_shard` axis, between its uses."""

    REPLICATE = "replicate"
    SHARD = "shard"
    PARTIAL = "partial"
    """Gradients only: every rank keeps the whole of its own unreduced sum until the boundary."""


class Reshard(Enum):
    """When gathered parameters are released again."""

    NEVER = "never"
    """They rest whole."""
    AFTER_BACKWARD = "after backward"
    AFTER_FORWARD = "after forward"
    """And gathered again for backward."""


@dataclass(frozen=True)
class Sharding:
    """One point of the product space of placements.

    `parameter`, `gradient`, `optimizer` are placements along `dp_shard`; along `dp_replicate` everything is copied.
    `needs_replicas` marks presets that make sense only on a (dp_replicate, dp_shard) mesh.

    >>> from unishard import ZERO2
    >>> ZERO2.gradient, ZERO2.parameter
    (<Placement.SHARD: 'shard'>, <Placement.REPLICATE: 'replicate'>)
    """

    name: str
    parameter: Placement
    gradient: Placement
    optimizer: Placement
    reshard: Reshard
    needs_replicas: bool = False

    def __post_init__(self) -> None:
        rests_whole = self.parameter is Placement.REPLICATE
        if self.parameter is Placement.PARTIAL or self.optimizer is Placement.PARTIAL:
            raise ShardingError(f"{self.name}: only gradients can be PARTIAL; use SHARD or REPLICATE")
        if rests_whole != (self.reshard is Reshard.NEVER):
            raise ShardingError(
                f"{self.name}: parameters that rest whole reshard NEVER, sharded ones at some time"
            )
        if self.optimizer is Placement.REPLICATE and not (rests_whole and self.gradient is Placement.PARTIAL):
            raise ShardingError(
                f"{self.name}: a replicated optimizer needs replicated parameters and whole gradients"
            )

    def __repr__(self) -> str:
        return self.name

    @property
    def sharded_anywhere(self) -> bool:
        """Whether the `dp_shard` axis is used at all; if not, all data-parallel ranks are replicas."""
        return self.optimizer is Placement.SHARD


_R, _S, _P = Placement.REPLICATE, Placement.SHARD, Placement.PARTIAL

NO_SHARD = Sharding("NO_SHARD", _R, _P, _R, Reshard.NEVER)
ZERO1 = Sharding("ZERO1", _R, _P, _S, Reshard.NEVER)
ZERO2 = Sharding("ZERO2", _R, _S, _S, Reshard.NEVER)
SHARD_GRAD_OP = Sharding("SHARD_GRAD_OP", _S, _S, _S, Reshard.AFTER_BACKWARD)
ZERO3 = Sharding("ZERO3", _S, _S, _S, Reshard.AFTER_FORWARD)
HYBRID_ZERO1 = replace(ZERO1, name="HYBRID_ZERO1", needs_replicas=True)
HYBRID_ZERO2 = replace(ZERO2, name="HYBRID_ZERO2", needs_replicas=True)
HYBRID_SHARD = replace(ZERO3, name="HYBRID_SHARD", needs_replicas=True)
HYBRID_SHARD_GRAD_OP = replace(SHARD_GRAD_OP, name="HYBRID_SHARD_GRAD_OP", needs_replicas=True)
DDP = NO_SHARD
FULL_SHARD = ZERO3

PRESETS: dict[str, Sharding] = {
    preset.name: preset
    for preset in (
        NO_SHARD,
        ZERO1,
        ZERO2,
        SHARD_GRAD_OP,
        ZERO3,
        HYBRID_ZERO1,
        HYBRID_ZERO2,
        HYBRID_SHARD_GRAD_OP,
        HYBRID_SHARD,
    )
}
"""Every named strategy once; `DDP` and `FULL_SHARD` are second names."""

_ALIASES = {"DDP": NO_SHARD, "FULL_SHARD": ZERO3}


def preset(name: str) -> Sharding:
    """The preset called `name`, in any case. Raises `ShardingError` with the known names.

    >>> preset("zero3")
    ZERO3
    """
    found = (PRESETS | _ALIASES).get(name.upper())
    if found is None:
        raise ShardingError(f"unknown sharding {name!r}; choose one of {', '.join([*PRESETS, *_ALIASES])}")
    return found
