"""The one table: operation and device type to implementation. Chosen once for each device type.

| name | module | serves |
|---|---|---|
| `native` | `native.py` over `csrc/` | the CPU, where the extension was compiled |
| `triton` | `triton/` | CUDA, where Triton is installed; the CPU under TRITON_INTERPRET=1, for tests |
| `torch` | `reference.py` | everything |

`UNISHARD_KERNELS` in the environment names one of them and overrides the choice.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from unishard.errors import ConfigError

_log = logging.getLogger("unishard")

VARIABLE = "UNISHARD_KERNELS"

OPERATIONS = ("adam", "lion", "adagrad", "sgd", "squared_norm", "sum_pieces", "pack")

_MODULES = {
    "native": "unishard.kernels.native",
    "triton": "unishard.kernels.triton",
    "torch": "unishard.kernels.reference",
}

_PREFERRED = {"cpu": "native", "cuda": "triton"}

_REMEDY = {
    "native": "install a wheel of unishard, or reinstall it where a C++17 compiler is at hand",
    "triton": "pip install triton",
}


def implementation(op: str, device_type: str, *, fake: bool = False) -> Callable[..., Any]:
    """The function that carries out `op` on tensors of `device_type`; on `fake` tensors, which have no memory, torch's.

    Raises:
        ConfigError: `UNISHARD_KERNELS` names an implementation that does not exist or cannot serve here.

    >>> implementation("pack", "cpu", fake=True).__module__
    'unishard.kernels.reference'
    """
    module = importlib.import_module(_MODULES["torch"]) if fake else _module(device_type)
    return getattr(module, op)


def active(device_type: str) -> str:
    """The name of the implementation that serves `device_type`.

    Raises:
        ConfigError: as `implementation`.

    >>> active("meta")
    'torch'
    """
    return {path: name for name, path in _MODULES.items()}[_module(device_type).__name__]


def missing(name: str, device_type: str) -> str | None:
    """Why implementation `name` cannot serve `device_type`, or None when it can.

    >>> missing("native", "cuda")
    'the compiled kernels work on CPU tensors'
    """
    if name == "native":
        return _missing_native(device_type)
    if name == "triton":
        return _missing_triton(device_type)
    return None


def _missing_native(device_type: str) -> str | None:
    if device_type != "cpu":
        return "the compiled kernels work on CPU tensors"
    try:
        importlib.import_module("unishard._native")
    except ModuleNotFoundError:
        return "the compiled extension unishard._native is not installed"
    except ImportError as error:
        return f"the compiled extension unishard._native does not load ({error})"
    return None


def _missing_triton(device_type: str) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not (interpreted and device_type == "cpu"):
        return "Triton works on CUDA tensors (and on CPU ones under TRITON_INTERPRET=1, slowly, for tests)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


@cache
def _module(device_type: str) -> ModuleType:
    return importlib.import_module(_MODULES[_choose(device_type)])


def _choose(device_type: str) -> str:
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in _MODULES:
            raise ConfigError(f"{VARIABLE}={forced}: unknown; use one of {', '.join(_MODULES)}, or unset it")
        reason = missing(forced, device_type)
        if reason is not None:
            raise ConfigError(
                f"{VARIABLE}={forced}: {reason}, and these tensors are on {device_type}. "
                f"Unset it, or set {VARIABLE}=torch ({_REMEDY[forced]})"
            )
        return forced
    name = _PREFERRED.get(device_type, "torch")
    reason = missing(name, device_type)
    if reason is None:
        return name
    _log.warning(
        "kernels for %s tensors run as plain torch operations, in several passes over memory: %s; to change that, %s",
        device_type,
        reason,
        _REMEDY[name],
    )
    return "torch"
