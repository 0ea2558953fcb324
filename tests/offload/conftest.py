from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread: small operations on busy cores wait longest for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def logger_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import linter, which another test runs, disables every logger that exists."""
    monkeypatch.setattr(logging.getLogger("unishard"), "disabled", False)
