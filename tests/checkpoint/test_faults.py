"""Full disks, read-only folders, damaged files: an error on every rank that says what and where; nothing changes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import unishard
from unishard.checkpoint import commit
from unishard.errors import CheckpointError, CorruptCheckpointError, RankError

Ranks = Callable[..., Any]
ALL_RANKS = (OSError, CheckpointError, RankError)


def start(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(200, 600), nn.Tanh(), nn.Linear(600, 200))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    return unishard.initialize(model=model, config=config).engine


def train(engine: Any, steps: int = 1) -> float:
    loss = torch.zeros(())
    for _ in range(steps):
        loss = engine(torch.full((1, 200), 0.1 * (engine.global_steps + dist.get_rank()))).square().mean()
        engine.backward(loss)
        engine.step()
    return loss.item()


def state_of(engine: Any) -> list[Any]:
    """Everything that a failed save or load must leave alone, copied."""
    optimizer = engine.optimizer
    tensors = [group.buffer.shard.clone() for group in engine.schedule.groups]
    moments = [
        value.clone() if isinstance(value, torch.Tensor) else value
        for kinds in optimizer.inner.state.values()
        for value in kinds.values()
    ]
    counters = [engine.global_steps, engine.micro_steps, engine.global_samples, torch.get_rng_state().clone()]
    return [*tensors, *moments, *counters, [dict(g, params=0) for g in optimizer.inner.param_groups]]


def unchanged(engine: Any, before: list[Any]) -> None:
    now = state_of(engine)
    assert len(now) == len(before)
    for a, b in zip(now, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def files_in(folder: str) -> set[str]:
    dist.barrier()
    found = set(os.listdir(folder))
    dist.barrier()
    return found


# places that cannot be written --------------------------------------------------------------------------------


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[str]:
    """A file system of 10 MB: three checkpoints of 2.9 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or not mount("-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)):
        pytest.skip("needs the right to mount a file system")
    yield str(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def disk_full(disk: str, background: bool) -> None:
    engine = start()
    for _ in range(3):
        train(engine)
        engine.save_checkpoint(disk, background=background)
    engine.wait_for_checkpoints()
    train(engine)
    before, there = state_of(engine), files_in(disk)
    with pytest.raises(ALL_RANKS, match="No space left on device"):
        engine.save_checkpoint(disk, background=background)
        engine.wait_for_checkpoints()
    unchanged(engine, before)
    assert files_in(disk) == there, "what was written in part is gone"
    assert (Path(disk) / "latest").read_text() == "global_step3"
    if dist.get_rank() == 0:
        shutil.rmtree(f"{disk}/global_step1")
    dist.barrier()
    engine.save_checkpoint(disk, background=background)
    engine.wait_for_checkpoints()
    expected = train(engine)
    twin = start(seed=1)
    twin.auto_resume(disk)
    unchanged(twin, before)
    assert train(twin) == expected


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk(small_disk: str, background: bool, ranks: Ranks) -> None:
    ranks(disk_full, small_disk, background)


def writes_one(folder: str) -> None:
    engine = start()
    train(engine, 2)
    engine.save_checkpoint(folder)


def read_only(folder: str) -> None:
    engine = start(seed=1)
    engine.load_checkpoint(folder)
    before = state_of(engine)
    for background in (False, True):
        with pytest.raises(ALL_RANKS, match="Read-only file system"):
            engine.save_checkpoint(folder, "two", background=background)
            engine.wait_for_checkpoints()
    with pytest.raises(ALL_RANKS, match="Read-only file system"):
        engine.save_16bit_model(folder)
    unchanged(engine, before)


def writable_again(folder: str) -> None:
    engine = start()
    engine.save_checkpoint(folder, "two")
    assert files_in(folder) == {"global_step2", "two", "latest", "zero_to_fp32.py"}


def test_a_read_only_folder(small_disk: str, ranks: Ranks) -> None:
    ranks(writes_one, small_disk)
    assert mount("-o", "remount,ro", small_disk)
    ranks(read_only, small_disk)
    assert mount("-o", "remount,rw", small_disk)
    ranks(writable_again, small_disk)


def manifest_fails(folder: str) -> None:
    """The last step of a save, which only the first rank takes."""
    engine = start()
    train(engine)
    original = commit.write_durably
    before = state_of(engine)
    for name in ("manifest.json", ".latest-"):

        def fail(path: Path, content: bytes, name: str = name) -> None:
            original(path, content[: len(content) // 2])
            if path.name.startswith(name):
                raise OSError(28, "No space left on device")

        commit.write_durably = fail
        try:
            with pytest.raises(ALL_RANKS, match="No space left on device"):
                engine.save_checkpoint(folder)
        finally:
            commit.write_durably = original
        assert not {n for n in files_in(folder) if n.startswith(".")}
    unchanged(engine, before)
    engine.save_checkpoint(folder)
    twin = start(seed=1)
    twin.load_checkpoint(folder)
    unchanged(twin, before)


def test_the_last_step_of_a_save_fails(tmp_path: Path, ranks: Ranks) -> None:
    ranks(manifest_fails, str(tmp_path))


# damage -------------------------------------------------------------------------------------------------------


def flip(folder: Path, key: str) -> None:
    chunk = unishard.checkpoint.inspect(folder).tensors[key].chunks[-1]
    content = bytearray((folder / chunk.file).read_bytes())
    content[(chunk.data or 0) + 100] ^= 16
    (folder / chunk.file).write_bytes(content)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


WEIGHT = "model.2.weight"
MOMENT = "optim.state.2.weight.exp_avg_sq"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped byte of a weight": (
        lambda folder: flip(folder, WEIGHT),
        r"__1_0.distcp: the bytes of model.2.weight near \d+ are not those that were written",
    ),
    "a flipped byte of a moment": (
        lambda folder: flip(folder, MOMENT),
        rf"__1_0.distcp: the bytes of {MOMENT} near \d+ are not those that were written",
    ),
    "a truncated file": (
        lambda folder: cut(folder / "__1_0.distcp", 5000),
        r"__1_0.distcp \(with model.*and \d+ more\) has 5000 bytes instead of \d+",
    ),
    "a missing shard": (
        lambda folder: (folder / "__1_0.distcp").unlink(),
        r"__1_0.distcp \(with model.* and \d+ more\) is missing",
    ),
    "a shard of another checkpoint": (
        lambda folder: (folder / "__7_0.distcp").write_bytes(b"x"),
        r"__7_0.distcp is not of this checkpoint; move it away",
    ),
    "a truncated manifest": (
        lambda folder: cut(folder / "manifest.json", 3000),
        r"manifest.json is damaged",
    ),
    "only foreign files": (
        lambda folder: [p.unlink() for p in folder.iterdir()] and (folder / "notes.txt").touch(),
        r"holds no checkpoint|no format|notes.txt",
    ),
}


def damaged(folder: str) -> None:
    engine = start()
    train(engine)
    engine.save_checkpoint(folder, "whole")
    whole = state_of(engine)
    # One that has trained, and one that has not and whose optimizer has no state.
    others = [start(seed=1), start(seed=2)]
    train(others[0], 2)
    for name, (damage, message) in DAMAGE.items():
        bad = Path(folder) / "bad"
        if dist.get_rank() == 0:
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(Path(folder) / "whole", bad)
            damage(bad)
        dist.barrier()
        for other in others:
            before = state_of(other)
            with pytest.raises((CorruptCheckpointError, CheckpointError, RankError), match=message):
                other.load_checkpoint(folder, "bad")
            unchanged(other, before)
            dist.barrier()
        assert name
    for other in others:
        other.load_checkpoint(folder, "whole")
        unchanged(other, whole)


def test_damage_is_named_on_every_rank_and_changes_nothing(tmp_path: Path, ranks: Ranks) -> None:
    ranks(damaged, str(tmp_path))


def with_foreign_files(folder: str) -> None:
    """What users put into a checkpoint stays when another takes its name; what lies beside is left alone."""
    engine = start()
    train(engine)
    engine.save_checkpoint(folder, "best")
    engine.save_16bit_model(f"{folder}/best", "model.bin")
    if dist.get_rank() == 0:
        (Path(folder) / "best" / "tokenizer").mkdir()
        (Path(folder) / "best" / "tokenizer" / "vocabulary.txt").write_text("a b c")
        (Path(folder) / "notes.txt").write_text("beside")
    dist.barrier()
    start(seed=1).load_checkpoint(folder, "best")
    train(engine)
    before = state_of(engine)
    engine.save_checkpoint(folder, "best", keep_last=1)
    dist.barrier()
    assert (Path(folder) / "best" / "tokenizer" / "vocabulary.txt").read_text() == "a b c"
    assert (Path(folder) / "best" / "model.bin").exists()
    assert files_in(folder) == {"best", "latest", "notes.txt", "zero_to_fp32.py"}
    twin = start(seed=1)
    twin.load_checkpoint(folder, "best")
    unchanged(twin, before)


def test_foreign_files_stay(tmp_path: Path, ranks: Ranks) -> None:
    ranks(with_foreign_files, str(tmp_path))
