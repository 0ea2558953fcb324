"""The comparison's code examples, each run as the script it is on two ranks, and what each has to reach."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.testing import RankPool

# Looked for, not imported: accelerate asks at its import whether there is a deepspeed, and there is one only later.
_MISSING = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.hf,
    pytest.mark.slow,
    pytest.mark.skipif(bool(_MISSING), reason=f"needs {', '.join(_MISSING)}"),
]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "from_the_comparison"
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Ranks of their own: in these `import deepspeed` means unishard, for transformers' sake."""
    with RankPool() as pool:
        yield pool


def run(name: str) -> None:
    """Run an example in this rank's process, then what is checked of it, while its process group lives."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import unishard.deepspeed

    unishard.deepspeed.install()
    seen = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    falls(seen["losses"])
    CHECKS[name](seen)


def same_way(model: Any, steps: int, rows: int = 4, **options: Any) -> None:
    """Whether 16-bit training went where one process goes in fp32: Adam makes steps of rounding errors, too."""
    import tiny_gpt2

    start, goal, reached = (
        tiny_gpt2.tiny_gpt2().state_dict(),
        plain(steps, 2e-5, rows, **options),
        state_of(model),
    )
    names = [name.replace("_checkpoint_wrapped_module.", "") for name in reached]
    assert set(names) == set(goal)
    done = torch.cat(
        [(reached[key] - start[name]).flatten() for key, name in zip(reached, names, strict=True)]
    )
    meant = torch.cat([(goal[name] - start[name]).flatten() for name in names])
    assert torch.nn.functional.cosine_similarity(done, meant, dim=0) > 0.9
    assert done.norm().item() == pytest.approx(meant.norm().item(), rel=0.1)


def falls(losses: list[float]) -> None:
    assert all(math.isfinite(loss) for loss in losses), losses
    assert losses[-1] < losses[0], losses


def plain(steps: int, lr: float, rows: int = 4, **options: Any) -> dict[str, Tensor]:
    """The weights after as many steps of one process on the batches of all ranks."""
    import tiny_gpt2

    model = tiny_gpt2.tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **options)
    data = tiny_gpt2.Rows(rows * steps * dist.get_world_size())
    for batch in torch.utils.data.DataLoader(data, batch_size=rows * dist.get_world_size()):
        model(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def same(left: dict[str, Any], right: dict[str, Any], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert set(left) == set(right)
    for name, value in left.items():
        torch.testing.assert_close(
            value.float(), right[name].float(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def state_of(model: Any) -> dict[str, Tensor]:
    return model.state_dict() if isinstance(model, FSDP) else model.module_state_dict()


# one check for each example --------------------------------------------------------------------------------------


def check_deepspeed_basic_training(seen: Seen) -> None:
    engine = seen["model_engine"]
    assert engine.train_batch_size() == 32
    assert engine.zero_optimization_stage() == 2
    assert engine.fp16_enabled()
    assert engine.global_steps == 12
    assert engine.skipped_steps < 12
    assert 0 < engine.get_lr()[0] < 1e-3
    assert seen["optimizer"].param_groups[0]["weight_decay"] == 0.01


def check_fsdp_basic_training(seen: Seen) -> None:
    assert len(FSDP.fsdp_modules(seen["model"])) == 3  # the model, and two blocks
    same_way(seen["model"], 12, rows=16)
    assert sum(p.to_local().numel() for p in seen["model"].parameters()) < 25_000  # of 29 thousand


def check_deepspeed_zero3_cpu_offload(seen: Seen) -> None:
    engine = seen["model_engine"]
    assert engine.gradient_accumulation_steps() == 16
    assert engine.global_steps == 4
    same_way(engine, 4, rows=64, weight_decay=0.0)


def check_fsdp_cpu_offload(seen: Seen) -> None:
    model = seen["model"]
    assert len(FSDP.fsdp_modules(model)) > 1
    assert sum(type(m).__name__ == "CheckpointWrapper" for m in model.modules()) == 2
    assert all(p.device.type == "cpu" for p in model.parameters())
    same_way(model, 12)


def check_deepspeed_hf_trainer(seen: Seen) -> None:
    trainer = seen["trainer"]
    assert type(trainer.deepspeed).__module__.startswith("unishard.")
    assert trainer.deepspeed.gradient_accumulation_steps() == 4
    falls(seen["eval_losses"])
    [*_, last] = sorted(Path("output").glob("checkpoint-*"))
    assert (last / "latest").is_file()
    import safetensors.torch

    saved = safetensors.torch.load_file(last / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def check_ddp_to_deepspeed(seen: Seen) -> None:
    same(state_of(seen["model_engine"]), dict(seen["ddp_model"].state_dict()))
    same(state_of(seen["model_engine"]), plain(6, 2e-5))


def check_ddp_to_fsdp(seen: Seen) -> None:
    assert len(FSDP.fsdp_modules(seen["model"])) == 3
    same_way(seen["model"], 12)


def check_deepspeed_to_fsdp(seen: Seen) -> None:
    engine = seen["model_engine"]
    assert engine.zero_optimization_stage() == 3
    assert engine.zero_offload_optimizer().device == "cpu"
    assert engine.global_steps - engine.skipped_steps >= 3
    falls(seen["deepspeed_losses"])
    same_way(seen["model"], 12)


def check_fsdp_to_deepspeed(seen: Seen) -> None:
    falls(seen["fsdp_losses"])
    assert seen["model_engine"].skipped_steps < 6
    same_way(seen["model"], 12)
    same_way(seen["model_engine"], 12 - seen["model_engine"].skipped_steps)


def check_deepspeed_checkpoints(seen: Seen) -> None:
    assert seen["resumed"] == pytest.approx(seen["uninterrupted"], rel=1e-3)
    assert Path("checkpoints/latest").read_text().strip() == "epoch_1"
    assert any(Path("checkpoints/epoch_1").iterdir())
    saved = torch.load("model_final/model.pt", weights_only=True)
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    model = seen["tiny_gpt2"](seed=1)
    model.load_state_dict(saved)
    batch = next(iter(seen["dataloader"](batch_size=4, steps=1)))
    assert model(batch).loss.item() == pytest.approx(seen["resumed"][0], rel=2e-2)


def check_deepspeed_checkpoint_to_hf(seen: Seen) -> None:
    from transformers import GPT2LMHeadModel

    dist.barrier()
    loaded = GPT2LMHeadModel.from_pretrained("./hf_model")
    same(dict(loaded.state_dict()), seen["trained"])


def check_fsdp_full_state_dict(seen: Seen) -> None:
    assert {type(value) for value in torch.load("model.pt").values()} == {Tensor}
    same(state_of(seen["model"]), state_of(seen["trained"]), rtol=0, atol=0)
    same(state_of(seen["model"]), plain(4, 1e-3))
    model = seen["tiny_gpt2"](seed=1)
    model.load_state_dict(torch.load("model.pt"))


def check_fsdp_sharded_state_dict(seen: Seen) -> None:
    same(state_of(seen["model"]), state_of(seen["trained"]), rtol=0, atol=0)
    same(state_of(seen["model"]), plain(4, 1e-3))
    dist.barrier()
    sizes = [os.path.getsize(f"model_rank_{rank}.pt") for rank in range(2)]
    assert max(sizes) < 0.8 * 4 * sum(value.numel() for value in seen["trained"].state_dict().values())


def check_fsdp_gradient_hooks(seen: Seen) -> None:
    shapes = {tuple(p.shape) for p in seen["model"].parameters()}
    assert seen["seen"] == shapes, "a hook for each parameter gets its whole gradient"
    same_mostly(state_of(seen["model"]), quantized_by_hand(seen["quantize"], seen["tiny_gpt2"]()))


def quantized_by_hand(quantize: Callable[[Tensor], Tensor], model: Any) -> dict[str, Tensor]:
    """One process: each rank's gradient quantized by itself, then the mean."""
    import tiny_gpt2

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    world = dist.get_world_size()
    rows = tiny_gpt2.Rows(4 * 4 * world)
    for step in range(4):
        optimizer.zero_grad()
        for rank in range(world):
            picked = [rows[4 * world * step + world * place + rank] for place in range(4)]
            batch = {key: torch.stack([row[key] for row in picked]) for key in picked[0]}
            grads = torch.autograd.grad(model(batch).loss, list(model.parameters()))
            for param, grad in zip(model.parameters(), grads, strict=True):
                share = quantize(grad) / world
                param.grad = share if param.grad is None else param.grad + share
        optimizer.step()
    return dict(model.state_dict())


def same_mostly(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """But for the few elements that rounding sends to the next of 255 values."""
    close = torch.cat([torch.isclose(left[name], right[name], atol=1e-5).flatten() for name in right])
    assert close.float().mean() > 0.99


def check_fsdp_profiler(seen: Seen) -> None:
    assert "Self CPU time total" in seen["table"]
    dist.barrier()
    traces = list(Path("log").glob("*.pt.trace.json"))
    assert len(traces) == 2
    assert b"aten::addmm" in traces[dist.get_rank()].read_bytes()
    same(state_of(seen["model"]), plain(5, 1e-3))


def check_fsdp_tensor_parallel(seen: Seen) -> None:
    torch.manual_seed(0)
    model = seen["Model"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups = [seen["batch_of"](group) for group in range(dist.get_world_size() // 2)]
    inputs, targets = (torch.cat(parts) for parts in zip(*groups, strict=True))
    for _ in range(6):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    whole = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in state_of(seen["fsdp_model"]).items()
    }
    same(whole, dict(model.state_dict()), rtol=1e-3, atol=1e-4)


def check_fsdp_wrapping_by_size(seen: Seen) -> None:
    assert len(re.findall(r"FullyShardedDataParallel\(", repr(seen["model"]))) > 1
    same(state_of(seen["model"]), plain(4, 1e-3))


CHECKS: dict[str, Callable[[Seen], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


def test_every_example_is_checked_and_listed():
    files = {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny_gpt2"}
    assert files == set(CHECKS)
    assert files == set(re.findall(r"\[(\w+)\.py\]", (EXAMPLES / "README.md").read_text()))


@pytest.mark.parametrize("name", CHECKS)
def test_example(pool, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool.run(run, name, backend=None, timeout=90)


def test_tensor_parallel_with_two_data_parallel_groups(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool.run(run, "fsdp_tensor_parallel", backend=None, world_size=4, timeout=90)
