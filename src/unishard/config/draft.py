"""A config on its way from given to resolved: values and origins by dotted key, findings so far."""

from __future__ import annotations

import math
from typing import Any

from unishard.config.model import Config
from unishard.config.problems import Problem


class Draft:
    """Mutable working copy, used by `resolve` only. Missing and unresolvable values read as None."""

    def __init__(
        self, config: Config, origins: dict[str, str], world_size: int | None, world_source: str
    ) -> None:
        self.config = config
        self.values: dict[str, Any] = {
            name: value
            for name, value in config.model_dump(warnings=False).items()
            if name in Config.model_fields
        }
        self.origins = origins
        self.world_size = world_size
        self.world_source = world_source
        self.problems: list[Problem] = []
        self.lines: list[str] = []

    def get(self, path: str) -> Any:
        """The value at a dotted key now, or None."""
        node: Any = self.values
        for part in path.split("."):
            if not isinstance(node, dict):
                return None
            node = node.get(part)
        return node

    def given(self, path: str) -> Any:
        """The value the user gave at a dotted key, or None."""
        node: Any = self.config
        for part in path.split("."):
            if isinstance(node, dict):
                node = node.get(part)
            elif node is None or part not in node.model_fields_set:
                return None
            else:
                node = getattr(node, part)
        return node

    def number(self, path: str) -> float:
        """The value at a dotted key if it is a number, else NaN, which compares false with everything."""
        value = self.get(path)
        return float(value) if isinstance(value, (int, float)) else math.nan

    def set(self, path: str, value: Any, origin: str) -> None:
        """Put a value and its origin at a dotted key."""
        *parents, last = path.split(".")
        node = self.values
        for part in parents:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        node[last] = value
        self.origins[path] = origin

    def problem(self, key: str, message: str, rule: str) -> None:
        """Record a finding."""
        self.problems.append(Problem(key, message, rule))

    def bad(self, *keys: str) -> bool:
        """Whether one of these keys already has a problem."""
        return any(
            problem.key == key or problem.key.startswith(f"{key}.")
            for problem in self.problems
            for key in keys
        )
