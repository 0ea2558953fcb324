"""The example as users start it: through torchrun, on two processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("tensorboard")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COMMAND = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--standalone",
    str(EXAMPLES / "train_gpt.py"),
    "--quick",
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
FIELDS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "skipped_steps",
    "loss_scale",
    "bytes_sent",
}

pytestmark = pytest.mark.slow


def train(out: Path, *arguments: str) -> str:
    done = subprocess.run(
        [*COMMAND, "--out", str(out), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(out: Path) -> list[dict[str, float]]:
    [file] = out.glob("*/steps.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_records(out: Path, steps: Sequence[int]) -> None:
    rows = records(out)
    assert [row["step"] for row in rows] == list(steps)
    assert all(set(row) == FIELDS for row in rows)
    assert all(row["bytes_sent"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert list(out.glob("*/events.out.tfevents.*"))


def test_config_door_trains_and_compares_the_presets(tmp_path):
    printed = train(tmp_path, "--steps", "12")
    check_records(tmp_path, range(1, 13))
    assert "held-out loss" in printed
    assert "sample:" in printed
    table = re.findall(r"│ (one process|\w+) +│ +([\d.]+) │ +[\d,]+ │ +([\d.]+) │ +([\d.]+) │", printed)
    rows = {name: (loss, float(rest), float(sent)) for name, loss, rest, sent in table}
    assert list(rows) == ["one process", "NO_SHARD", "ZERO1", "ZERO2", "ZERO3"]
    assert len({loss for loss, _, _ in rows.values()}) == 1, printed
    assert rows["NO_SHARD"][1] > rows["ZERO1"][1] >= rows["ZERO2"][1] > rows["ZERO3"][1]
    assert rows["one process"][2] == 0 < rows["NO_SHARD"][2]


def test_code_door_trains(tmp_path):
    printed = train(tmp_path, "--steps", "30", "--door", "code", "--preset", "ZERO2", "--no-table")
    check_records(tmp_path, range(1, 31))
    assert "code door, ZERO2" in printed
    assert "20 steps" not in printed
    rates = [row["learning_rate"] for row in records(tmp_path)]
    assert rates[-1] < max(rates) == 6e-4  # the configured schedule, not a constant
    losses = [row["loss"] for row in records(tmp_path)]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("phase", ["steps", "table"])
def test_ctrl_c_ends_all_ranks(tmp_path, phase):
    log = tmp_path / "log"
    steps = "100000" if phase == "steps" else "1"
    with log.open("w") as output:
        run = subprocess.Popen(
            [*COMMAND, "--out", str(tmp_path), "--steps", steps],
            env=ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(run, log, lambda: started(tmp_path, log, phase))
            os.killpg(run.pid, signal.SIGINT)
            run.wait(timeout=20)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    text = log.read_text()
    assert "interrupted: all 2 ranks stopped at the same step" in text
    assert 'train_gpt.py", line' not in text, text  # torchrun itself shows where its own wait was cut short
    assert "KeyboardInterrupt" not in text
    assert records(tmp_path)[-1]["step"] == len(records(tmp_path))


def started(out: Path, log: Path, phase: str) -> bool:
    if phase == "table":
        return "sample:" in log.read_text()
    return any(file.read_text().count("\n") > 3 for file in out.glob("*/steps.jsonl"))


def wait_for(run: subprocess.Popen, log: Path, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not reached():
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
