"""Real DeepSpeed writes checkpoints and unishard continues them, and the reverse, with matching losses."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.checkpoint.convert import runs

import unishard
from unishard.checkpoint.convert import Hints, Options, compare, convert, open_checkpoint
from unishard.errors import CheckpointError, CorruptCheckpointError, RankError, UnsupportedError
from unishard.testing import RankPool

Ranks = Callable[..., Any]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
ROOT = Path(__file__).resolve().parents[3]
PROCESS = Path(__file__).with_name("deepspeed_process.py")
WRITTEN = [f"{stage}-{dtype}" for stage in range(4) for dtype in ("fp32", "bf16")] + [
    "2-fp32-robin",
    "3-fp32-subgroups",
]


class Runs(NamedTuple):
    """A folder that three ranks of DeepSpeed wrote to, and losses: after what it wrote, after what unishard wrote."""

    folder: Path
    written: dict[str, list[float]]
    continued: dict[str, list[float]]
    expected: dict[str, list[float]]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, rank_pool: RankPool) -> Runs:
    """One launch of DeepSpeed writes everything, and continues what unishard wrote before."""
    folder = tmp_path_factory.mktemp("deepspeed")
    expected = {}
    for dtype, groups in (("fp32", "two"), ("fp32", "one"), ("bf16", "two")):
        which = f"{dtype}-{groups}"
        expected[which] = rank_pool.run(
            unishard_writes, str(folder / "ours" / which), dtype, groups, world_size=2
        )[0]
        options = Options(torch_optimizer=True)
        convert(folder / "ours" / which, folder / "universal" / which, "deepspeed-universal", options)
        for stage in (2, 3):
            native = Options(torch_optimizer=True, ranks=3, zero_stage=stage)
            convert(folder / "ours" / which, folder / "native" / f"{stage}-{which}", "deepspeed", native)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    results = folder / "losses.json"
    done = subprocess.run(
        [*command, str(PROCESS), str(folder), str(results)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return Runs(folder, **json.loads(results.read_text()), expected=expected)


def unishard_continues(folder: str, stage: int, dtype: str) -> list[float]:
    model = runs.build(seed=5)
    engine = unishard.initialize(
        model=model, model_parameters=runs.groups(model), config=runs.config(stage, dtype)
    ).engine
    runs.train(engine, range(1))  # so that there is state to replace
    path, client_state = engine.load_checkpoint(folder)
    assert path.endswith(f"global_step{runs.STEPS}")
    assert client_state == {"note": [1, "two"]}
    assert engine.global_steps == engine.micro_steps == runs.STEPS
    assert engine.global_samples == runs.STEPS * runs.GLOBAL_BATCH
    return runs.train(engine, runs.AFTER)


@pytest.mark.parametrize("ranks_here", [2])
@pytest.mark.parametrize("which", WRITTEN)
def test_unishard_continues_what_deepspeed_wrote(
    which: str, ranks_here: int, theirs: Runs, ranks: Ranks
) -> None:
    stage, dtype = which.split("-")[:2]
    found = ranks(
        unishard_continues, str(theirs.folder / which), (int(stage) + 1) % 4, dtype, world_size=ranks_here
    )
    tolerance = 1e-5 if dtype == "fp32" else 2e-3
    for each in found:
        assert each == pytest.approx(theirs.written[which], rel=tolerance)


def unishard_writes(folder: str, dtype: str, groups: str) -> list[float]:
    model = runs.build()
    engine = unishard.initialize(
        model=model, model_parameters=runs.groups(model, groups == "one"), config=runs.config(3, dtype)
    ).engine
    runs.train(engine, runs.BEFORE)
    engine.save_checkpoint(folder, client_state={"note": [1, "two"]})
    return runs.train(engine, runs.AFTER)


def test_deepspeed_continues_what_unishard_wrote(theirs: Runs) -> None:
    universal = {"1-fp32-two", "2-bf16-two", "3-fp32-one"}
    native = {f"native-{stage}-{dtype}-two" for stage in (1, 2, 3) for dtype in ("fp32", "bf16")}
    assert theirs.continued.keys() == universal | native
    for which, losses in theirs.continued.items():
        tolerance = 1e-5 if "fp32" in which else 2e-3
        dtype_and_groups = which.removeprefix("native-")[2:]
        assert losses == pytest.approx(theirs.expected[dtype_and_groups], rel=tolerance), which


def test_all_stages_hold_the_same(theirs: Runs) -> None:
    first = open_checkpoint(theirs.folder / "1-fp32")
    for which in ("2-fp32", "3-fp32", "2-fp32-robin", "3-fp32-subgroups"):
        differences = list(compare(first, open_checkpoint(theirs.folder / which)))
        assert all(d.largest is not None and d.largest < 1e-6 for d in differences), differences
    assert first.catalog.aliases == {"model.head.weight": "model.embed.weight"}


@pytest.mark.parametrize("which", ["1-fp32", "2-bf16", "3-bf16", "2-fp32-robin", "3-fp32-subgroups"])
def test_weights_are_those_that_deepspeed_itself_consolidates(
    which: str, theirs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as reference

    from unishard.checkpoint.convert import get_fp32_state_dict_from_zero_checkpoint as ours

    expected = {name: value.contiguous() for name, value in reference(str(theirs.folder / which)).items()}
    found = ours(theirs.folder / which)
    if which.startswith("1-"):  # where DeepSpeed's own loses frozen weights
        expected |= {n: v for n, v in found.items() if n.startswith("frozen")}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name].float(), rtol=0, atol=0)
    assert found["head.weight"] is found["embed.weight"]
    trained = ours(theirs.folder / which, exclude_frozen_parameters=True)
    assert set(found) - set(trained) == {"frozen.weight", "frozen.bias"}


@pytest.mark.parametrize("which", ["2-fp32", "3-fp32-subgroups"])
def test_what_deepspeeds_own_converter_writes(
    which: str, theirs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.checkpoint.ds_to_universal import main

    tag = f"global_step{runs.STEPS}"
    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(theirs.folder / which / tag), "output_folder": str(tmp_path / tag)}
    main(argparse.Namespace(**folders, **settings, inject_missing_state=True))
    found = open_checkpoint(tmp_path)
    assert found.format == "deepspeed-universal"
    assert list(compare(open_checkpoint(theirs.folder / which), found)) == []


def test_a_fused_16_bit_optimizer_without_zero(theirs: Runs, tmp_path: Path) -> None:
    """DeepSpeed has it on GPUs alone: made here of what its other one wrote, with each group in one vector."""
    tag = copy_of(theirs, "0-bf16", tmp_path / "fused")
    file = tag / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    saved = content["optimizer"]
    inner = saved["optimizer_state_dict"]
    flat = [torch.cat([m.flatten() for m in group]) for group in saved.pop("fp32_groups")]
    states = {}
    for position, group in enumerate(inner["param_groups"]):
        mine = [inner["state"][index] for index in group["params"]]
        kinds = {k: torch.cat([s[k].flatten() for s in mine]) for k in ("exp_avg", "exp_avg_sq")}
        states[position] = {"step": mine[0]["step"], **kinds}
        group["params"] = [position]
    inner["state"], saved["fp32_groups_flat"] = states, flat
    torch.save(content, file)
    matrices = ["embed.weight", "up.weight", "down.weight"]
    others = ["up.bias", "down.bias", "norm.weight", "norm.bias"]
    hints = Hints(
        [[*matrices, "frozen.weight"], [*others, "frozen.bias"]], frozenset({"frozen.weight", "frozen.bias"})
    )
    expected = open_checkpoint(theirs.folder / "0-bf16", hints=hints)
    assert list(compare(expected, open_checkpoint(tag, hints=hints))) == []
    with pytest.raises(
        CheckpointError, match=r"as vectors of \[852, 53\] elements, and those named have \[1061\]"
    ):
        open_checkpoint(tag)


# damage ---------------------------------------------------------------------------------------------------------


def copy_of(theirs: Runs, which: str, to: Path) -> Path:
    shutil.copytree(theirs.folder / which, to)
    return to / f"global_step{runs.STEPS}"


def optimizer_file(tag: Path, rank: int) -> Path:
    return next(tag.glob(f"*zero_pp_rank_{rank}_*optim_states.pt"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"written by 3 ranks, and \*zero_pp_rank_1_mp_rank_00_optim_states.pt is missing"),
        (
            "more",
            r"written by 3 ranks, and there is a \*zero_pp_rank_3_mp_rank_00_optim_states.pt, which is of another",
        ),
        ("truncated", r"zero_pp_rank_1_mp_rank_00_optim_states.pt is truncated or no file of torch.save"),
        ("garbage", r"zero_pp_rank_1_mp_rank_00_optim_states.pt is truncated or no file of torch.save"),
        (
            "flipped",
            r"zero_pp_rank_1_mp_rank_00_optim_states.pt: the bytes of .*embed.weight.* are not those",
        ),
    ],
)
@pytest.mark.parametrize("which", ["2-fp32", "3-fp32"])
def test_damage_is_named(which: str, how: str, message: str, theirs: Runs, tmp_path: Path) -> None:
    tag = copy_of(theirs, which, tmp_path / "copy")
    file = optimizer_file(tag, 1)
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "more":
        shutil.copy(file, tag / "zero_pp_rank_3_mp_rank_00_optim_states.pt")
    elif how == "truncated":
        file.write_bytes(content[:-100])
    elif how == "garbage":
        file.write_bytes(b"x" * 5000)
    else:
        catalog = open_checkpoint(tmp_path / "copy").catalog
        chunk = next(c for c in catalog.tensors["model.embed.weight"].chunks if c.file == file.name)
        content[(chunk.data or 0) + 1] ^= 4
        file.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=message):
        convert(tmp_path / "copy", tmp_path / "out", "unishard")
    assert not (tmp_path / "out" / "latest").exists()


def damaged_on_load(folder: str) -> None:
    model = runs.build(seed=5)
    engine = unishard.initialize(
        model=model, model_parameters=runs.groups(model), config=runs.config(3, "fp32")
    ).engine
    with pytest.raises(
        (CorruptCheckpointError, RankError), match=r"the bytes of .*embed.weight.* are not those"
    ):
        engine.load_checkpoint(folder)


def test_a_flipped_byte_is_everybodys_error(theirs: Runs, tmp_path: Path, ranks: Ranks) -> None:
    tag = copy_of(theirs, "3-fp32", tmp_path / "copy")
    file = optimizer_file(tag, 1)
    chunk = next(
        c for c in open_checkpoint(tag).catalog.tensors["model.embed.weight"].chunks if c.file == file.name
    )
    content = bytearray(file.read_bytes())
    content[chunk.data or 0] ^= 1
    file.write_bytes(content)
    ranks(damaged_on_load, str(tmp_path / "copy"))


def test_a_model_split_over_tensor_parallel_ranks_is_refused(theirs: Runs, tmp_path: Path) -> None:
    tag = copy_of(theirs, "1-fp32", tmp_path / "copy")
    shutil.copy(tag / "mp_rank_00_model_states.pt", tag / "mp_rank_01_model_states.pt")
    with pytest.raises(UnsupportedError, match=r"split over tensor-parallel ranks"):
        open_checkpoint(tag)
    (tag / "mp_rank_01_model_states.pt").rename(tag / "layer_01-model_00-model_states.pt")
    with pytest.raises(UnsupportedError, match=r"split over pipeline stages or experts \(layer_01-model_00"):
        open_checkpoint(tag)


def resumes_by_itself(folder: str) -> None:
    model = runs.build(seed=5)
    engine = unishard.initialize(
        model=model, model_parameters=runs.groups(model), config=runs.config(2, "fp32")
    ).engine
    assert engine.auto_resume(folder) == {"note": [1, "two"]}
    assert engine.global_steps == runs.STEPS


def test_auto_resume_does_not_start_anew_over_deepspeeds_checkpoints(theirs: Runs, ranks: Ranks) -> None:
    ranks(resumes_by_itself, str(theirs.folder / "3-fp32"))


def other_model(folder: str) -> None:
    engine = unishard.initialize(model=torch.nn.Linear(3, 3), config=runs.config(2, "fp32")).engine
    with pytest.raises(CheckpointError, match=r"model.weight +missing -> \(3, 3\)"):
        engine.load_checkpoint(folder)


def test_another_model_is_refused_with_a_table(theirs: Runs, ranks: Ranks) -> None:
    ranks(other_model, str(theirs.folder / "1-fp32"))


def test_the_dynamic_loss_scale_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: DeepSpeed has no fp16 on CPUs."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.fp16 import loss_scaler

    from unishard.checkpoint.convert.deepspeed_values import _loss_scale
    from unishard.checkpoint.convert.torch_read import Archive
    from unishard.optim.loss_scale import DynamicLossScale

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    theirs = loss_scaler.DynamicLossScaler(2.0**8, 3, 1.0, 2, False)
    ours = DynamicLossScale(initial=2.0**8, window=3, hysteresis=2)
    overflows = [False, True, False, True, False, False, False, False, False, True]
    for overflow in overflows:
        theirs.update_scale(overflow)
        ours.update(overflow)
    torch.save({"loss_scaler": theirs}, tmp_path / "zero.pt")
    found = _loss_scale(Archive(tmp_path / "zero.pt").content, {})
    assert found == ours.state_dict()
