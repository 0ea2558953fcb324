"""A bar appears for what takes longer, and only where someone looks."""

from __future__ import annotations

import io
import sys

import pytest

from unishard.checkpoint.progress import bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "show", "after", "seen"),
    [
        (Terminal, True, 0.0, True),
        (Terminal, True, 60.0, False),
        (Terminal, False, 0.0, False),
        (io.StringIO, True, 0.0, False),
    ],
)
def test_bar(
    stream: type[io.StringIO], show: bool, after: float, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream())
    with bar("saving global_step7", 100, show=show, after=after) as progress:
        progress(60)
        progress(40)
    assert ("saving global_step7" in sys.stderr.getvalue()) == seen  # pyright: ignore[reportAttributeAccessIssue]
