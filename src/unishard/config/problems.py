"""What is wrong with a config: one `Problem` a finding, all of them in one error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from unishard.config.fields import AUTO, Section
from unishard.config.schema import section_at, suggestion
from unishard.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)

_EXPECTED = {
    "int_type": "an integer",
    "bool_type": "true or false",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
}


@dataclass(frozen=True)
class Problem:
    """One finding: the dotted key, a message with value and remedy, and the check or table row behind it."""

    key: str
    message: str
    rule: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


def config_error(problems: Iterable[Problem], source: str = "the config") -> ConfigError:
    """One error that lists every problem."""
    lines = [str(problem) for problem in problems]
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError("\n".join([f"{len(lines)} problems in {source}:", *(f"  - {line}" for line in lines)]))


def shown(value: Any) -> str:
    """A value as a config file spells it."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return repr(value)


def problems_of(error: ValidationError, model: type[Section], prefix: str = "") -> list[Problem]:
    """Problems for every finding of pydantic, in unishard's words; `prefix` is the dotted path of `model`."""
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        path = prefix + ".".join(str(part) for part in _real(detail, model))
        # A union reports once a member: the first says enough.
        found.setdefault(path, _problem(path, detail, model, prefix))
    return list(found.values())


def _real(detail: Mapping[str, Any], model: type[Section]) -> tuple[Any, ...]:
    """The location of an error without the names of union members, which are no keys, nor places in a list."""
    loc: tuple[Any, ...] = detail["loc"]
    for depth in range(1, len(loc)):
        if section_at(model, loc[:depth]) is None:
            return loc[:depth]
    return loc


def _problem(path: str, detail: Mapping[str, Any], model: type[Section], prefix: str) -> Problem:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        *parents, key = detail["loc"]
        section = section_at(model, parents) or model
        where = prefix + "".join(f"{part}." for part in parents)
        return Problem(path, f"unknown key; {suggestion(str(key), section, where)}", "unknown-key")
    if kind == "missing":
        if isinstance(detail["loc"][-1], int):
            return Problem(path, "has too few values; add the missing ones", "value")
        return Problem(path, "is required; add it", "missing")
    if isinstance(value, str) and value == AUTO:
        return Problem(
            path, '"auto" is not possible here; give a value, or remove the key for its default', "auto"
        )
    if kind in _EXPECTED:
        return Problem(
            path, f"expected {_EXPECTED[kind]}, got {shown(value)}{_unquoted(kind, value)}", "type"
        )
    if kind == "literal_error":
        return Problem(path, f"expected {context['expected']}, got {shown(value)}", "value")
    bounds = {"greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt")}
    bounds |= {"less_than_equal": ("at most", "le"), "less_than": ("less than", "lt")}
    if kind in bounds:
        words, bound = bounds[kind]
        return Problem(path, f"must be {words} {context[bound]:g}, got {shown(value)}", "value")
    return Problem(path, str(detail["msg"]), "value")


def _unquoted(kind: str, value: Any) -> str:
    if not isinstance(value, str) or kind not in ("int_type", "float_type", "bool_type"):
        return "; remove the key for its default" if value is None else ""
    return " (a string); write it without quotes"


def parse(
    model: type[SectionT], raw: Mapping[str, Any], prefix: str = ""
) -> tuple[SectionT | None, list[Problem]]:
    """Validate `raw` as `model`: what is left once wrong values are dropped, and every problem.

    None when a required key is missing or wrong.
    """
    tree, problems = deepcopy(dict(raw)), []
    while True:
        section = model.__new__(model)
        try:
            BaseModel.__init__(section, **tree)
        except ValidationError as error:
            known = {problem.key for problem in problems}
            problems += [problem for problem in problems_of(error, model, prefix) if problem.key not in known]
            locs = [_real(detail, model) for detail in error.errors(include_url=False)]
            dropped = [_drop(tree, loc) for loc in locs]
            if not any(dropped):
                return None, problems
        else:
            return section, problems


def _drop(tree: dict[str, Any], loc: tuple[Any, ...]) -> bool:
    """Remove the value at `loc`, or the innermost object around it that exists. False if nothing does."""
    holders: list[tuple[dict[str, Any], Any]] = []
    node: Any = tree
    for part in loc:
        if not isinstance(node, dict):
            break
        holders.append((node, part))
        node = node.get(part)
    for holder, part in reversed(holders):
        if part in holder:
            del holder[part]
            return True
    return False
