"""The tree of known keys: what exists where, and the nearest known key to an unknown one."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

from unishard.config.fields import Auto, Honoured, Refused, Section, Translated, Treatment, marker
from unishard.config.optimizer import OPTIMIZERS
from unishard.config.scheduler import SCHEDULES


@dataclass(frozen=True)
class Key:
    """One known leaf key: its dotted path, its field, what is done with it, and whether it takes `"auto"`."""

    path: str
    field: FieldInfo
    treatment: Treatment | None
    auto: Auto | None


def section_type(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds (optional or not), or None for a leaf."""
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def treatment_of(field: FieldInfo) -> Treatment | None:
    """The field's own treatment."""
    return marker(field, (Honoured, Translated, Refused))


def keys(model: type[Section], prefix: str = "", inherited: Treatment | None = None) -> Iterator[Key]:
    """Every leaf key below `model`; keys inside a refused section share its treatment."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        own = inherited if isinstance(inherited, Refused) else treatment_of(field)
        inner = section_type(field)
        if inner is None:
            yield Key(path, field, own, marker(field, Auto))
        else:
            yield from keys(inner, f"{path}.", own)


@cache
def known_keys() -> dict[str, Key]:
    """Every leaf key of the config by dotted path, without the parameters of optimizers and schedules."""
    from unishard.config.model import Config

    return {key.path: key for key in keys(Config)}


def section_at(model: type[Section], path: Sequence[Any]) -> type[Section] | None:
    """The section found by following `path` from `model`, or None if it leads elsewhere."""
    for part in path:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        inner = section_type(field) if field is not None else None
        if inner is None:
            return None
        model = inner
    return model


def suggestion(key: str, model: type[Section], prefix: str = "") -> str:
    """What to write instead of the unknown `key` of section `model`, as the end of a message.

    >>> from unishard.config.zero import ZeroOptimization
    >>> suggestion("stge", ZeroOptimization, "zero_optimization.")
    "did you mean 'stage'?"
    """
    if key.startswith(("_", "//", "#")):
        return "a config has no comments; remove the key, or keep the note in another file"
    bare = key.lower().replace("-", "_")
    elsewhere = _telling()
    if bare in elsewhere and elsewhere[bare] != prefix + key:
        return f"it belongs elsewhere: did you mean '{elsewhere[bare]}'?"
    if near := get_close_matches(bare, model.model_fields, n=1):
        return f"did you mean '{near[0]}'?"
    if near := get_close_matches(bare, elsewhere, n=1, cutoff=0.85):
        return f"did you mean '{elsewhere[near[0]]}'?"
    return f"remove it; known keys here are {_listed(list(model.model_fields))}"


@cache
def _telling() -> dict[str, str]:
    """Paths of usable keys by their last part, where that part tells the section (unlike "enabled")."""
    from unishard.config.model import Config

    leaves = [path for path, key in known_keys().items() if not isinstance(key.treatment, Refused)]
    params = [f"optimizer.params.{name}" for model in OPTIMIZERS.values() for name in model.model_fields]
    params += [f"scheduler.params.{name}" for model in SCHEDULES.values() for name in model.model_fields]
    by_name: dict[str, list[str]] = {}
    for path in dict.fromkeys([*Config.model_fields, *leaves, *params]):
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    return {name: paths[0] for name, paths in by_name.items() if len(paths) <= 2}


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown}, and {len(names) - 12} more"
