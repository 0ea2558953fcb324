"""The one table of DeepSpeed's names: module path below `deepspeed` -> name -> what it is here.

Everything follows from it: the modules that can be imported, what their names resolve to, the stubs that refuse, and
what `python -m unishard.deepspeed` prints.
"""

from __future__ import annotations

from functools import cache

from unishard.deepspeed.entries import Names
from unishard.deepspeed.surface.checkpoints import CHECKPOINTS
from unishard.deepspeed.surface.launching import LAUNCHING
from unishard.deepspeed.surface.operations import OPERATIONS
from unishard.deepspeed.surface.parallelism import PARALLELISM
from unishard.deepspeed.surface.root import ROOT
from unishard.deepspeed.surface.running import RUNNING
from unishard.deepspeed.surface.services import SERVICES
from unishard.deepspeed.surface.zero import ZERO

SURFACE: dict[str, Names] = {
    **ROOT,
    **SERVICES,
    **RUNNING,
    **ZERO,
    **OPERATIONS,
    **CHECKPOINTS,
    **PARALLELISM,
    **LAUNCHING,
}


@cache
def packages() -> frozenset[str]:
    """Paths that have modules below them, in the table or not."""
    return frozenset(
        ".".join(parts[:depth])
        for parts in (path.split(".") for path in SURFACE if path)
        for depth in range(1, len(parts))
    )
