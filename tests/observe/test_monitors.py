from __future__ import annotations

import csv
import json
import sys
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest

from unishard.errors import ConfigError
from unishard.observe.monitors import (
    MONITORS,
    CsvMonitor,
    JsonlMonitor,
    TensorBoardMonitor,
    monitors_from_config,
)
from unishard.observe.record import StepRecord

FULL = StepRecord(
    step=3,
    loss=2.5,
    learning_rate=1e-3,
    grad_norm=0.75,
    tokens_per_second=1000.0,
    skipped_steps=1,
    loss_scale=64.0,
    bytes_sent=4096,
)
SPARSE = StepRecord(step=4, loss=2.25, learning_rate=1e-3)


def test_a_record_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        FULL.loss = 0.0  # type: ignore[misc]


def test_scalars_leave_out_what_was_not_measured():
    assert set(SPARSE.scalars()) == {"loss", "learning_rate", "skipped_steps", "loss_scale"}
    assert FULL.scalars()["bytes_sent"] == 4096.0


def test_jsonl_gives_every_field_back_and_a_whole_line_at_once(tmp_path):
    file = tmp_path / "runs" / "steps.jsonl"
    monitor = JsonlMonitor(file)
    for count, record in enumerate((FULL, SPARSE), start=1):
        monitor.write(record)
        text = file.read_text()  # before close: a run that is killed here has lost nothing
        assert text.endswith("\n")
        assert len(text.splitlines()) == count
    monitor.close()
    assert [StepRecord(**json.loads(line)) for line in file.read_text().splitlines()] == [FULL, SPARSE]


def test_jsonl_continues_a_file(tmp_path):
    file = tmp_path / "steps.jsonl"
    for record in (FULL, SPARSE):
        monitor = JsonlMonitor(file)
        monitor.write(record)
        monitor.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [3, 4]


def test_jsonl_stays_json_when_a_run_diverges(tmp_path):
    file = tmp_path / "steps.jsonl"
    monitor = JsonlMonitor(file)
    monitor.write(StepRecord(step=1, loss=float("nan"), learning_rate=1e-3, grad_norm=float("inf")))
    monitor.close()

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(file.read_text(), parse_constant=refuse)
    assert row["loss"] is None
    assert row["grad_norm"] is None


def test_csv_has_one_file_a_metric_with_one_header(tmp_path):
    monitor = CsvMonitor(tmp_path)
    monitor.write(FULL)
    monitor.write(SPARSE)
    monitor.close()
    with (tmp_path / "Train_loss.csv").open() as file:
        assert list(csv.reader(file)) == [["step", "Train_loss"], ["3", "2.5"], ["4", "2.25"]]
    with (tmp_path / "Train_grad_norm.csv").open() as file:
        assert list(csv.reader(file)) == [["step", "Train_grad_norm"], ["3", "0.75"]]


def test_tensorboard_can_read_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = TensorBoardMonitor(tmp_path)
    monitor.write(FULL)
    monitor.write(SPARSE)
    monitor.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("Train/loss")] == [(3, 2.5), (4, 2.25)]
    assert {f"Train/{name}" for name in FULL.scalars()} == set(events.Tags()["scalars"])


def test_tensorboard_leaves_nothing_for_close_to_write(tmp_path):
    pytest.importorskip("tensorboard")
    monitor = TensorBoardMonitor(tmp_path)
    for step in range(200):
        monitor.write(StepRecord(step=step, loss=1.0, learning_rate=1e-3))
    [file] = tmp_path.iterdir()
    on_disk = file.stat().st_size
    monitor.close()
    assert file.stat().st_size == on_disk


def test_a_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"tensorboard.*pip install 'unishard\[examples\]'"):
        TensorBoardMonitor(tmp_path)


def section(tmp_path, enabled: bool) -> SimpleNamespace:
    return SimpleNamespace(enabled=enabled, output_path=str(tmp_path), job_name="job")


def test_a_configuration_switches_on_only_what_it_enables(tmp_path):
    config = SimpleNamespace(tensorboard=section(tmp_path, False), csv_monitor=section(tmp_path, True))
    [monitor] = monitors_from_config(config)
    monitor.write(FULL)
    assert (tmp_path / "job" / "Train_loss.csv").exists()


def test_a_new_monitor_is_one_entry(tmp_path, monkeypatch):
    class Remembering:
        def __init__(self, folder):
            self.records = []

        def write(self, record):
            self.records.append(record)

        def close(self):
            return None

    monkeypatch.setitem(MONITORS, "remembering", Remembering)
    off, on = section(tmp_path, False), section(tmp_path, True)
    config = SimpleNamespace(tensorboard=off, csv_monitor=off, remembering=on)
    [monitor] = monitors_from_config(config)
    monitor.write(FULL)
    assert monitor.records == [FULL]


class Recorded:
    """Stands for a service's package: keeps every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = []

    def __getattr__(self, name: str):
        def call(*args, **options):
            self.calls.append((name, args, options))
            return self

        return call


def test_services_get_the_scalars_when_their_package_is_there(monkeypatch):
    wandb, comet = Recorded(), Recorded()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    off = SimpleNamespace(enabled=False)
    config = SimpleNamespace(
        tensorboard=off,
        csv_monitor=off,
        wandb=SimpleNamespace(enabled=True, project="p", group=None, team="t"),
        comet=SimpleNamespace(
            enabled=True, api_key="k", project="p", workspace=None, experiment_key=None, mode=None, online=None,
            experiment_name="n", samples_log_interval=2,
        ),
    )  # fmt: skip
    monitors = monitors_from_config(config)
    for record in (FULL, SPARSE, StepRecord(step=5, loss=1.0, learning_rate=0.1)):
        for monitor in monitors:
            monitor.write(record)
    for monitor in monitors:
        monitor.close()
    names = [name for name, _, _ in wandb.calls]
    assert names == ["init", "log", "log", "log", "finish"]
    assert wandb.calls[0][2] == {"project": "p", "group": None, "entity": "t"}
    assert wandb.calls[1][1][0]["Train/loss"] == 2.5
    assert [name for name, _, _ in comet.calls] == ["start", "set_name", "log_metrics", "log_metrics", "end"]
    assert [options["step"] for name, _, options in comet.calls if name == "log_metrics"] == [3, 5]


def test_a_service_without_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    off = SimpleNamespace(enabled=False)
    wanted = SimpleNamespace(enabled=True, project="p", group=None, team=None)
    with pytest.raises(ConfigError, match=r"wandb\.enabled: the wandb package is not installed"):
        monitors_from_config(SimpleNamespace(tensorboard=off, csv_monitor=off, wandb=wanted, comet=off))
