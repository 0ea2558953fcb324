"""Importing unishard must stay cheap: users pay for it at every start, on every rank."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "import_cost.py"
MAX_NEW_MODULES = 150
EXPENSIVE = {
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "lightning",
}


def measure() -> tuple[float, list[str]]:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return result["seconds"], result["modules"]


def test_both_doors_add_few_modules_to_torch():
    seconds, modules = min((measure() for _ in range(2)), key=lambda pair: pair[0])
    owners = collections.Counter(name.split(".")[0] for name in modules).most_common(8)
    print(f"\nboth doors add {seconds:.3f} s and {len(modules)} modules to torch, most from {owners}")
    assert len(modules) <= MAX_NEW_MODULES, owners
    assert not EXPENSIVE & set(modules)
