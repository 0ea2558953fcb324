"""Ways of calling `deepspeed.initialize` and the engine that scripts in the wild have."""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import Any

import pytest
import torch
from torch import nn

import unishard.deepspeed as deepspeed
from unishard.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

WIDTH = 8


class Net(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            x = linear(x)
        return nn.functional.cross_entropy(x.float(), target)


def new_net(width: int = WIDTH) -> Net:
    torch.manual_seed(0)
    return Net(width)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, WIDTH, generator=generator), torch.randint(0, WIDTH, (2,), generator=generator)


def settings(stage: int = 2, **more: Any) -> dict[str, Any]:
    optimizer = {"type": "Adam", "params": {"lr": 1e-2}}
    return {"train_batch_size": 4, "optimizer": optimizer, "zero_optimization": {"stage": stage}, **more}


def train(engine: Any, steps: int = 2) -> dict[str, torch.Tensor]:
    for seed in range(steps):
        engine.backward(engine(*batch(seed)))
        engine.step()
    return engine.module_state_dict()


def differ(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


def _optimizers() -> list[float]:
    def by(optimizer: Any) -> dict[str, torch.Tensor]:
        net = new_net()
        built = optimizer(net) if isinstance(optimizer, type(lambda: 0)) else optimizer
        config = {"train_batch_size": 4, "zero_optimization": {"stage": 3}}
        return train(deepspeed.initialize(model=net, optimizer=built, config=config)[0])

    expected = by(lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1))
    l2 = by(lambda net: torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=0.1))
    found = [
        by(lambda net: FusedAdam(net.parameters(), lr=1e-2, weight_decay=0.1)),
        by(lambda net: DeepSpeedCPUAdam(net.parameters(), lr=1e-2, weight_decay=0.1)),
        by(lambda net: lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)),
    ]
    plain = by(lambda net: DeepSpeedCPUAdam(net.parameters(), lr=1e-2, weight_decay=0.1, adamw_mode=False))
    assert differ(expected, l2) > 1e-4
    return [*(differ(expected, each) for each in found), differ(l2, plain)]


def test_deepspeeds_optimizers_are_torchs(ranks):
    assert max(ranks(_optimizers)[0]) < 1e-6


def _two_engines() -> float:
    first, second = new_net(), new_net()
    engines = [deepspeed.initialize(model=net, config=settings(3))[0] for net in (first, second)]
    alone = deepspeed.initialize(model=new_net(), config=settings(3))[0]
    loss = engines[0](*batch(0)) + engines[1](*batch(1))
    loss.backward()
    for engine in engines:
        engine.step()
        assert engine.was_step_applied()
    return differ(engines[0].module_state_dict(), train(alone, 1))


def test_one_loss_may_train_two_engines(ranks):
    assert max(ranks(_two_engines)) < 1e-6


def _scales() -> list[float]:
    fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
    net = new_net(1)
    engine, optimizer, *_ = deepspeed.initialize(model=net, config=settings(0, fp16=fp16))
    assert optimizer.loss_scale_config.scale_window == 2
    seen = []
    for value in (float("inf"), float("nan"), 0.0, 0.0, 0.0):
        for param in net.parameters():
            param.grad = torch.full_like(param, value)
        engine.step()
        seen.append(optimizer.cur_scale)
        assert optimizer.overflow == (value != 0.0)
    return seen


def test_the_loss_scale_follows_gradients_put_in_by_hand(ranks):
    assert ranks(_scales)[0] == [128.0, 64.0, 64.0, 64.0, 128.0]


def _sources(folder: str) -> list[str | None]:
    path = f"{folder}/ds_{deepspeed.comm.get_rank()}.json"
    with open(path, "w") as file:
        json.dump(settings(1), file)
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", path])
    by_args, *_ = deepspeed.initialize(args=args, model=new_net())
    by_old_name, *_ = deepspeed.initialize(model=new_net(), config_params=settings(1))
    forward_only, optimizer, *_ = deepspeed.initialize(model=new_net(), config={"train_batch_size": 4})
    with torch.no_grad():
        forward_only(*batch(0))
    assert optimizer is None
    assert differ(train(by_args), train(by_old_name)) == 0.0
    return [by_args.optimizer_name(), by_old_name.scheduler_name()]


def test_configurations_come_from_arguments_files_and_dictionaries(ranks, tmp_path):
    assert ranks(_sources, str(tmp_path)) == [["adam", None]] * 2


def _written_by_a_rank() -> float:
    with deepspeed.zero.Init(config_dict_or_path=settings(3)):
        net = Net()
    for param in net.parameters():
        with deepspeed.zero.GatheredParameters(param, modifier_rank=1), torch.no_grad():
            if deepspeed.comm.get_rank() == 1:
                param.fill_(0.5)
    engine, *_ = deepspeed.initialize(model=net, config=settings(3))
    return max((value - 0.5).abs().max().item() for value in engine.module_state_dict().values())


def test_any_rank_may_write_gathered_parameters(ranks):
    assert ranks(_written_by_a_rank) == [0.0, 0.0]


def test_hjson_is_read_where_the_package_is_there(tmp_path):
    path = tmp_path / "ds_config.hjson"
    path.write_text('{\n  # a comment\n  "train_batch_size": 8\n}\n')
    if importlib.util.find_spec("hjson") is None:
        with pytest.raises(deepspeed.DeepSpeedConfigError, match="pip install hjson"):
            deepspeed.DeepSpeedConfig(str(path))
    else:
        assert deepspeed.DeepSpeedConfig(str(path)).train_batch_size == 8
