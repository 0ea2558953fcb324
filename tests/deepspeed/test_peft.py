"""LoRA adapters through the Trainer and the drop-in: train, save, merge and resume as on whole parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft", reason="peft is not installed (the extra `finetune`)")
pytestmark = [pytest.mark.hf, pytest.mark.slow]


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[int | None, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("peft")
    script = Path(__file__).parent / "peft_script.py"
    command = [sys.executable, "-m", "unishard.cli.main", "run", "-n", "2", "--as-deepspeed", str(script)]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


def same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_train_as_without_sharding(seen, stage):
    plain, sharded = seen[None], seen[stage]
    assert len(sharded["losses"]) == 4
    same(sharded["losses"], plain["losses"])
    same(sharded["eval"], plain["eval"])
    same(sharded["adapters"], plain["adapters"])


@pytest.mark.parametrize("stage", [2, 3])
def test_only_adapters_are_saved(seen, stage):
    assert seen[stage]["files"] == seen[None]["files"]
    assert seen[stage]["adapters"]
    assert all("lora" in name for name in seen[stage]["adapters"])


@pytest.mark.parametrize("stage", [2, 3])
def test_training_resumes(seen, stage):
    same(seen[stage]["resumed"], seen[None]["losses"])
    same(seen[stage]["resumed adapters"], seen[None]["adapters"])


@pytest.mark.parametrize("stage", [2, 3])
def test_saved_adapters_merge_into_the_base_model(seen, stage):
    same(seen[stage]["merged"], seen[None]["merged"])


def test_adapters_merge_while_parameters_are_gathered(seen):
    same(seen[3]["merged in place"], seen[None]["merged"])
    # What was merged, and unmerged, is the model that goes on.
    same(seen[3]["eval after merging"], seen[3]["eval"])


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_generate_texts_of_different_lengths(seen, stage):
    assert seen[stage]["lengths"] == [3, 8]
    assert torch.equal(seen[stage]["text"], seen[None]["text"])
