"""A load holds no more than what it loads, and reads no more than it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import unishard
from unishard import checkpoint
from unishard.checkpoint.boxes import Box, intersection
from unishard.checkpoint.catalog import BLOCK, Catalog, read_catalog
from unishard.checkpoint.loading import read_entries
from unishard.checkpoint.meeting import GroupMeeting, world
from unishard.checkpoint.storage import Reader
from unishard.testing.models import TinyTransformer

Ranks = Callable[..., Any]

# memory -------------------------------------------------------------------------------------------------------

WIDTH = 4096  # one weight of 67 MB: a load that held a chunk besides would be seen
LOADS = """
import json, sys, torch, unishard

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1000

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1000

with torch.device("meta"):
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH))
engine = unishard.initialize(model=model, config=json.loads(sys.argv[2])).engine
torch._dynamo  # what the first optimizer imports is not the load's
before, high = resident(), peak()
engine.load_checkpoint(sys.argv[1])
shards = sum(g.buffer.shard.nbytes for g in engine.schedule.groups) / 1e6
print(json.dumps({"before": before, "high": high, "after": resident(), "peak": peak(), "shards": shards}))
"""


def config(ranks: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 12 // ranks,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }


def writes_large(folder: str) -> None:
    engine = unishard.initialize(model=nn.Sequential(nn.Linear(WIDTH, WIDTH)), config=config(2)).engine
    engine.backward(engine(torch.ones(1, WIDTH)).mean())
    engine.step()
    engine.save_checkpoint(folder)


def test_a_load_holds_the_shards_and_little_more(tmp_path: Path, ranks: Ranks) -> None:
    ranks(writes_large, str(tmp_path), world_size=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = LOADS.replace("WIDTH", str(WIDTH))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), json.dumps(config(1))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["shards"] == pytest.approx(67, abs=1)
    moments = 2 * found["shards"]  # made by the load; the weights are there before
    assert found["after"] - found["before"] < moments + 64
    assert found["peak"] <= found["before"] + moments + 64
    assert found["peak"] > found["before"] + moments / 2, "otherwise this measures nothing"


# bytes --------------------------------------------------------------------------------------------------------


class Counted:
    """Counts what readers read while it is active, checking and filling apart."""

    def __init__(self) -> None:
        self.checked = self.filled = 0

    def __enter__(self) -> Counted:
        self._original = Reader._read_into
        counter = self

        def read(reader: Reader, file: str, offset: int, view: memoryview, key: str) -> None:
            if reader._verify:
                counter.checked += len(view)
            else:
                counter.filled += len(view)
            counter._original(reader, file, offset, view, key)

        Reader._read_into = read
        return self

    def __exit__(self, *exception: Any) -> None:
        Reader._read_into = self._original


def blocks_of(catalog: Catalog, held: dict[str, list[Box]]) -> int:
    """Bytes of all checksum blocks that contain an element of `held`, by brute force."""
    total = 0
    for key, boxes in held.items():
        info = catalog.find(key)
        assert info is not None
        for chunk in info.chunks:
            places = np.arange(chunk.box.numel).reshape(chunk.sizes)
            touched: set[int] = set()
            for box in boxes:
                shared = intersection(box, chunk.box)
                if shared is not None:
                    cut = tuple(
                        slice(a - b, a - b + s)
                        for a, b, s in zip(shared.offsets, chunk.offsets, shared.sizes, strict=True)
                    )
                    touched |= set((places[cut].reshape(-1) * info.dtype.itemsize // BLOCK).tolist())
            size = chunk.box.numel * info.dtype.itemsize
            total += sum(min(BLOCK, size - block * BLOCK) for block in touched)
    return total


def start() -> Any:
    torch.manual_seed(0)
    model = TinyTransformer(vocabulary=4000, width=160)  # a table of more than two blocks
    return unishard.initialize(model=model, config=config(dist.get_world_size())).engine


def step(engine: Any) -> None:
    batch = TinyTransformer(vocabulary=4000, width=160).example_batch(0, 12 // dist.get_world_size())
    engine.backward(engine(batch.inputs).square().mean())
    engine.step()


def writes(folder: str) -> None:
    engine = start()
    step(engine)
    engine.save_checkpoint(folder, "one", client_state={"note": "x" * 1000})


def counts(folder: str, fresh: bool) -> tuple[int, int]:
    engine = start()
    if not fresh:
        step(engine)
    catalog = read_catalog(Path(folder) / "one")
    held: dict[str, list[Box]] = {}
    scalars = 0
    from unishard.checkpoint.training import model_contents

    for key, entry in model_contents(engine.module, engine.schedule.groups, world()).entries.items():
        boxes = [part.box for part in entry.held]
        held[key] = boxes
        name = key.removeprefix("model.")
        for kind in ("exp_avg", "exp_avg_sq") if boxes else ():
            held[f"optim.state.{name}.{kind}"] = boxes
        if boxes:
            scalars += 1
            held[f"optim.state.{name}.step"] = [Box((), ())]
    here = ("unishard.engine", "unishard.client_state", f"unishard.rng.{dist.get_rank()}")
    blobs = [
        blob for key, blob in catalog.blobs.items() if key.startswith("optim.param_groups.") or key in here
    ]
    with Counted() as counter:
        engine.load_checkpoint(folder, "one")
    weights = sum(
        span.numel for g in engine.schedule.groups for span in g.buffer.shard_spans(g.axes.shard.rank)
    )
    moments = 2 * 4 * weights + 4 * scalars
    # State that is not there yet is compared as it comes, and never read again.
    assert counter.filled == 4 * weights + (0 if fresh else moments)
    assert counter.checked == blocks_of(catalog, held) + sum(blob.length for blob in blobs)
    assert counter.checked < 0.7 * sum(catalog.files.values())
    model = sum(4 * p.numel() for p in TinyTransformer(vocabulary=4000, width=160).parameters())
    return 4 * weights, model


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(("wrote", "reads"), [(3, 2), (2, 4)])
def test_a_rank_reads_what_it_holds(
    wrote: int, reads: int, fresh: bool, tmp_path: Path, ranks: Ranks
) -> None:
    ranks(writes, str(tmp_path), world_size=wrote)
    found = ranks(counts, str(tmp_path), fresh, world_size=reads)
    held, model = sum(f for f, _ in found), found[0][1]
    assert model <= held < model + 4 * 8 * reads


# pieces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parts_of_all_shapes(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, columns, scattered elements, targets that are not contiguous, other dtypes; with a small buffer."""
    from unishard.checkpoint import storage

    monkeypatch.setattr(storage, "_PIECE", 4096)
    monkeypatch.setattr(storage, "_SHORT_RUN", 64)
    monkeypatch.setattr(storage, "BLOCK", 1024)
    value = torch.randn(40, 30, 20)
    folder = checkpoint.save({"w": value, "scalar": value[0, 0, 0]}, tmp_path / "one")
    monkeypatch.setattr(storage, "_LARGEST_CHUNK", 20_000)
    small = checkpoint.save({"w": value, "scalar": value[0, 0, 0]}, tmp_path / "two")
    draw = np.random.default_rng(0)
    for path in (folder, small):
        with Reader(path, read_catalog(path)) as reader:
            for _ in range(60):
                offsets = [int(draw.integers(0, size)) for size in value.shape]
                sizes = [
                    int(draw.integers(1, size - at + 1))
                    for at, size in zip(offsets, value.shape, strict=True)
                ]
                whole = [draw.random() < 0.4 for _ in offsets]
                offsets = [0 if w else at for w, at in zip(whole, offsets, strict=True)]
                sizes = [full if w else s for w, s, full in zip(whole, sizes, value.shape, strict=True)]
                box = Box(tuple(offsets), tuple(sizes))
                expected = value[tuple(slice(a, a + s) for a, s in zip(*box, strict=True))].to(dtype)
                target = torch.zeros(sizes, dtype=dtype)
                if draw.random() < 0.5:
                    target = torch.zeros(*sizes[:2], 2 * sizes[2], dtype=dtype)[:, :, ::2]
                before = target._version
                reader.fill("w", box, target)
                assert torch.equal(target, expected), box
                assert target._version > before
            target = torch.zeros((), dtype=dtype)
            reader.fill("scalar", Box((), ()), target)
            assert target == value[0, 0, 0].to(dtype)


def test_a_failed_load_of_a_state_changes_nothing(tmp_path: Path) -> None:
    folder = checkpoint.save({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / "one")
    catalog = checkpoint.inspect(folder)
    chunk = catalog.tensors["b"].chunks[0]
    content = bytearray((folder / chunk.file).read_bytes())
    content[(chunk.data or 0) + 10] ^= 1
    (folder / chunk.file).write_bytes(content)
    target = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    with pytest.raises(checkpoint_errors(), match="the bytes of b near"):
        checkpoint.load(target, folder)
    assert not target["a"].any()
    assert not target["b"].any()
    from unishard.checkpoint.entries import entries_of

    # Without checksums there is nothing to compare.
    contents = entries_of(target, 0, 1)
    read_entries(folder, catalog, contents.entries.values(), GroupMeeting(world()), verify=False)
    assert target["a"].all()


def checkpoint_errors() -> Any:
    from unishard.errors import CorruptCheckpointError

    return CorruptCheckpointError
