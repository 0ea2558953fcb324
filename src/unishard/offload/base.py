"""What all tiers share: which keys there are, what may be moved into which tensor, and in which order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from unishard.errors import OffloadError
from unishard.sharding.ports import Ticket


@dataclass(slots=True)
class Entry:
    """One key of a tier."""

    numel: int
    dtype: torch.dtype
    lost: OffloadError | None = None
    """Why what was stored last is not there: the transfer failed half-way."""

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Transfer(ABC):
    """A ticket: one key on its way, in one direction."""

    def __init__(self, key: str, tensor: torch.Tensor, *, writes: bool) -> None:
        self.key, self.tensor, self.writes = key, tensor, writes
        self.ended = False
        self.error: OffloadError | None = None

    @abstractmethod
    def done(self) -> bool: ...

    @abstractmethod
    def finish(self) -> None:
        """Wait for the end. Raises `OffloadError` if it was not a good one. Called once."""


E = TypeVar("E", bound=Entry)


class BaseTier(ABC, Generic[E]):
    """Keys, checks and order; subclasses move bytes. One thread at a time calls a tier's methods."""

    name: str

    def __init__(self) -> None:
        self._entries: dict[str, E] = {}
        self._under_way: dict[str, list[Transfer]] = {}
        self._closed = False

    # what a tier is ----------------------------------------------------------------------------------------

    @abstractmethod
    def _reserve(self, key: str, numel: int, dtype: torch.dtype) -> E: ...

    @abstractmethod
    def _start(self, key: str, entry: E, tensor: torch.Tensor, *, writes: bool) -> Transfer: ...

    @abstractmethod
    def _release(self, key: str, entry: E) -> None: ...

    @abstractmethod
    def _shut(self) -> None: ...

    @abstractmethod
    def _memory(self, entry: E) -> torch.Tensor | None: ...

    # the port ----------------------------------------------------------------------------------------------

    def allocate(self, key: str, numel: int, dtype: torch.dtype) -> None:
        self._require_open(key)
        if key in self._entries:
            raise OffloadError(f"{self.name} tier: {key} is allocated already; discard it first")
        self._entries[key] = self._reserve(key, numel, dtype)

    def spec(self, key: str) -> tuple[int, torch.dtype]:
        entry = self._entry(key)
        return entry.numel, entry.dtype

    def put(self, key: str, tensor: torch.Tensor) -> None:
        if key not in self._entries:
            self.allocate(key, tensor.numel(), tensor.dtype)
        self.wait(self.store(key, tensor))

    def resident(self, key: str) -> torch.Tensor | None:
        entry = self._entry(key)
        self._settle(key, reads_too=True)
        return self._memory(entry)

    def fetch(self, key: str, into: torch.Tensor) -> Ticket:
        return self._begin(key, into, writes=False)

    def store(self, key: str, tensor: torch.Tensor) -> Ticket:
        return self._begin(key, tensor, writes=True)

    def wait(self, ticket: Ticket) -> torch.Tensor:
        if not isinstance(ticket, Transfer):
            raise OffloadError(f"{self.name} tier: {ticket!r} is not a ticket of a tier")
        if not ticket.ended:
            self._end(ticket)
        if ticket.error is not None:
            raise ticket.error
        return ticket.tensor

    def discard(self, key: str) -> None:
        entry = self._entry(key)
        for transfer in list(self._under_way.get(key, ())):
            self._end(transfer)  # an error in it no longer matters
        del self._entries[key]
        self._release(key, entry)

    def keys(self) -> list[str]:
        return list(self._entries)

    def close(self) -> None:
        if self._closed:
            return
        for transfer in [transfer for some in self._under_way.values() for transfer in some]:
            self._end(transfer)
        self._closed = True
        while self._entries:
            self._release(*self._entries.popitem())
        self._shut()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    # order -------------------------------------------------------------------------------------------------

    def _begin(self, key: str, tensor: torch.Tensor, *, writes: bool) -> Transfer:
        entry = self._entry(key)
        fits = tensor.dim() == 1 and tensor.numel() == entry.numel and tensor.dtype == entry.dtype
        if not fits or not tensor.is_contiguous():
            raise OffloadError(
                f"{self.name} tier: {key} holds {entry.numel} elements of {entry.dtype}, and the tensor given for it "
                f"is of shape {tuple(tensor.shape)} and {tensor.dtype}, strides {tensor.stride()}; pass a flat "
                "contiguous one of that length and dtype"
            )
        self._settle(key, reads_too=writes)
        if entry.lost is not None and not writes:
            raise entry.lost
        transfer = self._start(key, entry, tensor, writes=writes)
        self._under_way.setdefault(key, []).append(transfer)
        return transfer

    def _settle(self, key: str, *, reads_too: bool) -> None:
        """Return once what was started on `key` before cannot meet what comes now."""
        for transfer in list(self._under_way.get(key, ())):
            if transfer.writes or reads_too:
                self._end(transfer)

    def _end(self, transfer: Transfer) -> None:
        try:
            transfer.finish()
        except OffloadError as error:
            transfer.error = error
        transfer.ended = True
        remaining = self._under_way[transfer.key]
        remaining.remove(transfer)
        if not remaining:
            del self._under_way[transfer.key]
        if transfer.writes:
            self._entries[transfer.key].lost = transfer.error

    def _entry(self, key: str) -> E:
        self._require_open(key)
        entry = self._entries.get(key)
        if entry is None:
            raise OffloadError(
                f"{self.name} tier: nothing is allocated under {key}; allocate or put it first"
            )
        return entry

    def _require_open(self, key: str) -> None:
        if self._closed:
            raise OffloadError(f"{self.name} tier: {key} was asked for after the tier was closed")
