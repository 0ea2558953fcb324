"""Which modules become units of their own: repeated blocks first, then by size."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from unishard.sharding.leaves import is_leaf
from unishard.sharding.parameter import Home, ParameterRecord, find_parameters
from unishard.sharding.single import full_shape

log = logging.getLogger("unishard")

LARGE_MODULE = 100_000_000
"""Elements above which a module that is not part of a repeated block gets a unit of its own."""


@dataclass(frozen=True)
class ChosenUnit:
    """A module that will be gathered on its own, and the parameters it owns."""

    name: str
    module: nn.Module
    records: list[ParameterRecord]


_EXTERNAL: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Parameter]]] = weakref.WeakKeyDictionary()
"""Parameters that a module's forward uses although another module owns them."""


def note_external(module: nn.Module, param: nn.Parameter) -> None:
    """Count `module` among those that use `param`, for models sharded from now on."""
    _EXTERNAL.setdefault(module, []).append(weakref.ref(param))


def forget_external(module: nn.Module, param: nn.Parameter) -> None:
    """Undo `note_external`."""
    _EXTERNAL[module] = [ref for ref in _EXTERNAL.get(module, ()) if ref() is not param]


def _external_users(model: nn.Module) -> dict[int, list[nn.Module]]:
    """By id of the parameter, the modules that use it from outside."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules() if len(_EXTERNAL) else ():
        for ref in _EXTERNAL.get(module, ()):
            if ref() is not None:
                users.setdefault(id(ref()), []).append(module)
    return users


def choose_modules(model: nn.Module, large: int = LARGE_MODULE) -> list[tuple[str, nn.Module]]:
    """The modules below `model` that deserve their own gather, outermost first.

    Two or more siblings of one class, each with parameters, are blocks of a repeated stack (the outermost such stack
    counts). Elsewhere a module of more than `large` elements is split off.
    """
    chosen: list[tuple[str, nn.Module]] = []

    def visit(module: nn.Module, prefix: str) -> None:
        children = [(name, child) for name, child in module.named_children() if _numel(child)]
        kinds = Counter(type(child) for _, child in children)
        for name, child in children:
            repeated = kinds[type(child)] > 1 and _is_block(module, child)
            large_one = not any(child.children()) and _numel(child) > large
            if _runs(child) and (repeated or is_leaf(child) or large_one):
                chosen.append((prefix + name, child))
            elif not is_leaf(child):  # a list that is a leaf stays whole with the module around it
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return chosen


def _runs(module: nn.Module) -> bool:
    """Whether calls of `module` can say when its parameters are needed: lists of modules are never called."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def choose_holders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules below `model` with parameters of their own, outermost first.

    What is inside one of them stays with it: a module may use its children's parameters without calling them.
    """
    chosen: list[tuple[str, nn.Module]] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            holds = any(True for _ in child.parameters(recurse=False))
            if _runs(child) and (is_leaf(child) or holds):
                chosen.append((prefix + name, child))
            elif not is_leaf(child):  # a list that is a leaf stays whole with the module around it
                visit(child, f"{prefix}{name}.")

    if not is_leaf(model):
        visit(model, "")
    return chosen


def _is_block(parent: nn.Module, child: nn.Module) -> bool:
    """A block of a stack: a container's child with structure of its own, not three projections that are all Linear."""
    return isinstance(parent, nn.ModuleList | nn.Sequential | nn.ModuleDict) and any(
        True for _ in child.children()
    )


def _numel(module: nn.Module) -> int:
    return sum(prod(full_shape(p)) for p in module.parameters())


def assign_parameters(
    model: nn.Module,
    modules: Iterable[tuple[str, nn.Module]],
    ignored: set[nn.Parameter] | None = None,
) -> list[ChosenUnit]:
    """Give every parameter to the innermost chosen module that contains all its homes; the root gets the rest.

    Returns the root first, then the chosen modules in order. A parameter tied across units goes to their outermost
    common one, with one log line.
    """
    root = ChosenUnit("", model, [])
    units = {id(module): ChosenUnit(name, module, []) for name, module in modules if module is not model}
    owners = _owners_by_module(model, units, root)
    external = _external_users(model)
    for record in find_parameters([model], {}, ignored or set(), set()):
        paths = [owners[id(home.module)] for home in record.homes]
        paths += [owners[id(module)] for module in external.get(id(record.param), ())]
        owner = _common(paths)
        if any(path[-1] is not owner for path in paths):
            homes = ", ".join(_home_name(model, home) for home in record.homes)
            log.info(
                "unishard: %s is tied (%s); it is gathered with %s",
                record.fqn,
                homes,
                owner.name or "the root module",
            )
        owner.records.append(record)
    return [root, *units.values()]


def _owners_by_module(
    model: nn.Module, units: dict[int, ChosenUnit], root: ChosenUnit
) -> dict[int, tuple[ChosenUnit, ...]]:
    """For each module the chain of units around it, outermost first."""
    owners: dict[int, tuple[ChosenUnit, ...]] = {}

    def visit(module: nn.Module, chain: tuple[ChosenUnit, ...]) -> None:
        unit = units.get(id(module))
        chain = (*chain, unit) if unit is not None and unit not in chain else chain
        if id(module) in owners:
            # Reached on a second path (a shared module): only the units on both paths surely run.
            chain = tuple(a for a, b in zip(owners[id(module)], chain, strict=False) if a is b)
        owners[id(module)] = chain
        for child in module.children():
            visit(child, chain)

    visit(model, (root,))
    return owners


def _common(paths: Sequence[tuple[ChosenUnit, ...]]) -> ChosenUnit:
    common = paths[0][0]
    for level in zip(*paths, strict=False):
        if any(unit is not level[0] for unit in level):
            break
        common = level[0]
    return common


def _home_name(model: nn.Module, home: Home) -> str:
    for name, module in model.named_modules():
        if module is home.module:
            return f"{name}.{home.name}" if name else home.name
    return home.name
