"""`ResolvedConfig`: a config with every `"auto"` and every derived value filled, ready for a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, PrivateAttr

from unishard.config.fields import Honoured
from unishard.config.model import Config
from unishard.config.problems import Problem
from unishard.config.schema import known_keys

Origin = Literal["default", "file", "dict", "auto", "derived", "override", "launcher"]
DtypeName = Literal["fp32", "bf16", "fp16"]


class Row(NamedTuple):
    """One line of the resolved config."""

    key: str
    value: Any
    origin: str


class ResolvedConfig(Config):
    """What the engine reads. Frozen; sections and keys as in `Config`, plus the values below.

    `dp_world_size` ranks share the batch. `compute_dtype` follows from fp16 and bf16, `grad_accum_dtype` from
    data_types; `mesh` is None for one flat dimension. `log_lines` say how translated keys were read.

    >>> from unishard.config import resolve
    >>> resolved = resolve({"train_batch_size": 8, "zero_optimization": {"stage": 2}}, dp_world_size=2)
    >>> resolved.sharding, resolved.train_micro_batch_size_per_gpu, resolved.origin("sharding")
    ('ZERO2', 4, 'derived')
    """

    train_batch_size: int  # pyright: ignore[reportGeneralTypeIssues]
    train_micro_batch_size_per_gpu: int  # pyright: ignore[reportGeneralTypeIssues]
    gradient_accumulation_steps: int  # pyright: ignore[reportGeneralTypeIssues]
    gradient_clipping: float  # pyright: ignore[reportGeneralTypeIssues]
    sharding: str  # pyright: ignore[reportGeneralTypeIssues]
    dp_world_size: int
    compute_dtype: DtypeName
    grad_accum_dtype: DtypeName | None

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _log_lines: tuple[str, ...] = PrivateAttr(())

    def __init__(self, **keys: Any) -> None:
        # Values were validated as given; what is derived from them is no longer the user's mistake.
        BaseModel.__init__(self, **keys)

    @property
    def log_lines(self) -> tuple[str, ...]:
        """One line for each translated key, to be logged once by one rank."""
        return self._log_lines

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Always empty: `resolve` raises when there are any, `check` returns them."""
        return ()

    def origin(self, key: str) -> str:
        """Where the value of a dotted key is from: default, file, dict, auto, derived, override, launcher.

        Raises `KeyError` for a key that does not exist.
        """
        if key in self._origins:
            return self._origins[key]
        if key not in dict(_leaves(self.as_dict())):
            raise KeyError(f"{key}: no such key in the resolved config")
        return "default"

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, infinity spelled "inf", fit for `json.dumps`."""
        return _plain(self.model_dump(warnings=False))

    def as_table(self, *, full: bool = False) -> list[Row]:
        """(key, value, origin) rows in schema order; without `full`, only keys given or acted on."""
        rows = [Row(key, value, self._origins.get(key, "default")) for key, value in _leaves(self.as_dict())]
        return [row for row in rows if full or row.origin != "default" or _acted_on(row.key)]


def _acted_on(path: str) -> bool:
    below = (key for name, key in known_keys().items() if name == path or name.startswith(f"{path}."))
    key = next(below, None)
    return key is None or isinstance(key.treatment, Honoured)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
