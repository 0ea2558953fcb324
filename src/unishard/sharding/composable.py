"""The notes that torch's composable APIs leave on modules, so that they and `fully_shard` keep off each other's work.

`torch.distributed._composable.replicate` (and DDP through it) leaves out what carries `fully_shard`'s note.
"""

from __future__ import annotations

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem, _get_registry

_NAME = "fully_shard"


def note_sharded(module: nn.Module) -> None:
    module.__dict__.setdefault(REGISTRY_KEY, {}).setdefault(_NAME, RegistryItem())


def forget_sharded(module: nn.Module) -> None:
    """A copy of a sharded module carries the note, and is not sharded by that."""
    (_get_registry(module) or {}).pop(_NAME, None)


def is_replicated(module: nn.Module) -> bool:
    """Whether `replicate` was applied to `module`: its parameters are DDP's."""
    return "replicate" in (_get_registry(module) or {})
