from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from unishard.checkpointing import get_cuda_rng_tracker, settings


@pytest.fixture(autouse=True)
def fresh_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing configured before, and nothing after; one torch thread."""
    monkeypatch.setattr(settings, "_current", None)
    get_cuda_rng_tracker().reset()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    get_cuda_rng_tracker().reset()
