"""docs/deepspeed-config.md is what the models say, and names every key once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from unishard.config.optimizer import OPTIMIZERS, UNAVAILABLE_OPTIMIZERS
from unishard.config.scheduler import SCHEDULES
from unishard.config.schema import known_keys

ROOT = Path(__file__).resolve().parents[2]


def generator():
    spec = importlib.util.spec_from_file_location(
        "config_reference", ROOT / "scripts" / "config_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    assert generator().page() == (ROOT / "docs" / "deepspeed-config.md").read_text(), (
        "run python scripts/config_reference.py"
    )


def test_every_key_has_one_row_with_a_status():
    page = (ROOT / "docs" / "deepspeed-config.md").read_text()
    rows = [
        [cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("| `")
    ]
    by_key: dict[str, list[list[str]]] = {}
    for row in rows:
        by_key.setdefault(row[0].removeprefix("| ").split("`")[1], []).append(row)
    for path in known_keys():
        statuses = [row[2] for row in by_key[path] if len(row) > 3]
        assert len(statuses) == 1, path
        assert statuses[0] in ("honoured", "translated", "refused"), path
    for name in (*OPTIMIZERS, *SCHEDULES):
        assert f"### {name}\n" in page
    assert all(name in by_key for name in UNAVAILABLE_OPTIMIZERS)
