"""Runs of FSDP2, saved by torch.distributed.checkpoint, and runs of the engine continue each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.checkpoint.convert import runs
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import unishard
from unishard.checkpoint.convert import compare, convert, open_checkpoint, verify
from unishard.errors import CorruptCheckpointError

Ranks = Callable[..., Any]
PLAIN = {"gradient_clipping": 0.0, "scheduler": None}


def fsdp2(seed: int) -> tuple[Any, torch.optim.Optimizer]:
    from torch.distributed.fsdp import fully_shard

    model: Any = runs.build(seed)
    parameters = runs.groups(model)
    for child in (model.up, model.down):
        fully_shard(child)
    fully_shard(model)
    names = dict(model.named_parameters())
    trained = [p for p in names.values() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() < 2]
    parameters = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, weight_decay=0.1)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = model(runs.batch(step)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(runs.mean(loss))
    return losses


def content(model: Any, optimizer: Any, names: tuple[str, str], flatten: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {names[0]: state, names[1]: optimizer_state, "epoch": 7}


def fsdp2_writes(folder: str, names: tuple[str, str], flatten: bool) -> list[float]:
    model, optimizer = fsdp2(0)
    train(model, optimizer, runs.BEFORE)
    dcp.save(content(model, optimizer, names, flatten), checkpoint_id=folder)
    return train(model, optimizer, runs.AFTER)


def fsdp2_continues(folder: str) -> list[float]:
    model, optimizer = fsdp2(5)
    train(model, optimizer, range(1))
    found = content(model, optimizer, ("model", "optim"), False)
    del found["epoch"]
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optim"])
    return train(model, optimizer, runs.AFTER)


def engine(seed: int, stage: int) -> Any:
    model = runs.build(seed)
    settings = {k: v for k, v in runs.config(stage, "fp32", **PLAIN).items() if v is not None}
    return unishard.initialize(model=model, model_parameters=runs.groups(model), config=settings).engine


def engine_continues(folder: str, stage: int) -> list[float]:
    running = engine(5, stage)
    runs.train(running, range(1))
    _, client_state = running.load_checkpoint(folder)
    assert client_state == {"epoch": 7}
    assert running.optimizer.inner.param_groups[1]["weight_decay"] == 0
    return runs.train(running, runs.AFTER)


def engine_writes(folder: str) -> list[float]:
    running = engine(0, 3)
    runs.train(running, runs.BEFORE)
    running.save_checkpoint(folder, client_state={"epoch": 7})
    return runs.train(running, runs.AFTER)


@pytest.mark.parametrize(
    ("names", "flatten"),
    [(("model", "optim"), False), (("app.model", "app.optimizer"), False), (("m", "o"), True)],
)
def test_the_engine_continues_what_fsdp2_wrote(
    names: tuple[str, str], flatten: bool, tmp_path: Path, ranks: Ranks
) -> None:
    folder = str(tmp_path / "dcp")
    expected = ranks(fsdp2_writes, folder, names, flatten, world_size=2)[0]
    found = ranks(engine_continues, folder, 3, world_size=2)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert not open_checkpoint(folder).notes
    convert(folder, tmp_path / "ours", "unishard")
    assert list(compare(open_checkpoint(folder), open_checkpoint(tmp_path / "ours"))) == []
    assert ranks(engine_continues, str(tmp_path / "ours"), 2, world_size=1)[0] == pytest.approx(
        expected, rel=1e-5
    )


def test_fsdp2_continues_what_the_engine_wrote(tmp_path: Path, ranks: Ranks) -> None:
    """As it is, and as a plain DCP folder."""
    expected = ranks(engine_writes, str(tmp_path / "ours"), world_size=2)[0]
    convert(tmp_path / "ours", tmp_path / "dcp", "dcp")
    for folder in (tmp_path / "dcp", tmp_path / "ours" / f"global_step{runs.STEPS}"):
        for found in ranks(fsdp2_continues, str(folder), world_size=2):
            assert found == pytest.approx(expected, rel=1e-5)
    files = {p.name for p in (tmp_path / "dcp").iterdir()}
    assert files == {".metadata", "__0_0.distcp"}


def save_two(folder: str) -> None:
    dcp.save(
        {"model": {"w": torch.arange(1000.0)}, "n": torch.ones(dist.get_rank() + 5)}, checkpoint_id=folder
    )


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_is_named(how: str, tmp_path: Path, ranks: Ranks) -> None:
    ranks(save_two, str(tmp_path / "dcp"), world_size=1)
    file = tmp_path / "dcp" / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    opened = open_checkpoint(tmp_path / "dcp")
    assert list(verify(opened)) == []
    chunk = opened.catalog.tensors["model.w"].chunks[0]
    if how == "flipped":
        raw[chunk.offset + chunk.length // 2] ^= 1
    file.write_bytes(raw if how == "flipped" else raw[: chunk.offset + 100])
    if how == "missing":
        file.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"__0_0.distcp.*model\.w"):
        convert(tmp_path / "dcp", tmp_path / "out", "unishard")
