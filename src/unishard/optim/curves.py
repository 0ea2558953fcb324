"""Closed forms of the learning-rate schedules: pure functions of the update's index.

`update` counts applied optimizer updates from 0, so a value belongs to the update that uses it. The formulas
are those that DeepSpeed documents for the schedules of the same names. Its schedulers are first stepped after
the first update and count from there, so update n uses their formula at n - 1, and updates 0 and 1 of a
warm-up both use its lowest value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

WarmupType: TypeAlias = Literal["log", "linear"]


def warmup_fraction(update: int, num_steps: int, kind: WarmupType) -> float:
    """How far a warm-up has come, from 0 at updates 0 and 1 to 1 from update `num_steps` (+ 1 if linear) on.

    `log`: log(update) / log(num_steps); `linear`: (update - 1) / num_steps. `num_steps` is at least 2.

    >>> [round(warmup_fraction(n, 4, "log"), 3) for n in range(6)]
    [0.0, 0.0, 0.5, 0.792, 1.0, 1.0]
    >>> [warmup_fraction(n, 4, "linear") for n in range(6)]
    [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if update <= 1:
        return 0.0
    if update > num_steps:
        return 1.0
    return math.log(update) / math.log(num_steps) if kind == "log" else (update - 1) / num_steps


def linear_decay_fraction(update: int, warmup_steps: int, total_steps: int) -> float:
    """What is left of the peak after a warm-up: falls linearly from 1 to 0 at update `total_steps` + 1.

    >>> [linear_decay_fraction(n, 2, 6) for n in range(3, 8)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return max(0.0, (total_steps - (update - 1)) / max(1, total_steps - warmup_steps))


def cosine_decay_fraction(update: int, warmup_steps: int, total_steps: int, floor: float) -> float:
    """What is left of the peak after a warm-up: half a cosine from 1 to `floor`, reached at `total_steps`.

    >>> [round(cosine_decay_fraction(n, 2, 6, 0.0), 3) for n in range(3, 8)]
    [0.854, 0.5, 0.146, 0.0, 0.0]
    """
    progress = min(1.0, (update - warmup_steps) / max(1, total_steps - warmup_steps))
    return max(0.0, floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def range_test_factor(update: int, step_size: int, step_rate: float, staircase: bool) -> float:
    """The factor on the lowest rate in a range test: grows by `step_rate` every `step_size` updates.

    Source: Smith 2018, arXiv:1803.09820.

    >>> [range_test_factor(n, 2, 5.0, False) for n in range(4)], range_test_factor(3, 2, 5.0, True)
    ([1.0, 3.5, 6.0, 8.5], 6.0)
    """
    intervals = update // step_size if staircase else update / step_size
    return 1 + step_rate * intervals


@dataclass(frozen=True)
class Cycle:
    """One triangular cycle and what follows it (Smith 2018, arXiv:1803.09820).

    Attributes:
        first, second: updates of the rising and of the falling half.
        first_stairs, second_stairs: steps in which each half moves; 0 for continuously.
        decay_size: updates per decay interval after the cycle; 0 for no decay.
    """

    first: float
    second: float
    first_stairs: int = 0
    second_stairs: int = 0
    decay_size: float = 0

    def fraction(self, update: int) -> float:
        """The height in the cycle: 0 at its ends and after it, 1 at the end of the first half.

        >>> [Cycle(first=2, second=4).fraction(n) for n in range(8)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        >>> [Cycle(first=4, second=4, first_stairs=2).fraction(n) for n in range(5)]
        [0.0, 0.0, 0.5, 0.5, 1.0]
        """
        if update >= self.first + self.second:
            return 0.0
        if update <= self.first:
            position, length, stairs = update, self.first, self.first_stairs
        else:
            position, length, stairs = self.first + self.second - update, self.second, self.second_stairs
        return math.floor(position * stairs / length) / stairs if stairs else position / length

    def decay_intervals(self, update: int) -> float:
        """Decay intervals since the end of the cycle, not rounded; 0 during it.

        >>> cycle = Cycle(first=2, second=2, decay_size=10)
        >>> cycle.decay_intervals(3), cycle.decay_intervals(9)
        (0.0, 0.5)
        """
        after = update - self.first - self.second
        return after / self.decay_size if after > 0 and self.decay_size else 0.0
