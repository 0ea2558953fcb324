"""`unishard config show` and `check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from unishard.cli.main import app

GOOD: dict[str, Any] = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 3, "overlap_comm": False},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
}
BAD: dict[str, Any] = {
    "train_batch_size": 15,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stge": 3},
    "comms_logger": {"enabled": True},
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def run(folder: Path, config: dict[str, Any] | str, *args: str) -> Any:
    path = folder / "ds_config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    command, *options = args
    return CliRunner().invoke(app, ["config", command, str(path), *options])


def cells(output: str) -> dict[str, tuple[str, str]]:
    rows = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in output.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def test_show_prints_values_and_origins(tmp_path: Path) -> None:
    result = run(tmp_path, GOOD, "show", "--world-size", "2")
    assert result.exit_code == 0, result.output
    rows = cells(result.output)
    assert rows["train_batch_size"] == ("16", "file")
    assert rows["train_micro_batch_size_per_gpu"] == ("4", "derived")
    assert rows["optimizer.type"] == ('"AdamW"', "derived")
    assert rows["sharding"] == ('"ZERO3"', "derived")
    assert rows["gradient_clipping"] == ("0.0", "default")
    assert "autotuning.enabled" not in rows
    assert "for 2 data-parallel rank(s), from --world-size" in result.output
    assert "translated: zero_optimization.overlap_comm = false: reductions always run" in result.output


def test_show_takes_overrides_and_hidden_size(tmp_path: Path) -> None:
    config = GOOD | {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    options = ("--world-size", "2", "--hidden-size", "8", "--set", "optimizer.params.lr=0.5", "--all")
    rows = cells(run(tmp_path, config, "show", *options).output)
    assert rows["zero_optimization.reduce_bucket_size"] == ("64", "auto")
    assert rows["optimizer.params.lr"] == ("0.5", "override")
    assert rows["autotuning.enabled"] == ("false", "default")


def test_show_json_is_json(tmp_path: Path) -> None:
    result = run(tmp_path, GOOD | {"steps_per_print": "inf"}, "show", "--json", "--world-size", "4")
    report = json.loads(result.output)
    assert report["config"]["train_micro_batch_size_per_gpu"] == 2
    assert report["config"]["steps_per_print"] == "inf"
    assert report["origins"]["optimizer.params.lr"] == "file"
    assert len(report["log_lines"]) == 2


@pytest.mark.parametrize(
    ("config", "environment", "words"),
    [
        (GOOD, None, "for 1 data-parallel rank(s), from an assumption; pass --world-size"),
        (GOOD, "4", "for 4 data-parallel rank(s), from WORLD_SIZE in the environment"),
        (
            GOOD | {"train_micro_batch_size_per_gpu": 1},
            None,
            "for 8 data-parallel rank(s), from the batch sizes",
        ),
    ],
)
def test_show_says_where_the_world_size_is_from(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    environment: str | None,
    words: str,
) -> None:
    if environment is not None:
        monkeypatch.setenv("WORLD_SIZE", environment)
    assert words in run(tmp_path, config, "show").output


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (BAD, (), "zero_optimization.stge: unknown key; did you mean 'stage'?"),
        ("{", (), "ds_config.json:1:2: not JSON"),
        (GOOD, ("--set", "optimizer.params.lr"), "write KEY=VALUE"),
    ],
)
def test_show_of_a_bad_config_fails_with_its_problems(
    tmp_path: Path, config: Any, options: tuple[str, ...], words: str
) -> None:
    result = run(tmp_path, config, "show", *options)
    assert result.exit_code == 1
    assert words in result.output


def test_check_lists_every_problem_at_once(tmp_path: Path) -> None:
    result = run(tmp_path, BAD, "check", "--world-size", "4")
    assert result.exit_code == 1
    assert "3 problem(s)" in result.output
    for words in (
        "train_batch_size: train_batch_size=15",
        "(from --world-size)",
        "stge: unknown key",
        "comms_logger: comms_logger",
    ):
        assert words in result.output


def test_check_accepts_a_good_config(tmp_path: Path) -> None:
    result = run(tmp_path, GOOD, "check", "--world-size", "4")
    assert (result.exit_code, "no problems" in result.output) == (0, True)


def test_check_of_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, "[]", "check")
    assert (result.exit_code, "an object of keys, not a list" in result.output) == (1, True)
    monkeypatch.setenv("WORLD_SIZE", "many")
    result = run(tmp_path, GOOD, "check")
    assert (result.exit_code, "WORLD_SIZE='many'" in result.output) == (1, True)
