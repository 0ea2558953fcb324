"""Choosing contestants by name, family and pattern; what does not fit or is not installed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from unishard.bench.contestant import Contestant
from unishard.bench.plan import Plan
from unishard.bench.registry import choose, contestants
from unishard.cli.main import app
from unishard.errors import ConfigError
from unishard.sharding.placement import PRESETS

PLAN = Plan(size="tiny")
ROWS = tuple(replace(c, imports=()) for c in contestants())  # whatever is installed here


def names(plan=PLAN, **options) -> list[str]:
    return [c.name for c in choose(plan, among=ROWS, **options).contestants]


def test_names_are_unique():
    assert len({c.name for c in contestants()}) == len(contestants())


def test_every_preset_takes_part_through_both_doors():
    everyone = {c.name: c for c in contestants() if c.ours}
    for preset in PRESETS:
        name = "unishard-" + preset.lower().replace("_", "-")
        assert {name, name + "-code"} <= everyone.keys()
    levels = [
        everyone[f"unishard-{n}"].level for n in ("no-shard", "zero1", "zero2", "shard-grad-op", "zero3")
    ]
    assert levels == ["replicated", "zero1", "zero2", "zero2", "zero3"]
    assert {n for n in everyone if n.endswith("-overlap")} >= {
        "unishard-zero1-overlap",
        "unishard-zero2-overlap",
    }


def test_a_family_stands_for_its_settings_and_patterns_match():
    assert names(only=["deepspeed-2"]) == [
        "deepspeed-2-cpuadam-overlap",
        "deepspeed-2-cpuadam",
        "deepspeed-2-fused-overlap",
        "deepspeed-2-fused",
    ]
    assert names(only=["fsdp*"], without=["*-full"]) == ["fsdp1-gradop", "fsdp2-gradop"]


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("fsdp2-ful", "did you mean fsdp2-full"),
        ("deepspeed3", "did you mean deepspeed-3"),
        ("qqq", "`unishard bench --list` shows all"),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest(given, hint):
    with pytest.raises(ConfigError, match=hint):
        choose(PLAN, [given])
    with pytest.raises(ConfigError, match=hint):
        choose(PLAN, without=[given])


def test_what_does_not_fit_is_left_out_with_the_reason():
    chosen = choose(PLAN, among=ROWS)
    assert chosen.left_out["unishard-hybrid-shard"] == "at least 4 ranks needed"
    assert chosen.left_out["ddp-bf16-wire"] == "for bf16 only"
    more = names(Plan(size="tiny", ranks=4, dtype="bf16"))
    assert {"unishard-hybrid-shard", "ddp-bf16-wire"} <= set(more)


def test_what_does_not_fit_is_refused_when_named():
    with pytest.raises(
        ConfigError, match="unishard-hybrid-shard: at least 4 ranks needed; this run has 2 ranks and fp32"
    ):
        choose(PLAN, ["unishard-hybrid-shard"], among=ROWS)


def test_excluding_everything_is_refused():
    with pytest.raises(ConfigError, match="no contestant is left"):
        choose(PLAN, ["ddp"], ["ddp"], among=ROWS)


def test_a_missing_library_is_named_with_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(ConfigError) as caught:
        choose(PLAN)
    message = str(caught.value)
    assert "deepspeed-1-cpuadam-overlap needs deepspeed, which is not installed" in message
    assert "unishard[bench]" in message
    assert "--without 'deepspeed-*'" in message
    assert not [c for c in choose(PLAN, without=["deepspeed-*"]).contestants if "deepspeed" in c.name]


def test_a_row_is_all_it_takes():
    mine = Contestant("mine", family="mine", level="zero3", setting="as it comes", build=print)
    assert choose(PLAN, ["mine"], among=[*ROWS, mine]).contestants == (mine,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contestants", "fsdp3-full"], "did you mean fsdp2-full"),
        (["--size", "7b"], "unknown size '7b'; choose one of tiny, 30m, 124m"),
        (["--dtype", "fp8"], "--dtype: Input should be 'fp32' or 'bf16'"),
        (["--curve", "2"], "memory and traffic take 5 steps"),
        (["--from", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_the_command_refuses_before_it_runs(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", *options])
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


def test_the_command_lists_contestants_with_their_settings():
    done = CliRunner().invoke(app, ["bench", "--list"])
    assert done.exit_code == 0
    text = " ".join(done.output.split())
    for contestant in contestants():
        assert f"{contestant.name}: {contestant.setting[:20]}" in text
