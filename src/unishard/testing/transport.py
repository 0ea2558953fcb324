"""The transport that ranks on several hosts have, on one host: for tests of what only sockets do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from unishard.dist.collectives import known_communicators
from unishard.dist.memory_window import SWITCH


@contextmanager
def through_sockets() -> Iterator[None]:
    """Send everything through sockets inside the block, as between hosts. All ranks enter together.

    What is sharded inside must be done with by the end.
    """
    before = os.environ.get(SWITCH)
    known = {comm: comm.__dict__.get("window") for comm in known_communicators()}
    os.environ[SWITCH] = "sockets"
    for comm in known:
        comm.__dict__["window"] = None
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before
        for comm in known_communicators():
            comm.__dict__.pop("window", None)
            if known.get(comm) is not None:
                comm.__dict__["window"] = known[comm]
