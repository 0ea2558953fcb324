"""Reduced gradients on a tier: same numbers, out of memory until the update, and accessors that show what rests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import unishard
from unishard.config import resolve
from unishard.errors import ConfigError, NonFiniteError
from unishard.sharding.resting import is_absent
from unishard.testing.models import TinyTransformer
from unishard.testing.tiers import resting_late

Ranks = Callable[..., Any]


def engine_of(zero: dict[str, Any], door: Any = unishard, **more: Any) -> Any:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 3, **zero},
        **more,
    }
    return door.initialize(model=TinyTransformer(), config=config)[0]


def nvme(folder: str, *sections: str) -> dict[str, Any]:
    return {f"offload_{section}": {"device": "nvme", "nvme_path": folder} for section in sections}


def loss_of(engine: Any, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    return engine(torch.randint(37, (2, 7), generator=draw)).float().pow(2)


def curve(zero: dict[str, Any], tokens: bool = False, **more: Any) -> list[float]:
    engine, found = engine_of(zero, **more), []
    for micro in range(6):
        loss = loss_of(engine, micro)
        if tokens:
            engine.backward(loss.sum() / 100, tokens=14 + dist.get_rank())
        else:
            engine.backward(loss.mean())
        engine.step()
        found += [loss.mean().item(), engine.get_global_grad_norm() or 0.0]
    assert (
        all(g.gradients.shard is None or is_absent(g.gradients.shard) for g in engine.schedule.groups)
        or not zero
    )
    return found


SETTINGS = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "tokens": {"gradient_accumulation_steps": 3, "tokens": True},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
    "bf16": {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2},
    "in_backward": {
        "optimizer_in_backward": True,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
    },
    "torch": {"optimizer": {"type": "torch.optim.NAdam", "params": {"lr": 1e-2}}},
}


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("sections", [("gradient",), ("optimizer", "param")])
def test_a_disk_gives_the_numbers_of_memory(
    name: str, sections: tuple[str, ...], tmp_path: Path, ranks: Ranks
) -> None:
    expected = ranks(curve, {}, world_size=2, **SETTINGS[name])
    found = ranks(curve, nvme(str(tmp_path), *sections), world_size=2, **SETTINGS[name])
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def held_between(zero: dict[str, Any]) -> tuple[int, int, list[bool]]:
    engine = engine_of(zero, gradient_accumulation_steps=2)
    held = []
    for micro in range(2):
        engine.backward(loss_of(engine, micro).mean())
        held.append(sum(g.persistent_bytes["gradients"] for g in engine.schedule.groups))
        if micro == 0:
            engine.step()
    idle = [g.gradients.resting is None or g.gradients.resting.idle for g in engine.schedule.groups]
    return held[0], held[1], idle


def test_no_gradient_is_in_memory_after_backward(tmp_path: Path, ranks: Ranks) -> None:
    assert all(min(first, second) > 0 for first, second, _ in ranks(held_between, {}, world_size=2))
    for sections in (("optimizer",), ("gradient",)):
        for first, second, idle in ranks(held_between, nvme(str(tmp_path), *sections), world_size=2):
            assert (first, second) == (0, 0)
            assert all(idle)


def test_a_section_of_its_own_keeps_them_in_memory(tmp_path: Path, ranks: Ranks) -> None:
    zero = {**nvme(str(tmp_path), "optimizer"), "offload_gradient": {"device": "none"}}
    assert ranks(held_between, zero, world_size=1)[0][0] > 0


def overflows(zero: dict[str, Any]) -> tuple[int, float, list[float], str]:
    fp16 = {"enabled": True, "loss_scale": 2.0**40, "max_consecutive_overflows": 3}
    engine, losses, message = engine_of(zero, fp16=fp16), [], ""
    for step in range(3):
        loss = loss_of(engine, step).mean()
        engine.backward(loss)
        try:
            engine.step()
        except NonFiniteError as error:
            message = str(error)
            break
        losses.append(loss.item())
    return engine.skipped_steps, engine.loss_scale, losses, message


def test_overflow_skips_and_names_the_gradient(tmp_path: Path, ranks: Ranks) -> None:
    expected = ranks(overflows, {}, world_size=2)
    assert expected[0][0] == 3
    assert "first non-finite gradient" in expected[0][3]
    assert ranks(overflows, nvme(str(tmp_path), "optimizer"), world_size=2) == expected


def shown(zero: dict[str, Any]) -> list[tuple[list[float], ...]]:
    import unishard.deepspeed as deepspeed
    from unishard.deepspeed import utils

    engine, found = engine_of(zero, deepspeed), []
    for step in range(2):
        engine.backward(loss_of(engine, step).mean())
        params = list(engine.module.parameters())[:4]
        for param in params:
            utils.safe_set_full_grad(param, 2 * utils.safe_get_full_grad(param))
        grads = [utils.safe_get_full_grad(p).sum().item() for p in params]
        local = [utils.safe_get_local_grad(p).sum().item() for p in params]
        engine.step()
        for param in params:
            master = utils.safe_get_full_fp32_param(param)
            utils.safe_set_full_fp32_param(param, master + 1e-3)
            moment = utils.safe_get_full_optimizer_state(param, "exp_avg")
            utils.safe_set_full_optimizer_state(param, moment * 1.5, "exp_avg")
        masters = [utils.safe_get_full_fp32_param(p).sum().item() for p in params]
        moments = [utils.safe_get_full_optimizer_state(p, "exp_avg").sum().item() for p in params]
        found.append((grads, local, masters, moments, [engine.get_global_grad_norm()]))
    return found


def test_accessors_show_and_write_what_rests(tmp_path: Path, ranks: Ranks) -> None:
    expected = ranks(shown, {}, world_size=2)
    for sections in (("optimizer",), ("optimizer", "param"), ("gradient",)):
        found = ranks(shown, nvme(str(tmp_path), *sections), world_size=2)
        for mine, theirs in zip(found, expected, strict=True):
            for step, wanted in zip(mine, theirs, strict=True):
                for values, others in zip(step, wanted, strict=True):
                    assert values == pytest.approx(others, rel=1e-5, abs=1e-9)


def forgets() -> None:
    with resting_late("optimizer+gradient"):
        engine = engine_of({})
    plain = engine_of({})
    # Gradients that were forgotten must not come back with the next ones.
    engine.backward(loss_of(engine, 7).mean())
    engine.zero_grad()
    for step in range(2):
        losses = []
        for each in (engine, plain):
            losses.append(loss_of(each, step).mean())
            each.backward(losses[-1])
            each.step()
        assert losses[0].item() == losses[1].item()


def test_forgotten_gradients_do_not_come_back(ranks: Ranks) -> None:
    ranks(forgets, world_size=2)


def test_a_path_is_needed() -> None:
    zero = {"stage": 3, "offload_gradient": {"device": "nvme"}}
    with pytest.raises(ConfigError, match=r"offload_gradient\.nvme_path"):
        resolve({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}, dp_world_size=1)
