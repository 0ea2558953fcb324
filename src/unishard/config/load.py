"""Read a config from a file, a mapping or a string, without interpreting it."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from unishard.config.model import Config
from unishard.config.problems import Problem, config_error, parse
from unishard.errors import ConfigError

Source = str | PathLike[str] | Mapping[str, Any] | Config


@dataclass(frozen=True)
class Raw:
    """Keys as given, where they are from, and what old spellings stood for."""

    tree: dict[str, Any]
    source: str
    origin: str
    lines: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = field(default=())


def load_config(source: Source) -> Config:
    """A `Config` from a JSON file, a mapping, or a base64 string of JSON; a `Config` is returned as it is.

    Raises `ConfigError` for a missing file, broken JSON (naming line and column), repeated or unknown keys,
    and values of the wrong type.

    >>> load_config({"train_batch_size": 8}).train_batch_size
    8
    """
    if isinstance(source, Config):
        return source
    raw = read(source)
    config, problems = parse(Config, raw.tree)
    problems = [*raw.problems, *problems]
    if problems or config is None:
        raise config_error(problems, raw.source)
    config._source = raw.origin
    config._lines = raw.lines
    return config


def read(source: Source) -> Raw:
    """The keys of `source` as given, old spellings replaced. Raises `ConfigError` when it cannot be read."""
    if isinstance(source, Config):
        given = source.model_dump(exclude_unset=True, warnings=False, include=set(Config.model_fields))
        return Raw(given, "the config", source._source, source._lines)
    if isinstance(source, Mapping):
        return _modern(_plain(source), "the config", "dict")
    name = os.fspath(source)
    if os.path.isfile(name):
        return _modern(_loads(Path(name).read_text(encoding="utf-8"), name), name, "file")
    if isinstance(source, str) and (decoded := _base64(source)) is not None:
        return _modern(_loads(decoded, "the base64 config"), "the base64 config", "file")
    raise ConfigError(
        f"config {name!r}: no such file in {os.getcwd()}, and no base64 of a JSON object; pass an existing "
        "path or a dict"
    )


def _plain(source: Mapping[Any, Any]) -> dict[str, Any]:
    odd = [key for key in source if not isinstance(key, str)]
    if odd:
        raise ConfigError(f"config key {odd[0]!r} is a {type(odd[0]).__name__}; keys are strings")
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in source.items()}


def _base64(text: str) -> str | None:
    try:
        decoded = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True).decode("utf-8")
    except (UnicodeError, binascii.Error):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _loads(text: str, name: str) -> dict[str, Any]:
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        tree = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        hint = " (JSON has no comments)" if line.startswith(("//", "#", "/*")) else ""
        raise ConfigError(
            f"{name}:{error.lineno}:{error.colno}: not JSON: {error.msg}{hint}; the line is {line!r}"
        ) from error
    if repeated:
        places = "; ".join(f"'{key}' (lines {_lines_with(text, key)})" for key in repeated)
        raise ConfigError(f"{name}: keys given more than once in one object: {places}; keep one of each")
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: a config is an object of keys, not a {type(tree).__name__}")
    return tree


def _lines_with(text: str, key: str) -> str:
    quoted = json.dumps(key, ensure_ascii=False)
    return ", ".join(str(number) for number, line in enumerate(text.splitlines(), 1) if quoted in line)


def _modern(tree: dict[str, Any], source: str, origin: str) -> Raw:
    """Replace the two old spellings that change the shape of the tree."""
    lines, problems = [], []
    if "bfloat16" in tree:
        old = tree.pop("bfloat16")
        if "bf16" in tree:
            problems.append(
                Problem("bfloat16", "is an old name of 'bf16', which is given too; keep 'bf16'", "renamed")
            )
        else:
            tree["bf16"] = old
            lines.append("bfloat16: an old name of bf16; read as bf16")
    if isinstance(tree.get("zero_optimization"), bool):
        stage = int(tree["zero_optimization"])
        lines.append(f"zero_optimization = {str(bool(stage)).lower()}: an old form; read as stage {stage}")
        tree["zero_optimization"] = {"stage": stage}
    return Raw(tree, source, origin, tuple(lines), tuple(problems))
