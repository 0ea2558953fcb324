"""Unmodified `transformers.Trainer` and `accelerate` scripts through the drop-in train as they do without sharding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.hf, pytest.mark.slow]


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hugging_face")
    script = Path(__file__).parent / "hugging_face.py"
    command = [
        sys.executable,
        "-m",
        "unishard.cli.main",
        "run",
        "-n",
        "2",
        "--as-deepspeed",
        str(script),
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


def same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-6)


def test_the_drop_in_was_used(seen):
    assert seen["version"] == "0.19.8+unishard"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trainer_trains_evaluates_and_saves_as_without_deepspeed(seen, stage):
    plain, sharded = seen["trainer-None"], seen[f"trainer-{stage}"]
    assert len(sharded["losses"]) == 4
    for key in ("losses", "norms", "eval"):
        same(sharded[key], plain[key])
    assert set(plain["weights"]) <= set(sharded["weights"])
    same({name: sharded["weights"][name] for name in plain["weights"]}, plain["weights"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trainer_resumes_and_loads_the_best_model(seen, stage):
    sharded = seen[f"trainer-{stage}"]
    same(sharded["resumed"], sharded["losses"])
    assert sharded["best"].endswith("checkpoint-4")
    again, best = sharded["evaluated again"]
    same(again, best)


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_with_a_plugin_trains_as_without(seen, stage):
    plain, sharded = seen["accelerate-None"], seen[f"accelerate-{stage}"]
    same(sharded["losses"], plain["losses"])
    # DeepSpeed's norm is that of the last update: one behind where it is asked for before the step.
    same(sharded["rate"], plain["rate"])
    weights = {name.removeprefix("module."): value for name, value in plain["weights"].items()}
    same({name: sharded["weights"][name] for name in weights}, weights)
    assert (sharded["steps"], sharded["unwrapped"]) == (4, "GPT2LMHeadModel")
