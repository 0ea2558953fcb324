"""Ratios formed pair by pair within a round, and their spread over rounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

from unishard.bench.results import Entry, Results

ByRound = dict[int, float]
"""Round -> tokens/s."""


class Spread(NamedTuple):
    """Over rounds."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread | None:
    """None for nothing.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, least=1.0, most=3.0)
    """
    return Spread(median(values), min(values), max(values)) if values else None


def by_round(entry: Entry) -> ByRound:
    return {r.index: r.tokens_per_second for r in entry.rounds}


def fastest(entries: Iterable[Entry]) -> ByRound:
    """The best of several settings, round by round."""
    best: ByRound = {}
    for entry in entries:
        for index, rate in by_round(entry).items():
            best[index] = max(rate, best.get(index, 0.0))
    return best


def paired(ours: ByRound, theirs: ByRound) -> Spread | None:
    """Spread of ours / theirs over the rounds that have both.

    >>> paired({0: 2.0, 1: 3.0}, {0: 1.0, 2: 9.0})
    Spread(median=2.0, least=2.0, most=2.0)
    """
    return spread([ours[i] / theirs[i] for i in sorted(ours.keys() & theirs.keys())])


def against(results: Results, entry: Entry, reference: str = "ddp") -> Spread | None:
    """Throughput of `entry` against that of the contestant called `reference`."""
    base = results.entry(reference)
    return None if base is None else paired(by_round(entry), by_round(base))


STEADY = 0.15
"""Two measurements whose reference products differ by more than this share met two different machines."""


def steady_rounds(results: Results, entry: Entry, reference: str = "ddp") -> tuple[int, int] | None:
    """In how many of the shared rounds the machine was as fast beside `entry` as beside the contestant `reference`."""
    base = results.entry(reference)
    if base is None:
        return None
    theirs = {r.index: r.reference for r in base.rounds}
    pairs = [(r.reference, theirs[r.index]) for r in entry.rounds if r.index in theirs]
    steady = sum(abs(ours - other) <= STEADY * max(ours, other) for ours, other in pairs)
    return (steady, len(pairs)) if pairs else None


def loss_deviation(results: Results, entry: Entry, reference: str = "ddp") -> float | None:
    """The largest distance between the two loss curves, in nats."""
    base = results.entry(reference)
    if base is None or base.observation is None or entry.observation is None:
        return None
    pairs = zip(entry.observation.losses, base.observation.losses, strict=True)
    return max(abs(a - b) for a, b in pairs)


class Comparison(NamedTuple):
    """One of unishard's contestants beside a peer of its level.

    `memory` is the ratio of peaks (to the peer's leanest setting), `sent` of bytes on the wire; below 1 is less.
    """

    ours: str
    peer: str
    throughput: Spread | None
    memory: float | None
    sent: float | None


def comparisons(results: Results) -> Iterator[Comparison]:
    """Every unishard contestant beside every peer of its level; of a peer's settings, the fastest of each round."""
    peers: dict[str, list[Entry]] = {}
    for entry in results.entries:
        if not entry.ours and not entry.alone:
            peers.setdefault(entry.family, []).append(entry)
    for entry in results.entries:
        for family, settings in peers.items():
            if entry.ours and settings[0].level == entry.level:
                yield _compare(entry, family, settings)


def _compare(entry: Entry, family: str, settings: list[Entry]) -> Comparison:
    theirs = [s.observation for s in settings if s.observation is not None]
    memory = sent = None
    if entry.observation is not None and theirs:
        memory = entry.observation.peak / min(o.peak for o in theirs)
        least = min(o.sent_on_wire for o in theirs)
        sent = entry.observation.sent_on_wire / least if least else None
    return Comparison(entry.name, family, paired(by_round(entry), fastest(settings)), memory, sent)
