"""Found by Python at its start when this folder is on PYTHONPATH: installs the drop-in where it is asked for."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def _run_the_next_one() -> None:
    """The environment's own sitecustomize, which this one hides."""
    here = Path(__file__).resolve().parent
    places = [place for place in sys.path if Path(place or ".").resolve() != here]
    for place in places:
        candidate = Path(place or ".") / "sitecustomize.py"
        if candidate.is_file():
            spec = importlib.util.spec_from_file_location("sitecustomize", candidate)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
            return


if os.environ.get("UNISHARD_AS_DEEPSPEED") == "1":
    from unishard.deepspeed.hook import install

    install()
_run_the_next_one()
