"""Settle `optimizer` and `scheduler`: their types, and parameters checked against the type."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from unishard.config.autos import fill_autos, no_value
from unishard.config.draft import Draft
from unishard.config.fields import AUTO, Honoured, Section
from unishard.config.optimizer import OPTIMIZERS, QUIET, TORCH_OPTIMIZERS, UNAVAILABLE_OPTIMIZERS
from unishard.config.problems import Problem, parse
from unishard.config.scheduler import SCHEDULES, TORCH_SCHEDULES
from unishard.config.schema import treatment_of
from unishard.config.translate import treat

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def resolve_optimizer(draft: Draft) -> None:
    """Put the canonical type and the full parameters of the optimizer, or a problem, into `draft`."""
    if draft.get("optimizer") is None:
        return
    given: str = draft.get("optimizer.type")
    bare = given.removeprefix("torch.optim.")
    if refused := _any_case(bare, UNAVAILABLE_OPTIMIZERS):
        entry = UNAVAILABLE_OPTIMIZERS[refused]
        return draft.problem("optimizer.type", f'"{given}" {entry.reason}; use {entry.instead}', "refused")
    name = _any_case(given, OPTIMIZERS)
    if name is None:
        if given in TORCH_OPTIMIZERS:
            given = _of_torch(draft, "optimizer", f"torch.optim.{given}")
        return _imported(draft, "optimizer", given, [*OPTIMIZERS, *TORCH_OPTIMIZERS], "torch.optim.NAdam")
    params = _checked(draft, "optimizer", OPTIMIZERS[name])
    decoupled = name == "AdamW" or (name == "Adam" and params.get("adam_w_mode", True))
    if decoupled and draft.given("optimizer.params.torch_adam") is True and not _gave(draft, "weight_decay"):
        draft.set("optimizer.params.weight_decay", 0.01, "derived")
    if name == "Adam" and decoupled:
        params.pop("adam_w_mode", None)
        draft.lines.append(
            f'optimizer.type = "{given}": means AdamW, as in DeepSpeed, because adam_w_mode is true; write '
            '"AdamW", or set adam_w_mode to false for decay added to the gradient'
        )
        name = "AdamW"
    if name != given:
        draft.set("optimizer.type", name, "derived")


def resolve_scheduler(draft: Draft) -> None:
    """Put the canonical type and the full parameters of the schedule, or a problem, into `draft`."""
    if draft.get("scheduler") is None:
        return
    given: str = draft.get("scheduler.type")
    name = _any_case(given, SCHEDULES)
    if name is None:
        if given in TORCH_SCHEDULES:
            given = _of_torch(draft, "scheduler", f"torch.optim.lr_scheduler.{given}")
        names = [*SCHEDULES, *TORCH_SCHEDULES]
        return _imported(draft, "scheduler", given, names, "torch.optim.lr_scheduler.StepLR")
    _checked(draft, "scheduler", SCHEDULES[name])
    if name != given:
        draft.set("scheduler.type", name, "derived")
    rate = draft.get("optimizer.params.lr")
    if name == "WarmupLR" and draft.get("scheduler.params.warmup_max_lr") is None and rate is not None:
        draft.set("scheduler.params.warmup_max_lr", rate, "derived")


def _of_torch(draft: Draft, section: str, path: str) -> str:
    """Complete the name of one of torch's own classes, and say so."""
    draft.lines.append(f'{section}.type = "{draft.get(f"{section}.type")}": read as {path}')
    draft.set(f"{section}.type", path, "derived")
    return path


def _gave(draft: Draft, param: str) -> bool:
    return draft.given(f"optimizer.params.{param}") not in (None, AUTO)


def _any_case(given: str, names: Iterable[str]) -> str | None:
    return next((name for name in names if name.lower() == given.lower()), None)


def _checked(draft: Draft, section: str, model: type[Section]) -> dict[str, Any]:
    """Check the parameters of a type built here, and replace them by all that it takes, defaults included."""
    prefix = f"{section}.params."
    given: Mapping[str, Any] = draft.get(f"{section}.params")
    params, problems = parse(model, given, prefix)
    draft.problems += problems
    if params is None:
        return {}
    for finding in treat(params, prefix):
        if isinstance(finding, Problem):
            draft.problems.append(finding)
        else:
            draft.lines.append(finding)
    full = {
        name: getattr(params, name)
        for name, field in model.model_fields.items()
        if isinstance(treatment_of(field), Honoured)
        and not (name in QUIET and getattr(params, name) == field.default)
    }
    draft.values[section]["params"] = full
    fill_autos(draft, model, prefix, None)
    return full


def _imported(draft: Draft, section: str, given: str, names: list[str], example: str) -> None:
    """Accept an import path with parameters of its own; its class is looked up when it is built."""
    if not _IMPORT_PATH.fullmatch(given):
        near = get_close_matches(given.lower(), [name.lower() for name in names], n=1, cutoff=0.5)
        meant = next((name for name in names if near and name.lower() == near[0]), None)
        hint = f"did you mean '{meant}'? Otherwise " if meant else ""
        draft.problem(
            f"{section}.type",
            f'unknown type "{given}"; {hint}use one of {", ".join(names)}, or an import path like {example}',
            "unknown-type",
        )
        return
    params: dict[str, Any] = draft.get(f"{section}.params")
    for key in [key for key, value in params.items() if value == AUTO]:
        if section == "optimizer" and key != "lr":
            # The class's own default is the documented one.
            del params[key]
            draft.origins.pop(f"{section}.params.{key}", None)
        else:
            no_value(draft, f"{section}.params.{key}")
