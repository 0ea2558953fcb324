"""Leaf modules: modules whose parameters are gathered all together, whatever runs inside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from unishard.errors import ShardingError
from unishard.sharding.leaves import is_leaf, is_of, mark_leaf


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether `model` was declared a leaf."""
    return is_leaf(model)


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Whether a leaf module was said to hold this parameter."""
    return bool(getattr(model, "ds_z3_leaf_module", None))


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that are leaves."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Declare `model` itself a leaf, or no leaf. Takes effect when the model is sharded."""
    mark_leaf(model, flag)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type[nn.Module] | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Declare every module of these classes (or class names) a leaf; returns them. Call it before `initialize`."""
    wanted = list(leaf_module_classes)
    found = [m for m in model.modules() if any(is_of(m, kind) for kind in wanted)]
    return _mark(found, True, wanted, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type[nn.Module] | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Undo `set_z3_leaf_modules`; returns the modules it changed."""
    wanted = list(leaf_module_classes)
    found = [m for m in model.modules() if any(is_of(m, kind) for kind in wanted)]
    return _mark(found, False, wanted, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Declare the modules of these paths leaves; returns them and the names that were not found."""
    modules = dict(model.named_modules())
    wanted = list(module_names)
    missing = [name for name in wanted if name not in modules]
    found = [modules[name] for name in wanted if name in modules]
    return _mark(found, flag, wanted, raise_if_not_found), missing


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Declare modules whose path ends with one of these leaves; returns them and the suffixes that match nothing."""
    wanted = list(module_name_suffixes)
    found = {s: [m for name, m in model.named_modules() if name.endswith(s)] for s in wanted}
    every = list(dict.fromkeys(module for modules in found.values() for module in modules))
    return _mark(every, flag, wanted, raise_if_not_found), [s for s in wanted if not found[s]]


def _mark(modules: list[nn.Module], flag: bool, wanted: list[Any], needed: bool) -> list[nn.Module]:
    if not modules and needed:
        names = ", ".join(getattr(kind, "__name__", str(kind)) for kind in wanted)
        raise LeafModuleError(f"no module of the model matches {names}; look at model.named_modules()")
    for module in modules:
        set_z3_leaf_module(module, flag)
    return modules


class LeafModuleError(ShardingError):
    """Leaf modules that the model does not have."""
