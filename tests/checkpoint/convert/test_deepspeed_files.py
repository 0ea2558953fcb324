"""Files for DeepSpeed's own loader, read back without DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.checkpoint.convert import runs
from tests.checkpoint.convert.test_files import ours

import unishard
from unishard.checkpoint.convert import Options, compare, convert, open_checkpoint
from unishard.errors import CheckpointError


@pytest.mark.parametrize("size", [1, 3, 13])
def test_deepspeeds_own_files_at_any_number_of_ranks(size: int, tmp_path: Path) -> None:
    ours(tmp_path)
    done = convert(tmp_path / "ours", tmp_path / "out", "deepspeed", Options(ranks=size, zero_stage=2))
    assert f"on {size} ranks" in done.notes[0]
    files = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(size)]
    assert sorted(p.name for p in done.path.iterdir()) == sorted(["mp_rank_00_model_states.pt", *files])
    found = open_checkpoint(tmp_path / "out")
    assert found.format == "deepspeed"
    assert list(compare(open_checkpoint(tmp_path / "ours"), found)) == []
    model = torch.load(done.path / "mp_rank_00_model_states.pt", weights_only=True)
    assert model["module"]["head.weight"] is model["module"]["embed.weight"]
    assert set(model["frozen_param_fragments"]) == set(model["frozen_param_shapes"])
    lengths = {
        tuple(part["exp_avg"].numel() for part in load["base_optimizer_state"]["state"].values())
        for name in files
        for load in [torch.load(done.path / name, weights_only=True)["optimizer_state_dict"]]
    }
    assert len(lengths) == 1
    assert all(length % 2 == 0 for length in lengths.pop())


@pytest.mark.parametrize("size", [1, 3])
def test_files_of_stage_3_at_any_number_of_ranks(size: int, tmp_path: Path) -> None:
    model = runs.build()
    settings = runs.config(3, "fp32", zero={"sub_group_size": 300})
    engine = unishard.initialize(model=model, model_parameters=runs.groups(model), config=settings).engine
    runs.train(engine, range(1))
    engine.save_checkpoint(tmp_path / "ours")
    options = Options(ranks=size, tag="here")
    done = convert(tmp_path / "ours", tmp_path / "out", "deepspeed", options)
    assert "under ZeRO-3" in done.notes[0]
    kinds = ("model", "optim")
    files = [f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in range(size) for kind in kinds]
    assert sorted(p.name for p in done.path.iterdir()) == files
    found = open_checkpoint(tmp_path / "out")
    assert found.catalog.about["zero_stage"] == 3
    assert list(compare(open_checkpoint(tmp_path / "ours"), found)) == []
    model = torch.load(done.path / files[0], weights_only=True)
    assert model["module"]["head.weight"].shape == model["module"]["embed.weight"].shape == (0,)
    assert model["buffer_names"] == ["scale"]
    assert len(model["param_shapes"]) == {1: 3, 3: 2}[size]


def test_what_deepspeeds_files_cannot_hold_is_refused(tmp_path: Path) -> None:
    ours(tmp_path)
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    for source, options, message in (
        ("ours", Options(ranks=0), "are of one number of ranks, and ranks=0"),
        ("ours", Options(zero_stage=4), "zero_stage=4: DeepSpeed's files are of stage 1, 2 or 3"),
        ("ours", Options(zero_stage=3), "does not say which weights are frozen"),
        ("w.pt", Options(ranks=2), "has no optimizer state"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / source, tmp_path / "out", "deepspeed", options)
    assert not list((tmp_path / "out").glob("*"))
