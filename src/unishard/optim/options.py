"""Checking a config section's options against the signature of what it builds."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from unishard.errors import ConfigError

_POSITIONAL = frozenset({"self", "params", "optimizer"})

# Options that users carry over from elsewhere, and where each belongs here.
_MOVED = {
    "max_grad_norm": "set `gradient_clipping` at the top level of the config instead",
    "grad_clip": "set `gradient_clipping` at the top level of the config instead",
    "master_weights": "master weights follow the `fp16`/`bf16` sections; remove the option",
}


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `choices` (case-insensitive), or an empty string.

    >>> suggest("adamm", ["AdamW", "SGD"])
    " Did you mean 'AdamW'?"
    >>> suggest("zzz", ["AdamW", "SGD"])
    ''
    """
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def checked_options(owner: str, accepts: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` ready for `accepts(**options)`: every key known, none missing, lists made tuples.

    Args:
        owner: what the message names, such as `optimizer AdamW`.
        accepts: a class or function whose parameters (but `params` and `optimizer`) are the valid options.
        options: what the user wrote.

    Raises:
        ConfigError: for unknown, misplaced, missing or mistyped options; all of them in one message.

    >>> checked_options("f", lambda lr=0.1, betas=(0.9, 0.99): None, {"betas": [0, 0.5]})
    {'betas': (0.0, 0.5)}
    """
    signature = inspect.signature(accepts).parameters
    known = {name: p for name, p in signature.items() if name not in _POSITIONAL and p.kind in _NAMED}
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
    problems = [_unknown(key, known) for key in options if key not in known and not open_ended]
    problems += [
        f"{name!r} is required"
        for name, p in known.items()
        if p.default is inspect.Parameter.empty and name not in options
    ]
    problems += [
        _mistyped(key, options[key]) for key in options if _is_mistyped(known.get(key), options[key])
    ]
    if problems:
        raise ConfigError(f"{owner}: " + "; ".join(problems))
    return {key: _as_declared(known.get(key), value) for key, value in options.items()}


def import_class(owner: str, path: str) -> type:
    """Return the class at `path` (`package.module.Class`).

    Raises:
        ConfigError: when the module cannot be imported, or has no such class.

    >>> import_class("optimizer", "torch.optim.RMSprop").__name__
    'RMSprop'
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty or relative module name
        raise ConfigError(
            f"{owner} {path!r}: cannot import {module_name!r} ({error}); install it or fix the path"
        ) from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(f"{owner} {path!r}: {module_name!r} has no class {name!r}.{suggest(name, classes)}")
    return found


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _unknown(key: str, known: Mapping[str, inspect.Parameter]) -> str:
    if key in _MOVED:
        return f"{key!r} is not an option here: {_MOVED[key]}"
    hint = suggest(key, known)
    return f"unknown option {key!r}.{hint or ' Valid: ' + ', '.join(known)}"


def _is_mistyped(parameter: inspect.Parameter | None, value: Any) -> bool:
    """Whether `value` is a string where no string is meant; YAML reads `1e-5` as one."""
    if parameter is None or not isinstance(value, str) or isinstance(parameter.default, str):
        return False
    declared = str(parameter.annotation)
    if parameter.annotation is inspect.Parameter.empty:
        return isinstance(parameter.default, (int, float, tuple))
    return "str" not in declared and "Literal" not in declared and "Any" not in declared


def _mistyped(key: str, value: str) -> str:
    try:
        return f"{key!r} is the string {value!r}; write the number {float(value)!r}"
    except ValueError:
        return f"{key!r} is the string {value!r}; a string is not accepted here"


def _as_declared(parameter: inspect.Parameter | None, value: Any) -> Any:
    if parameter is None or not isinstance(value, (list, tuple)) or not isinstance(parameter.default, tuple):
        return value
    # torch refuses an int beside a float in `betas`.
    floats = all(isinstance(item, float) for item in parameter.default)
    return tuple(float(item) if floats and isinstance(item, int) else item for item in value)
