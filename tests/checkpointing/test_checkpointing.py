"""Checkpointed functions have the gradients of plain ones, wherever their inputs rest, and keep only what they say."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unishard import checkpointing
from unishard.checkpointing import settings
from unishard.checkpointing.inputs import Inputs
from unishard.errors import ConfigError, StateError
from unishard.offload import NvmeTier

DEPTH, WIDTH = 4, 32

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "cpu": {"checkpoint_in_cpu": True},
    "contiguous": {"contiguous_checkpointing": True, "num_checkpoints": DEPTH},
    "contiguous in cpu": {
        "contiguous_checkpointing": True,
        "num_checkpoints": DEPTH,
        "checkpoint_in_cpu": True,
    },
    "nvme": {},
    "partition without ranks": {"partition_activations": True},
    "observed": {"synchronize": True, "profile": True},
}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    options = dict(MODES[request.param])
    if request.param == "nvme":
        options["tier"] = NvmeTier(tmp_path, rank=0)
    checkpointing.configure(None, **options)
    yield request.param
    if "tier" in options:
        options["tier"].close()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        h = nn.functional.dropout(torch.relu(self.up(self.norm(x))), 0.3)
        with checkpointing.get_cuda_rng_tracker().fork():
            h = nn.functional.dropout(self.down(h), 0.3)
        return x + h * mask * scale


Call = Callable[..., Any]


def plain(function: Call, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def gradients(call: Call, times: int = 1, backwards: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(DEPTH))
    checkpointing.model_parallel_cuda_manual_seed(3)
    x = torch.randn(8, WIDTH, requires_grad=True)
    mask = (torch.rand(8, 1) > 0.2).float()
    for _ in range(times):
        h = x * 1
        for block in blocks:
            h = call(block, h, mask, scale=0.5)
        loss = h.square().mean()
        for number in range(backwards):
            loss.backward(retain_graph=number + 1 < backwards)
        del loss
    torch.rand(3)  # the state of the generators counts too
    assert x.grad is not None
    grads = [x.grad, *(p.grad for p in blocks.parameters() if p.grad is not None)]
    return torch.cat([*(g.flatten() for g in grads), torch.rand(3)])


def test_gradients_and_draws_are_the_same_bits(mode: str) -> None:
    assert torch.equal(gradients(checkpointing.checkpoint, times=3), gradients(plain, times=3))


def test_a_graph_that_is_kept(mode: str) -> None:
    assert torch.equal(gradients(checkpointing.checkpoint, backwards=2), gradients(plain, backwards=2))


def test_under_autocast(mode: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradients(checkpointing.checkpoint), gradients(plain))


def test_nested_arguments_and_outputs(mode: str) -> None:
    def function(pair: tuple[torch.Tensor, torch.Tensor], extra: dict[str, Any]) -> dict[str, Any]:
        a, b = pair
        return {"product": torch.sin(a) * b * extra["factor"], "ids": extra["ids"] + 1, "none": None}

    def run(call: Call) -> list[torch.Tensor]:
        torch.manual_seed(0)
        a, b, factor = (torch.randn(4, 6, requires_grad=True) for _ in range(3))
        out = call(function, (a * 1, b.t().t()), {"factor": factor * 2, "ids": torch.arange(3)})
        assert out["none"] is None
        assert out["ids"].tolist() == [1, 2, 3]
        out["product"].sum().backward()
        return [t.grad for t in (a, b, factor) if t.grad is not None]

    assert all(map(torch.equal, run(checkpointing.checkpoint), run(plain)))


def test_checkpoints_inside_checkpoints(mode: str) -> None:
    if mode.startswith("contiguous"):
        checkpointing.configure(None, **{**MODES[mode], "num_checkpoints": 2 * DEPTH})

    def twice(function: Call, *args: Any, **kwargs: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return checkpointing.checkpoint(function, *args, **kwargs)

        return checkpointing.checkpoint(inner, *args, **kwargs)

    assert torch.equal(gradients(twice), gradients(plain))


def test_what_is_kept_for_backward() -> None:
    """Intermediate results never; the input unless it rests elsewhere."""

    def alive_after_forward(**options: Any) -> tuple[bool, bool]:
        checkpointing.configure(None, **options)
        inner: list[Any] = []

        def function(x: torch.Tensor) -> torch.Tensor:
            middle = torch.exp(x)
            inner.append(weakref.ref(middle))
            return torch.sin(middle)

        x = torch.randn(10, requires_grad=True) * 2
        outer = weakref.ref(x)
        out = checkpointing.checkpoint(function, x)
        del x
        gc.collect()
        found = outer() is not None, inner[0]() is not None
        out.sum().backward()
        assert len(inner) == 2, "backward ran it again"
        return found

    assert alive_after_forward() == (True, False)
    assert alive_after_forward(checkpoint_in_cpu=True) == (False, False)
    contiguous = {"contiguous_checkpointing": True, "num_checkpoints": 1}
    assert alive_after_forward(**contiguous) == (False, False)


def test_without_gradients_nothing_is_kept(mode: str) -> None:
    with torch.no_grad():
        for _ in range(3 * DEPTH):
            out = checkpointing.checkpoint(torch.sin, torch.ones(3))
    assert torch.equal(out, torch.sin(torch.ones(3)))


# contiguous memory -----------------------------------------------------------------------------------------


def test_contiguous_inputs_lie_in_one_buffer_and_slots_are_reused() -> None:
    checkpointing.configure(None, contiguous_checkpointing=True, num_checkpoints=2)
    for _ in range(3):
        x = torch.randn(16, requires_grad=True) * 1
        y = checkpointing.checkpoint(torch.sin, checkpointing.checkpoint(torch.sin, x))
        [slots] = settings.current().slots.values()
        assert slots._buffer is not None
        assert slots._buffer.numel() == 2 * 64
        assert not slots._free
        y.sum().backward()
        del y
        assert len(slots._free) == 2


def test_what_recomputation_was_given_is_not_overwritten() -> None:
    """A function may keep what it was given; the slot goes to the next checkpoint."""
    checkpointing.configure(None, contiguous_checkpointing=True, num_checkpoints=1)
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach())
        return torch.sin(x)

    for value in (1.0, 2.0):
        x = torch.full((4,), value, requires_grad=True) * 1
        checkpointing.checkpoint(function, x).sum().backward()
    assert [tensor[0].item() for tensor in seen] == [1, 1, 2, 2]


def test_more_checkpoints_than_promised() -> None:
    checkpointing.configure(None, contiguous_checkpointing=True, num_checkpoints=2)
    x = torch.randn(16, requires_grad=True) * 1
    first = checkpointing.checkpoint(torch.sin, x)
    second = checkpointing.checkpoint(torch.sin, first)
    with pytest.raises(StateError, match="number_checkpoints=2, and one more checkpoint"):
        checkpointing.checkpoint(torch.sin, second)
    checkpointing.reset()
    third = checkpointing.checkpoint(torch.sin, second)
    third.sum().backward()
    assert x.grad_fn is not None


def test_checkpoints_of_several_sizes() -> None:
    checkpointing.configure(None, contiguous_checkpointing=True, num_checkpoints=2)
    x = torch.randn(160, requires_grad=True) * 1
    checkpointing.checkpoint(torch.sin, x[:16])
    with pytest.raises(StateError, match="640 bytes does not fit the slots of 64 bytes"):
        checkpointing.checkpoint(torch.sin, x)


# configuration ---------------------------------------------------------------------------------------------


def test_names_of_deepspeed(tmp_path: Path) -> None:
    assert not checkpointing.is_configured()
    config = {
        "activation_checkpointing": {
            "cpu_checkpointing": True,
            "contiguous_memory_optimization": True,
            "number_checkpoints": 7,
            "profile": True,
        }
    }
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    for source in (config, tmp_path / "ds_config.json", str(tmp_path / "ds_config.json")):
        checkpointing.configure(None, deepspeed_config=source, num_checkpoints=9)
        now = settings.current()
        assert (now.in_cpu, now.contiguous, now.count, now.profile, now.partition) == (
            True,
            True,
            9,
            True,
            False,
        )
    checkpointing.set_num_layers(5)
    checkpointing.partition_activations_in_checkpoint(True)
    now = settings.current()
    assert (now.count, now.partition, now.in_cpu) == (5, True, True)
    assert checkpointing.is_configured()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contiguous_checkpointing": True}, "needs number_checkpoints"),
        ({"tier": object(), "checkpoint_in_cpu": True}, "tier and cpu_checkpointing both say"),
        ({"deepspeed_config": "/no/such/file"}, "not a readable JSON file"),
        ({"deepspeed_config": {"activation_checkpointing": {"cpu_checkpoint": True}}}, "cpu_checkpoint"),
        ({"deepspeed_config": 3}, "pass a mapping"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checkpointing.configure(None, **options)
    assert not checkpointing.is_configured()


def test_what_has_no_effect_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("unishard"), "disabled", False)
    caplog.set_level(logging.INFO, "unishard")
    checkpointing.configure(None, partition_activations=True, num_checkpoints=3, profile=True)
    assert "there is one tensor-parallel rank" in caplog.text
    assert "number_checkpoints sizes the buffer" in caplog.text
    checkpointing.checkpoint(torch.sin, torch.ones(2, requires_grad=True)).sum().backward()
    assert "checkpoint: forward took" in caplog.text
    assert "checkpoint: recomputation took" in caplog.text


def test_random_states() -> None:
    tracker = checkpointing.get_cuda_rng_tracker()
    checkpointing.model_parallel_cuda_manual_seed(5)
    with pytest.raises(StateError, match="seed 2723 is used"):
        tracker.add("other", 2723)
    with pytest.raises(StateError, match="exists already"):
        tracker.add("model-parallel-rng", 1)
    with pytest.raises(StateError, match="no random state 'other'"), tracker.fork("other"):
        pass
    default = torch.get_rng_state()
    with tracker.fork():
        drawn = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), default)
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(2723)))


# tensor-parallel ranks -------------------------------------------------------------------------------------


class Mpu:
    """What Megatron-LM's `mpu` offers."""

    def get_tensor_model_parallel_group(self) -> Any:
        return torch.distributed.group.WORLD

    def get_tensor_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return torch.distributed.get_world_size()


def partitioned_run(options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    try:
        checkpointing.configure(Mpu(), partition_activations=True, **options)
        torch.manual_seed(0)
        x = torch.randn(5, 7, requires_grad=True)

        def run(call: Call) -> torch.Tensor:
            x.grad = None
            checkpointing.model_parallel_cuda_manual_seed(3)
            torch.manual_seed(4)
            h = x * 1
            for _ in range(3):
                h = call(lambda h: nn.functional.dropout(torch.tanh(h) * 2, 0.3), h)
            h.square().sum().backward()
            assert x.grad is not None
            return x.grad

        inputs = Inputs((x * 1,), {})
        inputs.leave(settings.current())
        kept = inputs._leaves[0]._resting.back().numel()
        del inputs
        found = run(checkpointing.checkpoint)
        parallel = checkpointing.get_cuda_rng_tracker().get_states()["model-parallel-rng"]
        return found, run(plain), kept, parallel
    finally:
        settings._current = None


@pytest.mark.parametrize(
    "options", [{}, {"checkpoint_in_cpu": True}, {"contiguous_checkpointing": True, "num_checkpoints": 3}]
)
def test_each_tensor_parallel_rank_keeps_its_part(ranks: Callable[..., Any], options: dict[str, Any]) -> None:
    results = ranks(partitioned_run, options, world_size=2)
    for found, expected, kept, _ in results:
        assert torch.equal(found, expected)
        assert kept == 18, "half of 35 elements, rounded up"
    assert not torch.equal(results[0][3], results[1][3]), "ranks draw different numbers where they hold parts"


def test_initialize_sets_the_keys_of_its_configuration() -> None:
    import unishard

    mpu = object()
    checkpointing.configure(mpu, synchronize=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "activation_checkpointing": {"cpu_checkpointing": True, "number_checkpoints": 3},
    }
    unishard.initialize(model=nn.Linear(2, 2), config=config)
    now = settings.current()
    assert (now.mpu, now.synchronize, now.in_cpu, now.count) == (mpu, True, True, 3)
    with pytest.raises(ConfigError, match="number_checkpoints to the number of checkpointed calls"):
        unishard.initialize(
            model=nn.Linear(2, 2),
            config={**config, "activation_checkpointing": {"contiguous_memory_optimization": True}},
        )
