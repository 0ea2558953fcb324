"""`launcher.runner`: hostfiles, filters, and a script started with its own arguments untouched."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from unishard.deepspeed.parts import launcher, local_rank

TORCHRUN = ("torch.distributed.run", "--nproc_per_node")
HOSTS = {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, HOSTS),
        ({"include_str": "b:0,3"}, {"b": [0, 3]}),
        ({"include_str": "a@b:2"}, {"a": [0, 1, 2, 3], "b": [2]}),
        ({"include_str": "a:1@a:0,1"}, {"a": [0, 1]}),
        ({"exclude_str": "b"}, {"a": [0, 1, 2, 3]}),
        ({"exclude_str": "a:0,1@b:3"}, {"a": [2, 3], "b": [0, 1, 2]}),
        ({"exclude_str": "a:0,1,2,3@b"}, {}),
    ],
)
def test_slots_are_chosen(chosen: dict[str, str], expected: dict[str, list[int]]):
    assert launcher.parse_resource_filter(HOSTS, **chosen) == expected
    pool = {host: len(slots) for host, slots in HOSTS.items()}
    words = chosen.get("include_str", ""), chosen.get("exclude_str", "")
    assert launcher.parse_inclusion_exclusion(pool, *words) == expected


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"include_str": "a", "exclude_str": "b"}, "keep one"),
        ({"include_str": "c"}, "No host 'c' among a, b"),
        ({"exclude_str": "a:4"}, "No slot '4' specified on host 'a'"),
        ({"exclude_str": "a@b:0@5"}, "No host '5'"),
    ],
)
def test_slots_that_are_not_there_are_refused(chosen: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        launcher.parse_resource_filter(HOSTS, **chosen)


def test_hostfiles(tmp_path: Path):
    file = tmp_path / "hosts"
    file.write_text("# mine\n\n  a slots=2\n10.0.0.7 slots=1\n")
    assert launcher.fetch_hostfile(file) == {"a": 2, "10.0.0.7": 1}
    assert launcher.fetch_hostfile(tmp_path / "none") == {}
    for text, message in (("a slots=1\na slots=2", "occurs twice"), ("a", "cannot read"), ("", "no host")):
        with pytest.raises(ValueError, match=message):
            launcher._parse_hostfile(text.splitlines())


def test_contradicting_and_distant_requests_are_refused(tmp_path: Path, monkeypatch: Any):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="keep one kind"):
        launcher.main(["--num_gpus", "1", "-i", "localhost", "train.py"])
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    with pytest.raises(NotImplementedError, match="hosts a, b: this version starts one host"):
        launcher.main(["--hostfile", str(hosts), "train.py"])


def test_the_script_gets_its_own_arguments(tmp_path: Path, monkeypatch: Any, capsys: Any):
    script, text = tmp_path / "show.py", """I'm "72" tall"""
    script.write_text("import sys; print(__name__, sys.argv[1:])")
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *words: started.extend(words))
    launcher.main(["--num_gpus", "2", str(script), "--prompt", text])
    program, command, environment = started
    assert (program, command[:5]) == (sys.executable, [sys.executable, "-m", *TORCHRUN, "2"])
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "bootstrap" in environment["PYTHONPATH"]  # the script's `import deepspeed` is ours
    monkeypatch.setattr(sys, "argv", command[command.index("unishard.deepspeed.parts.local_rank") :])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("LOCAL_RANK", "1")
    local_rank.main()
    assert capsys.readouterr().out == f"__main__ {['--local_rank=1', '--prompt', text]}\n"
