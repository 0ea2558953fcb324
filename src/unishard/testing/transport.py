"""Transports that ranks of a CPU test would not use by themselves: between hosts, and an accelerator's.

`natively_late` stands for a device with streams of its own: a collective does nothing until someone waits for it, and
then reads what its buffers hold by then. A wait that is missing, or a buffer that is reused too early, gives other
numbers than one process. `late_reads` does the same to ranks that read each other's memory.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from unishard.dist import collectives, in_place
from unishard.dist.collectives import Communicator, known_communicators
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


class LateWork:
    """A collective that happens when it is waited for."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run: Callable[[], Any] | None = run

    def wait(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run()


def _late(collective: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        if not async_op:
            return collective(*args, **kwargs)
        return LateWork(lambda: collective(*args, **kwargs))

    return launch


@contextmanager
def natively_late() -> Iterator[None]:
    """Use the backend's own collectives, as on GPUs, each delayed until its `wait()`. All ranks enter together."""
    names = ((collectives, "_all_gather"), (collectives, "_reduce_scatter"), (dist, "all_reduce"))
    patched = [*names, (dist, "all_to_all_single"), (Communicator, "__init__")]
    before = [(owner, name, getattr(owner, name)) for owner, name in patched]
    initialize = Communicator.__init__

    def initialize_native(self: Communicator, group: Any) -> None:
        initialize(self, group)
        self.point_to_point = False

    with through_sockets():
        known = [comm for comm in known_communicators() if comm.point_to_point]
        try:
            for owner, name in patched[:-1]:
                setattr(owner, name, _late(getattr(owner, name)))
            setattr(Communicator, "__init__", initialize_native)  # noqa: B010 - pyright forbids assigning it
            for comm in known:
                comm.point_to_point = False
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)
            for comm in known:
                comm.point_to_point = True


@contextmanager
def late_reads(most: float = 0.004) -> Iterator[None]:
    """Read peers' memory up to `most` seconds later than possible, each rank at other times than its peers."""
    original = in_place.copy_from
    draw = random.Random(dist.get_rank())

    def copy_late(*args: Any) -> None:
        time.sleep(most * draw.random() ** 2)
        original(*args)

    in_place.copy_from = copy_late
    try:
        yield
    finally:
        in_place.copy_from = original
