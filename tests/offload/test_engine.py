"""Offload through the configuration: what it trains, what it holds in memory, and what happens when a tier fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unishard
from unishard.config import resolve
from unishard.errors import ConfigError, OffloadError, RankError, UnsupportedError
from unishard.sharding.resting import is_absent
from unishard.testing.models import TinyTransformer
from unishard.testing.tiers import resting_late

Ranks = Callable[..., Any]


def config(**more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "sharding": "ZERO3",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3}},
        **more,
    }


def nvme(folder: str, *sections: str, **more: Any) -> dict[str, Any]:
    return {section: {"device": "nvme", "nvme_path": folder, **more} for section in sections}


def engine_of(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return unishard.initialize(model=TinyTransformer(), config=config(**more)).engine


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        loss = engine(torch.randint(37, (2, 7), generator=draw)).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def losses_with(zero: dict[str, Any], **more: Any) -> list[float]:
    return train(engine_of(zero_optimization=zero, **more), 4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_disk_trains_as_memory_does_to_the_bit(dtype: str, tmp_path: Path, ranks: Ranks) -> None:
    more = {"bf16": {"enabled": True}} if dtype == "bf16" else {}
    expected = ranks(losses_with, {}, world_size=2, **more)
    zero = nvme(str(tmp_path), "offload_optimizer", "offload_param")
    assert ranks(losses_with, zero, world_size=2, **more) == expected
    assert ranks(losses_with, nvme(str(tmp_path), "offload_optimizer"), world_size=2, **more) == expected
    assert ranks(losses_with, zero, world_size=2, optimizer_in_backward=True, **more) == expected


def names_that_rest(zero: dict[str, Any]) -> tuple[dict[str, set[str]], list[bool]]:
    engine = engine_of(zero_optimization=zero)
    train(engine, 1)
    kinds = {g.name: set(g.resting.kinds) for g in engine.schedule.groups if g.resting is not None}
    state = engine.optimizer.state.values()
    return kinds, [is_absent(s["exp_avg"]) for s in state if s["exp_avg"].numel() > 1]


def test_a_ratio_leaves_the_last_groups(tmp_path: Path, ranks: Ranks) -> None:
    zero = nvme(str(tmp_path), "offload_optimizer", ratio=0.5)
    kinds, away = ranks(names_that_rest, zero, world_size=1)[0]
    assert 0 < sum(away) < len(away)
    assert all(found == {"exp_avg", "exp_avg_sq"} for found in kinds.values())


def test_everything_else_is_not_in_memory(tmp_path: Path, ranks: Ranks) -> None:
    zero = nvme(str(tmp_path), "offload_optimizer", "offload_param")
    kinds, away = ranks(names_that_rest, zero, world_size=2)[0]
    assert all(away)
    assert all(found == {"shard", "exp_avg", "exp_avg_sq"} for found in kinds.values())


def where_shards_rest(zero: dict[str, Any]) -> tuple[list[float], set[str]]:
    engine = engine_of(zero_optimization=zero)
    losses = train(engine, 3)
    tier = engine.schedule.groups[0].tiers.parameter
    return losses, {tier.home(key).name for key in tier.keys()}  # noqa: SIM118


def test_some_shards_may_stay_in_host_memory(tmp_path: Path, ranks: Ranks) -> None:
    zero = nvme(str(tmp_path), "offload_param", max_in_cpu=1500)
    losses, homes = ranks(where_shards_rest, zero, world_size=1)[0]
    assert homes == {"cpu", "nvme"}
    assert losses == ranks(losses_with, {}, world_size=1)[0][:3]


def gathers_and_writes() -> None:
    with resting_late("optimizer+parameter"):
        engine = engine_of(bf16={"enabled": True})
    train(engine, 1)
    weight = next(engine.module.parameters())
    with unishard.gather(engine.module, modifier_rank=0), torch.no_grad():
        before = weight.float().clone()
        weight.mul_(2)
    train(engine, 0)
    with unishard.gather(engine.module):
        torch.testing.assert_close(weight.float(), before * 2)
    group = engine.schedule.groups[0]
    with group.in_memory(changed=False):
        assert torch.equal(group.buffer.shard.to(torch.bfloat16), group.buffer.compute_shard)
    assert all(g.resting.idle for g in engine.schedule.groups)


def test_gathered_parameters_can_be_written(ranks: Ranks) -> None:
    ranks(gathers_and_writes, world_size=2)


def loads_safetensors(path: str) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    wanted = TinyTransformer().state_dict()
    save_file({name: value.clone() for name, value in wanted.items()}, path)
    with resting_late("optimizer+parameter"):
        engine = engine_of()
    unishard.load_safetensors(engine.module, path)
    with unishard.gather(engine.module):
        for name, param in engine.module.named_parameters():
            assert torch.equal(param, wanted[name]), name


def test_files_are_loaded_group_by_group(tmp_path: Path, ranks: Ranks) -> None:
    ranks(loads_safetensors, str(tmp_path / "model.safetensors"), world_size=1)


def fails_in_the_middle() -> None:
    with resting_late("optimizer") as tier:
        engine = engine_of()
    expected = train(engine_of(), 3)
    assert train(engine, 1) == expected[:1]
    tier.failing = next(key for key in tier.keys() if "exp_avg_sq" in key)  # noqa: SIM118
    draw = torch.Generator().manual_seed(1)
    engine.backward(engine(torch.randint(37, (2, 7), generator=draw)).float().pow(2).mean())
    with pytest.raises(OffloadError, match="exp_avg_sq"):
        engine.step()
    assert all(not item.users for g in engine.schedule.groups for item in g.resting._items.values())


def test_a_failing_tier_is_an_error_that_names_the_state(ranks: Ranks) -> None:
    ranks(fails_in_the_middle, world_size=1)


def loses_its_file(folder: str) -> None:
    engine = engine_of(zero_optimization=nvme(folder, "offload_optimizer"))
    train(engine, 1)
    for file in Path(folder).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    train(engine, 1)


def test_a_truncated_swap_file_is_named(tmp_path: Path, ranks: Ranks) -> None:
    with pytest.raises(Exception, match=str(tmp_path)):
        ranks(loses_its_file, str(tmp_path), world_size=1)


def refuses_state_dict() -> None:
    with resting_late("optimizer"):
        engine = engine_of()
    with pytest.raises(UnsupportedError, match="save_checkpoint"):
        engine.optimizer.state_dict()


def test_a_state_dict_would_need_everything_in_memory(ranks: Ranks) -> None:
    ranks(refuses_state_dict, world_size=1)


def test_a_path_that_is_no_folder_is_refused_before_the_model_is_touched(
    tmp_path: Path, ranks: Ranks
) -> None:
    (tmp_path / "file").write_text("")
    ranks(refuses_path, str(tmp_path / "file"), world_size=2)


def refuses_path(path: str) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises((OffloadError, RankError), match="file"):
        unishard.initialize(model=model, config=config(zero_optimization=nvme(path, "offload_optimizer")))
    assert model.weight.shape == (4, 4)


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"offload_optimizer\.device"):
        resolve(config(zero_optimization={"offload_optimizer": {"device": "tape"}}), dp_world_size=1)
