"""`delayed_update`: gradients of one step are applied in the next backward, as one process would that waits a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.engine.test_optimizer_in_backward import Sometimes
from tests.sharding.step_harness import inputs_for
from tests.sharding.test_step import Stack
from torch import Tensor, nn

import unishard
from unishard.errors import ConfigError, OffloadError, StateError
from unishard.optim.schedules import build_schedule
from unishard.sharding import group as group_module
from unishard.testing.tiers import resting_late
from unishard.testing.transport import through_sockets

Ranks = Callable[..., Any]
PRESETS = ["NO_SHARD", "ZERO1", "ZERO2", "SHARD_GRAD_OP", "ZERO3"]
STEPS, CLIP = 5, 0.05
ADAMW: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.01}
WARMUP = {"warmup_min_lr": 1e-3, "warmup_max_lr": 2e-2, "warmup_num_steps": 4, "warmup_type": "linear"}


def engine_of(
    preset: str, delayed: bool = True, accumulation: int = 1, model: type[nn.Module] = Stack, **more: Any
) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "sharding": preset,
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "zero_optimization": {"offload_optimizer": {"device": "none", "delayed_update": delayed}},
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
        **more,
    }
    return unishard.initialize(model=model(), config=config).engine


def loss_of(model: Any, rank: int, micro: int) -> Tensor:
    return model(inputs_for(rank, micro)).float().pow(2).mean()


def train(engine: Any, start: int = 0, stop: int = STEPS) -> list[float]:
    losses = []
    for micro in range(
        start * engine.gradient_accumulation_steps(), stop * engine.gradient_accumulation_steps()
    ):
        loss = loss_of(engine, dist.get_rank(), micro)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights_of(engine: Any) -> list[Tensor]:
    with unishard.gather(engine.module):
        return [p.detach().float().clone() for p in engine.module.parameters()]


def alone(world: int, accumulation: int, clip: float) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """One process: weights while the last update waits, weights after it, and the norm of each step's gradients."""
    torch.manual_seed(0)
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    schedule = build_schedule("WarmupLR", optimizer, WARMUP)
    waiting: list[Tensor] = []
    waiting_rate, norms = 0.0, []

    def apply() -> None:
        rate, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], waiting_rate
        for param, gradient in zip(model.parameters(), waiting, strict=True):
            param.grad = gradient
        optimizer.step()
        optimizer.param_groups[0]["lr"] = rate

    for step in range(STEPS):
        model.zero_grad(set_to_none=True)
        for micro in range(step * accumulation, (step + 1) * accumulation):
            for rank in range(world):
                (loss_of(model, rank, micro) / world / accumulation).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9).item())
        fresh = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if waiting:
            apply()
        waiting, waiting_rate = fresh, optimizer.param_groups[0]["lr"]
        schedule.step()
    old = [p.detach().clone() for p in model.parameters()]
    apply()
    return old, [p.detach().clone() for p in model.parameters()], norms


def follows_one_process(preset: str, accumulation: int, clip: float, tier: str, transport: str) -> None:
    with ExitStack() as stack:
        stack.enter_context(through_sockets() if transport == "sockets" else nullcontext())
        if tier:
            stack.enter_context(resting_late(tier))
        engine = engine_of(preset, True, accumulation, gradient_clipping=clip)
        train(engine)
        old, new, norms = alone(dist.get_world_size(), accumulation, clip)
        torch.testing.assert_close(weights_of(engine), old, rtol=1e-5, atol=1e-6)
        assert engine.get_global_grad_norm() == pytest.approx(norms[-1], rel=1e-5)
        engine.complete_update()
        torch.testing.assert_close(weights_of(engine), new, rtol=1e-5, atol=1e-6)
        assert any((a - b).abs().max() > 1e-4 for a, b in zip(old, new, strict=True)), (
            "the last update does something"
        )


EVERYTHING = "optimizer+gradient+parameter"
TIERS = [
    *((preset, tier) for preset in PRESETS for tier in ("", "optimizer", "optimizer+gradient")),
    ("SHARD_GRAD_OP", EVERYTHING),
    ("ZERO3", EVERYTHING),
]


@pytest.mark.parametrize("transport", ["memory", "sockets"])
@pytest.mark.parametrize(("preset", "tier"), TIERS)
def test_it_is_one_process_that_waits_a_step(preset: str, tier: str, transport: str, ranks: Ranks) -> None:
    for accumulation, clip in ((1, 0.0), (3, CLIP)):
        ranks(follows_one_process, preset, accumulation, clip, tier, transport)


def with_branches(tier: str, optimizer: str, dtype: str) -> list[Tensor]:
    more = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    with resting_late(tier) if tier else nullcontext():
        engine = engine_of(
            "ZERO3",
            model=Sometimes,
            optimizer={"type": optimizer, "params": {"lr": 1e-2, "eps": 1e-3}},
            **more,
        )
    train(engine, 0, 9)
    engine.complete_update()
    assert not engine.optimizer.delayed
    return weights_of(engine)


@pytest.mark.parametrize("optimizer", ["AdamW", "torch.optim.RMSprop"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_tiers_change_no_bit(optimizer: str, dtype: str, ranks: Ranks) -> None:
    """With parameters that some ranks or none use, and steps that an overflow skips."""
    expected = ranks(with_branches, "", optimizer, dtype)
    assert all(torch.equal(a, b) for a, b in zip(*expected, strict=True))
    found = ranks(with_branches, EVERYTHING, optimizer, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


def skips() -> None:
    engine = engine_of("ZERO2", fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1})
    train(engine, 0, 2)
    assert engine.optimizer.delayed
    loss = loss_of(engine, dist.get_rank(), 2)
    engine.backward(loss * (float("inf") if dist.get_rank() else 1.0))
    engine.step()
    assert engine.skipped_steps == 1
    assert not engine.optimizer.delayed, "the update before was carried out, and this one will never be"
    before = weights_of(engine)
    engine.complete_update()
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))


def test_an_overflow_leaves_nothing_behind(ranks: Ranks) -> None:
    ranks(skips)


def saves_and_loads(folder: str) -> None:
    engine = engine_of("ZERO3", gradient_clipping=CLIP)
    train(engine, 0, 3)
    with pytest.raises(StateError, match=r"state_dict\(\) while an update is delayed.*complete_update"):
        engine.optimizer.state_dict()
    engine.save_checkpoint(folder)
    assert not engine.optimizer.delayed
    train(engine, 3, 5)
    engine.complete_update()
    other = engine_of("ZERO1", gradient_clipping=CLIP)
    train(other, 0, 1)
    other.load_checkpoint(folder)
    assert not other.optimizer.delayed, "what waited belongs to other weights"
    train(other, 3, 5)
    other.complete_update()
    torch.testing.assert_close(weights_of(engine), weights_of(other), rtol=1e-5, atol=1e-7)
    train(engine, 5, 6)
    whole, weights = engine.full_state_dict(), weights_of(engine)
    for (name, _), weight in zip(engine.module.named_parameters(), weights, strict=True):
        assert whole is None or torch.equal(whole[name], weight), name


def test_checkpoints_hold_finished_updates(tmp_path: Path, ranks: Ranks) -> None:
    ranks(saves_and_loads, str(tmp_path))


def evaluates() -> None:
    engine = engine_of("ZERO2")
    train(engine, 0, 2)
    waiting = weights_of(engine)
    with torch.no_grad():
        loss_of(engine, 0, 0)
    assert not engine.optimizer.delayed
    assert any(not torch.equal(a, b) for a, b in zip(waiting, weights_of(engine), strict=True))


def test_evaluation_sees_finished_updates(ranks: Ranks) -> None:
    ranks(evaluates)


def tries_again() -> None:
    """A state that cannot be read while the update is carried out in backward."""
    with resting_late(EVERYTHING) as tier:
        engine = engine_of("ZERO3")
    losses = train(engine, 0, 2)
    tier.failing = next(key for key in tier.keys() if "exp_avg_sq" in key)  # noqa: SIM118
    loss = loss_of(engine, dist.get_rank(), 2)
    with pytest.raises(OffloadError, match="exp_avg_sq"):
        engine.backward(loss)
    tier.failing = None
    engine.complete_update()
    engine.zero_grad()
    losses += train(engine, 2, 4)
    engine.complete_update()
    other = engine_of("ZERO3")
    expected = train(other, 0, 2)
    other.complete_update()
    expected += train(other, 2, 4)
    other.complete_update()
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights_of(engine), weights_of(other), strict=True))


def test_a_failed_transfer_loses_no_update(ranks: Ranks) -> None:
    ranks(tries_again, world_size=1)


class Breaking(Stack):
    broken = False

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.broken:
            out.register_hook(_stop)
        return out


def _stop(gradient: Tensor) -> None:
    raise ValueError("stopped on purpose")


def goes_on(in_backward: bool) -> None:
    """A backward that fails, after which the step is made anew; and what was read ahead is let go of."""
    mode = {"optimizer_in_backward": True} if in_backward else {}
    with resting_late(EVERYTHING):
        engine = engine_of("ZERO3", delayed=not in_backward, model=Breaking, **mode)
    losses = train(engine, 0, 2)
    engine.module.broken = True
    with pytest.raises(ValueError, match="stopped on purpose"):
        engine.backward(loss_of(engine, dist.get_rank(), 2))
    engine.module.broken = False
    losses += train(engine, 2, 5)
    engine.complete_update()
    assert losses == train(engine_of("ZERO3", delayed=not in_backward, **mode))
    assert all(group.resting.idle for group in engine.schedule.groups)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_failed_backward_may_be_repeated(in_backward: bool, ranks: Ranks) -> None:
    ranks(goes_on, in_backward)


def transfers(in_backward: bool, accumulation: int) -> list[tuple[str, str]]:
    """What one step moves: ("fetch" or "store", key), in order."""
    mode = {"optimizer_in_backward": True} if in_backward else {}
    small, group_module.COALESCE_BYTES = group_module.COALESCE_BYTES, 1
    try:
        with resting_late(EVERYTHING) as tier:
            engine = engine_of("ZERO3", not in_backward, accumulation, **mode)
        train(engine, 0, 2)
        tier.calls.clear()
        train(engine, 2, 3)
        return list(tier.calls)
    finally:
        group_module.COALESCE_BYTES = small


@pytest.mark.parametrize("in_backward", [False, True])
def test_backward_reads_one_group_ahead_and_each_state_once(in_backward: bool, ranks: Ranks) -> None:
    calls = ranks(transfers, in_backward, 1)[0]
    moments = [(kind, key) for kind, key in calls if "exp_avg#" in key]
    keys = list(dict.fromkeys(key for _, key in moments))
    assert len(keys) == 4
    assert sorted(moments) == sorted((kind, key) for key in keys for kind in ("fetch", "store"))
    for this, after in itertools.pairwise(keys):
        assert calls.index(("fetch", after)) < calls.index(("store", this)), (
            "read while the one before is updated"
        )
    # The root stays whole from forward to backward; the others are gathered in both, and updated.
    shards = [kind for kind, key in calls if "shard#" in key]
    assert (shards.count("fetch"), shards.count("store")) == (3 * 3 + 2, 4)
    gradients = [kind for kind, key in calls if "gradient" in key]
    assert gradients.count("fetch") == gradients.count("store") == (0 if in_backward else 4)


def both_ways() -> None:
    with pytest.raises(ConfigError, match=r"optimizer_in_backward.*delayed_update"):
        engine_of("ZERO2", optimizer_in_backward=True)


def test_one_of_two_ways(ranks: Ranks) -> None:
    ranks(both_ways, world_size=1)
