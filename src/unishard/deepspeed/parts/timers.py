"""`utils.timer`: wall-clock timers by name."""

from __future__ import annotations

import time
from collections.abc import Iterable

from unishard.deepspeed.parts.accelerator import get_accelerator
from unishard.deepspeed.parts.logs import log_dist


def trim_mean(data: Iterable[float], trim_percent: float) -> float:
    """The mean without the lowest and highest share of the values.

    >>> trim_mean([1.0, 2.0, 3.0, 100.0], 0.25)
    2.5
    """
    if not 0.0 <= trim_percent <= 1.0:
        raise ValueError(f"trim_percent={trim_percent}: a share from 0 to 1")
    values = sorted(data)
    if not values:
        return 0.0
    cut = int(trim_percent * len(values))
    kept = values[cut : len(values) - cut] or values
    return sum(kept) / len(kept)


class Timer:
    """One interval at a time; the records since the last reset."""

    def __init__(self, name: str) -> None:
        self.name_ = name
        self.started_ = False
        self.records: list[float] = []
        self._start = 0.0

    def start(self) -> None:
        get_accelerator().synchronize()
        self.started_, self._start = True, time.perf_counter()

    def stop(self, reset: bool = False, record: bool = True) -> None:
        get_accelerator().synchronize()
        if record:
            self.records.append(time.perf_counter() - self._start)
        self.started_ = False

    def reset(self) -> None:
        self.started_, self.records = False, []

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds recorded; forgotten afterwards with `reset`."""
        total = sum(self.records) * 1000.0
        if reset:
            self.records = []
        return total

    def mean(self) -> float:
        """Milliseconds of an interval, extremes left out."""
        return trim_mean(self.records, 0.1) * 1000.0


class SynchronizedWallClockTimer:
    """Timers by name; each waits for the device before it reads the clock."""

    def __init__(self) -> None:
        self.timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        return self.timers.setdefault(name, Timer(name))

    def get_timers(self) -> dict[str, Timer]:
        return self.timers

    @staticmethod
    def memory_usage() -> str:
        """One line about the device's memory."""
        return f"mem_allocated: {get_accelerator().memory_allocated() / 2**30:.4f} GB"

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Iterable[int] | None = None,
    ) -> None:
        """Log the milliseconds of the timers called `names`, divided by `normalizer`."""
        parts = [
            f"{name}: {self.timers[name].elapsed(reset) / normalizer:.2f}"
            for name in names
            if name in self.timers
        ]
        log_dist("time (ms) | " + " | ".join(parts), ranks=list(ranks or [0]))

    def get_mean(self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Mean milliseconds of the timers called `names`, divided by `normalizer`."""
        means = {}
        for name in names:
            if name in self.timers:
                means[name] = self.timers[name].mean() / normalizer
                if reset:
                    self.timers[name].reset()
        return means


class NoopTimer:
    """Takes the place of a timer, and does nothing."""

    class Timer:
        def start(self) -> None: ...

        def reset(self) -> None: ...

        def stop(self, **options: bool) -> None: ...

        def elapsed(self, **options: bool) -> float:
            return 0.0

        def mean(self) -> float:
            return 0.0

    def __init__(self) -> None:
        self.timer = self.Timer()

    def __call__(self, name: str) -> NoopTimer.Timer:
        return self.timer

    def get_timers(self) -> dict[str, NoopTimer.Timer]:
        return {}

    def log(self, names: Iterable[str], **options: object) -> None: ...

    def get_mean(self, names: Iterable[str], **options: object) -> dict[str, float]:
        return {}


class ThroughputTimer:
    """Samples a second over the steps between `start` and `stop`; the first `start_step` steps do not count.

    >>> timer = ThroughputTimer(batch_size=8)
    >>> timer.start()
    >>> timer.stop(global_step=True)
    >>> timer.micro_step_count, timer.global_step_count, timer.total_elapsed_time
    (1, 1, 0.0)
    """

    def __init__(
        self,
        config: object = None,
        batch_size: int = 1,
        start_step: int = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: object = None,
    ) -> None:
        if steps_per_output is not None and not isinstance(steps_per_output, int):
            raise ValueError(f"steps_per_output is a number of steps, or None: not {steps_per_output!r}")
        self.batch_size, self.start_step = max(batch_size, 1), start_step
        self.steps_per_output = steps_per_output
        self.initialized = self.started = False
        self.micro_step_count = self.global_step_count = 0
        self.start_time = self.end_time = 0.0
        self.step_elapsed_time = self.total_elapsed_time = 0.0
        """Seconds of the step under way, and of all that count."""
        self._is_report_boundary()

    def start(self) -> None:
        self.initialized = self.started = True
        if self.global_step_count >= self.start_step:
            get_accelerator().synchronize()
            self.start_time = time.perf_counter()

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        if not self.started:
            return
        self.started = False
        self.micro_step_count += 1
        self.global_step_count += global_step
        if not self.start_time:
            return
        get_accelerator().synchronize()
        self.end_time = time.perf_counter()
        spent = self.end_time - self.start_time
        self.total_elapsed_time += spent
        self.step_elapsed_time = 0.0 if global_step else self.step_elapsed_time + spent

    def _is_report_boundary(self) -> bool:
        """Whether `steps_per_output` divides the steps so far. Raises `ValueError` unless it is positive, or `None`."""
        every = self.steps_per_output
        if every is not None and every <= 0:
            raise ValueError(
                f"steps_per_output must be greater than 0 (positive), and is {every}; None prints nothing"
            )
        return every is not None and self.global_step_count % every == 0

    def avg_samples_per_sec(self) -> float:
        """Of the steps after the first `start_step`; -inf before."""
        steps = self.global_step_count - self.start_step
        return self.batch_size * steps / self.total_elapsed_time if self.total_elapsed_time else float("-inf")
