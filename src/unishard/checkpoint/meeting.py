"""How ranks learn whether all of them succeeded: by a collective, or from background threads through the store."""

from __future__ import annotations

import pickle
import time
from typing import Any, Protocol

import torch.distributed as dist

from unishard.dist.collectives import SOLO, Communicator, communicator
from unishard.errors import CheckpointError, RankError


class Meeting(Protocol):
    """All ranks call the same methods in the same order."""

    rank: int
    size: int

    def meet(self, what: str, failure: Exception | None = None, value: Any = None) -> list[Any]:
        """Every rank's `value`, in rank order. If one brings a `failure` all raise: it its own, others `RankError`."""
        ...


def _judge(what: str, rank: int, failure: Exception | None, found: list[tuple[str | None, Any]]) -> list[Any]:
    if failure is not None:
        raise failure
    for other, (cause, _) in enumerate(found):
        if cause is not None:
            raise RankError(f"{what}: rank {other} failed: {cause}")
    return [value for _, value in found]


def _said(failure: Exception | None) -> str | None:
    return None if failure is None else f"{type(failure).__name__}: {failure}"


class GroupMeeting:
    """By a collective, on the main thread."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size

    def meet(self, what: str, failure: Exception | None = None, value: Any = None) -> list[Any]:
        found = self._comm.all_gather_object((_said(failure), value))
        return _judge(what, self.rank, failure, found)


class StoreMeeting:
    """Through the process group's key-value store, from any thread: collectives belong to the main one.

    Raises `CheckpointError` for ranks that do not come within `patience` seconds.
    """

    def __init__(self, name: str, patience: float = 1800.0) -> None:
        self.rank, self.size = 0, 1
        self._store: Any = None
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            default = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore(f"unishard/checkpoint/{name}", default)
        self._patience = patience

    def meet(self, what: str, failure: Exception | None = None, value: Any = None) -> list[Any]:
        if self.size == 1:
            return _judge(what, self.rank, failure, [(_said(failure), value)])
        self._store.set(f"{what}/{self.rank}", pickle.dumps((_said(failure), value)))
        found = [pickle.loads(self._get(what, rank)) for rank in range(self.size)]
        return _judge(what, self.rank, failure, found)

    def _get(self, what: str, rank: int) -> bytes:
        key, deadline = f"{what}/{rank}", time.monotonic() + self._patience
        # Asked again and again: a blocking wait would hold the store against the main thread.
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                raise CheckpointError(f"{what}: rank {rank} did not finish within {self._patience:.0f} s")
            time.sleep(0.01)
        return self._store.get(key)


def world() -> Communicator:
    """All ranks, or just this process where there is no process group."""
    return communicator(dist.group.WORLD) if dist.is_initialized() else SOLO
