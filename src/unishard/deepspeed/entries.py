"""What one public name of DeepSpeed is here: where it lives, and how far it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Status: TypeAlias = Literal["supported", "partial", "absent"]

PARTS = "unishard.deepspeed.parts."


@dataclass(frozen=True)
class Entry:
    """One name of one module.

    `home` is `module:attribute` of what it stands for (`module` alone for a module); a name without a home is a
    refusing stub. `constant` is a plain value. `note` says what is missing, or what to use instead.
    """

    home: str | None = None
    status: Status = "supported"
    note: str = ""
    constant: Any = None

    @property
    def is_constant(self) -> bool:
        return self.home is None and self.status == "supported"


Names: TypeAlias = Mapping[str, Entry]


def part(module: str, *names: str, note: str = "", **renamed: str) -> dict[str, Entry]:
    """Names that live in `unishard.deepspeed.parts.<module>`; keywords map public names to others there.

    `note` says what is missing, which makes them partial.
    """
    return elsewhere(PARTS + module, *names, note=note, **renamed)


def elsewhere(module: str, *names: str, note: str = "", **renamed: str) -> dict[str, Entry]:
    """Names that live in `module`, under the same names or (keywords) under others."""
    pairs = {**{name: name for name in names}, **renamed}
    status: Status = "partial" if note else "supported"
    return {public: Entry(f"{module}:{own}", status, note) for public, own in pairs.items()}


def absent(note: str, *names: str) -> dict[str, Entry]:
    """Names that exist and raise at first use; `note` says why, and what to use instead."""
    return {name: Entry(None, "absent", note) for name in names}


def constants(**values: Any) -> dict[str, Entry]:
    """Plain values."""
    return {name: Entry(constant=value) for name, value in values.items()}


def spelled(*names: str) -> dict[str, Entry]:
    """String constants whose value is their own name in lower case, as most of DeepSpeed's are.

    >>> spelled("PARAM_SHAPES")["PARAM_SHAPES"].constant
    'param_shapes'
    """
    return constants(**{name: name.lower() for name in names})


def module(target: str) -> Entry:
    """A name that is another module of this namespace, by its path below `deepspeed`."""
    return Entry(f"unishard.deepspeed.{target}" if target else "unishard.deepspeed")
