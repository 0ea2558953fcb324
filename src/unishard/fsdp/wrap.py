"""Auto-wrap policies: which modules of a model `FullyShardedDataParallel` gathers one by one.

A policy is an object with `choose`, or a callable `(module, recurse, nonwrapped_numel) -> bool`: with `recurse=True` it
says whether to look below `module`, with `recurse=False` whether to wrap it. torch's policies work as they are.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

from torch import nn

from unishard.errors import ShardingError, StateError
from unishard.sharding.single import full_shape

__all__ = [
    "CustomPolicy",
    "ModuleWrapPolicy",
    "always_wrap_policy",
    "enable_wrap",
    "lambda_auto_wrap_policy",
    "size_based_auto_wrap_policy",
    "transformer_auto_wrap_policy",
    "wrap",
]

ModuleClasses = Iterable[type[nn.Module]]
Overrides = dict[str, Any]
Choice = dict[nn.Module, Overrides]
"""The modules to wrap, each with constructor arguments that differ from the root's."""


class WrapPolicy(ABC):
    """A policy that sees the whole model at once."""

    @abstractmethod
    def choose(self, root: nn.Module, ignored: set[nn.Module]) -> Choice:
        """The modules of `root` to wrap, `root` itself allowed; none of `ignored`."""


class ModuleWrapPolicy(WrapPolicy):
    """Wrap every instance of `module_classes`; also usable as a callable policy.

    >>> policy = ModuleWrapPolicy({nn.Linear})
    >>> len(policy.choose(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), set()))
    1
    """

    def __init__(self, module_classes: ModuleClasses) -> None:
        self.module_classes = _classes("ModuleWrapPolicy(module_classes)", module_classes)

    def choose(self, root: nn.Module, ignored: set[nn.Module]) -> Choice:
        return {m: {} for m in root.modules() if m not in ignored and isinstance(m, self.module_classes)}

    def __call__(self, module: nn.Module, recurse: bool, *args: Any, **kwargs: Any) -> bool:
        return recurse or isinstance(module, self.module_classes)

    def __repr__(self) -> str:
        return f"ModuleWrapPolicy({', '.join(sorted(c.__name__ for c in self.module_classes))})"


class CustomPolicy(WrapPolicy):
    """Wrap each module for which `lambda_fn` returns `True`, or a dict of arguments that differ from the root's."""

    def __init__(self, lambda_fn: Callable[[nn.Module], bool | Overrides]) -> None:
        self._lambda_fn = lambda_fn

    def choose(self, root: nn.Module, ignored: set[nn.Module]) -> Choice:
        found: Choice = {}
        for module in root.modules():
            if module in ignored:
                continue
            answer = self._lambda_fn(module)
            if not isinstance(answer, bool | dict):
                raise ShardingError(
                    f"CustomPolicy: lambda_fn returned {answer!r} for {type(module).__name__}; return True, False or a "
                    "dict of FSDP arguments"
                )
            if answer:
                found[module] = answer if isinstance(answer, dict) else {}
        return found


def _classes(where: str, given: Any) -> tuple[type[nn.Module], ...]:
    """Raises `ShardingError` unless `given` is a class or several."""
    classes: tuple[Any, ...] = (given,) if isinstance(given, type) else tuple(given)
    if not classes or not all(isinstance(each, type) for each in classes):
        raise ShardingError(
            f"{where}={given!r} must be a non-empty set of module classes, for example {{Block}}"
        )
    return classes


def transformer_auto_wrap_policy(
    module: nn.Module | None = None,
    recurse: bool = True,
    nonwrapped_numel: int = 0,
    transformer_layer_cls: ModuleClasses = (),
) -> Any:
    """Wrap instances of `transformer_layer_cls`.

    Bind the classes with `functools.partial`; a call without a module does that and returns the policy.

    >>> policy = transformer_auto_wrap_policy(transformer_layer_cls={nn.Linear})
    >>> policy(nn.Linear(1, 1), recurse=False, nonwrapped_numel=2)
    True
    """
    classes = _classes("transformer_auto_wrap_policy(transformer_layer_cls)", transformer_layer_cls)
    if module is None:
        return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=set(classes))
    return recurse or isinstance(module, classes)


def size_based_auto_wrap_policy(
    module: nn.Module | None = None,
    recurse: bool = True,
    nonwrapped_numel: int = 0,
    min_num_params: int = 100_000_000,
    force_leaf_modules: set[type[nn.Module]] | None = None,
    exclude_wrap_modules: set[type[nn.Module]] | None = None,
) -> Any:
    """Wrap a module once `min_num_params` elements in it are not wrapped yet, innermost first.

    Never looks inside `force_leaf_modules` (default: attention that reads its children's weights) and never wraps
    `exclude_wrap_modules` (default: plain containers). A call without a module returns the policy.
    """
    if module is None:
        return functools.partial(
            size_based_auto_wrap_policy,
            min_num_params=min_num_params,
            force_leaf_modules=force_leaf_modules,
            exclude_wrap_modules=exclude_wrap_modules,
        )
    if nonwrapped_numel < min_num_params:
        return False
    leaves = FORCE_LEAF_MODULES if force_leaf_modules is None else force_leaf_modules
    excluded = EXCLUDE_WRAP_MODULES if exclude_wrap_modules is None else exclude_wrap_modules
    return not isinstance(module, tuple(leaves if recurse else excluded))


EXCLUDE_WRAP_MODULES: set[type[nn.Module]] = {nn.ModuleList, nn.ModuleDict}
FORCE_LEAF_MODULES: set[type[nn.Module]] = {nn.MultiheadAttention}
# Scripts extend the defaults through the function.
size_based_auto_wrap_policy.EXCLUDE_WRAP_MODULES = EXCLUDE_WRAP_MODULES  # pyright: ignore[reportFunctionMemberAccess]
size_based_auto_wrap_policy.FORCE_LEAF_MODULES = FORCE_LEAF_MODULES  # pyright: ignore[reportFunctionMemberAccess]


def lambda_auto_wrap_policy(
    module: nn.Module | None = None,
    recurse: bool = True,
    nonwrapped_numel: int = 0,
    lambda_fn: Callable[[nn.Module], bool] | None = None,
) -> Any:
    """Wrap each module for which `lambda_fn` returns true. A call without a module returns the policy."""
    if lambda_fn is None:
        raise ShardingError(
            "lambda_auto_wrap_policy needs lambda_fn=, a function of a module that returns a bool"
        )
    if module is None:
        return functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda_fn)
    return recurse or bool(lambda_fn(module))


def always_wrap_policy(*args: Any, **kwargs: Any) -> bool:
    """Wrap every module."""
    return True


def _or_policy(
    module: nn.Module, recurse: bool, nonwrapped_numel: int, policies: Iterable[Callable[..., bool]]
) -> bool:
    """Wrap what any of `policies` wraps."""
    return any(
        policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel) for policy in policies
    )


def choose_by_policy(
    root: nn.Module,
    policy: Any,
    ignored: set[nn.Module],
    ignored_params: set[nn.Parameter],
    islands: ModuleClasses = (),
) -> Choice:
    """The modules below `root` that `policy` wraps, and all instances of `islands`, with arguments of their own.

    Raises `ShardingError` for what is no policy.
    """
    islands = tuple(islands)
    if isinstance(policy, set | frozenset | list | tuple):
        policy = ModuleWrapPolicy(policy)
    if isinstance(policy, WrapPolicy) or hasattr(policy, "_run_policy"):
        # The second kind is torch's: given no arguments of the root, it returns those that differ.
        own = isinstance(policy, WrapPolicy)
        found: Choice = policy.choose(root, ignored) if own else policy._run_policy(root, ignored, {})
        for module in root.modules() if islands else ():
            if isinstance(module, islands) and module not in ignored:
                found.setdefault(module, {})
        found.pop(root, None)
        return found
    ask: Any = policy
    if not callable(policy) or isinstance(policy, type):
        raise ShardingError(
            f"FSDP: auto_wrap_policy={policy!r} is no policy; pass one of unishard.fsdp.wrap, for example "
            "ModuleWrapPolicy({Block}), or a function (module, recurse, nonwrapped_numel) -> bool"
        )
    if islands:
        members = [ask, functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=islands)]
        ask = functools.partial(_or_policy, policies=members)
    chosen: Choice = {}
    _visit(root, ask, ignored, ignored_params, chosen)
    chosen.pop(root, None)
    return chosen


def _visit(
    module: nn.Module,
    policy: Callable[..., bool],
    ignored: set[nn.Module],
    ignored_params: set[nn.Parameter],
    chosen: Choice,
) -> int:
    """Ask a callable policy from the leaves up; return how many elements in `module` are wrapped."""
    total = sum(prod(full_shape(p)) for p in module.parameters() if p not in ignored_params)
    if not policy(module=module, recurse=True, nonwrapped_numel=total):
        return 0
    wrapped = 0
    for child in module.children():
        if child not in ignored and child not in chosen:
            wrapped += _visit(child, policy, ignored, ignored_params, chosen)
    if policy(module=module, recurse=False, nonwrapped_numel=total - wrapped):
        chosen[module] = {}
        return total
    return wrapped


_enabled: ContextVar[tuple[Callable[..., nn.Module], Overrides] | None] = ContextVar(
    "enable_wrap", default=None
)


@contextmanager
def enable_wrap(*, wrapper_cls: Callable[..., nn.Module], **wrapper_kwargs: Any) -> Iterator[None]:
    """Let `wrap` inside the block call `wrapper_cls(module, **wrapper_kwargs)`. Raises `StateError` if nested."""
    if _enabled.get() is not None:
        raise StateError("enable_wrap inside enable_wrap is not supported; leave the outer block first")
    token = _enabled.set((wrapper_cls, wrapper_kwargs))
    try:
        yield
    finally:
        _enabled.reset(token)


def wrap(module: nn.Module, **wrap_overrides: Any) -> nn.Module:
    """Wrap `module` inside an `enable_wrap` block; return it as it is outside.

    >>> wrap(nn.ReLU())
    ReLU()
    """
    enabled = _enabled.get()
    if enabled is None:
        return module
    wrapper_cls, kwargs = enabled
    return wrapper_cls(module, **{**kwargs, **wrap_overrides})
