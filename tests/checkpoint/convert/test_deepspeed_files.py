"""Files for DeepSpeed's own loader, read back without DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.checkpoint.convert.test_files import ours

from unishard.checkpoint.convert import Options, compare, convert, open_checkpoint


@pytest.mark.parametrize("size", [1, 3, 13])
def test_deepspeeds_own_files_at_any_number_of_ranks(size: int, tmp_path: Path) -> None:
    ours(tmp_path)
    done = convert(tmp_path / "ours", tmp_path / "out", "deepspeed", Options(ranks=size))
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
