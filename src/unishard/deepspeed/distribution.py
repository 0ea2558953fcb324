"""The drop-in as an installed distribution: what `importlib.metadata` says about `deepspeed`."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from unishard.deepspeed.release import VERSION

NAME = "deepspeed"


class DropInDistribution(importlib.metadata.Distribution):
    """Name, version and top-level module; nothing more is installed."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"
            "Summary: unishard in the place of DeepSpeed\n",
            "top_level.txt": f"{NAME}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent.parent / path
