"""The optimizer registry, and building an optimizer from a config section.

Everything here is a plain `torch.optim.Optimizer` over 1-D tensors, the local pieces of parameters. A rank
may hold no piece of a group, or none at all, so empty `params` lists are as good as any.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from unishard.errors import ConfigError, UnsupportedError
from unishard.optim.elementwise import elementwise, refusal, require_elementwise
from unishard.optim.options import checked_options, import_class, suggest

Params: TypeAlias = Sequence[Tensor] | Sequence[dict[str, Any]]
Build: TypeAlias = Callable[[list[dict[str, Any]], dict[str, Any]], Optimizer]

_BUILT_IN = ("adagrad", "adam", "lion", "sgd")

# Device types on which each class has a fused kernel. Not SGD: torch's fails once a parameter gets its first gradient
# later than others, with momentum.
_FUSED_ON = {
    torch.optim.Adam: frozenset({"cpu", "cuda", "mps", "xpu"}),
    torch.optim.AdamW: frozenset({"cpu", "cuda", "mps", "xpu"}),
    torch.optim.Adagrad: frozenset({"cpu"}),
}


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer that a config can name.

    Attributes:
        name: as written in messages and in `config show`.
        accepts: a callable whose parameters are the valid options, with their defaults.
        build: makes the optimizer from parameter groups and options that were checked against `accepts`.
        per_run: options that hold for the whole optimizer and cannot differ between parameter groups.
    """

    name: str
    accepts: Callable[..., Any]
    build: Build
    per_run: frozenset[str] = frozenset()


_REGISTRY: dict[str, OptimizerSpec] = {}


def register(
    name: str, accepts: Callable[..., Any], per_run: frozenset[str] = frozenset()
) -> Callable[[Build], Build]:
    """Register the decorated `build(groups, options)` as the optimizer `name` (matched without case).

    Raises:
        ValueError: when the name is taken.
    """

    def add(build: Build) -> Build:
        taken = _REGISTRY.get(name.lower())
        if taken is not None and taken.build.__module__ != build.__module__:  # a reload is no clash
            raise ValueError(f"optimizer {name!r} of {build.__module__} is taken by {taken.build.__module__}")
        _REGISTRY[name.lower()] = OptimizerSpec(name, accepts, build, per_run)
        return build

    return add


def registered() -> dict[str, OptimizerSpec]:
    """Every registered optimizer by its name, the built-in ones included.

    >>> sorted(registered())
    ['Adagrad', 'Adam', 'AdamW', 'Lion', 'SGD']
    """
    for module in _BUILT_IN:
        importlib.import_module(f"unishard.optim.{module}")
    return {spec.name: spec for spec in _REGISTRY.values()}


def find_optimizer(type_name: str) -> OptimizerSpec:
    """The optimizer that a config means by `type_name`.

    A registered name or the name of a class in `torch.optim` (both without regard to case), or the import
    path of a class.

    Raises:
        ConfigError: unknown name, bad import path, or not an optimizer class.
        UnsupportedError: an optimizer that exists and cannot step shards.

    >>> find_optimizer("adamw").name
    'AdamW'
    """
    own = {name.lower(): spec for name, spec in registered().items()}
    if type_name.lower() in own:
        return own[type_name.lower()]
    if "." in type_name:
        return _from_class(type_name, import_class("optimizer", type_name))
    in_torch = {name.lower(): cls for name, cls in _torch_classes()}
    if type_name.lower() in in_torch:
        return _from_class(type_name, in_torch[type_name.lower()])
    reason = refusal(type_name)
    if reason is not None:
        raise UnsupportedError(f"optimizer {type_name!r}: {reason}. Use one of {', '.join(registered())}.")
    names = [*registered(), *(name for name, cls in _torch_classes() if elementwise(cls))]
    hint = suggest(type_name, names) or f" Known: {', '.join(names)}, or the import path of a class."
    raise ConfigError(f"unknown optimizer type {type_name!r}.{hint}")


def check_optimizer(type_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check a config's optimizer section before there is a model; return the options as they will be used.

    Raises:
        ConfigError, UnsupportedError: as `build_optimizer`.

    >>> check_optimizer("SGD", {"lr": 0.1})
    {'lr': 0.1}
    """
    spec = find_optimizer(type_name)
    # One throwaway element: constructors also check ranges and combinations.
    build_optimizer(type_name, [torch.nn.Parameter(torch.zeros(1))], options)
    return checked_options(f"optimizer {spec.name}", spec.accepts, options)


def build_optimizer(type_name: str, params: Params, options: Mapping[str, Any]) -> Optimizer:
    """Build the optimizer that a config names, over local pieces of parameters.

    Args:
        type_name: see `find_optimizer`.
        params: 1-D tensors, or parameter groups (dicts with `params` and overrides); lists may be empty.
        options: keyword options, as written in the config; torch's fused kernels are used where the devices
            have them, unless `fused`, `foreach`, `capturable` or `differentiable` is given.

    Raises:
        ConfigError: unknown name or option (with the closest valid one), or a value the optimizer refuses.
        UnsupportedError: an optimizer that cannot step shards.

    >>> optimizer = build_optimizer("adamw", [torch.nn.Parameter(torch.ones(3))], {"lr": 0.1})
    >>> optimizer.param_groups[0]["fused"]
    True
    """
    spec = find_optimizer(type_name)
    owner = f"optimizer {spec.name}"
    checked = checked_options(owner, spec.accepts, options)
    groups = _as_groups(params)
    for index, group in enumerate(groups):
        misplaced = sorted(spec.per_run & group.keys())
        if misplaced:
            raise ConfigError(
                f"{owner}: parameter group {index} sets {misplaced[0]!r}, which holds for all groups; "
                "move it to the optimizer's own options"
            )
    try:
        return spec.build(groups, checked)
    except UnsupportedError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{owner}: {error} (options given: {dict(options)})") from error


def with_fused(
    cls: type[Optimizer], groups: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """`options`, with `fused=True` added where `cls` has a fused kernel for all these tensors.

    >>> with_fused(torch.optim.SGD, [{"params": []}], {"lr": 0.1, "foreach": True})
    {'lr': 0.1, 'foreach': True}
    """
    chosen = any(options.get(key) is not None for key in ("fused", "foreach"))
    ruled_out = any(options.get(key) for key in ("differentiable", "capturable"))
    devices = _FUSED_ON.get(cls, frozenset())
    if chosen or ruled_out:
        return dict(options)
    tensors = [param for group in groups for param in group["params"]]
    # A rank without pieces decides like the others, for its groups are saved beside theirs.
    types = {tensor.device.type for tensor in tensors} or {"cuda" if torch.cuda.is_available() else "cpu"}
    full_precision = all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)
    if types <= devices and full_precision:
        return {**options, "fused": True}
    return dict(options)


def _as_groups(params: Params) -> list[dict[str, Any]]:
    """Copies of the groups: torch adds keys to the dicts it is given, and refuses an empty list."""
    entries = list(params)
    if entries and isinstance(entries[0], dict):
        return [{**group, "params": list(group["params"])} for group in entries if isinstance(group, dict)]
    return [{"params": entries}]


def _from_class(type_name: str, cls: type) -> OptimizerSpec:
    if not issubclass(cls, Optimizer) or cls is Optimizer:
        raise ConfigError(
            f"optimizer {type_name!r} is not a torch.optim.Optimizer; name a class that derives from it"
        )
    if not elementwise(cls):
        require_elementwise(cls)

    def build(groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
        require_elementwise(cls, options)
        return cls(groups, **with_fused(cls, groups, options))  # pyright: ignore[reportCallIssue]

    return OptimizerSpec(type_name, cls, build)


def _torch_classes() -> Iterator[tuple[str, type[Optimizer]]]:
    for name, value in vars(torch.optim).items():
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer:
            yield name, value
