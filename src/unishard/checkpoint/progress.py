"""A progress bar on standard error, for saves, loads and conversions that take longer than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

AFTER = 1.0
"""Seconds before a bar appears."""


class _Bar:
    """Counts bytes; shows itself once it has lasted a while and if someone is looking."""

    def __init__(self, what: str, total: int, after: float) -> None:
        self._what, self._total, self._done = what, total, 0
        self._due = time.monotonic() + after
        self._shown: Any = None
        self._task: Any = None

    def __call__(self, done: int) -> None:
        self._done += done
        if self._shown is None and time.monotonic() >= self._due:
            self._show()
        if self._shown is not None:
            self._shown.update(self._task, completed=self._done)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._shown = Progress(*columns, console=Console(stderr=True), transient=True)
        self._shown.start()
        self._task = self._shown.add_task(self._what, total=self._total)

    def stop(self) -> None:
        if self._shown is not None:
            self._shown.stop()


@contextmanager
def bar(what: str, total: int, *, show: bool = True, after: float = AFTER) -> Iterator[Callable[[int], None]]:
    """What to tell of each number of bytes that are done; a bar after `after` seconds, on a terminal.

    >>> with bar("reading", 100, show=False) as progress:
    ...     progress(100)
    """
    if not (show and sys.stderr.isatty()):
        yield lambda done: None
        return
    shown = _Bar(what, total, after)
    try:
        yield shown
    finally:
        shown.stop()
