"""What importing costs, in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

_SCRIPT = """
import importlib, sys, time
started = time.perf_counter()
import torch
middle = time.perf_counter()
for name in sys.argv[1:]:
    importlib.import_module(name)
print(middle - started, time.perf_counter() - middle)
"""


def import_seconds(modules: Sequence[str], repeats: int = 3) -> tuple[float, float]:
    """Median seconds of `import torch` and of importing `modules` after it.

    Raises:
        subprocess.CalledProcessError: an import failed.

    >>> torch_seconds, added = import_seconds([], repeats=1)
    >>> added < torch_seconds
    True
    """
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", _SCRIPT, *modules]
    runs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(repeats)
    ]
    # Libraries may print while they are imported; the script's own line is the last.
    seconds = [tuple(map(float, run.splitlines()[-1].split())) for run in runs]
    return median(s[0] for s in seconds), median(s[1] for s in seconds)
