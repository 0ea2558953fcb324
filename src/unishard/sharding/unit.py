"""ShardUnit: one sharded module, its groups and the phase of its step."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING

from torch import nn

from unishard.dist.collectives import Communicator
from unishard.sharding.group import ShardGroup
from unishard.sharding.placement import Reshard, Sharding
from unishard.sharding.precision import MixedPrecision

if TYPE_CHECKING:
    from unishard.sharding.hooks import UnitHooks
    from unishard.sharding.schedule import Schedule


class Phase(Enum):
    RESTING = "resting"
    FORWARD = "forward"
    BACKWARD = "backward"


class ShardUnit:
    """What is gathered before a module's forward and released after its backward.

    `modules` are usually one; a list runs as one unit from the first forward to the last. A unit without parameters
    has no groups and only takes part in the schedule (a root whose children hold everything).
    """

    def __init__(
        self,
        name: str,
        modules: Sequence[nn.Module],
        sharding: Sharding,
        policy: MixedPrecision,
    ) -> None:
        self.name = name
        self.modules = tuple(modules)
        self.sharding = sharding
        self.policy = policy
        self.groups: list[ShardGroup] = []
        self.schedule: Schedule | None = None
        self.phase = Phase.RESTING
        self.reshard_after_forward = sharding.reshard is Reshard.AFTER_FORWARD
        self.keep_within: Communicator | None = None
        """After forward, keep 1/size of the parameters on each rank of this subgroup (ZeRO++'s hpZ)."""
        self.keep_if_root = True
        """Whether the outermost unit stays whole from forward to backward, where it is needed again at once."""
        self.reshard_after_backward = True
        self.reduce_gradients = True
        self.reduce_across_replicas = True
        self.forward_prefetch: list[ShardUnit] | None = None
        self.backward_prefetch: list[ShardUnit] | None = None
        self.unshard_in_backward = True
        self.max_reductions: int | None = None
        """How many reductions of the whole model may be under way, if users set it; the largest of all units counts."""
        self.tied_elsewhere: list[tuple[str, str]] = []
        """Parameters that another unit had sharded before, with their names there; refused at the first forward."""
        self.hooks: UnitHooks
        self.open_calls = 0
        """Forward calls whose backward has not reached their inputs yet."""
        for module in self.modules:
            module.__dict__[_MARK] = _Mark(self)
        self.serial = next(_serials)
        _living[self.serial] = self

    def __repr__(self) -> str:
        return f"ShardUnit({self.name!r}, {len(self.groups)} groups)"

    @property
    def releases_after_forward(self) -> bool:
        root = self.schedule is not None and self.schedule.root is self
        return self.reshard_after_forward and not (root and self.keep_if_root)

    @property
    def has_frozen(self) -> bool:
        return any(len(group.trainable) < len(group.registrations) for group in self.groups)

    def copy_settings(self, other: ShardUnit) -> None:
        """Take over what users set on `other`; prefetch lists name modules of the original and are not copied."""
        for name in (
            "reshard_after_forward",
            "keep_within",
            "keep_if_root",
            "reshard_after_backward",
            "reduce_gradients",
            "reduce_across_replicas",
            "unshard_in_backward",
            "max_reductions",
        ):
            setattr(self, name, getattr(other, name))

    def unshard(self) -> None:
        for group in self.groups:
            group.unshard()

    def wait(self) -> None:
        for group in self.groups:
            group.wait()

    def reshard(self, after_forward: bool = False) -> None:
        for group in self.groups:
            group.reshard(self.keep_within if after_forward else None)


class _Mark:
    """Ties a module to its unit from inside the module: a table of modules would keep every model alive, because units
    refer to their modules. A copied or pickled module has no unit, and its mark is empty."""

    def __init__(self, unit: ShardUnit | None) -> None:
        self.unit = unit

    def __deepcopy__(self, memo: dict[int, object]) -> _Mark:
        return _Mark(None)

    def __reduce__(self) -> tuple[type[_Mark], tuple[None]]:
        return _Mark, (None,)


_MARK = "_unishard_unit"
_living: weakref.WeakValueDictionary[int, ShardUnit] = weakref.WeakValueDictionary()
_serials = itertools.count()


def unit_of(module: nn.Module) -> ShardUnit | None:
    """The unit whose forward is `module`'s, if `module` was sharded."""
    mark: _Mark | None = module.__dict__.get(_MARK)
    return None if mark is None else mark.unit


def all_units() -> Iterator[ShardUnit]:
    """Every unit of every living model, once, in the order of creation, which all ranks share."""
    yield from list(_living.values())


def units_under(module: nn.Module) -> Iterator[ShardUnit]:
    """Every unit at or below `module`, once, outermost first, in module order."""
    seen: set[int] = set()
    for child in module.modules():
        unit = unit_of(child)
        if unit is not None and id(unit) not in seen:
            seen.add(id(unit))
            yield unit


def forget_unit(unit: ShardUnit) -> None:
    for module in unit.modules:
        module.__dict__.pop(_MARK, None)
    _living.pop(unit.serial, None)
