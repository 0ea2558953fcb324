"""Fill values left to `"auto"`."""

from __future__ import annotations

from typing import Any

from unishard.config.draft import Draft
from unishard.config.fields import AUTO, Auto, Section, marker
from unishard.config.schema import section_type


def fill_autos(draft: Draft, model: type[Section], prefix: str, hidden_size: int | None) -> None:
    """Replace each `"auto"` below `prefix` by what its field says, or record which value is missing.

    Sizes of the batch become None, for the triad to fill. `hidden_size` is the model's width, in elements.
    """
    for name, field in model.model_fields.items():
        path, inner = f"{prefix}{name}", section_type(field)
        if inner is not None:
            fill_autos(draft, inner, f"{path}.", hidden_size)
        elif draft.get(path) == AUTO and (auto := marker(field, Auto)) is not None:
            _fill(draft, path, auto, field.default, hidden_size)


def no_value(draft: Draft, path: str) -> None:
    """Record that nothing can fill the `"auto"` at `path`."""
    draft.problem(
        path,
        f'"auto" has nothing to follow here; give a value, or pass overrides={{"{path}": ...}} (--set {path}=...)',
        "auto",
    )
    draft.set(path, None, "auto")


def _fill(draft: Draft, path: str, auto: Auto, default: Any, hidden_size: int | None) -> None:
    rate = draft.get("optimizer.params.lr")
    if auto.fill == "default":
        draft.set(path, default, "auto")
    elif auto.fill == "batch":
        draft.set(path, None, "auto")
    elif auto.fill == "lr" and isinstance(rate, (int, float)):
        draft.set(path, rate, "auto")
    elif auto.fill == "hidden" and hidden_size is not None and auto.formula is not None:
        draft.set(path, auto.formula(hidden_size), "auto")
    elif auto.fill == "hidden":
        draft.problem(
            path,
            '"auto" follows the model\'s hidden size, which is unknown; give a number, or pass hidden_size '
            "(--hidden-size on the command line)",
            "auto",
        )
        draft.set(path, default, "auto")
    else:
        no_value(draft, path)
