"""Where records go: JSON lines, TensorBoard, CSV. A new destination is one class here and one line in `MONITORS`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

from unishard.errors import ConfigError
from unishard.observe.record import StepRecord


class Monitor(Protocol):
    """Writes records; used on one rank."""

    def write(self, record: StepRecord) -> None: ...

    def close(self) -> None: ...


class JsonlMonitor:
    """One JSON object a line, flushed at once: a run that dies leaves whole lines.

    JSON has no NaN and no infinity: a loss or norm that is not finite is written as null.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "run.jsonl"
    >>> monitor = JsonlMonitor(file); monitor.write(StepRecord(1, 2.0, 0.1)); monitor.close()
    >>> json.loads(file.read_text())["loss"]
    2.0
    """

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def write(self, record: StepRecord) -> None:
        fields = {name: _finite(value) for name, value in record.as_dict().items()}
        self._file.write(json.dumps(fields, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class TensorBoardMonitor:
    """Scalars under `Train/`. Raises `ConfigError` if tensorboard is not installed."""

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as missing:
            raise ConfigError(
                "tensorboard.enabled: the tensorboard package is not installed; pip install 'unishard[examples]'"
            ) from missing
        self._writer = SummaryWriter(str(folder))

    def write(self, record: StepRecord) -> None:
        for name, value in record.scalars().items():
            self._writer.add_scalar(f"Train/{name}", value, record.step)
        # The writer keeps events in memory for minutes, and drops them at exit unless someone closes it.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class CsvMonitor:
    """One file a metric, with columns step and value, as DeepSpeed's csv_monitor lays them out."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, record: StepRecord) -> None:
        for name, value in record.scalars().items():
            file = self._folder / f"Train_{name}.csv"
            header = "" if file.exists() else f"step,Train_{name}\n"
            with file.open("a", encoding="utf-8") as out:
                out.write(f"{header}{record.step},{value}\n")

    def close(self) -> None:
        return None


MONITORS = {"tensorboard": TensorBoardMonitor, "csv_monitor": CsvMonitor}
"""Config section -> what it switches on."""


def monitors_from_config(config: Any) -> list[Monitor]:
    """The monitors that a resolved configuration enables, each under output_path/job_name."""
    chosen: list[Monitor] = []
    for section, monitor in MONITORS.items():
        settings = getattr(config, section)
        if settings.enabled:
            chosen.append(monitor(Path(settings.output_path or "runs") / settings.job_name))
    return chosen
