"""`python -m unishard.deepspeed`: which of DeepSpeed's names are supported, partial or absent."""

from __future__ import annotations

import sys
from collections import Counter

from unishard.deepspeed.entries import Status
from unishard.deepspeed.release import API
from unishard.deepspeed.surface import SURFACE

_ORDER: tuple[Status, ...] = ("supported", "partial", "absent")


def lines(only: str | None = None) -> list[str]:
    """The table: for each module its names by status, with what is missing; `only` limits it to one status."""
    table, total = [], Counter[str]()
    for path, names in sorted(SURFACE.items()):
        rows = []
        for status in _ORDER:
            found = {name: entry for name, entry in names.items() if entry.status == status}
            total[status] += len(found)
            if not found or only not in (None, status):
                continue
            for note in dict.fromkeys(entry.note for entry in found.values()):
                members = ", ".join(name for name, entry in found.items() if entry.note == note)
                rows.append(f"  {status:<9}  {members}" + (f"\n             {note}" if note else ""))
        if rows:
            table += [f"deepspeed.{path}".rstrip("."), *rows]
    counts = ", ".join(f"{total[status]} {status}" for status in _ORDER)
    return [f"DeepSpeed {API} in unishard: {counts} names in {len(SURFACE)} modules", *table]


if __name__ == "__main__":
    print("\n".join(lines(sys.argv[1] if len(sys.argv) > 1 else None)))
