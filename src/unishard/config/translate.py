"""Apply each key's treatment: a log line for what is translated, a problem for what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from unishard.config.fields import AUTO, Auto, Refused, Section, Translated, marker
from unishard.config.problems import Problem, shown
from unishard.config.schema import treatment_of


def treat(section: Section, prefix: str = "") -> Iterator[Problem | str]:
    """One log line (a string) for each translated key, one `Problem` for each refused one, in schema order.

    Keys left out, at their default, or at a value that already describes what happens give nothing.
    """
    for name, field in type(section).model_fields.items():
        if name not in section.model_fields_set:
            continue
        value, path, treatment = getattr(section, name), f"{prefix}{name}", treatment_of(field)
        if isinstance(treatment, Refused):
            if _refuses(treatment, field, value):
                given = "" if isinstance(value, (Section, dict)) else f" (got {shown(value)})"
                yield Problem(path, f"{treatment.reason}{given}; {treatment.instead}", "refused")
        elif isinstance(value, Section):
            yield from treat(value, f"{path}.")
        elif isinstance(treatment, Translated) and not _neutral(treatment, field, value):
            yield f"{path} = {shown(value)}: {treatment.meaning}"


def _refuses(treatment: Refused, field: FieldInfo, value: Any) -> bool:
    if value == AUTO:
        return False
    if treatment.asks is not None:
        return treatment.asks(value)
    return value != field.default and value not in treatment.neutral


def _neutral(treatment: Translated, field: FieldInfo, value: Any) -> bool:
    if value == AUTO:
        auto = marker(field, Auto)
        return auto is not None and auto.fill == "default"
    return value == field.default or value in treatment.neutral
