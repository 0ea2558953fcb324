"""All contestants, and choosing among them by name, family or pattern."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

from unishard.bench import ours, peers
from unishard.bench.contestant import Contestant
from unishard.bench.plan import Plan
from unishard.errors import ConfigError

FIRST = ("plain", "ddp", "ddp-bf16-wire", "torch-zero1")
"""What others are compared with comes first in every table."""


@cache
def contestants() -> tuple[Contestant, ...]:
    """Every contestant: each file of `unishard.bench.peers` and unishard's own rows.

    >>> [c.name for c in contestants()][:2]
    ['plain', 'ddp']
    """
    modules = [
        importlib.import_module(f"{peers.__name__}.{m.name}") for m in pkgutil.iter_modules(peers.__path__)
    ]
    found = [row for module in [*modules, ours] for row in module.CONTESTANTS]
    found.sort(key=lambda c: FIRST.index(c.name) if c.name in FIRST else len(FIRST))
    return tuple(found)


class Chosen(NamedTuple):
    """Who takes part, and why each of the others that were asked for does not."""

    contestants: tuple[Contestant, ...]
    left_out: dict[str, str]


def choose(
    plan: Plan,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    among: Iterable[Contestant] | None = None,
) -> Chosen:
    """The contestants that match any of `only` (default: all) and none of `without`, in table order.

    A pattern is a name, a family (`deepspeed-2` stands for its settings) or has wildcards. Those that a pattern with
    wildcards (or the default) picks and that do not fit the plan are left out with the reason.

    Raises:
        ConfigError: an unknown name, with the closest known ones; a contestant named in full that does not fit the
            plan; a contestant whose library is not installed.

    >>> [c.name for c in choose(Plan(), ["ddp", "fsdp2-*"]).contestants]
    ['ddp', 'fsdp2-gradop', 'fsdp2-full']
    """
    everyone = tuple(contestants() if among is None else among)
    excluded = {c.name for pattern in without for c in _matching(pattern, everyone)}
    asked = [c for pattern in only for c in _matching(pattern, everyone)] if only else everyone
    named = {pattern.strip() for pattern in only}
    picked, left_out, missing = [], {}, []
    for contestant in everyone:
        if contestant not in asked or contestant.name in excluded:
            continue
        if (reason := contestant.unfit(plan)) is not None:
            if contestant.name in named:
                raise ConfigError(
                    f"{contestant.name}: {reason}; this run has {plan.ranks} ranks and {plan.dtype}"
                )
            left_out[contestant.name] = reason
        elif (reason := contestant.missing()) is not None:
            missing.append(reason)
        else:
            picked.append(contestant)
    if missing:
        raise ConfigError("\n".join(missing))
    if not picked:
        raise ConfigError("no contestant is left: everything that --contestants chose is left out again")
    return Chosen(tuple(picked), left_out)


def _matching(pattern: str, everyone: Sequence[Contestant]) -> list[Contestant]:
    pattern = pattern.strip()
    found = [c for c in everyone if fnmatchcase(c.name, pattern) or c.family == pattern]
    if found:
        return found
    known = list(dict.fromkeys([c.name for c in everyone] + [c.family for c in everyone]))
    near = get_close_matches(pattern, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`unishard bench --list` shows all"
    raise ConfigError(f"no contestant {pattern!r}; {hint}")
