"""TRL's SFTTrainer under `deepspeed=` and, with `use_unishard`, under `fsdp=`: as the plain one, with LoRA too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("trl", "peft", "datasets", "transformers", "accelerate"):
    pytest.importorskip(needed)
pytestmark = [pytest.mark.hf, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "trl_script.py"
PRESETS = {"deepspeed-2": "ZERO2", "deepspeed-3": "ZERO3", "fsdp": "ZERO3", "lora deepspeed-3": "ZERO3"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("trl")
    command = [sys.executable, "-m", "unishard.cli.main", "run", "-n", "2", str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", PRESETS)
def test_it_trains_saves_and_resumes_as_the_plain_sft_trainer(seen, name):
    sharded, plain = seen[name], seen["lora plain" if name.startswith("lora") else "plain"]
    assert sharded["engine"] == "unishard.deepspeed.parts.engine.DeepSpeedEngine"
    assert "DistributedDataParallel" in plain["engine"]
    assert sharded["preset"] == PRESETS[name]
    assert len(sharded["losses"]) == 4
    for key in ("losses", "weights"):
        torch.testing.assert_close(sharded[key], plain[key], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(sharded["resumed"], plain["losses"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_falls(seen, name):
    losses = seen[name]["losses"]
    assert losses[-1] < losses[0] - (0.01 if name.startswith("lora") else 0.3)
