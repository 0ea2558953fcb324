"""`monitor.*`: events (name, value, samples) that rank 0 writes to TensorBoard, CSV files, W&B or Comet."""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

Event = tuple[str, Any, int]


class Monitor(ABC):
    """One destination of events; `config` is its section."""

    def __init__(self, monitor_config: Any) -> None:
        self.monitor_config = monitor_config
        self.enabled = bool(monitor_config.enabled)
        self.writes = self.enabled and _is_first()

    @abstractmethod
    def write_events(self, event_list: Sequence[Event]) -> None:
        """Write (name, value, step) triples."""


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _folder(config: Any, fallback: str) -> Path:
    base = Path(config.output_path) if config.output_path else Path.home() / fallback
    return base / config.job_name


class csvMonitor(Monitor):
    """One file an event name, with columns step and value, under `output_path`/`job_name`."""

    def __init__(self, csv_config: Any) -> None:
        super().__init__(csv_config)
        self.filenames: list[str] = []
        self.output_path, self.job_name = csv_config.output_path, csv_config.job_name
        self.log_dir: str | None = None
        if self.writes:
            self.log_dir = self.setup_log_dir()

    def setup_log_dir(self, base: str | None = None) -> str:
        """Make the folder, and return it."""
        folder = Path(base) / self.job_name if base else _folder(self.monitor_config, "csv_monitor")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def write_events(self, event_list: Sequence[Event]) -> None:
        if not self.writes or self.log_dir is None:
            return
        for name, value, step in event_list:
            file = os.path.join(self.log_dir, name.replace("/", "_") + ".csv")
            fresh = not os.path.exists(file)
            if file not in self.filenames:
                self.filenames.append(file)
            with open(file, "a", encoding="utf-8") as out:
                out.write((f"step,{name.replace('/', '_')}\n" if fresh else "") + f"{step},{float(value)}\n")


class TensorBoardMonitor(Monitor):
    """Scalars in event files under `output_path`/`job_name`."""

    def __init__(self, tensorboard_config: Any) -> None:
        super().__init__(tensorboard_config)
        self.output_path, self.job_name = tensorboard_config.output_path, tensorboard_config.job_name
        self.summary_writer: Any = None
        if self.writes:
            check_tb_availability()
            self.get_summary_writer()

    def get_summary_writer(self, base: str | None = None) -> Any:
        """The writer, made when first asked for."""
        if self.summary_writer is None and self.writes:
            from torch.utils.tensorboard import SummaryWriter

            folder = (
                Path(base) / self.monitor_config.job_name
                if base
                else _folder(self.monitor_config, "tensorboard")
            )
            self.summary_writer = SummaryWriter(log_dir=str(folder))
        return self.summary_writer

    def write_events(self, event_list: Sequence[Event], flush: bool = True) -> None:
        if self.writes:
            for name, value, step in event_list:
                self.summary_writer.add_scalar(name, value, step)
            if flush:
                self.summary_writer.flush()

    def flush(self) -> None:
        """Write what is in memory."""
        if self.summary_writer is not None:
            self.summary_writer.flush()


class WandbMonitor(Monitor):
    """A Weights & Biases run. Needs the wandb package."""

    def __init__(self, wandb_config: Any) -> None:
        super().__init__(wandb_config)
        self.group, self.team, self.project = wandb_config.group, wandb_config.team, wandb_config.project
        if self.writes:
            check_wandb_availability()
            import wandb  # pyright: ignore[reportMissingImports]

            wandb.init(project=self.project, group=self.group, entity=self.team)

    def log(
        self,
        data: dict[str, Any],
        step: int | None = None,
        commit: bool | None = None,
        sync: bool | None = None,
    ) -> Any:
        """Pass to `wandb.log`."""
        if not self.writes:
            return None
        import wandb  # pyright: ignore[reportMissingImports]

        return wandb.log(data, step=step, commit=commit)

    def write_events(self, event_list: Sequence[Event]) -> None:
        for name, value, step in event_list if self.writes else ():
            self.log({name: value}, step=int(step))


class EventsLogScheduler:
    """Lets an event through once every `samples_log_interval` samples."""

    def __init__(self, samples_log_interval: int) -> None:
        self._interval = samples_log_interval
        self._last: dict[str, int] = {}

    def needs_logging(self, name: str, current_sample: int) -> bool:
        """Whether `name` is due at `current_sample`, which then counts as logged."""
        if name in self._last and current_sample - self._last[name] < self._interval:
            return False
        self._last[name] = current_sample
        return True


class CometMonitor(Monitor):
    """A Comet experiment. Needs the comet_ml package."""

    def __init__(self, comet_config: Any) -> None:
        super().__init__(comet_config)
        self.experiment: Any = None
        self.samples_log_interval: int = comet_config.samples_log_interval
        self._scheduler = EventsLogScheduler(self.samples_log_interval)
        if self.writes:
            check_comet_availability()
            import comet_ml  # pyright: ignore[reportMissingImports]

            self.experiment = comet_ml.start(
                api_key=comet_config.api_key,
                project=comet_config.project,
                workspace=comet_config.workspace,
                experiment_key=comet_config.experiment_key,
                mode=comet_config.mode,
                online=comet_config.online,
            )
            if comet_config.experiment_name is not None:
                self.experiment.set_name(comet_config.experiment_name)

    def write_events(self, event_list: Sequence[Event]) -> None:
        for name, value, step in event_list if self.writes else ():
            if self._scheduler.needs_logging(name, step):
                self.experiment._log_metric(name, value, step=step)


class MonitorMaster(Monitor):
    """Every monitor that a configuration enables."""

    def __init__(self, monitor_config: Any) -> None:
        super().__init__(monitor_config)
        kinds: dict[str, type[Monitor]] = {
            "tensorboard": TensorBoardMonitor,
            "wandb": WandbMonitor,
            "csv_monitor": csvMonitor,
            "comet": CometMonitor,
        }
        self._monitors = {
            name: kind(getattr(monitor_config, name))
            for name, kind in kinds.items()
            if getattr(monitor_config, name).enabled and _is_first()
        }

    @property
    def tb_monitor(self) -> Any:
        return self._monitors.get("tensorboard")

    @property
    def wandb_monitor(self) -> Any:
        return self._monitors.get("wandb")

    @property
    def csv_monitor(self) -> Any:
        return self._monitors.get("csv_monitor")

    @property
    def comet_monitor(self) -> Any:
        return self._monitors.get("comet")

    def write_events(self, event_list: Sequence[Event]) -> None:
        for monitor in self._monitors.values():
            monitor.write_events(event_list)


def _need(package: str, section: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{section}.enabled: the package {package} is not installed; pip install {package}")


def check_tb_availability() -> None:
    """Raise `ImportError` unless tensorboard is installed."""
    _need("tensorboard", "tensorboard")


def check_wandb_availability() -> None:
    """Raise `ImportError` unless wandb is installed."""
    _need("wandb", "wandb")


def check_comet_availability() -> None:
    """Raise `ImportError` unless comet_ml is installed."""
    _need("comet_ml", "comet")
