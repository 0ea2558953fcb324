"""FSDP1's names that are not available, each with what to use instead."""

from __future__ import annotations

from typing import NoReturn

from unishard.errors import UnsupportedError

REFUSED_NAMES = {
    "FlatParameter": "parameters keep their own names and shapes here; nothing is flattened in sight of users",
}
"""Public names of `torch.distributed.fsdp` that `unishard.fsdp` knows and does not have."""


def refuse(name: str, instead: str) -> NoReturn:
    """Raise `UnsupportedError`."""
    raise UnsupportedError(f"unishard.fsdp: {name} is not available in this version; {instead}")
