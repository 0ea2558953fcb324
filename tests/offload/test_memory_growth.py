"""Training with every state on the nvme tier does not grow; `scripts/memory_growth.py` measures long runs,
`make soak` both doors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DOORS = ["config", "code"] if os.environ.get("UNISHARD_LONG") else ["code"]
SCRIPT = Path(__file__).parents[2] / "scripts" / "memory_growth.py"


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_memory_does_not_grow(door: str, tmp_path: Path) -> None:
    options = ["--nvme", str(tmp_path), f"--door={door}", "--steps=24", "--width=64", "--depth=3"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["last_loss"] < found["first_loss"]
    assert not list(tmp_path.iterdir())
