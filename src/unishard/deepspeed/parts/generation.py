"""Generating with a model under ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unishard.sharding.gather import gather


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[Any]:
    """The module of an engine with whole parameters, for as long as the context lasts. All ranks enter together."""
    module = getattr(model, "module", model)
    with gather(module):
        yield module
