"""`unishard.integrations.lightning`: a Trainer with `UnishardStrategy` trains as one with DDP does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "lightning_script.py"
PRESETS = ("NO_SHARD", "ZERO1", "ZERO2", "ZERO3")
CASES = [f"{name} {preset}" for name in ("plain", "accumulated") for preset in PRESETS]
CASES += [
    f"{name} {preset}"
    for name in ("by value", "manual", "own backward", "own clipping", "built late", "accumulated later")
    for preset in ("ZERO1", "ZERO3")
]


def ran(command: list[str], folder: Path, mode: str, package: str = "lightning.pytorch") -> dict[str, Any]:
    # Lightning's own launcher starts processes itself; what a launcher of the tests set would tell it otherwise.
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    alone["UNISHARD_TEST_LIGHTNING"] = package
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), mode],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=alone,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{mode}.pt", weights_only=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def seen(folder) -> dict[str, Any]:
    return ran([sys.executable, "-m", "unishard.cli.main", "run", "-n", "2"], folder, "two")


@pytest.fixture(scope="module")
def alone(seen, folder) -> dict[str, Any]:
    return ran([sys.executable], folder, "one")


def same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_ddp_does(seen, name):
    ours, ddp = seen[name], seen[f"{name.rpartition(' ')[0]} ddp"]
    assert len(ours["losses"]) == 8
    assert ours["engine"]["preset"] == name.rpartition(" ")[2]
    for key in ("losses", "weights", "metrics", "rates"):
        same(ours[key], ddp[key])
    assert ours["steps"] == ddp["steps"]


@pytest.mark.parametrize("preset", PRESETS)
def test_it_validates_tests_and_predicts_as_ddp_does(seen, preset):
    ours, ddp = seen[f"plain {preset}"]["evaluated"], seen["plain ddp"]["evaluated"]
    same(ours, ddp)


def test_the_trainer_fills_the_configuration(seen):
    plain, accumulated = seen["plain ZERO3"]["engine"], seen["accumulated ZERO3"]["engine"]
    assert (plain["sizes"], plain["clipping"]) == ((8, 4, 8), 0.0)
    assert (accumulated["sizes"], accumulated["clipping"]) == ((24, 4, 8), 0.9)


def test_the_configuration_fills_the_trainer(seen):
    for name in ("file", "object"):
        found = seen[name]
        assert found["engine"] == {"preset": "ZERO3", "sizes": (24, 4, 8), "clipping": 0.1}
        assert found["steps"] == 4  # two in each epoch of four batches
        assert found["rates"] == [1e-2]  # the section's schedule has warmed up
    # The first update's rate is 0, by the schedule; until the second the losses are the same.
    same(seen["file"]["losses"], seen["object"]["losses"])


def test_validation_alone_asks_for_none_of_trainings_keys(seen):
    same(seen["validated"], seen["validated ddp"])


def test_the_batch_of_a_loader_that_a_hook_makes_is_known_in_training(seen):
    assert seen["hook"]["engine"]["sizes"] == (8, 4, 8)
    same(seen["hook"]["losses"], seen["plain ddp"]["losses"])


def test_configure_model_builds_sharded_what_rests_sharded(seen):
    assert all(seen["built late ZERO3"]["rested"])
    assert not any(seen["built late ZERO1"]["rested"])


@pytest.mark.parametrize("name", ["bf16", "bf16 true"])
def test_bf16_computes_in_bf16_over_fp32_masters(seen, name):
    found = seen[name]
    assert found["dtypes"] == {torch.bfloat16}
    assert {value.dtype for value in found["weights"].values() if value.numel() > 1} == {torch.float32}
    torch.testing.assert_close(found["losses"], seen["plain ddp"]["losses"], rtol=2e-2, atol=0)


def test_fp16_scales_and_clips(seen):
    found = seen["fp16"]
    assert found["dtypes"] == {torch.float16}
    torch.testing.assert_close(found["losses"], seen["fp32 clipped"]["losses"], rtol=2e-3, atol=0)


@pytest.mark.parametrize("preset", ["ZERO2", "ZERO3"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(seen, preset):
    found = seen[f"saved {preset}"]
    # With Lightning 2.6 dropout is on: the random generators go on too, which those of DDP do not.
    assert found["resumed"]["losses"] == found["whole"]["losses"][8:]
    torch.testing.assert_close(found["resumed"]["weights"], found["whole"]["weights"], rtol=0, atol=0)
    assert found["resumed"]["steps"] == found["whole"]["steps"] == 6
    assert found["resumed"]["rates"] == found["whole"]["rates"]


@pytest.mark.parametrize("preset", ["ZERO2", "ZERO3"])
def test_the_best_checkpoint_loads_for_testing(seen, preset):
    found = seen[f"saved {preset}"]
    assert found["is folder"]
    assert found["best"].endswith(f"{preset}/epoch=1-step=4.ckpt")
    best = found["half"]["metrics"]["val"]
    same([row["test"] for row in found["tested"] + found["again"]], [best, best])
    same(best, seen["saved ddp"]["half"]["metrics"]["val"])


@pytest.mark.parametrize("preset", ["ZERO1", "ZERO3"])
def test_a_checkpoint_of_ddp_goes_on_sharded(seen, preset):
    ours, ddp = seen[f"from ddp {preset}"], seen["saved ddp"]["resumed"]
    assert len(ours["losses"]) == 4
    for key in ("losses", "weights", "rates", "steps"):
        same(ours[key], ddp[key])


def test_a_checkpoint_of_an_engine_goes_on_from_epoch_0(seen):
    found = seen["from engine"]
    assert len(found["losses"]) == 4
    same(found["losses"][0], found["first"])
    assert found["losses"][0] != seen["plain ddp"]["losses"][0]


def test_one_module_may_be_trained_again_and_by_another_trainer(seen):
    same(seen["twice"]["ours"], seen["twice"]["ddp"])


def test_the_strategys_collectives(seen):
    assert seen["collectives"] == {
        "reduce": 1.0,
        "mean": 0.5,
        "gather": [0, 1],
        "broadcast": {"rank": 1},
        "decision": (False, True),
    }


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("accumulation", ["gradient_accumulation_steps = 4", "accumulate_grad_batches=3"]),
        ("clipping", ["gradient_clipping = 1.0", "gradient_clip_val=0.5"]),
        ("precision", ["fp16.enabled = true", "precision='bf16-mixed'"]),
        ("double", ["precision='64-true'", "bf16-mixed"]),
        ("micro", ["train_micro_batch_size_per_gpu = 3", "batch_size=4"]),
        ("hook", ["micro-batches of 3", "batch_size=4"]),
        ("optimizer", ['optimizer = {"type": "Adam"', "returns AdamW"]),
        ("none", ["returns no optimizer", "section optimizer"]),
        ("two", ["returns 2 optimizers"]),
        ("manual", ["2 batches a step", "manual optimization"]),
        ("averaging", ["StochasticWeightAveraging"]),
        ("remote", ["s3://bucket/x.ckpt", "all of them see"]),
        ("weights", ["no optimizer state", "Net.load_from_checkpoint"]),
    ],
)
def test_what_cannot_be_honoured_is_refused(seen, name, says):
    assert [part for part in says if part not in seen["refusals"][name]] == []


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightnings_own_launcher_starts_the_ranks(seen, folder, package):
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    found = ran([sys.executable], folder, "launcher", package)["launched"]
    same(found["losses"], seen["plain ddp"]["losses"])
    same(found["weights"], seen["plain ddp"]["weights"])


def test_one_process_trains_as_a_plain_loop_does(alone):
    same(alone["one"]["losses"], alone["loop"]["losses"])
    weights = {name: value for name, value in alone["one"]["weights"].items() if name != "seen"}
    same(weights, {name: alone["loop"]["weights"][name] for name in weights})


@pytest.mark.parametrize("preset", ["ZERO2", "ZERO3"])
def test_a_checkpoint_of_two_ranks_goes_on_with_one(alone, preset):
    assert alone[preset]["steps"] == 12  # from 4, with eight batches in the third epoch
    assert len(alone[preset]["losses"]) == 8
    same(alone[preset]["losses"], alone["ZERO3"]["losses"])


def test_weights_only_gives_a_file_that_load_from_checkpoint_reads(alone, seen):
    same(dict(alone["loaded"]), seen["saved ZERO3"]["weights"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lightnings_strategy_for_deepspeed_trains_through_the_drop_in(seen, stage):
    found = seen["deepspeed"]
    ours, ddp = found[stage], found["ddp"]
    assert ours["engine"] == "unishard.deepspeed.parts.engine.DeepSpeedEngine"
    assert ours["config"] == {"stage": stage, "clipping": 0.9}
    assert ours["steps"] == ddp["steps"] == 6
    same(ours["losses"], ddp["losses"])
    same(ours["weights"], ddp["weights"])
    same(ours["tested"], found["tested"])


def test_lightnings_strategy_for_deepspeed_computes_in_bf16(seen):
    found = seen["deepspeed"]["bf16"]
    assert found["dtypes"] == {torch.bfloat16}
    torch.testing.assert_close(found["losses"], seen["plain ddp"]["losses"], rtol=2e-2, atol=0)
