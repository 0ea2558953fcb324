from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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


@pytest.fixture(scope="session", autouse=True)
def _deepspeed_leaves_nothing() -> Iterator[None]:
    """Every process of the real DeepSpeed leaves 69 MB of shared memory behind, under a name with its port in it."""
    started = time.time()
    yield
    for left in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):
        if left.stat().st_uid == os.getuid() and left.stat().st_mtime >= started:
            left.unlink(missing_ok=True)


@pytest.fixture
def ranks(rank_pool: RankPool) -> Callable[..., list[Any]]:
    """`ranks(fn, *args, world_size=2, timeout=60, **kwargs)`: the results of `fn` on each rank."""
    return rank_pool.run
