"""Every pitfall of docs/pitfalls.md ends as the table says: in the right weights, or in a message."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import unishard.deepspeed as deepspeed
from unishard.errors import ShardingError, StateError, UnsupportedError
from unishard.fsdp import FSDP, ShardingStrategy
from unishard.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy
from unishard.testing.models import Block, TinyTransformer

TABLE = Path(__file__).resolve().parents[2] / "docs" / "pitfalls.md"
EPS = 1e-4  # the bias of keys has a gradient of rounding errors, which Adam would make steps of
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": EPS}},
}


class Notes(logging.Handler):
    """What unishard says on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"

    def __enter__(self) -> Notes:
        logging.getLogger("unishard").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("unishard").removeHandler(self)

    def said_once(self, pattern: str) -> None:
        """The first rank speaks for all."""
        assert len(re.findall(pattern, self.text)) == (1 if dist.get_rank() == 0 else 0), self.text


def fresh() -> TinyTransformer:
    torch.manual_seed(3)
    return TinyTransformer()


def loss_on(model: Any, step: int, rows: int = 2, rank: int | None = None) -> Tensor:
    batch = fresh().example_batch(10 * step + (dist.get_rank() if rank is None else rank), rows)
    return TinyTransformer.loss(model(batch.inputs), batch.targets)


def plain(groups: list[list[int]], rows: int = 2, weight_decay: float = 0.0) -> dict[str, Tensor]:
    """One process's weights after an update for each list of steps, on the batches of both ranks."""
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS, weight_decay=weight_decay)
    for steps in groups:
        optimizer.zero_grad()
        for step in steps:
            for rank in range(2):
                (loss_on(model, step, rows, rank) / (2 * len(steps))).backward()
        optimizer.step()
    return dict(model.state_dict())


def same(left: dict[str, Any], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=1e-4, atol=1e-5)


def engine_of(model: nn.Module | None = None, **more: Any) -> Any:
    return deepspeed.initialize(model=model or fresh(), config={**CONFIG, **more})[0]


def refused(error: type[Exception], pattern: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=pattern):
        call()


# DeepSpeed ---------------------------------------------------------------------------------------------------------


def case_loss_backward() -> None:
    for stage in (1, 2, 3):
        engine = engine_of(zero_optimization={"stage": stage}, gradient_accumulation_steps=2)
        for step in range(4):
            loss_on(engine, step).backward()
            engine.step()
        same(engine.module_state_dict(), plain([[0, 1], [2, 3]]))


def case_loss_backward_fp16() -> None:
    engine = engine_of(fp16={"enabled": True})
    loss_on(engine, 0).backward()
    refused(StateError, r"without the loss scale; call engine\.backward\(loss\)", engine.step)


def case_batch_sizes() -> None:
    wrong = {"train_batch_size": 128, "gradient_accumulation_steps": 1}
    message = r"128 != 2 x 1 x 2 = 4; set train_batch_size to 4"
    refused(deepspeed.DeepSpeedConfigError, message, lambda: engine_of(**wrong))


def case_loader_batch() -> None:
    with Notes() as notes:
        engine = engine_of()
        for step in range(2):
            engine.backward(loss_on(engine, step, rows=3))
            engine.step()
    notes.said_once(r"first batch has 3 samples, .* train_micro_batch_size_per_gpu=2.*batch_size=2")
    same(engine.module_state_dict(), plain([[0], [1]], rows=3))
    with Notes() as notes:
        engine = engine_of()
        loss_on(engine, 0)
    assert "first batch" not in notes.text


def case_dist_backend() -> None:
    assert not dist.is_initialized()
    deepspeed.init_distributed()
    assert dist.get_backend() == ("nccl" if torch.cuda.is_available() else "gloo")
    assert dist.get_world_size() == 2
    dist.barrier()  # who leaves first cuts off who is still connecting


def case_dist_backend_named() -> None:
    with Notes() as notes:
        deepspeed.init_distributed(dist_backend="nccl")
    if not torch.cuda.is_available():
        assert "no GPU here; gloo is used instead of nccl" in notes.text
        assert dist.get_backend() == "gloo"
    dist.barrier()


def case_pipeline() -> None:
    message = "pipeline parallelism is not"
    for stage in (1, 2, 3):
        config = {"zero_optimization": {"stage": stage}, "pipeline": {"stages": 2}}
        refused(deepspeed.DeepSpeedConfigError, message, lambda given=config: engine_of(**given))
    refused(
        UnsupportedError, message, lambda: deepspeed.PipelineModule(layers=[nn.Linear(2, 2)], num_stages=1)
    )


def case_empty_state_dict() -> None:
    engine = engine_of(zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0})
    with Notes() as notes:
        same(engine.module_state_dict(), dict(fresh().state_dict()))
        assert notes.text == ""
        engine.module.state_dict()
        engine.module.state_dict()
    notes.said_once(r"empty tensors .*save_16bit_model\(\).*module_state_dict\(\).*GatheredParameters")
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        same(engine.module.state_dict(), dict(fresh().state_dict()))
    with Notes() as notes:
        engine_of(zero_optimization={"stage": 2}).module.state_dict()
    assert notes.text == ""


# FSDP --------------------------------------------------------------------------------------------------------------


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    for step in range(2):
        loss_on(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def case_no_policy() -> None:
    model = FSDP(fresh())
    assert len(FSDP.fsdp_modules(model)) == 1
    train(model)
    same(model.state_dict(), plain([[0], [1]], weight_decay=0.01))


def case_policy_matches_nothing() -> None:
    with Notes() as notes:
        model = FSDP(fresh(), auto_wrap_policy=ModuleWrapPolicy({nn.Conv2d}))
    assert "matched no module of TinyTransformer; all of it will be gathered at once" in notes.text
    train(model)
    same(model.state_dict(), plain([[0], [1]], weight_decay=0.01))


def case_strategy() -> None:
    expected = plain([[0], [1]], weight_decay=0.01)
    for strategy in ShardingStrategy:
        model = FSDP(fresh(), sharding_strategy=strategy, auto_wrap_policy=ModuleWrapPolicy({Block}))
        train(model)
        same(model.state_dict(), expected)
    message = r"'ZERO3' is not one of ShardingStrategy\.FULL_SHARD"
    refused(ShardingError, message, lambda: FSDP(fresh(), sharding_strategy="ZERO3"))


def case_no_process_group() -> None:
    assert not dist.is_initialized()
    model = FSDP(fresh())
    assert dist.get_world_size() == model.world_size == 2
    train(model)
    same(model.state_dict(), plain([[0], [1]], weight_decay=0.01))


def case_no_state_dict_type() -> None:
    model = FSDP(fresh(), auto_wrap_policy=ModuleWrapPolicy({Block}))
    train(model)
    state = model.state_dict()
    assert {type(value) for value in state.values()} == {Tensor}, "whole, plain, on every rank"
    other = TinyTransformer()
    other.load_state_dict(state)
    same(dict(other.state_dict()), plain([[0], [1]], weight_decay=0.01))
    again = FSDP(TinyTransformer(), auto_wrap_policy=ModuleWrapPolicy({Block}))
    again.load_state_dict(state)
    same(again.state_dict(), state)


def case_small_model() -> None:
    policy = size_based_auto_wrap_policy(min_num_params=1000)
    model = FSDP(fresh(), auto_wrap_policy=policy)
    assert "2 x FullyShardedDataParallel(" in repr(model)
    assert len(FSDP.fsdp_modules(model)) == 3


GROUPLESS = {"dist_backend", "dist_backend_named", "no_process_group"}
CASES = {name.removeprefix("case_"): case for name, case in globals().items() if name.startswith("case_")}


@pytest.mark.parametrize("name", CASES)
def test_pitfall(ranks, name):
    ranks(CASES[name], backend=None if name in GROUPLESS else "gloo")


def test_the_table_lists_every_case():
    assert set(re.findall(r"`(\w+)` \|$", TABLE.read_text(), re.MULTILINE)) == set(CASES)
