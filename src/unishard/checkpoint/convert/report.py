"""What there is to tell about an opened checkpoint, as plain data."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from unishard.checkpoint.catalog import keys_of
from unishard.checkpoint.convert.format import Opened, Options
from unishard.checkpoint.convert.registry import get
from unishard.checkpoint.convert.source import Source
from unishard.checkpoint.keys import STATE
from unishard.errors import CheckpointError

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}

CHECKED = {
    "unishard": "every MiB matches its checksum",
    "deepspeed": "every record matches its CRC-32",
    "deepspeed-universal": "every record matches its CRC-32",
    "dcp": "every record that keeps a CRC-32 matches it",
    "safetensors": "sizes match the headers; safetensors keeps no checksums",
    "fsdp": "every record matches its CRC-32",
    "torch": "every record matches its CRC-32",
}
"""What `verify` compares, by format."""


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A dtype by its usual names; `None` stays.

    Raises `CheckpointError` for others.

    >>> parse_dtype("bf16")
    torch.bfloat16
    """
    if name is None:
        return None
    if name not in _DTYPES:
        raise CheckpointError(f"--dtype {name}: write one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def report(opened: Opened) -> dict[str, Any]:
    """Everything that `ckpt inspect` shows, without reading tensors."""
    catalog = opened.catalog
    with Source(opened, Options()) as source:
        weights, states, ties = source.weights(), source.states(), source.ties()
        counters, client, groups = _tried(source.engine), _tried(source.client_state), _tried(source.groups)
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in weights.values())
    kinds = sorted({kind for state in states.values() for kind in state})
    states_bytes = sum(catalog.tensors[f"{STATE}.{key}"].nbytes for key in keys_of(STATE, catalog.tensors))
    return {
        "path": str(opened.folder),
        "format": get(opened.format).title,
        "about": {key: value for key, value in catalog.about.items() if key != "config"},
        "step": catalog.about.get("step", (counters or {}).get("global_steps")),
        "counters": counters or {},
        "weights": len(weights),
        "elements": sum(info.nbytes // info.dtype.itemsize for info in weights.values()),
        "dtypes": ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items()),
        "tied": ties,
        "optimizer": f"{', '.join(kinds)} of {len(states)} parameters, {states_bytes:,} bytes"
        if states
        else None,
        "learning_rates": [float(group["lr"]) for group in groups or [] if "lr" in group],
        "client_state": [str(key) for key in client or {}],
        "bytes": sum(size for size in catalog.files.values() if size > 0),
        "files": len(catalog.files),
        "config": catalog.about.get("config"),
        "tensors": [
            {
                "key": key,
                "shape": list(info.shape),
                "dtype": str(info.dtype).removeprefix("torch."),
                "bytes": info.nbytes,
            }
            for key, info in catalog.tensors.items()
        ],
    }


def _tried(read: Any) -> Any:
    """Values with classes of the user's own are not needed to look into a checkpoint."""
    try:
        return read()
    except CheckpointError:
        return None
