"""The engine's checkpoints: any number of ranks, preset and mesh loads any other's, and the run goes on the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import unishard
from unishard.errors import CheckpointError, RankError, StateError
from unishard.testing.models import TinyTransformer

Ranks = Callable[..., Any]
GLOBAL_BATCH = 12  # divides over 1, 2, 3 and 4 ranks


class Frozen(nn.Module):
    """Tied ends, a frozen block, a buffer, and one that no state dict shows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyTransformer(tied=True)
        self.frozen = nn.Linear(37, 37)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.full((3,), 0.5))
        self.register_buffer("hidden", torch.ones(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.frozen(self.body(tokens)) * self.scale.sum()


def config(preset: str, ranks: int, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // ranks,
        "sharding": preset,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_max_lr": 1e-2}},
    }
    if preset.startswith("HYBRID"):
        found["mesh"] = {"dp_replicate": 2, "dp_shard": ranks // 2}
    return {**found, **more}


def start(preset: str, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return unishard.initialize(model=Frozen(), config=config(preset, dist.get_world_size(), **more)).engine


def run(engine: Any, steps: range) -> list[float]:
    """Losses over all ranks."""
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        inputs = torch.randint(37, (GLOBAL_BATCH, 7), generator=draw).chunk(dist.get_world_size())[
            dist.get_rank()
        ]
        loss = engine(inputs).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def whole_state(engine: Any) -> dict[str, Tensor]:
    """Master weights and optimizer state by name, whole."""
    from unishard.testing.parity import _whole

    names = {id(p): name for name, p in engine.module.named_parameters()}
    found = {name: b.clone() for name, b in engine.module.named_buffers()}
    flats = engine.optimizer._flat._flats
    for group in engine.schedule.groups:
        kinds = {"": group.buffer.shard}
        kinds |= {name: flat for (owner, name), flat in flats.items() if owner is group}
        for kind, flat in kinds.items():
            for registration, value in zip(group.registrations, _whole(group, flat), strict=True):
                found[f"{names[id(registration.visible)]}/{kind}"] = value
    return found


def writes(folder: str, preset: str, background: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    engine = start(preset)
    run(engine, range(4))
    engine.save_checkpoint(folder, client_state={"note": [1, "two"]}, background=background)
    state = whole_state(engine)
    losses = run(engine, range(4, 7))
    engine.wait_for_checkpoints()
    return losses, state


def continues(folder: str, preset: str) -> tuple[list[float], dict[str, Tensor]]:
    engine = start(preset, seed=5)
    run(engine, range(2))  # a run of its own, which everything must replace
    path, client_state = engine.load_checkpoint(folder)
    assert path.endswith("global_step4")
    assert client_state == {"note": [1, "two"]}
    assert engine.global_steps == 4
    assert engine.global_samples == 4 * GLOBAL_BATCH
    run(engine, range(0))
    losses = run(engine, range(4, 7))
    return losses, {}


def test_the_same_layout_continues_bit_for_bit(tmp_path: Path, ranks: Ranks) -> None:
    expected, _ = ranks(writes, str(tmp_path), "ZERO3", True, world_size=2)[0]
    assert ranks(continues, str(tmp_path), "ZERO3", world_size=2)[0][0] == expected


def sixteen_bits(folder: str, dtype: str, save: bool) -> list[float]:
    engine = start("ZERO2", seed=0 if save else 3, **{dtype: {"enabled": True}})
    if save:
        run(engine, range(4))
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    assert engine.skipped_steps == (0 if dtype == "bf16" else engine.skipped_steps)
    return [engine.loss_scale, *run(engine, range(4, 7))]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_keep_masters_and_loss_scale(dtype: str, tmp_path: Path, ranks: Ranks) -> None:
    expected = ranks(sixteen_bits, str(tmp_path), dtype, True)[0]
    assert ranks(sixteen_bits, str(tmp_path), dtype, False)[0] == expected


def frozen_left_out(folder: str) -> None:
    engine = start("ZERO3")
    run(engine, range(1))
    engine.save_checkpoint(folder, "small", exclude_frozen_parameters=True)
    engine.save_checkpoint(folder, "whole", save_latest=False)
    dist.barrier()
    stored = unishard.checkpoint.inspect(Path(folder) / "small").tensors
    assert "model.frozen.weight" not in stored
    assert "model.frozen.weight" in unishard.checkpoint.inspect(Path(folder) / "whole").tensors
    assert "model.scale" in stored
    assert "model.hidden" not in stored
    assert sum(name.startswith("model.body") for name in stored) == sum(
        1 for _ in engine.module.body.parameters()
    ), "tied weights once"
    with unishard.gather(engine.module, modifier_rank=0):
        engine.module.frozen.weight.data.fill_(3.0)
        engine.module.body.positions.weight.data.fill_(3.0)
    engine.load_checkpoint(folder)
    with unishard.gather(engine.module):
        assert engine.module.frozen.weight.eq(3).all()
        assert not engine.module.body.positions.weight.eq(3).any()


def test_frozen_weights_are_saved_unless_left_out(tmp_path: Path, ranks: Ranks) -> None:
    ranks(frozen_left_out, str(tmp_path))


def other_model(folder: str) -> None:
    start("ZERO3").save_checkpoint(folder)
    torch.manual_seed(0)
    engine = unishard.initialize(model=TinyTransformer(vocabulary=38), config=config("ZERO3", 2)).engine
    before = engine.schedule.groups[0].buffer.shard.clone()
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder)
    text = str(caught.value)
    assert "model.tokens.weight" in text
    assert "missing -> (38, 12)" in text
    assert "model.frozen.weight" in text
    assert torch.equal(before, engine.schedule.groups[0].buffer.shard)


def test_another_model_is_refused_with_a_table(tmp_path: Path, ranks: Ranks) -> None:
    ranks(other_model, str(tmp_path))


def other_optimizer(folder: str) -> None:
    engine = start("ZERO3")
    run(engine, range(1))
    engine.save_checkpoint(folder)
    optimizer = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
    other = start("ZERO3", **optimizer)
    with pytest.raises(CheckpointError, match=r"exp_avg -> SGD keeps momentum_buffer"):
        other.load_checkpoint(folder)
    other.load_checkpoint(folder, load_optimizer_states=False)
    trainable = [p for p in (Frozen()).parameters() if p.requires_grad]
    torch.manual_seed(0)
    model = Frozen()
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trainable[:2]}, {"params": trainable[2:]}]
    split = unishard.initialize(model=model, model_parameters=groups, config=config("ZERO3", 2)).engine
    with pytest.raises(CheckpointError, match=r"1 groups -> 2 groups"):
        split.load_checkpoint(folder)


def test_another_optimizer_is_refused_with_a_table(tmp_path: Path, ranks: Ranks) -> None:
    ranks(other_optimizer, str(tmp_path))


def module_only(folder: str) -> None:
    engine = start("ZERO1")
    run(engine, range(3))
    engine.save_checkpoint(folder)
    other = start("ZERO3", seed=4)
    other.load_checkpoint(folder, load_module_only=True)
    assert other.global_steps == 0
    assert not other.optimizer.inner.state
    assert other.get_lr() != engine.get_lr()
    with unishard.gather(other.module), unishard.gather(engine.module):
        for a, b in zip(other.module.parameters(), engine.module.parameters(), strict=True):
            assert torch.equal(a, b)


def without_an_optimizer(folder: str) -> None:
    engine = start("ZERO3")
    run(engine, range(1))
    engine.save_checkpoint(folder)
    settings = config("ZERO3", dist.get_world_size())
    del settings["optimizer"], settings["scheduler"], settings["gradient_clipping"]
    reader = unishard.initialize(model=Frozen(), config=settings).engine
    reader.load_checkpoint(folder)
    assert reader.global_steps == 1
    with unishard.gather(reader.module), unishard.gather(engine.module):
        for a, b in zip(reader.module.parameters(), engine.module.parameters(), strict=True):
            assert torch.equal(a, b)


def test_an_engine_without_an_optimizer_loads(tmp_path: Path, ranks: Ranks) -> None:
    ranks(without_an_optimizer, str(tmp_path))


def test_weights_alone(tmp_path: Path, ranks: Ranks) -> None:
    ranks(module_only, str(tmp_path))


def kept(folder: str) -> list[str]:
    engine = start("ZERO2")
    for step in range(4):
        run(engine, range(step, step + 1))
        engine.save_checkpoint(folder, keep_last=2)
    dist.barrier()
    assert (Path(folder) / "latest").read_text() == "global_step4"
    return sorted(p.name for p in Path(folder).iterdir() if p.is_dir())


def test_the_last_ones_are_kept(tmp_path: Path, ranks: Ranks) -> None:
    assert ranks(kept, str(tmp_path)) == [["global_step3", "global_step4"]] * 2


def one_after_the_other(folder: str) -> None:
    from unishard.checkpoint import background

    engine = start("ZERO2")
    run(engine, range(1))
    original = background.finish

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return original(*args)

    background.finish = slow
    try:
        engine.save_checkpoint(folder, background=True)
        run(engine, range(1, 2))
        engine.save_checkpoint(folder, keep_last=1)
    finally:
        background.finish = original
    dist.barrier()
    assert (Path(folder) / "latest").read_text() == "global_step2"
    assert sorted(os.listdir(folder)) == ["global_step2", "latest", "zero_to_fp32.py"]


def test_a_save_waits_for_the_one_in_the_background(tmp_path: Path, ranks: Ranks) -> None:
    ranks(one_after_the_other, str(tmp_path))


def absent(folder: str) -> None:
    engine = start("ZERO2")
    assert engine.auto_resume(folder) is None
    with pytest.raises((CheckpointError, RankError), match="holds no checkpoint"):
        engine.load_checkpoint(folder)
    engine.save_checkpoint(folder, "one", client_state={"a": 1})
    with pytest.raises((CheckpointError, RankError), match=r"holds no checkpoint 'two'; there are one"):
        engine.load_checkpoint(folder, "two")
    assert engine.auto_resume(folder) == {"a": 1}
    with engine.no_sync(), pytest.raises(StateError, match="inside no_sync"):
        engine.save_checkpoint(folder)


def test_what_is_not_there_is_said(tmp_path: Path, ranks: Ranks) -> None:
    ranks(absent, str(tmp_path))


def sixteen_bit_file(folder: str, preset: str) -> None:
    engine = start(preset, bf16={"enabled": True})
    run(engine, range(2))
    engine.save_16bit_model(folder, "model.bin")
    dist.barrier()
    found = torch.load(Path(folder) / "model.bin", weights_only=True)
    assert found["body.head.weight"].dtype == torch.bfloat16
    assert set(found) == set(Frozen().state_dict())
    with unishard.gather(engine.module):
        for name, param in engine.module.named_parameters(remove_duplicate=False):
            assert torch.equal(found[name], param), name


@pytest.mark.parametrize("preset", ["ZERO1", "ZERO3"])
def test_one_file_for_inference(preset: str, tmp_path: Path, ranks: Ranks) -> None:
    ranks(sixteen_bit_file, str(tmp_path), preset)


def data_goes_on(folder: str, resume: bool) -> list[list[int]]:
    """Samples in the order the run saw them, over all ranks; the second half continues the first."""
    data = torch.arange(50)
    world = dist.get_world_size()
    settings = config("ZERO2", world)
    torch.manual_seed(0)
    engine, _, loader, _ = unishard.initialize(
        model=nn.Linear(1, 1), config=settings, training_data=[x.float()[None] for x in data]
    )
    if resume:
        engine.load_checkpoint(folder)
    seen: list[list[int]] = []
    while len(seen) < 6:
        for batch in loader:
            engine.backward(engine(batch).mean())
            engine.step()
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, batch.flatten().int().tolist())
            seen.append(sorted(sample for part in everyone for sample in part))
            if len(seen) == 3 and not resume:
                engine.save_checkpoint(folder)
            if len(seen) == 6:
                break
    return seen


@pytest.mark.parametrize("reads", [2, 3])
def test_data_goes_on_where_it_stopped(reads: int, tmp_path: Path, ranks: Ranks) -> None:
    whole = ranks(data_goes_on, str(tmp_path), False, world_size=2)[0]
    rest = ranks(data_goes_on, str(tmp_path), True, world_size=reads)[0]
    assert rest[:3] == whole[3:]


SCRIPT = """
import os, signal, sys, torch, unishard
folder = sys.argv[1]
torch.manual_seed(0)
engine = unishard.initialize(model=torch.nn.Linear(4, 4), config={
    "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {}}}).engine
engine.save_on_signal(folder)
engine.auto_resume(folder)
sys.stdout.write(f"from {engine.global_steps}\\n"); sys.stdout.flush()
for step in range(engine.global_steps, 1000):
    if step == 5 and torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    if step == 8:
        break
sys.stdout.write(f"to {engine.global_steps}\\n"); sys.stdout.flush()
"""


def test_a_signal_on_one_rank_saves_on_all_and_leaves(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def launch() -> str:
        done = subprocess.run(
            [*command, str(script), str(tmp_path / "out")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = launch()
    assert first.count("from 0") == 2
    assert "to" not in first
    assert (tmp_path / "out" / "latest").read_text() == "global_step6"
    second = launch()
    assert second.count("from 6") == 2
    assert second.count("to 9") == 2


def test_signals_are_known() -> None:
    assert {signal.SIGTERM, signal.SIGUSR1} <= set(signal.Signals)
