"""What a run prints and records: progress, timing, monitors."""

from __future__ import annotations

from typing import Annotated, Any

from unishard.config.fields import (
    Honoured,
    PrintInterval,
    Refused,
    Section,
    Translated,
    enabled,
    not_available,
)

_MONITORS = "use tensorboard, which both services read, or csv_monitor"


class TensorBoard(Section):
    """`tensorboard`: event files under `output_path`/`job_name`."""

    enabled: Annotated[bool, Honoured()] = False
    output_path: Annotated[str | None, Honoured()] = ""
    job_name: Annotated[str, Honoured()] = "DeepSpeedJobName"


class CsvMonitor(Section):
    """`csv_monitor`: one file a metric under `output_path`/`job_name`."""

    enabled: Annotated[bool, Honoured()] = False
    output_path: Annotated[str | None, Honoured()] = ""
    job_name: Annotated[str, Honoured()] = "DeepSpeedJobName"


class WandB(Section):
    """`wandb`: known, refused when enabled."""

    enabled: Any = False
    group: Any = None
    team: Any = None
    project: Any = "deepspeed"


class Comet(Section):
    """`comet`: known, refused when enabled."""

    enabled: Any = False
    samples_log_interval: Any = 100
    project: Any = None
    workspace: Any = None
    api_key: Any = None
    experiment_name: Any = None
    experiment_key: Any = None
    online: Any = None
    mode: Any = None


class ThroughputTimer(Section):
    """`timers.throughput`."""

    enabled: Annotated[bool, Translated("throughput is part of every step's record")] = True
    synchronized: Annotated[bool, Translated("a step is timed when its numbers are read")] = True


class Timers(Section):
    """`timers`."""

    throughput: ThroughputTimer = ThroughputTimer()


class MonitoringKeys(Section):
    """Top-level keys about reports; `seed` is unishard's own."""

    steps_per_print: Annotated[PrintInterval, Honoured()] = 10
    wall_clock_breakdown: Annotated[bool, Honoured()] = False
    memory_breakdown: Annotated[
        bool, Translated("no memory report is printed; print torch.cuda.memory_summary() where you want one")
    ] = False
    dump_state: Annotated[bool, Honoured()] = False
    log_level: Annotated[
        str | None, Refused("log levels are Python's", 'call logging.getLogger("unishard").setLevel(...)')
    ] = None
    seed: Annotated[int | None, Honoured()] = None
    vocabulary_size: Annotated[
        int | None, Translated("it only warned about sizes that are not multiples of 8")
    ] = None
    disable_python_gc: Annotated[
        bool,
        Refused("Python's collector is left alone", "call gc.collect() and gc.disable() after initialize"),
    ] = False
    tensorboard: TensorBoard = TensorBoard()
    csv_monitor: CsvMonitor = CsvMonitor()
    wandb: Annotated[WandB, not_available("wandb", _MONITORS, asks=enabled)] = WandB()
    comet: Annotated[Comet, not_available("comet", _MONITORS, asks=enabled)] = Comet()
    timers: Timers = Timers()
