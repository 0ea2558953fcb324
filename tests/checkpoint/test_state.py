"""Nested states: saved, loaded by us and by torch.distributed.checkpoint, and the reverse; damage is named."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import unishard
from unishard import checkpoint
from unishard.checkpoint import commit
from unishard.errors import CheckpointError, CorruptCheckpointError, RankError

Ranks = Callable[..., Any]


def state(seed: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    return {
        "model": {
            "w": random(70, 5),
            "b": random(3).bfloat16(),
            "scalar": random(1)[0],
            "empty": torch.zeros(0, 4),
        },
        "optim": {
            "state": {"w": {"exp_avg": random(70, 5), "step": torch.tensor(float(seed))}},
            "param_groups": [{"lr": seed / 10, "betas": (0.9, 0.99), "params": ["w"]}],
        },
        "epoch": seed,
        "nested.dots": {"a.b": [1, 2, seed]},
    }


def same(a: Any, b: Any) -> None:
    """Equal bit for bit."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            same(left, right)
    else:
        assert a == b


def test_a_round_trip(tmp_path: Path) -> None:
    saved, target = state(1), state(2)
    pointer = target["model"]["w"].data_ptr()
    folder = checkpoint.save(saved, tmp_path / "one")
    checkpoint.load(target, folder)
    same(target, saved)
    assert target["model"]["w"].data_ptr() == pointer, "tensors are filled where they are"
    assert {p.name for p in folder.iterdir()} == {"__0_0.distcp", ".metadata", "manifest.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    same(checkpoint.read_tensor(folder, "model.w"), saved["model"]["w"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_ours_and_we_read_torchs(tmp_path: Path) -> None:
    saved = state(1)
    checkpoint.save(saved, tmp_path / "ours")
    target = state(2)
    dcp.load(target, checkpoint_id=tmp_path / "ours")
    same(target, saved)
    dcp.save(saved, checkpoint_id=tmp_path / "torchs")
    target = state(3)
    checkpoint.load(target, tmp_path / "torchs")
    same(target, saved)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_views_that_torch_saved_with_their_whole_storage(tmp_path: Path) -> None:
    base = torch.randn(1000, 8)
    saved = {"row": base[5], "transposed": base[:3].t(), "plain": base[:2]}
    dcp.save(saved, checkpoint_id=tmp_path / "torchs")
    target = {name: torch.zeros_like(value) for name, value in saved.items()}
    checkpoint.load(target, tmp_path / "torchs")
    same(target, {name: value.clone() for name, value in saved.items()})


def test_a_background_save_keeps_the_values_it_was_given(tmp_path: Path) -> None:
    """Trap 22: what changes after the call must not show."""
    value = torch.arange(2_000_000.0)
    pending = checkpoint.async_save({"w": value}, tmp_path / "one")
    value.fill_(-1.0)
    folder = pending.result()
    assert pending.done()
    same(checkpoint.read_tensor(folder, "w"), torch.arange(2_000_000.0))


def test_background_saves_in_a_row_share_one_copy_and_mix_nothing(tmp_path: Path) -> None:
    """Values of other dtypes, sizes and numbers from save to save, each started while the one before may be running."""
    states = [
        {"a": torch.full((700_000,), 1.0), "b": torch.arange(33, dtype=torch.int64)},
        {"a": torch.full((700_000,), 2.0), "b": torch.arange(33, dtype=torch.int64) + 1},
        {"c": torch.full((3, 5), 3.0, dtype=torch.bfloat16), "a": torch.full((900_001,), 4.0)},
    ]
    expected = [{key: value.clone() for key, value in state.items()} for state in states]
    pending = []
    for number, state in enumerate(states):
        pending.append(checkpoint.async_save(state, tmp_path / str(number)))
        for value in state.values():
            value.zero_()
    assert pending[0].staging is pending[1].staging is pending[2].staging
    for save, state in zip(pending, expected, strict=True):
        for key, value in state.items():
            same(checkpoint.read_tensor(save.result(), key), value)


def test_large_tensors_are_cut_into_chunks_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unishard.checkpoint import storage

    monkeypatch.setattr(storage, "_LARGEST_CHUNK", 40_000)
    saved = {"w": torch.randn(1000, 33), "flat": torch.randn(50_000)}
    folder = checkpoint.save(saved, tmp_path / "one")
    catalog = checkpoint.inspect(folder)
    assert len(catalog.tensors["w"].chunks) == 4
    target = {name: torch.zeros_like(value) for name, value in saved.items()}
    checkpoint.load(target, folder)
    same(target, saved)


def test_what_does_not_fit_is_listed_before_anything_changes(tmp_path: Path) -> None:
    folder = checkpoint.save(
        {"a": torch.ones(2, 3), "b": torch.ones(1), "c": torch.ones(4)}, tmp_path / "one"
    )
    target = {"a": torch.zeros(3, 2), "b": torch.zeros(1), "d": torch.zeros(5)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(target, folder)
    text = str(caught.value)
    assert "a  (2, 3) -> (3, 2)" in text
    assert "c  (4,) -> unexpected" in text
    assert "d  missing -> (5,)" in text
    assert "\n  b" not in text
    assert target["b"].item() == 0
    with pytest.raises(CheckpointError, match=r"a  \(2, 3\) -> \(3, 2\)") as caught:
        checkpoint.load(target, folder, strict=False)
    assert "missing" not in str(caught.value)
    checkpoint.load({"b": target["b"], "d": target["d"]}, folder, strict=False)
    assert target["b"].item() == 1


def damage(folder: Path, how: str) -> None:
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    chunk = checkpoint.inspect(folder).tensors["w"].chunks[0]
    if how == "flipped":
        content[(chunk.data or 0) + 1_500_000] ^= 4
        file.write_bytes(content)
    elif how == "truncated":
        file.write_bytes(content[:-100])
    elif how == "missing":
        file.unlink()
    elif how == "manifest":
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-50])
    elif how == "foreign":
        (folder / "__7_0.distcp").write_bytes(b"of another checkpoint")
    elif how == "grown":
        file.write_bytes(content + b"x")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flipped", r"__0_0.distcp: the bytes of w near 1\d{6} are not those"),
        ("truncated", r"__0_0.distcp \(with w\) has \d+ bytes instead of \d+"),
        ("grown", r"__0_0.distcp \(with w\) has \d+ bytes instead of \d+"),
        ("missing", r"__0_0.distcp \(with w\) is missing"),
        ("foreign", "__7_0.distcp is not of this checkpoint; move it away"),
        ("manifest", "manifest.json is damaged"),
    ],
)
def test_damage_is_named(how: str, message: str, tmp_path: Path) -> None:
    folder = checkpoint.save({"w": torch.randn(500_000)}, tmp_path / "one")
    damage(folder, how)
    with pytest.raises(CorruptCheckpointError, match=message):
        checkpoint.load({"w": torch.zeros(500_000)}, folder)


def test_no_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: neither .* but notes.txt"):
        checkpoint.load({}, tmp_path)


def test_an_existing_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        folder = checkpoint.save({"w": torch.full((3,), value)}, tmp_path / "one")
    same(checkpoint.read_tensor(folder, "w"), torch.full((3,), 2.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]


@pytest.mark.parametrize("tag", ["a/b", "..", "", ".hidden", "latest"])
def test_tags_that_are_no_names_are_refused(tag: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be a folder's name"):
        commit.new_draft(tmp_path, tag)


def test_drafts_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    mine = commit.new_draft(tmp_path, "one")
    host = socket.gethostname()
    dead = tmp_path / f".two.part-{host}-999999999-0123456789ab"
    old = tmp_path / f".two.old-{host}-999999999-0123456789ab"
    elsewhere = tmp_path / ".two.part-another-host-1-ba9876543210"
    for folder in (dead, old, elsewhere):
        folder.mkdir()
    pointer = tmp_path / f".latest-{host}-999999999-0123456789ab"
    pointer.touch()
    commit.new_draft(tmp_path, "three")
    assert mine.exists()
    assert elsewhere.exists()
    assert not any(path.exists() for path in (dead, old, pointer))


def test_drafts_are_no_checkpoints(tmp_path: Path) -> None:
    """Also whole ones, of a process that died just before it named them, and old ones that are being removed."""
    folder = checkpoint.save({"w": torch.ones(1)}, tmp_path / "one")
    for name in (".two.part-0123456789ab", ".zero.old-0123456789ab"):
        shutil.copytree(folder, tmp_path / name)
    assert [tag for _, tag in commit.committed(tmp_path)] == ["one"]
    commit.retain(tmp_path, 1)
    assert folder.exists()


def test_what_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    """A process that dies between the two renames, where there is no exchange in one step."""
    folder = checkpoint.save({"w": torch.ones(1)}, tmp_path / "one")
    folder.rename(tmp_path / ".one.old-0123456789ab")
    assert commit.find(tmp_path, "one") == folder
    assert checkpoint.read_tensor(folder, "w").item() == 1


# several ranks -------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x * self.scale.sum()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        loss = model(torch.randint(11, (4, 3), generator=draw)).pow(2).mean()  # the same batch on all ranks
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def build(fully_shard: Any, seed: int) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: Any = Model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def code_door_writes(folder: str, theirs: bool) -> list[float]:
    from torch.distributed.fsdp import fully_shard as torchs

    model, optimizer = build(torchs if theirs else unishard.fully_shard, 0)
    train(model, optimizer, range(3))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    content = {"model": model_state, "optim": optimizer_state, "step": 3}
    if theirs:
        dcp.save(content, checkpoint_id=folder)
    else:
        checkpoint.save(content, folder)
    return train(model, optimizer, range(3, 6))


def code_door_continues(folder: str, theirs: bool) -> list[float]:
    from torch.distributed.fsdp import fully_shard as torchs

    model, optimizer = build(torchs if theirs else unishard.fully_shard, 7)
    train(model, optimizer, range(1))  # so that there is state to fill
    model_state, optimizer_state = get_state_dict(model, optimizer)
    content = {"model": model_state, "optim": optimizer_state, "step": 0}
    if theirs:
        dcp.load(content, checkpoint_id=folder)
    else:
        checkpoint.load(content, folder)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optim"])
    assert content["step"] == 3
    return train(model, optimizer, range(3, 6))


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "torchs"])
@pytest.mark.parametrize("reader", ["ours", "torchs"])
@pytest.mark.parametrize(("wrote", "reads"), [(2, 3), (3, 2), (1, 2), (4, 1)])
def test_runs_of_the_code_door_and_of_fsdp2_continue_each_other(
    theirs: bool, reader: str, wrote: int, reads: int, tmp_path: Path, ranks: Ranks
) -> None:
    folder = str(tmp_path / "one")
    expected = ranks(code_door_writes, folder, theirs, world_size=wrote)[0]
    found = ranks(code_door_continues, folder, reader == "torchs", world_size=reads)
    for losses in found:
        assert losses == pytest.approx(expected, rel=1e-5)


def one_rank_fails(folder: str, background: bool) -> None:
    """A rank that cannot write, or dies of its own error, is everybody's error, and nothing is left."""
    from unishard.checkpoint import storage

    original = storage.RankFile.add_tensor

    def fail(self: Any, *args: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        original(self, *args)

    storage.RankFile.add_tensor = fail
    content = {"w": torch.ones(10_000), "v": torch.ones(10_000)}
    try:
        with pytest.raises((OSError, RankError), match="No space left on device"):
            if background:
                checkpoint.async_save(content, folder).result()
            else:
                checkpoint.save(content, folder)
    finally:
        storage.RankFile.add_tensor = original
    dist.barrier()
    assert not os.path.exists(folder)
    left = os.listdir(os.path.dirname(folder))
    assert left == [], left
    dist.barrier()
    checkpoint.save(content, folder)
    checkpoint.load(content, folder)


@pytest.mark.parametrize("background", [False, True])
def test_one_rank_fails_all_fail(background: bool, tmp_path: Path, ranks: Ranks) -> None:
    ranks(one_rank_fails, str(tmp_path / "one"), background, world_size=3)


def writes_its_share(folder: str) -> int:
    """Replicated tensors are written once, by all ranks together."""
    checkpoint.save({"w": torch.arange(100_000.0).reshape(1000, 100), "small": torch.ones(3)}, folder)
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    return manifest["files"][f"__{dist.get_rank()}_0.distcp"]


def test_copies_are_written_once_and_evenly(tmp_path: Path, ranks: Ranks) -> None:
    sizes = ranks(writes_its_share, str(tmp_path / "one"), world_size=4)
    assert sum(sizes) < 1.02 * 400_000
    assert max(sizes) < 1.05 * 100_000 + 3000
