"""What this process sent, counted where it is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Bytes this rank sent, by operation, and how often each operation ran.

    `data` holds parameters and gradients, `control` flags, norms and start-up broadcasts. What peers on the same host
    read in place counts as sent.
    """

    data: Counter[str] = field(default_factory=Counter)
    control: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def add(self, op: str, sent: int, control: bool) -> None:
        (self.control if control else self.data)[op] += sent
        self.calls[op] += 1

    @property
    def data_bytes(self) -> int:
        return sum(self.data.values())


_recorders: list[Traffic] = []


@contextmanager
def record_traffic() -> Iterator[Traffic]:
    """Count what this process sends inside the block.

    >>> with record_traffic() as traffic:
    ...     pass
    >>> traffic.data_bytes
    0
    """
    traffic = Traffic()
    _recorders.append(traffic)
    try:
        yield traffic
    finally:
        _recorders.remove(traffic)


def count(op: str, sent: int, control: bool = False) -> None:
    """Note `sent` bytes of one operation in every open recorder."""
    for recorder in _recorders:
        recorder.add(op, sent, control)
