"""Updating state that does not fit in memory: group by group, the disk busy before and behind the update.

    reads    |  1  |  2  |  3  |  4  |
    update         |  1  |  2  |  3  |  4  |
    writes               |  1  |  2  |  3  |  4  |

A group's buffers serve its read, its update and its write; three sets keep all three stages busy. What rests in memory
already (`Tier.resident`) is updated where it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from unishard.errors import OffloadError
from unishard.offload.aligned import aligned_empty, carve, carved_size
from unishard.sharding.ports import Ticket, Tier

Update = Callable[[int, list[torch.Tensor]], None]
"""Called with a group's number and its tensors in the order of its members, to change them in place."""


@dataclass(frozen=True)
class Swapped:
    """One member of a group: a key of a tier, what of it is needed before the update and kept after it."""

    tier: Tier
    key: str
    reads: bool = True
    """Without, the update finds anything in the buffer: for what it only produces."""
    writes: bool = True
    """Without, what the update leaves in the buffer is forgotten: for what it only uses."""


@dataclass
class StepTimes:
    """Seconds of one run: in the update, and waiting for reads and writes that it did not hide."""

    updating: float = 0.0
    reading: float = 0.0
    writing: float = 0.0


@dataclass
class _Flight:
    """A group in one set of buffers."""

    index: int
    buffer: torch.Tensor
    tensors: list[torch.Tensor]
    tickets: list[tuple[Tier, Ticket]]

    def done(self) -> bool:
        return all(ticket.done() for _, ticket in self.tickets)

    def wait(self) -> None:
        while self.tickets:
            tier, ticket = self.tickets[0]
            tier.wait(ticket)
            self.tickets.pop(0)

    def abandon(self) -> None:
        """Wait without asking how it ended: the memory is needed, or another error is on its way."""
        for tier, ticket in self.tickets:
            with suppress(OffloadError):
                tier.wait(ticket)
        self.tickets = []


class SwappedStep:
    """Runs an update over groups of swapped state, as often as one likes, in the same buffers.

    Args:
        groups: what is in memory together, in the order of the update. Every key appears once.
        buffer_count: sets of buffers, each as large as the largest group. 1 overlaps nothing; 2 overlap reads with
            writes; 3 keep reads, update and writes all busy; more read further ahead.
        overlap_reads: whether the next group is read during the update (`pipeline_read`).
        overlap_writes: whether the update goes on while the previous group is written (`pipeline_write`).

    >>> from unishard.offload.cpu import CpuTier
    >>> tier = CpuTier()
    >>> tier.put("a", torch.zeros(2)), tier.put("b", torch.ones(2))
    (None, None)
    >>> step = SwappedStep([[Swapped(tier, "a")], [Swapped(tier, "b")]])
    >>> _ = step.run(lambda index, tensors: tensors[0].add_(10))
    >>> tier.resident("a"), tier.resident("b")
    (tensor([10., 10.]), tensor([11., 11.]))
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Swapped]],
        *,
        buffer_count: int = 3,
        overlap_reads: bool = True,
        overlap_writes: bool = True,
    ) -> None:
        if buffer_count < 1:
            raise OffloadError(
                f"buffer_count={buffer_count}: a swapped step needs at least one set of buffers"
            )
        keys = [(id(member.tier), member.key) for group in groups for member in group]
        if len(set(keys)) != len(keys):
            twice = sorted({key for tier, key in keys if keys.count((tier, key)) > 1})
            raise OffloadError(f"{twice} are in several groups of one swapped step; each key may be in one")
        self._groups = [list(group) for group in groups]
        self._count = min(buffer_count, max(len(groups), 1))
        self._overlap_reads, self._overlap_writes = overlap_reads, overlap_writes
        self._free: list[torch.Tensor] = []
        self._made = 0
        self._size = -1

    @property
    def buffer_bytes(self) -> int:
        """Bytes of buffers held between runs: at most `buffer_count` times the largest group's."""
        return sum(buffer.numel() for buffer in self._free)

    def run(self, update: Update) -> StepTimes:
        """Update every group, in order. On return everything is stored.

        An error of any stage is raised here once nothing is under way any more. Groups before the one it met are stored
        with their new values; those after it have their old ones, as has a swapped group whose update raised.
        """
        self._fit_buffers()
        times = StepTimes()
        reading: deque[_Flight] = deque()
        writing: deque[_Flight] = deque()
        current: _Flight | None = None
        upcoming = 0
        try:
            for index in range(len(self._groups)):
                if not reading:
                    self._start_reading(index, reading, writing, times)
                    upcoming = index + 1
                current = reading.popleft()
                _timed(times, "reading", current.wait)
                while self._overlap_reads and upcoming < len(self._groups) and self._has_free(writing):
                    self._start_reading(upcoming, reading, writing, times)
                    upcoming += 1
                started = time.perf_counter()
                update(index, current.tensors)
                times.updating += time.perf_counter() - started
                self._start_writing(current)
                writing.append(current)
                current = None
                if not self._overlap_writes:
                    self._reclaim(writing, times)
            while writing:
                self._reclaim(writing, times)
        finally:
            for flight in (*reading, *writing, *([current] if current else [])):
                flight.abandon()
                self._free.append(flight.buffer)
        return times

    def release(self) -> None:
        """Give the buffers back to the system until the next run."""
        self._free.clear()
        self._made, self._size = 0, -1

    def _fit_buffers(self) -> None:
        size = max((carved_size(self._specs(group)) for group in self._groups), default=0)
        if size > self._size:
            self.release()
            self._size = size

    def _specs(self, group: Sequence[Swapped]) -> list[tuple[int, torch.dtype]]:
        return [member.tier.spec(member.key) for member in group if member.tier.resident(member.key) is None]

    def _has_free(self, writing: deque[_Flight]) -> bool:
        return bool(self._free) or self._made < self._count or bool(writing and writing[0].done())

    def _buffer(self, writing: deque[_Flight], times: StepTimes) -> torch.Tensor:
        if not self._free and self._made < self._count:
            self._made += 1
            return aligned_empty(self._size, torch.uint8)
        if not self._free:
            self._reclaim(writing, times)
        return self._free.pop()

    def _reclaim(self, writing: deque[_Flight], times: StepTimes) -> None:
        _timed(times, "writing", writing[0].wait)
        self._free.append(writing.popleft().buffer)

    def _start_reading(
        self, index: int, reading: deque[_Flight], writing: deque[_Flight], times: StepTimes
    ) -> None:
        group = self._groups[index]
        flight = _Flight(index, self._buffer(writing, times), [], [])
        reading.append(flight)  # first, so that an error below finds what was started
        views = iter(carve(flight.buffer, self._specs(group)))
        for member in group:
            resting = member.tier.resident(member.key)
            flight.tensors.append(next(views) if resting is None else resting)
            if resting is None and member.reads:
                flight.tickets.append((member.tier, member.tier.fetch(member.key, flight.tensors[-1])))

    def _start_writing(self, flight: _Flight) -> None:
        for member, tensor in zip(self._groups[flight.index], flight.tensors, strict=True):
            if member.writes and member.tier.resident(member.key) is None:
                flight.tickets.append((member.tier, member.tier.store(member.key, tensor)))


def _timed(times: StepTimes, stage: str, wait: Callable[[], None]) -> None:
    started = time.perf_counter()
    try:
        wait()
    finally:
        setattr(times, stage, getattr(times, stage) + time.perf_counter() - started)
