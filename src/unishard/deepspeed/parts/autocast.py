"""`runtime.torch_autocast`: which parameters compute in autocast's dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from unishard.errors import ConfigError

LOWER_PRECISION_SAFE_MODULES: list[type[nn.Module]] = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]
"""Classes whose modules compute in autocast's dtype where the configuration names none."""

PARAM_COMM_DTYPE_ATTR_NAME = "comm_dtype"
"""Attribute of the parameters of such modules. What travels is in `communication_data_type` all the same."""

_dtype: torch.dtype | None = None


def init_autocast_params(
    engine: Any, dtype: torch.dtype, torch_autocast_lower_precision_safe_modules: Iterable[str] | None = None
) -> None:
    """Mark the parameters of modules of these classes, given by import path; without any, of those above."""
    global _dtype
    _dtype = dtype
    paths = torch_autocast_lower_precision_safe_modules
    classes = LOWER_PRECISION_SAFE_MODULES if paths is None else [_imported(path) for path in paths]
    for module in engine.module.modules():
        if type(module) in classes:
            for param in module.parameters(recurse=False):
                setattr(param, PARAM_COMM_DTYPE_ATTR_NAME, dtype)


def _imported(path: str) -> Any:
    import pkgutil

    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"torch_autocast.lower_precision_safe_modules: {path!r} is not a class: {error}"
        ) from error


def is_autocast_initialized() -> bool:
    """Whether an engine of this process runs under autocast by its configuration."""
    return _dtype is not None


def get_autocast_dtype() -> torch.dtype | None:
    """The dtype of the last engine that does."""
    return _dtype


def get_default_autocast_lower_precision_modules() -> list[str]:
    """Import paths of `LOWER_PRECISION_SAFE_MODULES`.

    >>> get_default_autocast_lower_precision_modules()[0]
    'torch.nn.modules.linear.Linear'
    """
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in LOWER_PRECISION_SAFE_MODULES]


def has_comm_dtype(param: nn.Parameter) -> bool:
    """Whether the parameter was marked."""
    return hasattr(param, PARAM_COMM_DTYPE_ATTR_NAME)


def get_comm_dtype(param: nn.Parameter) -> torch.dtype:
    """Autocast's dtype for marked parameters, otherwise their own."""
    return getattr(param, PARAM_COMM_DTYPE_ATTR_NAME, param.dtype)


def get_all_comm_dtypes(params: Iterable[nn.Parameter]) -> set[torch.dtype]:
    """The dtypes of several parameters, each once."""
    return {get_comm_dtype(param) for param in params}


def sort_dtypes(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    """In the order of their names."""
    return sorted(dtypes, key=str)
