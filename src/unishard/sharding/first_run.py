"""What can only be checked once the whole model is sharded: right before its first forward."""

from __future__ import annotations

from unishard.errors import ShardingError, StateError
from unishard.sharding.dtensor import resync, was_replaced
from unishard.sharding.group import ShardGroup
from unishard.sharding.schedule import Schedule


def prepare_first_run(schedule: Schedule) -> None:
    """Take over parameters that users put into modules since they were sharded, and refuse what cannot train.

    Raises `ShardingError` for a parameter that two units hold, `StateError` for parameters on the meta device.
    """
    for unit in schedule.units:
        for fqn, taken in unit.tied_elsewhere:
            raise ShardingError(
                f"{unit.name}: parameter {fqn} is tied to {taken}, already managed by another fully_shard group; a "
                "parameter cannot be sharded twice: shard the modules that share it in one call, "
                "fully_shard([a, b]), or leave both to their common parent"
            )
    for group in schedule.groups:
        if was_replaced(group):
            resync(group)
    names = _names(schedule)
    for group in schedule.groups:
        _require_real(group, names)


def _names(schedule: Schedule) -> dict[int, str]:
    """What each module is called from the root."""
    found: dict[int, str] = {}
    for root in schedule.root.modules:
        for name, module in root.named_modules():
            found.setdefault(id(module), f"{name}." if name else "")
    return found


def _require_real(group: ShardGroup, names: dict[int, str]) -> None:
    if not group.buffer.shard.is_meta:
        return
    homes = [registration.homes[0] for registration in group.registrations]
    missing = [names.get(id(home.module), "") + home.name for home in homes]
    raise StateError(
        f"cannot train, these parameters are still on meta device: {missing}; call model.to_empty(device=...) and "
        "initialize them, or load a checkpoint, before the first forward"
    )
