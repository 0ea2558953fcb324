"""`unishard ckpt`: what users see, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from unishard import checkpoint
from unishard.checkpoint.convert import convert
from unishard.cli.main import app


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with `run.pt` and the same as a checkpoint of ours."""
    weight = torch.arange(12.0).reshape(4, 3)
    state = {"body.weight": weight, "head.weight": weight, "scale": torch.ones(2)}
    kinds = {"exp_avg": torch.ones(4, 3), "exp_avg_sq": torch.ones(4, 3), "step": torch.tensor(7.0)}
    options = torch.optim.AdamW([torch.nn.Parameter(weight)], lr=0.25).param_groups[0]
    group = {**options, "params": ["body.weight"]}
    optimizer = {"state": {"body.weight": kinds}, "param_groups": [group]}
    torch.save({"model": state, "optimizer": optimizer, "step": 7, "note": "hello"}, tmp_path / "run.pt")
    convert(tmp_path / "run.pt", tmp_path / "ours", "unishard")
    return tmp_path


def ckpt(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["ckpt", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_inspect_tells_what_is_in_it(run: Path) -> None:
    code, text = ckpt("inspect", run / "ours", "--tensors")
    assert code == 0
    for said in (
        "unishard 0.",
        "converted from",
        "14 elements in 2 tensors, 2 float32",
        "head.weight = body.weight",
        "exp_avg, exp_avg_sq, step of 1 parameters",
        "0.25",
        "step, note",
        "optim.state.body.weight.exp_avg_sq",
    ):
        assert said in text, said
    code, text = ckpt("inspect", run / "run.pt", "--json")
    found = json.loads(text)
    assert (code, found["format"], found["step"], found["elements"]) == (0, "torch.save", 7, 14)
    assert found["tied"] == {"head.weight": "body.weight"}


def test_inspect_says_with_which_configuration(tmp_path: Path) -> None:
    import unishard

    settings = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    engine = unishard.initialize(model=torch.nn.Linear(2, 2), config=settings).engine
    engine.save_checkpoint(tmp_path, client_state={"best": 1})
    code, text = ckpt("inspect", tmp_path, "--config")
    assert code == 0
    assert '"train_batch_size": 2' in text
    code, text = ckpt("inspect", tmp_path)
    assert "configuration" in text
    assert "train_batch_size" in text


def test_verify_names_file_and_parameter(run: Path) -> None:
    folder = run / "ours" / "global_step7"
    assert ckpt("verify", folder) == (0, f"{folder}: every MiB matches its checksum; no problems\n")
    (folder / "notes.txt").write_text("mine")
    code, text = ckpt("verify", run / "ours")
    assert (code, text) == (1, "notes.txt is not of this checkpoint; move it away\n")
    (folder / "notes.txt").unlink()
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[checkpoint.inspect(folder).tensors["optim.state.body.weight.exp_avg"].chunks[0].data or 0] ^= 1
    file.write_bytes(content)
    code, text = ckpt("verify", run / "ours")
    assert code == 1
    assert "__0_0.distcp: the bytes of optim.state.body.weight.exp_avg near" in text
    file.write_bytes(content[:-1])
    code, text = ckpt("verify", run / "ours")
    assert code == 1
    assert "__0_0.distcp (with model.body.weight, model.scale and 17 more) has" in text


@pytest.mark.parametrize(
    "to", ["unishard", "dcp", "safetensors", "torch", "deepspeed-universal", "deepspeed"]
)
def test_convert_and_diff(to: str, run: Path) -> None:
    target = run / ("out.pt" if to == "torch" else "out")
    code, text = ckpt("convert", run / "ours", target, "--to", to)
    assert code == 0, text
    assert f"wrote {target}" in text
    weights = ["--weights-only"] if to == "safetensors" else []
    code, text = ckpt("diff", run / "ours", target, *weights)
    assert (code, text) == (0, "no differences\n")
    code, text = ckpt("convert", run / "ours", target, "--to", to)
    assert code == 1
    assert "exists; choose another place" in text
    assert ckpt("convert", run / "ours", target, "--to", to, "--overwrite")[0] == 0


def test_diff_says_what_differs(run: Path) -> None:
    content = torch.load(run / "run.pt", weights_only=True)
    content["model"]["body.weight"][1, 2] += 0.5
    content["model"]["scale"] = torch.ones(3)
    content["model"]["more"] = torch.ones(1)
    content["optimizer"]["param_groups"][0]["lr"] = 0.5
    torch.save(content, run / "other.pt")
    code, text = ckpt("diff", run / "run.pt", run / "other.pt", "--json")
    rows = {row["key"]: row for row in json.loads(text)}
    assert code == 1
    assert rows.keys() == {"model.body.weight", "model.scale", "model.more", "optim.param_groups.0.lr"}
    assert rows["model.body.weight"]["largest"] == 0.5
    assert (rows["model.scale"]["first"], rows["model.scale"]["second"]) == ("(2,) float32", "(3,) float32")
    assert rows["model.more"]["first"] == "missing"
    assert "largest difference" in ckpt("diff", run / "run.pt", run / "other.pt")[1]


def test_consolidate_and_dtype(run: Path) -> None:
    assert ckpt("consolidate", run / "ours", run / "fp32.bin")[0] == 0
    found = torch.load(run / "fp32.bin", weights_only=True)
    assert found.keys() == {"body.weight", "head.weight", "scale"}
    target = run / "half.safetensors"
    assert ckpt("convert", run / "ours", target, "--to", "safetensors", "--dtype", "bf16")[0] == 0
    assert "2 bfloat16" in ckpt("inspect", run / "half.safetensors")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["inspect", "ours", "--tag", "global_step9"], "holds no 'global_step9'; there are global_step7"),
        (
            ["inspect", "notes"],
            "is no checkpoint of a known format (unishard, deepspeed-universal, deepspeed,",
        ),
        (["convert", "ours", "out", "--to", "pickle"], "format 'pickle' is not known; there are unishard,"),
        (["convert", "ours", "out", "--to", "deepspeed", "--ranks", "0"], "are of one number of ranks"),
        (["convert", "ours", "out", "--to", "deepspeed", "--dtype", "bf16"], "has no meaning for DeepSpeed"),
        (["convert", "ours", "out", "--to", "dcp", "--dtype", "fp4"], "--dtype fp4: write one of fp32"),
        (["convert", "ours", "out", "--to", "dcp", "--max-shard-size", "big"], "'big' is no size"),
        (
            ["convert", "ours", "out", "--to", "dcp", "--exclude-frozen"],
            "does not say which weights are frozen",
        ),
        (
            ["convert", "ours", "out", "--to", "dcp", "--like", "notes"],
            "has no meaning for torch.distributed",
        ),
        (
            ["convert", "ours", "out", "--to", "deepspeed-universal", "--dtype", "bf16"],
            "has no meaning for DeepSpeed",
        ),
        (["convert", "ours", "out.safetensors", "--to", "safetensors", "--like", "notes"], "is one file"),
        (["consolidate", "ours", "out.bin", "--max-shard-size", "1MB"], "is one file of any size"),
        (["consolidate", "ours", "out.bin", "--safe-serialization"], "give it the suffix .safetensors"),
        (["inspect", "ours", "--groups", "notes/a.txt"], "it must be a JSON list"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    (run / "notes").mkdir()
    (run / "notes" / "a.txt").write_text("hello")
    code, text = ckpt(*arguments)
    assert code == 1
    assert message in text
    assert not (run / "out").exists()


def test_state_by_position_is_named_by_a_file(run: Path) -> None:
    content = torch.load(run / "run.pt", weights_only=True)
    content["model"]["other"] = torch.zeros(4, 3)
    content["optimizer"]["state"] = {0: content["optimizer"]["state"]["body.weight"]}
    content["optimizer"]["param_groups"][0]["params"] = [0]
    torch.save(content, run / "position.pt")
    code, text = ckpt("inspect", run / "position.pt")
    assert code == 1
    assert "--groups FILE" in text
    (run / "groups.json").write_text('[["other"]]')
    code, text = ckpt("inspect", run / "position.pt", "--groups", run / "groups.json", "--tensors")
    assert code == 0
    assert "optim.state.other.exp_avg" in text
