"""`kill -9` at random instants of saving: a run goes on from a whole checkpoint, and none that was reported is lost.

Ten kills here; `make soak` sets UNISHARD_KILLS=200.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import unishard
from unishard.testing import RankPool
from unishard.testing.pool import RankFailure

KILLS = int(os.environ.get("UNISHARD_KILLS", "10"))
KEEP = 2


@pytest.fixture
def victims() -> Iterator[RankPool]:
    """A pool whose ranks are not waited for once one was killed."""
    with RankPool(2, grace=0.2) as pool:
        yield pool


def start() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256), nn.Linear(256, 256))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    return unishard.initialize(model=model, config=config).engine


def fingerprint(engine: Any) -> list[str]:
    """Of what each rank holds: weights and moments."""
    digest = hashlib.sha256()
    for group in engine.schedule.groups:
        digest.update(group.buffer.shard.detach().numpy().tobytes())
    for flat in engine.optimizer._flat._flats.values():
        digest.update(flat.numpy().tobytes())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digest.hexdigest())
    return everyone


def step(engine: Any) -> None:
    draw = torch.Generator().manual_seed(1000 * engine.global_steps + dist.get_rank())
    engine.backward(engine(torch.randn(2, 256, generator=draw)).square().mean())
    engine.step()


def save(engine: Any, folder: str, tag: str | None = None, background: bool = False) -> None:
    state = {"step": engine.global_steps, "fingerprint": fingerprint(engine)}
    engine.save_checkpoint(folder, tag, client_state=state, keep_last=KEEP, background=background)


def life(
    folder: str, diary: str, background: bool, victim: int | None, instant: float | None
) -> tuple[int, float]:
    """Go on from what the last life left; step, save and note what was saved, until `victim`, or all ranks, are gone.

    Without `instant` it returns after some saves: the last step, and seconds of a step and a save.
    """
    engine = start()
    state = engine.auto_resume(folder)
    if state is not None:
        assert engine.global_steps == state["step"]
        assert fingerprint(engine) == state["fingerprint"], "bit for bit what was saved"
    reported = Path(diary).read_text().strip()
    assert engine.global_steps >= int(reported or 0), (
        f"{reported} was saved; going on from {engine.global_steps}"
    )
    dist.barrier()
    if instant is not None and victim in (None, dist.get_rank()):
        die = threading.Timer(instant, os.kill, (os.getpid(), signal.SIGKILL))
        die.daemon = True
        die.start()
    saved, begin, seconds = 0, engine.global_steps, 0.0
    while instant is not None or engine.global_steps < begin + 3:
        clock = time.perf_counter()
        step(engine)
        # Every third one replaces a checkpoint of the same name.
        save(engine, folder, "again" if engine.global_steps % 3 == 0 else None, background)
        # Starting a save in the background waits for the one before, which is then there.
        done, saved = (saved, engine.global_steps) if background else (engine.global_steps, saved)
        if dist.get_rank() == 0 and done:
            with open(diary, "w") as file:
                file.write(f"{done}\n")
        seconds = time.perf_counter() - clock
    engine.wait_for_checkpoints()
    dist.barrier()
    left = sorted(os.listdir(folder))
    assert len(left) == KEEP + 2, (
        f"the last {KEEP}, latest and zero_to_fp32.py, and nothing that the dead left: {left}"
    )
    return engine.global_steps, seconds


@pytest.mark.timeout(60 + 5 * KILLS)
def test_killed_at_any_instant(tmp_path: Path, victims: RankPool) -> None:
    folder, diary = str(tmp_path / "run"), tmp_path / "diary"
    diary.write_text("")
    _, seconds = victims.run(life, folder, str(diary), False, None, None)[0]
    draw = random.Random(0)
    for _ in range(KILLS):
        background, victim = draw.random() < 0.5, draw.choice([None, 0, 1])
        instant = draw.uniform(0.2, 4.0) * seconds
        with pytest.raises(RankFailure, match="process death"):
            victims.run(life, folder, str(diary), background, victim, instant)
    steps, _ = victims.run(life, folder, str(diary), False, None, None)[0]
    assert steps >= KILLS // 2, "the runs got on between kills"
