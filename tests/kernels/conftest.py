from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from unishard.kernels import table


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread unless a test asks for more: small operations on busy cores wait longest for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets the table choose anew, in the test and after it."""
    # The import linter, which another test runs, disables every logger that exists.
    monkeypatch.setattr(table._log, "disabled", False)
    table._module.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    table._module.cache_clear()
