"""Reading a config: files, mappings, base64, and what cannot be read."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from unishard.config import Config, load_config, resolve
from unishard.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "ds_config.json"
    path.write_text(text)
    return path


def test_the_same_config_from_every_source(tmp_path: Path) -> None:
    tree = {"train_batch_size": 8, "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}
    path = write(tmp_path, json.dumps(tree))
    encoded = base64.urlsafe_b64encode(json.dumps(tree).encode()).decode()
    expected = load_config(tree)
    assert expected.zero_optimization.reduce_bucket_size == 500_000_000
    for source in (path, str(path), encoded, Config(**tree), expected):
        assert load_config(source).model_dump() == expected.model_dump()


def test_origin_tells_a_file_from_a_dict(tmp_path: Path) -> None:
    path = write(tmp_path, '{"train_batch_size": 8}')
    assert resolve(path, dp_world_size=1).origin("train_batch_size") == "file"
    assert resolve(load_config(path), dp_world_size=1).origin("train_batch_size") == "file"
    assert resolve({"train_batch_size": 8}, dp_world_size=1).origin("train_batch_size") == "dict"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  "train_batch_size": 8,\n}', "ds_config.json:3:1: not JSON"),
        ('{\n  // batch\n  "train_batch_size": 8\n}', "ds_config.json:2:3: not JSON"),
        ('{\n  // batch\n  "train_batch_size": 8\n}', "JSON has no comments"),
        ("", "ds_config.json:1:1: not JSON"),
        ("[1]", "a config is an object of keys, not a list"),
        (
            '{"train_batch_size": 8,\n "train_batch_size": 4}',
            "'train_batch_size' (lines 1, 2); keep one of each",
        ),
        (
            '{"fp16": {"enabled": true,\n "enabled": false}}',
            "more than once in one object: 'enabled' (lines 1, 2)",
        ),
        ('{"train_batch_sise": 8}', "did you mean 'train_batch_size'?"),
    ],
)
def test_unreadable_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("source", ["no_such_config.json", base64.b64encode(b"not an object").decode()])
def test_missing_file_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file .* pass an existing path or a dict"):
        load_config(source)


def test_keys_are_strings() -> None:
    with pytest.raises(ConfigError, match="config key 3 is a int; keys are strings"):
        load_config({"fp16": {3: 1}})


def test_old_spellings_are_read_and_said() -> None:
    resolved = resolve(
        {"train_batch_size": 8, "bfloat16": {"enabled": True}, "zero_optimization": True}, dp_world_size=1
    )
    assert (resolved.compute_dtype, resolved.sharding) == ("bf16", "ZERO1")
    assert [line.partition(":")[0] for line in resolved.log_lines] == ["bfloat16", "zero_optimization = true"]
    with pytest.raises(ConfigError, match="bfloat16: is an old name of 'bf16', which is given too"):
        load_config({"bfloat16": {"enabled": True}, "bf16": {"enabled": False}})


def test_the_source_is_left_as_it_was() -> None:
    tree = {"train_batch_size": 8, "bfloat16": {"enabled": True}, "optimizer": {"type": "Adam", "params": {}}}
    before = json.dumps(tree)
    resolve(tree, dp_world_size=1, overrides={"optimizer.params.lr": 1.0})
    assert json.dumps(tree) == before


def test_config_is_read_without_torch() -> None:
    code = (
        "import sys; from unishard.config import resolve; import unishard.cli.main;"
        "resolve({'train_batch_size': 8}, dp_world_size=1); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
