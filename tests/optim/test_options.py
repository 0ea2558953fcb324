"""Options are checked against what accepts them, all problems in one message."""

from __future__ import annotations

from typing import Any

import pytest

from unishard.errors import ConfigError
from unishard.optim.options import checked_options, import_class, suggest


def target(
    params: Any, size: int, lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.99), mode: str = "a"
) -> None:
    pass


def test_all_problems_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        checked_options("thing", target, {"lr": "1e-4", "beta": 1, "params": []})
    message = str(caught.value)
    for fragment in (
        "thing: ",
        "'size' is required",
        "'lr' is the string",
        "Did you mean 'betas'?",
        "'params'",
    ):
        assert fragment in message


def test_values_are_passed_as_declared() -> None:
    assert checked_options("thing", target, {"size": 1, "betas": [0, 0.5], "mode": "b"}) == {
        "size": 1,
        "betas": (0.0, 0.5),
        "mode": "b",
    }


def test_open_ended_targets_take_anything() -> None:
    assert checked_options("thing", lambda **options: None, {"x": 1}) == {"x": 1}


def test_strings_for_flags_are_refused() -> None:
    def flagged(on: bool = False) -> None:
        pass

    with pytest.raises(ConfigError, match="'on' is the string 'true'; a string is not accepted"):
        checked_options("thing", flagged, {"on": "true"})


def test_suggestions_ignore_case_and_give_up_on_nonsense() -> None:
    assert suggest("ADAMV", ["AdamW", "SGD"]) == " Did you mean 'AdamW'?"
    assert suggest("qqq", ["AdamW", "SGD"]) == ""


@pytest.mark.parametrize("path", [".Class", "math.pi", "no.such.Thing"])
def test_bad_paths(path: str) -> None:
    with pytest.raises(ConfigError, match=f"thing '{path}'"):
        import_class("thing", path)
