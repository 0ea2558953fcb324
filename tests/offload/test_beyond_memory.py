"""A model whose states do not fit trains offloaded, to the bit, where training in memory is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "beyond_memory.py"
CLIPS = [1.0, 0.0] if os.environ.get("UNISHARD_LONG") else [1.0]
"""Clipping holds all gradients on the tier; `make soak` also updates in the backward, without."""
LIMITS = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(LIMITS.parent, os.W_OK) or not LIMITS.exists(),
    reason="needs root and a memory cgroup (v1)",
)
@pytest.mark.parametrize("clip", CLIPS)
def test_a_part_of_the_memory_is_enough(clip: float, tmp_path: Path) -> None:
    options = ["--nvme", str(tmp_path), "--width=256", "--depth=32", "--steps=2", "--share=0.25"]
    options.append(f"--clip={clip}")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["in_memory_ended_with"] == -9
    assert len(found["losses"]) == 2
    assert not list(tmp_path.iterdir())
