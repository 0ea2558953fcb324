"""Search for a shard length and parameter offsets that put every shard boundary where it may fall.

The rule behind it: a boundary inside a parameter must lie a multiple of the parameter's *unit* (its row
length, or a block) from its start. Boundaries are one shard length S apart, so one boundary inside a
parameter constrains only its offset (padding before it suffices), while two or more force S to a multiple
of the unit. Candidates for S therefore are multiples of the units of all parameters longer than 2 S, tried
from the shortest; for each, parameters are placed greedily in a few orders, natural order first.
Pure arithmetic on element counts; `layout.py` is the public face.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd, lcm

_STEPS = 20_000  # placements of single parameters per search: bounds planning to tens of milliseconds
_MULTIPLES = 6  # shortest multiples of each modulus that are tried
_MODULI = 12  # row lengths, by the elements they cover, that propose shard lengths of their own


@dataclass(frozen=True)
class Problem:
    """What to place: `numels[i] > 0` elements in units of `units[i]`, over `world_size` equal shards.

    Offsets and the shard length are kept multiples of `align` (elements).
    """

    numels: tuple[int, ...]
    units: tuple[int, ...]
    world_size: int
    align: int

    @property
    def payload(self) -> int:
        return sum(self.numels)


@dataclass(frozen=True)
class Placement:
    """An answer: the shard length and where each parameter starts in the full buffer (elements)."""

    shard_numel: int
    offsets: tuple[int, ...]

    def boundaries(self, index: int, numel: int) -> tuple[int, int]:
        """First shard boundary inside parameter `index`, counted from its start, and how many there are."""
        first = self.shard_numel - self.offsets[index] % self.shard_numel
        return first, max(0, -(-(numel - first) // self.shard_numel))


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def divisors_descending(number: int) -> tuple[int, ...]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}, reverse=True))


def common_block(placement: Placement, numels: Sequence[int], block: int) -> int:
    """Largest divisor of `block` that divides the distance of every inner boundary from its parameter."""
    for index, numel in enumerate(numels):
        if numel == 0:
            continue
        first, count = placement.boundaries(index, numel)
        if count:
            block = gcd(block, first)
        if count > 1:
            block = gcd(block, placement.shard_numel)
    return block


def search(problem: Problem, shortest: int, longest: int) -> Placement | None:
    """Shortest shard length found in [shortest, longest] with offsets for it; None where none was found.

    The search is bounded and deterministic, so a shorter length may exist; when `align` and every unit
    are 1, the first candidate always succeeds.
    """
    natural = tuple(range(len(problem.numels)))
    by_unit = tuple(sorted(natural, key=lambda i: -problem.units[i]))
    orders = (natural,) if by_unit == natural else (natural, by_unit)
    kinds = len(set(zip(problem.numels, problem.units, strict=True)))
    steps = max(_STEPS, 8 * len(natural))
    for shard in _candidates(problem, shortest, longest):
        for order in orders:
            placed = _place(problem, shard, order)
            if len(placed) == len(natural):
                return _answer(shard, placed)
            steps -= len(placed) + 1
        if kinds * len(natural) <= steps:
            placed, tried = _place_filling(problem, shard)
            if len(placed) == len(natural):
                return _answer(shard, placed)
            steps -= tried
        if steps <= 0:
            return None
    return None


def _answer(shard: int, placed: dict[int, int]) -> Placement:
    return Placement(shard, tuple(placed[i] for i in range(len(placed))))


def _candidates(problem: Problem, shortest: int, longest: int) -> list[int]:
    found: set[int] = set()
    for first, last, modulus in _segments(problem, shortest, longest):
        for step in _moduli(problem, modulus, last):
            start = round_up(first, step)
            found.update(range(start, min(last, start + _MULTIPLES * step) + 1, step))
        # and a few spread over the whole segment, where padding between parameters is what is short
        found.update(round_up(first + (last - first) * k // 8, modulus) for k in range(1, 8))
    return sorted(s for s in found if shortest <= s <= longest)


def _segments(problem: Problem, shortest: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """Ranges [first, last] of shard lengths with the modulus that the parameters over 2 S force there."""
    sizes = sorted(set(zip(problem.numels, problem.units, strict=True)), reverse=True)
    cuts = sorted({shortest, *((n + 1) // 2 for n, _ in sizes if shortest < (n + 1) // 2 <= longest)})
    for first, after in zip(cuts, [*cuts[1:], longest + 1], strict=True):
        modulus = problem.align
        for numel, unit in sizes:
            if numel <= 2 * first or modulus >= after:
                break
            modulus = lcm(modulus, unit)
        if round_up(first, modulus) < after:
            yield first, after - 1, modulus


def _moduli(problem: Problem, forced: int, longest: int) -> list[int]:
    weight: dict[int, int] = {}
    for numel, unit in zip(problem.numels, problem.units, strict=True):
        weight[unit] = weight.get(unit, 0) + numel
    heaviest = sorted(weight, key=lambda unit: (-weight[unit], unit))[:_MODULI]
    proposals, together = {forced}, forced
    for unit in heaviest:
        together = min(lcm(together, unit), longest + 1)
        proposals |= {lcm(forced, unit), together}
    return sorted(p for p in proposals if p <= longest and p % forced == 0)


def _start(problem: Problem, cursor: int, index: int, shard: int) -> int | None:
    """Smallest legal offset of a parameter at or after `cursor`; None when this shard length allows none."""
    numel, unit = problem.numels[index], problem.units[index]
    offset = round_up(cursor, problem.align)
    boundary = (offset // shard + 1) * shard
    if offset + numel <= boundary:
        return offset
    step = lcm(unit, problem.align)
    even = shard % unit == 0
    offset += (boundary - offset) % step
    if offset < boundary and (even or offset + numel <= boundary + shard):
        return offset
    if even or numel <= shard:
        return boundary
    offset = boundary + shard % step
    return offset if shard >= step and offset + numel <= boundary + 2 * shard else None


def _place(problem: Problem, shard: int, order: Sequence[int]) -> dict[int, int]:
    """Offsets by parameter, in this order; incomplete as soon as the padding exceeds what there is."""
    spare = problem.world_size * shard - problem.payload
    placed: dict[int, int] = {}
    cursor = 0
    for index in order:
        offset = _start(problem, cursor, index, shard)
        if offset is None or offset - cursor > spare:
            break
        spare -= offset - cursor
        placed[index] = offset
        cursor = offset + problem.numels[index]
    return placed


def _place_filling(problem: Problem, shard: int) -> tuple[dict[int, int], int]:
    """As `_place`, choosing next what needs least padding, and filling gaps with parameters of unit 1.

    Returns the offsets and the work done (single placements tried).
    """
    spare = problem.world_size * shard - problem.payload
    waiting: dict[tuple[int, int], list[int]] = {}
    for index in reversed(range(len(problem.numels))):
        waiting.setdefault((problem.numels[index], problem.units[index]), []).append(index)
    placed: dict[int, int] = {}
    cursor, steps = 0, 0
    while waiting:
        start = round_up(cursor, problem.align)
        steps += len(waiting)
        choices: list[tuple[int, int, int, int]] = []
        for (numel, unit), indices in waiting.items():
            offset = _start(problem, cursor, indices[-1], shard)
            if offset is None:
                return placed, steps
            choices.append((offset - start, -unit, -numel, indices[-1]))
        fixed = min((c for c in choices if c[1] < -1), default=None)
        # unit 1 is legal anywhere: it goes into a gap it fits in, else behind everything else
        loose = [c for c in choices if c[1] == -1 and (fixed is None or -c[2] <= fixed[0])]
        gap, _, _, index = min(loose) if fixed is None or loose else fixed
        offset = start + gap
        if offset - cursor > spare:
            return placed, steps
        spare -= offset - cursor
        placed[index] = offset
        kind = problem.numels[index], problem.units[index]
        cursor = offset + kind[0]
        waiting[kind].pop()
        if not waiting[kind]:
            del waiting[kind]
    return placed, steps
