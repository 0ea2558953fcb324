"""Where records go: JSON lines, TensorBoard, CSV. A new destination is one class here and one line in `MONITORS`."""

from __future__ import annotations

import importlib
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


class WandBMonitor:
    """Scalars under `Train/` of a Weights & Biases run. `settings`: project, group and team.

    Raises `ConfigError` if the package is not installed.
    """

    def __init__(self, settings: Any) -> None:
        wandb = _service("wandb", "wandb")
        self._run = wandb.init(project=settings.project, group=settings.group, entity=settings.team)

    def write(self, record: StepRecord) -> None:
        self._run.log({f"Train/{name}": value for name, value in record.scalars().items()}, step=record.step)

    def close(self) -> None:
        self._run.finish()


class CometMonitor:
    """Scalars under `Train/` of a Comet experiment, once every `samples_log_interval` steps.

    Raises `ConfigError` if the package is not installed.
    """

    def __init__(self, settings: Any) -> None:
        comet = _service("comet_ml", "comet")
        names = ("api_key", "project", "workspace", "experiment_key", "mode", "online")
        self._experiment = comet.start(**{name: getattr(settings, name) for name in names})
        if settings.experiment_name is not None:
            self._experiment.set_name(settings.experiment_name)
        self._interval = settings.samples_log_interval
        self._next = 0

    def write(self, record: StepRecord) -> None:
        if record.step >= self._next:
            self._next = record.step + self._interval
            scalars = {f"Train/{name}": value for name, value in record.scalars().items()}
            self._experiment.log_metrics(scalars, step=record.step)

    def close(self) -> None:
        self._experiment.end()


def _service(package: str, section: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as missing:
        raise ConfigError(
            f"{section}.enabled: the {package} package is not installed; pip install {package}, or use csv_monitor"
        ) from missing


MONITORS = {"tensorboard": TensorBoardMonitor, "csv_monitor": CsvMonitor}
"""Config section -> what it switches on, under a folder."""
SERVICES = {"wandb": WandBMonitor, "comet": CometMonitor}
"""Config section -> what it switches on, elsewhere."""


def monitors_from_config(config: Any) -> list[Monitor]:
    """The monitors that a resolved configuration enables, those with files each under output_path/job_name."""
    chosen: list[Monitor] = []
    for section, monitor in MONITORS.items():
        settings = getattr(config, section)
        if settings.enabled:
            chosen.append(monitor(Path(settings.output_path or "runs") / settings.job_name))
    for section, service in SERVICES.items():
        settings = getattr(config, section, None)
        if settings is not None and settings.enabled:
            chosen.append(service(settings))
    return chosen
