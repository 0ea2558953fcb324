"""What DeepSpeed's scripts read out of checkpoints and optimizers: flat states, whole weights, files by rank."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unishard.checkpoint.convert import open_checkpoint
from unishard.deepspeed.parts.checkpoint_files import ZeROCheckpoint, merge_state, model_3d_desc
from unishard.deepspeed.parts.consolidation import main as to_torch
from unishard.errors import CheckpointError, StateError

deepspeed: Any = importlib.import_module("unishard.deepspeed")


class Net(nn.Module):
    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(width, width), nn.Linear(width, 3), nn.Linear(3, 1)
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.tied(self.first(x))))


def engine_of(stage: int, model: nn.Module | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    model = Net() if model is None else model
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
        **more,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train(engine: Any, steps: int) -> None:
    for seed in range(steps):
        x = torch.randn(2, 10, generator=torch.Generator().manual_seed(seed))
        engine.backward(engine(x.to(next(engine.module.parameters()).dtype)).square().mean())
        engine.step()


# optimizer state ----------------------------------------------------------------------------------------------


def _gathered(value: torch.Tensor) -> torch.Tensor:
    parts = [torch.zeros_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, value)
    return torch.cat(parts)


def _flat_moments(stage: int) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """The first moments of one layer end to end, as gathered by hand and as each parameter has them."""
    engine = engine_of(stage, nn.Linear(10, 10))
    train(engine, 2)
    state = engine.optimizer.optimizer.state_dict()
    ((number, kinds),) = state["state"].items()
    wholes = [deepspeed.utils.safe_get_full_optimizer_state(p, "exp_avg") for p in engine.module.parameters()]
    expected = torch.cat([whole.flatten() for whole in wholes])
    groups = [group["params"] for group in state["param_groups"]]
    return _gathered(kinds["exp_avg"]), expected, float(kinds["step"]), groups == [[number]]


@pytest.mark.parametrize("size", [2, 3])
def test_flat_state_of_all_ranks_is_that_of_the_parameters(ranks, size):
    for stage in (1, 3):
        for gathered, expected, step, alone in ranks(_flat_moments, stage, world_size=size):
            assert torch.equal(gathered[: expected.numel()], expected)
            assert not gathered[expected.numel() :].any()
            assert (step, alone) == (2.0, True)


def _comes_back(stage: int) -> None:
    saved, loaded = engine_of(stage), engine_of(stage)
    train(saved, 2)
    inner = saved.optimizer.optimizer.state_dict()
    assert {value.numel() for value in inner["state"][0].values()} - {1} == {
        flat.numel() for flat in saved.optimizer.state_dict()[saved.optimizer._MASTERS]
    }
    loaded.optimizer.load_state_dict(saved.optimizer.state_dict())
    for engine in (saved, loaded):
        train(engine, 1)
    for name, value in saved.module_state_dict().items():
        assert torch.equal(value, loaded.module_state_dict()[name]), name
    with pytest.raises(StateError, match="not a state dict"):
        loaded.optimizer.load_state_dict({})


def test_an_optimizer_goes_on_from_its_flat_state(ranks):
    for stage in (1, 3):
        ranks(_comes_back, stage)


def _counts_differ() -> list[int]:
    class Half(Net):
        def forward(self, x: torch.Tensor, whole: bool = True) -> torch.Tensor:
            return super().forward(x) if whole else self.first(x)

    engine = engine_of(1, Half())
    for whole in (True, False):
        engine.backward(engine(torch.ones(2, 10), whole).square().mean())
        engine.step()
    return [len(group["params"]) for group in engine.optimizer.optimizer.state_dict()["param_groups"]]


def test_state_stays_apart_where_parameters_took_different_steps(ranks):
    assert max(count for (count,) in ranks(_counts_differ)) > 1


# weights ------------------------------------------------------------------------------------------------------


def _written_by_all(folder: str) -> dict[str, torch.Tensor]:
    engine = engine_of(3, bf16={"enabled": True})
    train(engine, 1)
    engine.save_checkpoint(folder)
    assert {"zero_to_fp32.py", "zero_to_torch.py"} <= set(os.listdir(folder))
    convert = deepspeed.utils.zero_to_fp32.convert_zero_checkpoint_to_state_dict
    Path(folder, "out").mkdir(exist_ok=True)
    Path(folder, "out", "config.json").write_text("{}")
    # As scripts do, from every rank at once, and over what is there.
    convert(folder, f"{folder}/out", dtype="bf16", max_shard_size="200B")
    convert(folder, f"{folder}/out", dtype=torch.bfloat16, max_shard_size="200B")
    return engine.module_state_dict()


def test_weights_in_another_dtype_and_in_shards(ranks, tmp_path):
    expected, _ = ranks(_written_by_all, str(tmp_path))
    shards = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert shards[0] == "config.json"
    assert shards[-1] == "pytorch_model.bin.index.json"
    assert len(shards) > 3
    found: dict[str, torch.Tensor] = {}
    for name in shards[1:-1]:
        found |= torch.load(tmp_path / "out" / name, weights_only=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], value), name
    assert found["tied.weight"] is found["first.weight"]


def test_the_script_for_a_dtype(ranks, tmp_path, monkeypatch):
    ranks(_written_by_all, str(tmp_path))
    to_torch([str(tmp_path), str(tmp_path / "half"), "--dtype", "fp16", "--safe_serialization"])
    assert [p.name for p in (tmp_path / "half").iterdir()] == ["model.safetensors"]
    to_torch([str(tmp_path), str(tmp_path / "w.bin"), "--dtype", "fp32", "--exclude_frozen_parameters"])
    assert not any("frozen" in name for name in torch.load(tmp_path / "w.bin", weights_only=True))
    module = deepspeed.utils.zero_to_fp32
    with pytest.raises(ValueError, match="Unsupported output dtype 'int8'"):
        module.to_torch_tensor({}, dtype="int8")
    one = torch.ones(2)
    made = module.to_torch_tensor({"a": one, "b": one}, return_empty_tensor=True, dtype="bf16")
    assert made["a"] is made["b"]
    monkeypatch.setattr(module, "get_fp32_state_dict_from_zero_checkpoint", lambda *_, **__: {"a": one})
    module.convert_zero_checkpoint_to_fp32_state_dict("nowhere", tmp_path / "patched", max_shard_size=None)
    assert torch.load(tmp_path / "patched" / "pytorch_model.bin", weights_only=True).keys() == {"a"}


def _model_states(folder: str) -> dict[str, torch.Tensor]:
    model = Net()
    model.register_buffer("count", torch.tensor(7))
    engine = engine_of(1, model, bf16={"enabled": True})
    # Twice, so that the second has the place of the first.
    engine.save_checkpoint(folder, tag="one", exclude_frozen_parameters=True)
    train(engine, 2)
    engine.save_checkpoint(folder, tag="one", client_state={"epoch": 5})
    engine.save_checkpoint(folder, tag="two", exclude_frozen_parameters=True)
    engine_of(3).save_checkpoint(folder, tag="three")
    return engine.module_state_dict()


def test_model_states_are_loaded_out_of_the_shards(ranks, tmp_path):
    expected, _ = ranks(_model_states, str(tmp_path))
    name = deepspeed.checkpoint.utils.get_model_ckpt_name_for_rank
    file = Path(name(str(tmp_path / "one"), "00"))
    assert file.stat().st_size < 4096
    state = torch.load(file, weights_only=False)
    assert (state["epoch"], state["global_steps"]) == (5, 2)
    assert state["module"].keys() == expected.keys()
    for key, value in expected.items():
        assert state["module"][key].dtype == value.dtype
        assert torch.equal(state["module"][key], value), key
    assert state["module"]["tied.weight"] is state["module"]["first.weight"]
    fewer = torch.load(name(str(tmp_path / "two"), "00"), weights_only=False)["module"]
    assert fewer.keys() == {key for key in expected if "frozen" not in key}
    assert not Path(name(str(tmp_path / "three"), "00")).exists()
    assert open_checkpoint(tmp_path, tag="one").format == "unishard"
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="one, which is not there"):
        torch.load(tmp_path / "elsewhere" / file.name, weights_only=False)


# files by rank ------------------------------------------------------------------------------------------------


def test_files_are_dealt_out_to_fewer_ranks():
    grid = model_3d_desc(2, 2, 2)
    assert grid.reshape(model_3d_desc(1, 1, 1))[0].get_data() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert [m.get_data(1, 0) for m in grid.reshape(grid)] == [[2], [6]]
    two = grid.reshape(model_3d_desc(2, 1, 1))[0]
    assert two.get_data(pp_index=0) == two.get_data(0, 0) == [0, 4, 1, 5]
    assert grid.can_reshape(model_3d_desc(3, 2, 2)) == (False, ["pp cannot grow from 2 to 3"])
    with pytest.raises(AssertionError, match="dp cannot grow"):
        grid.reshape(model_3d_desc(1, 1, 4))
    with pytest.raises(AssertionError, match="3 files cannot be dealt out to 2 ranks"):
        model_3d_desc(1, 1, 3).reshape(model_3d_desc(1, 1, 2))
    assert grid.is_valid(0, 2, 0) == (False, ["tp index 2 is not below 2"])


def _files(folder: Path, told: list[Any]) -> None:
    for rank, dimensions in enumerate(told):
        state = {} if dimensions is None else {"checkpoint_parallel_dimensions": dimensions}
        torch.save(state, folder / f"mp_rank_{rank:02d}_model_states.pt")
    for rank in range(2):
        step = torch.tensor(3.0)
        inner = {"state": {0: {"step": step, "exp_avg": torch.full((4,), float(rank))}}}
        optimizer = {"base_optimizer_state": inner, "group_paddings": [rank], "partition_count": [2]}
        torch.save(
            {"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )


def test_states_of_several_ranks_become_one(tmp_path):
    _files(tmp_path, [None])
    checkpoint = ZeROCheckpoint(str(tmp_path))
    assert (checkpoint.get_src_pp_degree(), checkpoint.get_src_dp_degree()) == (1, 2)
    checkpoint.reshape(model_3d_desc())
    state = checkpoint.get_state_for_rank(0, 0, 0)["optimizer_state_dict"]
    assert state["base_optimizer_state"]["state"][0]["exp_avg"].tolist() == [0.0] * 4 + [1.0] * 3
    assert state["base_optimizer_state"]["state"][0]["step"] == 3
    assert (state["group_paddings"], state["partition_count"]) == ([0], [1])
    with pytest.raises(AssertionError, match="no files of a ZeRO optimizer"):
        ZeROCheckpoint(str(tmp_path.parent))
    with pytest.raises(ValueError, match=r"a\.b: Cannot merge lists of different lengths, 2 and 1"):
        merge_state({"a": {"b": [1, 2]}}, {"a": {"b": [1]}})
    with pytest.raises(ValueError, match="cannot merge a int with a str"):
        merge_state({"a": 1}, {"a": "1"})


def test_model_files_must_agree_on_degrees(tmp_path):
    two, other = {"pp_degree": 2, "tp_degree": 1}, {"pp_degree": 1, "tp_degree": 2}
    describe = deepspeed.checkpoint.get_model_3d_descriptor
    _files(tmp_path, [two, two])
    assert describe(str(tmp_path))._degrees() == (2, 1, 1)
    for told, said in (([two, None], "missing"), ([two, other], "disagrees")):
        _files(tmp_path, told)
        with pytest.raises(RuntimeError, match=f"{said}.*across|{said} from model-state files"):
            describe(str(tmp_path))
