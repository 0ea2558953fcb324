from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

from unishard.testing import RankPool, shared_pool

hypothesis.settings.register_profile("unishard", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("unishard")


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """The one pool of rank processes of this session."""
    pool = shared_pool()
    yield pool
    pool.close()


@pytest.fixture
def ranks(rank_pool: RankPool) -> Callable[..., list[Any]]:
    """`ranks(fn, *args, world_size=2, timeout=60, **kwargs)`: the results of `fn` on each rank."""
    return rank_pool.run
