"""One script under real DeepSpeed and under unishard, in the same test: same losses, weights, rates and counters."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs the real deepspeed: pip install 'unishard[bench]'", allow_module_level=True)

SCRIPT = Path(__file__).parent / "peer_script.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
OURS = ["-m", "unishard.cli.main", "run", "-n", "2", "--as-deepspeed"]
FP16 = {"rtol": 2e-3, "atol": 2e-3}
FP32 = {"rtol": 1e-5, "atol": 2e-6}


def run(launcher: list[str], folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    return run(TORCHRUN, tmp_path_factory.mktemp("real")), run(OURS, tmp_path_factory.mktemp("ours"))


def test_each_ran_under_its_own_package(results):
    real, ours = results
    assert "unishard" not in real["version"]
    assert ours["version"] == "0.19.8+unishard"
    assert set(real) == set(ours)


CASES = (
    "plain", "accumulation", "clipping", "client_optimizer", "client_scheduler", "configured_scheduler", "frozen",
    "half_with_overflow", "checkpoint", "sharded_construction", "inspected",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_script_gives_the_same_training(results, case):
    real, ours = results
    stages = [key for key in real if key.startswith(f"{case}-")]
    assert stages
    for key in stages:
        wanted, found = real[key], ours[key]
        assert len(wanted["losses"]) >= 2
        tolerance = FP16 if case == "half_with_overflow" else FP32
        torch.testing.assert_close(found, wanted, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def test_overflow_was_met(results):
    real, _ = results
    assert real["half_with_overflow-2"]["skipped_steps"] > 0
