"""A ds_config as DeepSpeed's users give it: read raw, completed with DeepSpeed's own defaults, checked."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from unishard.config import Config, ResolvedConfig
from unishard.config.load import read
from unishard.errors import ConfigError


class DeepSpeedConfigError(ConfigError, AssertionError):
    """A configuration that cannot be honoured. DeepSpeed asserts for some of them, so this is an AssertionError too."""


DEFAULTS: dict[str, Any] = {"gradient_clipping": 1.0, "steps_per_print": math.inf}
"""Where DeepSpeed 0.19's defaults differ from unishard's own."""


def raw_config(source: Any) -> dict[str, Any]:
    """The keys of `source` (a path, mapping, base64 string, `Config` or `DeepSpeedConfig`) as given; {} for `None`."""
    if source is None:
        return {}
    given = getattr(source, "_param_dict", source)
    if isinstance(given, Config):
        return read(given).tree
    return copy.deepcopy(read(given).tree)


def with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with DeepSpeed's own defaults where it says nothing (or `"auto"`, which nobody filled)."""
    completed = dict(raw)
    for key, value in DEFAULTS.items():
        if completed.get(key, "auto") == "auto":
            completed[key] = value
    if "optimizer_in_backward" in completed and "gradient_clipping" not in raw:
        completed["gradient_clipping"] = 0.0
    return completed


class ConfigView(dict[str, Any]):
    """`engine.config`: the user's own keys, as DeepSpeed shows them; attributes are the resolved values."""

    def __init__(self, raw: Mapping[str, Any], resolved: ResolvedConfig) -> None:
        super().__init__(raw)
        self._resolved = resolved

    def __getattr__(self, name: str) -> Any:
        if name == "_resolved":
            raise AttributeError(name)
        return getattr(self._resolved, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)
