"""Leaf modules: one unit with everything below it, whatever runs inside (an expert layer whose experts vary)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

LEAF = "_unishard_leaf"
"""Attribute: a module on which it is true is a leaf."""


def is_leaf(module: nn.Module) -> bool:
    """Whether `module` was marked."""
    return bool(getattr(module, LEAF, False))


def mark_leaf(module: nn.Module, leaf: bool = True) -> None:
    """Make `module` a leaf, or no leaf, for models sharded from now on."""
    setattr(module, LEAF, leaf)


def is_of(module: nn.Module, kind: type[nn.Module] | str) -> bool:
    """Whether `module` is of a class, given itself, by name or by import path."""
    if isinstance(kind, str):
        cls = type(module)
        return kind in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")
    return isinstance(module, kind)


def mark_leaves(
    model: nn.Module,
    classes: Iterable[type[nn.Module] | str] = (),
    names: Iterable[str] = (),
    name_suffixes: Iterable[str] = (),
) -> list[nn.Module]:
    """Mark the modules of `model` that one of the lists describes; returns them.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> mark_leaves(model, names=["0"])
    [Linear(in_features=2, out_features=2, bias=True)]
    """
    kinds, paths, endings = list(classes), set(names), tuple(name_suffixes)
    found = [
        module
        for path, module in model.named_modules()
        if path in paths or (endings and path.endswith(endings)) or any(is_of(module, kind) for kind in kinds)
    ]
    for module in found:
        mark_leaf(module)
    return found
