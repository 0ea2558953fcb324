"""Files of torch.save, safetensors and FSDP1: read where they lie, written in pieces."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.checkpoint.convert import runs
from torch import nn

import unishard
from unishard import checkpoint
from unishard.checkpoint.convert import (
    Options,
    compare,
    convert,
    convert_zero_checkpoint_to_fp32_state_dict,
    load_state_dict_from_zero_checkpoint,
    open_checkpoint,
    verify,
)
from unishard.checkpoint.convert.consolidate import get_fp32_state_dict_from_zero_checkpoint, main
from unishard.checkpoint.convert.torch_read import Archive, Foreign
from unishard.errors import CheckpointError, CorruptCheckpointError

Ranks = Callable[..., Any]


def trained(steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = runs.build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model(runs.batch(step)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=0)


# torch.save -----------------------------------------------------------------------------------------------------


def test_a_state_dict_comes_back_as_it_was(tmp_path: Path) -> None:
    model, _ = trained()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    opened = open_checkpoint(tmp_path / "model.pt")
    assert opened.catalog.aliases == {"model.head.weight": "model.embed.weight"}
    convert(tmp_path / "model.pt", tmp_path / "ours", "unishard")
    convert(tmp_path / "ours", tmp_path / "back.pt", "torch")
    found = torch.load(tmp_path / "back.pt", weights_only=True)
    equal(found, dict(model.state_dict()))
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr(), "tied weights share memory"
    mapped = torch.load(tmp_path / "back.pt", weights_only=True, mmap=True)
    equal(mapped, dict(model.state_dict()))
    assert all(value.data_ptr() % 64 == 0 for value in mapped.values())


@pytest.mark.parametrize("names", [("model", "optimizer"), ("model_state_dict", "optimizer_state_dict")])
def test_model_and_optimizer_come_back_as_they_were(names: tuple[str, str], tmp_path: Path) -> None:
    model, optimizer = trained()
    # By name, since two frozen tensors have shapes that trained ones have.
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    by_name = torch.optim.AdamW(named, lr=1e-2)
    by_name.load_state_dict(optimizer.state_dict())
    saved = {names[0]: model.state_dict(), names[1]: by_name.state_dict(), "epoch": 3, "step": 2}
    torch.save(saved, tmp_path / "run.pt")
    convert(tmp_path / "run.pt", tmp_path / "ours", "unishard")
    assert (
        json.loads((tmp_path / "ours" / "global_step2" / "manifest.json").read_text())["about"]["step"] == 2
    )
    convert(tmp_path / "ours", tmp_path / "back.pt", "torch")
    found = torch.load(tmp_path / "back.pt", weights_only=True)
    assert (found["epoch"], found["step"]) == (3, 2)
    other, fresh = trained(0)
    other.load_state_dict(found["model"])
    fresh.load_state_dict(found["optimizer"])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        equal(optimizer.state.get(a, {}), fresh.state.get(b, {}))


def test_files_of_lightning_list_their_optimizer(tmp_path: Path) -> None:
    model, optimizer = trained()
    named = torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2)
    named.load_state_dict(optimizer.state_dict())
    saved = {"state_dict": model.state_dict(), "optimizer_states": [named.state_dict()], "global_step": 2}
    torch.save(saved, tmp_path / "epoch=0.ckpt")
    catalog = open_checkpoint(tmp_path / "epoch=0.ckpt").catalog
    assert catalog.about["step"] == 2
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {f"optim.state.{name}.exp_avg" for name in trainable} <= set(catalog.tensors)


def test_state_by_position_is_not_guessed(tmp_path: Path) -> None:
    model, optimizer = trained()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=r"shapes do not say which of .*norm.bias.*frozen.bias"):
        open_checkpoint(tmp_path / "run.pt")


def test_views_expanded_and_other_orders_of_memory(tmp_path: Path) -> None:
    base = torch.randn(40, 6)
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    saved = {
        "row": base[5],
        "transposed": base[:3].t(),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "image": image,
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "bool": torch.tensor([True, False]),
        "half": torch.randn(5).bfloat16(),
        "numbers": torch.arange(7),
    }
    torch.save(saved, tmp_path / "views.pt")
    convert(tmp_path / "views.pt", tmp_path / "ours", "unishard")
    for name, value in saved.items():
        found = checkpoint.read_tensor(tmp_path / "ours" / "global_step0", f"model.{name}")
        torch.testing.assert_close(found, value, rtol=0, atol=0)


class Custom:
    def __init__(self) -> None:
        self.number = 3

    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_pickled_code_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "custom": Custom()}, tmp_path / "custom.pt")
    found = Archive(tmp_path / "custom.pt").content
    assert isinstance(found["custom"], Foreign)
    assert open_checkpoint(tmp_path / "custom.pt").notes == ["custom was left out"]
    assert "code ran" not in capsys.readouterr().out


def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path) -> None:
    torch.save(
        {"module._orig_mod.w": torch.ones(2), "module._orig_mod.b": torch.ones(1)}, tmp_path / "ddp.pt"
    )
    assert list(open_checkpoint(tmp_path / "ddp.pt").catalog.tensors) == ["model.w", "model.b"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"model.pt is truncated or no file of torch.save"),
        ("flipped", r"model.pt: the bytes of model.w are not those that were written \(CRC-32\)"),
        ("legacy", r"model.pt is in the format of torch before 1.6"),
        ("other", r"model.pt holds a list, not a state dict"),
    ],
)
def test_damage_is_named(how: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    value: Any = [1, 2] if how == "other" else {"w": torch.arange(1000.0)}
    torch.save(value, path, _use_new_zipfile_serialization=how != "legacy")
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[open_checkpoint(path).catalog.tensors["model.w"].chunks[0].offset + 7] ^= 1
    path.write_bytes(content[:-20] if how == "truncated" else content)
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "out", "unishard")
    assert not (tmp_path / "out").exists()


# safetensors ----------------------------------------------------------------------------------------------------


def test_safetensors_are_what_the_library_reads_and_writes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved = {
        "w": torch.randn(70, 5),
        "b": torch.randn(3).bfloat16(),
        "n": torch.arange(4),
        "s": torch.tensor(1.5),
        "e": torch.zeros(0, 2),
    }
    save_file(saved, tmp_path / "theirs.safetensors")
    convert(tmp_path / "theirs.safetensors", tmp_path / "ours", "unishard")
    convert(tmp_path / "ours", tmp_path / "back.safetensors", "safetensors")
    equal(load_file(tmp_path / "back.safetensors"), saved)
    convert(
        tmp_path / "ours", tmp_path / "half", "safetensors", Options(dtype=torch.float16, max_shard_bytes=100)
    )
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(saved)
    assert len(set(index["weight_map"].values())) > 1
    found = load_file(tmp_path / "half" / index["weight_map"]["w"])
    torch.testing.assert_close(found["w"], saved["w"].half(), rtol=0, atol=0)
    differences = list(compare(open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "half")))
    assert [d.key for d in differences] == ["model.w"], "rounded; what bfloat16 holds float16 holds as well"
    assert (differences[0].largest or 1) < 2e-3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"model-00001-of-00002.safetensors is truncated or damaged: w needs bytes up to"),
        ("missing", r"model-00001-of-00002.safetensors, which the index names, is missing"),
        ("header", r"model-00001-of-00002.safetensors: its header is damaged"),
    ],
)
def test_damaged_safetensors_are_named(how: str, message: str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100), "v": torch.ones(100)}, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "hf", "safetensors", Options(max_shard_bytes=500))
    file = tmp_path / "hf" / "model-00001-of-00002.safetensors"
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-10] if how == "truncated" else content[:8] + b"?" + content[9:])
    with pytest.raises(CorruptCheckpointError, match=message):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.hf
def test_transformers_loads_what_is_written_and_the_reverse(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": 2, "n_embd": 12, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", "unishard")
    torch.save(model.state_dict(), tmp_path / "state.pt")  # where the tied head has a name of its own
    for source in ("ours", "state.pt"):
        target = tmp_path / f"back-{source}"
        convert(
            tmp_path / source, target, "safetensors", Options(max_shard_bytes=8000, like=tmp_path / "theirs")
        )
        assert len(list(target.glob("*.safetensors"))) > 1
        found, info = transformers.GPT2LMHeadModel.from_pretrained(target, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        equal(dict(found.state_dict()), dict(model.state_dict()))
        assert found.lm_head.weight is found.transformer.wte.weight
        stored = [n for f in target.glob("*.safetensors") for n in open_checkpoint(f).catalog.tensors]
        assert "model.lm_head.weight" not in stored, "tied weights are stored once"


# FSDP1 ----------------------------------------------------------------------------------------------------------


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def inputs(step: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).chunk(2)[dist.get_rank()]


def fsdp1_writes(folder: str, mesh: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
    from torch.distributed.fsdp import StateDictType

    more: dict[str, Any] = {"device_mesh": init_device_mesh("cpu", (2,))} if mesh else {}
    model = small(0)
    wrapped = Fsdp(model, use_orig_params=True, device_id=torch.device("cpu"), **more)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.3)

    def train(steps: range) -> list[float]:
        losses = []
        for step in steps:
            loss = wrapped(inputs(step)).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(runs.mean(loss))
        return losses

    train(range(2))
    with Fsdp.state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT):
        content = {"model": wrapped.state_dict(), "optimizer": Fsdp.optim_state_dict(wrapped, optimizer)}
        torch.save(content, f"{folder}/sharded/rank{dist.get_rank()}.pt")
    with Fsdp.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
        # Not its optimizer: on CPUs torch 2.13 puts exp_avg_sq in the place of exp_avg.
        state = wrapped.state_dict()
        if dist.get_rank() == 0:
            torch.save({"model": state}, f"{folder}/full/rank0.pt")
    with Fsdp.summon_full_params(wrapped):
        whole = {name: value.detach().clone() for name, value in model.named_parameters()}
    return whole, train(range(2, 5))


def continues_fsdp1(path: str) -> list[float]:
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.7}},  # replaced by the checkpoint's
    }
    engine = unishard.initialize(model=small(3), config=settings).engine
    engine.load_checkpoint(path)
    losses = []
    for step in range(2, 5):
        loss = engine(inputs(step)).pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(runs.mean(loss))
    return losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mesh", [False, True], ids=["ShardedTensor", "DTensor"])
def test_state_dicts_of_fsdp1(mesh: bool, tmp_path: Path, ranks: Ranks) -> None:
    for place in ("sharded", "full"):
        (tmp_path / place).mkdir()
    expected, losses = ranks(fsdp1_writes, str(tmp_path), mesh, world_size=2)[0]
    sharded, full = tmp_path / "sharded", tmp_path / "full" / "rank0.pt"
    opened = open_checkpoint(sharded)
    assert opened.format == "fsdp"
    assert list(verify(opened)) == []
    assert not any(d.key.startswith("model.") for d in compare(opened, open_checkpoint(full)))
    assert ranks(continues_fsdp1, str(sharded), world_size=2)[0] == pytest.approx(losses, rel=1e-5)
    convert(sharded, tmp_path / "one.pt", "torch")
    found = torch.load(tmp_path / "one.pt", weights_only=True)
    equal(found["model"], expected)
    fresh = small(5)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
    optimizer.load_state_dict(found["optimizer"])
    assert optimizer.state[next(fresh.parameters())]["step"] == 2
    (sharded / "rank1.pt").unlink()
    with pytest.raises(
        CorruptCheckpointError, match=r"the files hold 20 of the 35 elements of model.0.weight"
    ):
        open_checkpoint(sharded)


def test_several_files_of_whole_tensors_are_not_mixed(tmp_path: Path) -> None:
    for epoch in (1, 2):
        torch.save({"w": torch.full((2,), float(epoch))}, tmp_path / f"epoch{epoch}.pt")
    with pytest.raises(
        CheckpointError, match=r"several files of torch.save .*epoch1.pt, epoch2.pt.*; name one"
    ):
        open_checkpoint(tmp_path)


def loads_weights(folder: str) -> None:
    model = runs.build(seed=7)
    engine = unishard.initialize(model=model, config=runs.config(3, "bf16")).engine
    with pytest.raises(
        CheckpointError, match=r"holds weights and no optimizer state; pass load_module_only=True"
    ):
        engine.load_checkpoint(folder)
    engine.load_checkpoint(folder, load_module_only=True)
    expected = runs.build().state_dict()
    for group in engine.schedule.groups:
        assert group.buffer.shard.dtype == torch.float32
    with unishard.gather(engine.module):
        for name, param in engine.module.named_parameters():
            torch.testing.assert_close(param.float(), expected[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("target", ["hf", "one.safetensors", "one.pt"])
def test_the_engine_starts_from_weights(target: str, tmp_path: Path, ranks: Ranks) -> None:
    torch.save(runs.build().state_dict(), tmp_path / "one.pt")
    if target != "one.pt":
        convert(tmp_path / "one.pt", tmp_path / target, "safetensors")
    ranks(loads_weights, str(tmp_path / target))


def losses_from(path: str) -> list[float]:
    model = runs.build(seed=7)
    engine = unishard.initialize(model=model, config=runs.config(3, "fp32", gradient_clipping=0.0)).engine
    engine.load_checkpoint(path)
    assert engine.optimizer is not None
    return runs.train(engine, range(2, 4))


def test_tied_weights_may_be_known_by_another_of_their_names(tmp_path: Path, ranks: Ranks) -> None:
    model, optimizer = trained()
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    other = ["head.weight" if name == "embed.weight" else name for name in names]
    saved, state = optimizer.state_dict(), dict(model.state_dict())
    for file, members in (("usual.pt", names), ("other.pt", other)):
        saved["param_groups"][0]["param_names"] = members
        del state["head.weight" if file == "usual.pt" else "embed.weight"]
        torch.save({"model": state, "optimizer": saved}, tmp_path / file)
        state = dict(model.state_dict())
    expected = ranks(losses_from, str(tmp_path / "usual.pt"))[0]
    assert ranks(losses_from, str(tmp_path / "other.pt"))[0] == expected


def test_the_code_door_names_the_command(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"unishard ckpt convert .* makes one of this Hugging Face safetensors"
    ):
        checkpoint.load({"model": {"w": torch.zeros(2)}}, tmp_path)


# consolidation --------------------------------------------------------------------------------------------------


def ours(folder: Path) -> nn.Module:
    model, optimizer = trained()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    by_name = torch.optim.AdamW(named, lr=1e-2)
    by_name.load_state_dict(optimizer.state_dict())
    torch.save({"model": model.state_dict(), "optimizer": by_name.state_dict()}, folder / "run.pt")
    convert(folder / "run.pt", folder / "ours", "unishard")
    return model


def test_the_script_beside_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ours(tmp_path)
    main([str(tmp_path / "ours"), str(tmp_path / "out"), "--tag", "global_step0"])
    equal(torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True), dict(model.state_dict()))
    main([str(tmp_path / "ours"), str(tmp_path / "sharded"), "--max_shard_size", "1KB"])
    index = json.loads((tmp_path / "sharded" / "pytorch_model.bin.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["weight_map"]["head.weight"] == index["weight_map"]["embed.weight"]
    main([str(tmp_path / "ours"), str(tmp_path / "safe"), "--safe_serialization"])
    assert [p.name for p in (tmp_path / "safe").iterdir()] == ["model.safetensors"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "ours"), str(tmp_path / "out"), "-t", "global_step9"])
    assert "holds no 'global_step9'; there are global_step0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "ours"), str(tmp_path / "out")])
    assert "exists; choose another place" in capsys.readouterr().err


def test_the_script_that_the_engine_writes_is_run(tmp_path: Path) -> None:
    model = runs.build()
    engine = unishard.initialize(model=model, config=runs.config(2, "fp32")).engine
    runs.train(engine, range(1))
    engine.save_checkpoint(tmp_path)
    command = [sys.executable, str(tmp_path / "zero_to_fp32.py"), str(tmp_path), str(tmp_path / "out.bin")]
    done = subprocess.run(
        [*command, "--exclude_frozen_parameters"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.bin", weights_only=True)
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith("frozen")}
    equal({name: found[name] for name in expected}, expected)
    assert found.keys() == expected.keys()


def test_consolidated_weights_in_memory_and_in_place(tmp_path: Path) -> None:
    model = ours(tmp_path)
    expected = dict(model.state_dict())
    equal(get_fp32_state_dict_from_zero_checkpoint(tmp_path / "ours"), expected)
    lazy = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "ours", lazy_mode=True)
    equal({name: value.contiguous() for name, value in lazy.items()}, expected)
    other = runs.build(seed=9)
    assert load_state_dict_from_zero_checkpoint(other, tmp_path / "ours", tag="global_step0") is other
    equal(dict(other.state_dict()), expected)
    with pytest.raises(CheckpointError, match=r"does not fit the model: weight is missing; bias is missing"):
        load_state_dict_from_zero_checkpoint(nn.Linear(2, 2), tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"does not say which weights are frozen"):
        convert_zero_checkpoint_to_fp32_state_dict(
            tmp_path / "ours", tmp_path / "out.bin", exclude_frozen_parameters=True
        )


# memory ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
import torch, rich.progress, torch.distributed.checkpoint
from unishard.checkpoint.convert import compare, convert, open_checkpoint
folder, peaks = Path(sys.argv[1]), {}
open_checkpoint(folder / "run.pt")
def held(what):
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0]) / 1024
before = held("VmRSS")
for source, target, to in (("run.pt", "ours", "unishard"), ("ours", "hf", "safetensors"), ("ours", "back.pt", "torch"),
                           ("ours", "dcp", "dcp"), ("ours", "uni", "deepspeed-universal")):
    convert(folder / source, folder / target, to)
    peaks[to] = held("VmHWM") - before
assert list(compare(open_checkpoint(folder / "uni"), open_checkpoint(folder / "back.pt"))) == []
peaks["compare"] = held("VmHWM") - before
print(peaks)
"""
BOUND_MB = 50


@pytest.mark.slow
def test_conversions_need_memory_for_a_few_pieces(tmp_path: Path) -> None:
    """Every writer, and files four times larger than the bound; one tensor of them alone is three times larger."""
    small = [torch.randn(1000, 512) for _ in range(20)]
    state = {"large": torch.randn(1, 80_000, 512), **{f"w{i}": value for i, value in enumerate(small)}}
    assert sum(v.nbytes for v in state.values()) / 2**20 > 3.8 * BOUND_MB
    optimizer = {"state": {}, "param_groups": [{"params": list(state), "lr": 0.1}]}
    torch.save({"model": state, "optimizer": optimizer}, tmp_path / "run.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    peaks = ast.literal_eval(done.stdout)
    assert max(peaks.values()) < BOUND_MB, peaks
    print(peaks)
