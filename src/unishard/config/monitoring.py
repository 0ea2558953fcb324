"""What a run prints and records: progress, timing, monitors."""

from __future__ import annotations

from typing import Annotated

from unishard.config.fields import (
    Count,
    Honoured,
    LogLevel,
    PrintInterval,
    Refused,
    Section,
    Translated,
)


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
    """`wandb`: a Weights & Biases run, if the package is installed."""

    enabled: Annotated[bool, Honoured()] = False
    group: Annotated[str | None, Honoured()] = None
    team: Annotated[str | None, Honoured()] = None
    project: Annotated[str, Honoured()] = "deepspeed"


class Comet(Section):
    """`comet`: a Comet experiment, if the package is installed."""

    enabled: Annotated[bool, Honoured()] = False
    samples_log_interval: Annotated[Count, Honoured()] = 100
    project: Annotated[str | None, Honoured()] = None
    workspace: Annotated[str | None, Honoured()] = None
    api_key: Annotated[str | None, Honoured()] = None
    experiment_name: Annotated[str | None, Honoured()] = None
    experiment_key: Annotated[str | None, Honoured()] = None
    online: Annotated[bool | None, Honoured()] = None
    mode: Annotated[str | None, Honoured()] = None


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
    log_level: Annotated[LogLevel | None, Honoured()] = None
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
    wandb: WandB = WandB()
    comet: Comet = Comet()
    timers: Timers = Timers()
