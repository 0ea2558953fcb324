"""What the engine refuses, counts and reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unishard
from unishard import ConfigError, ShardingError, StateError

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
}


def case_refusals() -> None:
    with pytest.raises(ConfigError, match=r"model=, an nn\.Module"):
        unishard.initialize(config=CONFIG)
    with pytest.raises(ConfigError, match=r"did you mean.*zero_optimization"):
        unishard.initialize(model=nn.Linear(2, 2), config={**CONFIG, "zero_optimisation": {}})
    with pytest.raises(ConfigError, match="train_batch_size"):
        unishard.initialize(model=nn.Linear(2, 2), config={**CONFIG, "train_batch_size": 7})
    with pytest.raises(ConfigError, match="gradient_accumulation_steps"):
        unishard.initialize(model=nn.Linear(2, 2), config={**CONFIG, "gradient_accumulation_steps": -1})
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ShardingError, match="not part of the model"):
        unishard.initialize(
            model=nn.Linear(2, 2), optimizer=other, config={"train_micro_batch_size_per_gpu": 1}
        )


def case_wrong_calls() -> None:
    engine, _, _, _ = unishard.initialize(model=nn.Linear(2, 2), config=CONFIG)
    with pytest.raises(StateError, match="scalar loss"):
        engine.backward(engine(torch.ones(2, 2)))
    with engine.no_sync(), pytest.raises(StateError, match="inside no_sync"):
        engine.step()
    engine.backward(engine(torch.ones(2, 2)).sum(), tokens=4)
    with pytest.raises(StateError, match="mixed in one step"):
        engine.backward(engine(torch.ones(2, 2)).sum())
    plain, _, _, _ = unishard.initialize(model=nn.Linear(2, 2), config={"train_micro_batch_size_per_gpu": 1})
    with pytest.raises(StateError, match="no optimizer"):
        plain.step()


def case_schedule_steps_once_an_update() -> None:
    config = {
        **CONFIG,
        "gradient_accumulation_steps": 3,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 1e-2}},
    }
    engine, _, _, scheduler = unishard.initialize(model=nn.Linear(2, 2), config=config)
    for _ in range(6):
        engine.backward(engine(torch.ones(2, 2)).sum())
        engine.step()
    assert engine.global_steps == 2
    assert engine.micro_steps == 6
    assert scheduler.last_epoch == 2


def case_overflow_stops_with_a_name() -> None:
    config = {**CONFIG, "fp16": {"enabled": True, "initial_scale_power": 1, "max_consecutive_overflows": 3}}
    engine, _, _, _ = unishard.initialize(model=nn.Linear(2, 2), config=config)
    before = engine.module_state_dict()
    with pytest.raises(unishard.NonFiniteError, match="weight"):
        for _ in range(20):
            engine.backward(engine(torch.ones(2, 2)).float().sum() * float("inf"))
            engine.step()
    assert engine.skipped_steps >= 3
    assert all(torch.equal(v, before[k]) for k, v in engine.module_state_dict().items())


class CallsItself(nn.Module):
    """Its own parameter is used after a nested call of the module, as in a step method that calls the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, inputs: torch.Tensor, step: bool = True) -> torch.Tensor:
        return (self(inputs, step=False) + self.shift).sum() if step else self.blocks(inputs)


def case_a_model_may_call_itself() -> None:
    for preset in ("ZERO2", "ZERO3"):
        plain = CallsItself()
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        engine, _, _, _ = unishard.initialize(
            model=CallsItself(),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "sharding": preset,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 1e-2}},
            },
        )
        for step in range(3):
            batch = torch.full((2, 4), float(step))
            with torch.no_grad():
                torch.testing.assert_close(engine(batch), plain(batch))
            loss, expected = engine(batch), plain(batch)
            torch.testing.assert_close(loss, expected)
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(loss)
            engine.step()
        with pytest.raises(RuntimeError, match="shapes"):
            engine(torch.ones(2, 3))
        torch.testing.assert_close(engine(batch), plain(batch))  # nothing is left of the call that failed


def case_the_norm_to_clip_to_may_change() -> None:
    batch, moved = torch.ones(2, 4), []
    for bound in (1e-2, 1e-3):
        engine, optimizer, _, _ = unishard.initialize(
            model=CallsItself(),
            config={**CONFIG, "gradient_clipping": 1e-2, "optimizer": {"type": "SGD", "params": {"lr": 1.0}}},
        )
        before = engine.module_state_dict()
        optimizer.max_norm = bound
        engine.backward(engine(batch))
        engine.step()
        after = engine.module_state_dict()
        moved.append(sum((after[k] - before[k]).square().sum() for k in after).sqrt().item())
    assert moved == pytest.approx([1e-2, 1e-3], rel=1e-3)


def case_full_state_dict_has_fp32_masters() -> None:
    model = CallsItself()
    model.register_buffer("seen", torch.tensor(3.0))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = {**CONFIG, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    engine, _, _, _ = unishard.initialize(model=model, config=config, device=torch.device("cpu"))
    assert engine.device == torch.device("cpu")
    found = engine.full_state_dict()
    assert (found is None) == (engine.global_rank != 0)
    if found is not None:
        found["seen"] = found["seen"].float()  # buffers follow the compute dtype
        torch.testing.assert_close(found, state, rtol=0, atol=0)


def monitored(folder: str) -> None:
    config = {**CONFIG, "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"}}
    engine, _, _, _ = unishard.initialize(model=nn.Linear(2, 2), config=config)
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 2)).sum())
        engine.step()


CASES = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}


@pytest.mark.parametrize("name", CASES)
def test_engine(name: str, ranks: Callable[..., Any]) -> None:
    ranks(CASES[name])


def test_the_configured_monitor_writes(ranks: Callable[..., Any], tmp_path: Path) -> None:
    ranks(monitored, str(tmp_path))
    lines = (tmp_path / "run" / "Train_loss.csv").read_text().splitlines()
    assert lines[0] == "step,Train_loss"
    assert len(lines) == 3


def _autocast() -> tuple[float, set[str]]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    plain.load_state_dict(net.state_dict())
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(x)
    expected.float().square().mean().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    }
    engine = unishard.initialize(model=net, config=config).engine
    output = engine(x)
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, expected)
    engine.backward(output.float().square().mean())
    engine.step()
    state = engine.module_state_dict()
    difference = max((state[name] - p).abs().max().item() for name, p in plain.named_parameters())
    return difference, {str(value.dtype) for value in state.values()}


def test_torch_autocast_computes_in_bf16_on_fp32_weights(ranks):
    for difference, dtypes in ranks(_autocast):
        assert difference < 1e-6
        assert dtypes == {"torch.float32"}
