"""`unishard.integrations.transformers`: `deepspeed=` and `fsdp=` arguments train as the plain Trainer does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.hf, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "trainer_script.py"
PRESETS = {
    "gpt2 deepspeed-2": "ZERO2",
    "gpt2 deepspeed-3": "ZERO3",
    "gpt2 fsdp": "ZERO3",
    "gpt2 shard_grad_op": "SHARD_GRAD_OP",
    "gpt2 no_shard": "NO_SHARD",
    "gpt2 hybrid": "ZERO3",  # one copy, as both ranks are on one node
    "gpt2 recompute": "ZERO3",
    "llama deepspeed-3": "ZERO3",
    "llama recompute": "ZERO3",
}


def launched(folder: Path, ranks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "unishard.cli.main", "run", "-n", str(ranks), str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    return launched(tmp_path_factory.mktemp("trainer"), ranks=2)


def same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-6)


def require_same_training(sharded: dict[str, Any], plain: dict[str, Any]) -> None:
    assert len(sharded["losses"]) == 4
    for key in ("losses", "norms", "eval", "best"):
        same(sharded[key], plain[key])
    for key in ("weights", "weights after resuming"):
        assert set(sharded[key]) >= set(plain[key])
        same({name: sharded[key][name] for name in plain[key]}, plain[key])
    same(sharded["resumed"], plain["losses"])


@pytest.mark.parametrize("name", PRESETS)
def test_it_trains_saves_and_resumes_as_the_plain_trainer(seen, name):
    require_same_training(seen[name], seen[f"{name.split()[0]} plain"])


@pytest.mark.parametrize("name", PRESETS)
def test_the_engine_that_was_asked_for_trained_it(seen, name):
    assert seen[name]["engine"] == "unishard.deepspeed.parts.engine.DeepSpeedEngine"
    assert seen[name]["preset"] == PRESETS[name]
    assert seen[name]["recomputes"] == name.endswith("recompute")
    # What rests sharded was never whole on a rank: from_pretrained read it shard by shard.
    whole = PRESETS[name] in ("ZERO2", "NO_SHARD")
    assert seen[name]["loaded"] == ("whole" if whole else "sharded")


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("gpt2")])
def test_evaluation_may_come_before_training(seen, name):
    same(seen[name]["before training"], seen["gpt2 plain"]["before training"])


def test_bf16_computes_in_bf16_over_fp32_masters(seen):
    plain, sharded = seen["gpt2 plain"], seen["gpt2 bf16"]
    assert (plain["dtype"], sharded["dtype"]) == ("torch.float32", "torch.bfloat16")
    torch.testing.assert_close(sharded["losses"], plain["losses"], rtol=1e-3, atol=0)
    torch.testing.assert_close(sharded["resumed"], sharded["losses"], rtol=1e-6, atol=0)
    torch.testing.assert_close(sharded["norms"], plain["norms"], rtol=1e-2, atol=0)


def test_the_plain_trainer_was_plain(seen):
    assert "DistributedDataParallel" in seen["gpt2 plain"]["engine"]
    assert "DistributedDataParallel" in seen["llama plain"]["engine"]


@pytest.mark.skipif(
    not os.environ.get("UNISHARD_LONG"), reason="four ranks of a Trainer: `make soak` runs it"
)
def test_hybrid_shard_on_two_nodes_of_two_ranks(tmp_path):
    results = launched(tmp_path, ranks=4)
    assert results["gpt2 hybrid"]["preset"] == "HYBRID_SHARD"
    require_same_training(results["gpt2 hybrid"], results["gpt2 plain"])


def test_arguments_that_cannot_be_meant_are_refused(seen):
    refused = seen["refusals"]
    assert "ask for no sharding" in refused["nothing"]
    assert "names LlamaDecoderLayer" in refused["class"]
    assert "GPT2Block" in refused["class"]
    assert "launch with torchrun" in refused["launch"]
    assert "xla_fsdp_grad_ckpt" in refused["key"]
    assert "did you mean 'cpu_offload'?" in refused["key"]
