"""`describe`: what is sharded how, for people."""

from __future__ import annotations

from math import prod

from torch import nn

from unishard.sharding.group import ShardGroup
from unishard.sharding.unit import ShardUnit, units_under
from unishard.sharding.wrap import assign_parameters, choose_modules

_COLUMNS = ("unit", "parameters", "elements", "dtype", "trains", "bytes here", "layout")


def describe(model: nn.Module) -> str:
    """A table of the groups of `model`: a row a group, with this rank's bytes at rest.

    A model that is not sharded is shown as `auto_shard` or `initialize` would group it.

    >>> print(describe(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))  # doctest: +ELLIPSIS
    not sharded; would be grouped as
    ...
    """
    units = list(units_under(model))
    if not units:
        chosen = assign_parameters(model, choose_modules(model))
        rows = [
            (
                c.name or type(model).__name__,
                str(len(c.records)),
                f"{sum(r.param.numel() for r in c.records):,}",
            )
            for c in chosen
            if c.records
        ]
        return "not sharded; would be grouped as\n" + _table(_COLUMNS[:3], rows)
    rows = [_row(unit, group) for unit in units for group in unit.groups]
    total = sum(sum(g.persistent_bytes.values()) for u in units for g in u.groups)
    first = units[0]
    axes = next((g.axes for u in units for g in u.groups), None)
    ranks = (
        "" if axes is None else f" over {axes.replicate.size} x {axes.shard.size} ranks (replicate x shard)"
    )
    head = f"{first.sharding}{ranks}: {len(rows)} groups, {total:,} bytes at rest on this rank"
    return head + "\n" + _table(_COLUMNS, rows)


def _row(unit: ShardUnit, group: ShardGroup) -> tuple[str, ...]:
    precision = group.precision
    dtypes = dict.fromkeys(
        str(d).removeprefix("torch.") for d in (precision.compute, precision.reduce, precision.master)
    )
    return (
        unit.name,
        str(len(group.registrations)),
        f"{sum(prod(shape) for shape in group.buffer.layout.shapes):,}",
        " / ".join(dtypes),
        f"{len(group.trainable)} of {len(group.registrations)}",
        f"{sum(group.persistent_bytes.values()):,}",
        group.buffer.layout.describe(),
    )


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (columns, *rows)
    ]
    return "\n".join(lines)
