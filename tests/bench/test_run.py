"""A small run with real contestants: what it measures is right, and one that fails loses nobody else's numbers."""

from __future__ import annotations

import json
import os
import platform
from functools import partial
from pathlib import Path

import pytest
from tests.bench.faulty import DYING, RAISING

from unishard.bench.plan import Plan
from unishard.bench.ratios import against, comparisons, loss_deviation
from unishard.bench.registry import choose
from unishard.bench.results import Results
from unishard.bench.run import Run
from unishard.bench.startup import import_seconds
from unishard.errors import ConfigError

PLAN = Plan(size="tiny", rounds=2, steps=3, warmup=2, curve=5, timeout=120)
NAMES = ["plain", "ddp", "fsdp2-full"]
NAMES += [f"unishard-zero{stage}{door}" for stage in (1, 2, 3) for door in ("", "-code")]
PARAMETERS = 4 * 118_528  # bytes of the tiny model in fp32

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Results, Path]:
    folder = tmp_path_factory.mktemp("bench")
    chosen = choose(PLAN, NAMES).contestants
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unishard.bench.run.import_seconds", partial(import_seconds, repeats=1))
        return Run(PLAN, chosen, folder, say=lambda line: None).everything(), folder


@pytest.fixture
def results(finished) -> Results:
    return finished[0]


def observed(results: Results, name: str):
    entry = results.entry(name)
    assert entry is not None
    assert entry.observation is not None, entry.error
    return entry.observation


def test_everybody_is_measured(results):
    assert [e.name for e in results.entries] == NAMES
    assert [e.error for e in results.entries] == [None] * len(NAMES)
    assert [len(e.rounds) for e in results.entries] == [2] * len(NAMES)
    assert not results.interrupted


def test_losses_are_the_same_in_fresh_and_in_shared_processes(results):
    for entry in results.entries:
        assert loss_deviation(results, entry) == pytest.approx(0.0, abs=2e-5) or entry.alone
        curve = observed(results, entry.name).losses
        assert len(curve) == PLAN.curve
        for each in entry.rounds:
            assert each.losses == pytest.approx(curve[: len(each.losses)], abs=2e-5)
        assert curve[-1] < curve[0] - 0.05, f"{entry.name} learns nothing"


def test_one_process_on_the_global_batch_has_the_same_loss(results):
    assert observed(results, "plain").losses == pytest.approx(observed(results, "ddp").losses, abs=2e-5)


def test_rounds_are_interleaved_and_timed_by_the_slowest_rank(results):
    for position, entry in enumerate(results.entries):
        for index, each in enumerate(entry.rounds):
            assert (each.index, each.position) == (index, position)
            assert len(each.step_seconds) == PLAN.steps
            assert 0 < max(each.step_seconds) < 2 * each.seconds  # ranks' clocks are read one after the other
            assert each.tokens_per_second == pytest.approx(PLAN.tokens_per_step * PLAN.steps / each.seconds)
            assert each.reference > 1
            assert each.left_behind < PARAMETERS / 2, f"{entry.name} leaves tensors behind"


@pytest.mark.parametrize(
    ("name", "parameters", "gradients", "optimizer"),
    [
        ("plain", 1, 1, 2),
        ("ddp", 1, 1, 2),
        ("fsdp2-full", 0.5, 0.5, 1),
        ("unishard-zero1", 1, 0.5, 1),
        ("unishard-zero2", 1, 0.5, 1),
        ("unishard-zero3", 0.5, 0.5, 1),
        ("unishard-zero3-code", 0.5, 0.5, 1),
    ],
)
def test_what_persists_follows_the_zero_paper(results, name, parameters, gradients, optimizer):
    seen = observed(results, name)
    expected = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}
    for kind, share in expected.items():
        assert seen.held[kind] == pytest.approx(share * PARAMETERS, rel=0.03), kind
    assert seen.live_before_update == pytest.approx(sum(expected.values()) * PARAMETERS, rel=0.25)


def test_memory_grows_by_at_least_what_persists(results):
    for entry in results.entries:
        seen = observed(results, entry.name)
        assert seen.peak >= seen.peak_setup > PARAMETERS
        assert seen.peak > sum(seen.held.values())


def test_bytes_on_the_wire_are_those_counted(tmp_path):
    plan = PLAN.model_copy(update={"rounds": 0, "transport": "sockets"})
    names = ["unishard-zero2", "unishard-zero3", "unishard-zero3-code"]
    results = Run(plan, choose(plan, names).contestants, tmp_path, say=lambda line: None).everything()
    for entry in results.entries:
        seen = observed(results, entry.name)
        if seen.own_network:
            # Headers and acknowledgements weigh more on a small model.
            assert seen.sent_on_wire == pytest.approx(seen.sent_counted, rel=0.1)


def test_who_sends_what(results):
    for entry in results.entries:
        seen = observed(results, entry.name)
        assert (seen.sent_counted is not None) == entry.ours
        if seen.sent_counted is not None and seen.own_network:
            assert seen.sent_on_wire < 0.1 * seen.sent_counted  # ranks read each other's memory
    assert observed(results, "plain").sent_on_wire < 10_000
    # gloo sends a reduce-scatter as an all-reduce, so FSDP2's full sharding costs 2 Ψ, its grad-op 1.5 Ψ.
    assert observed(results, "fsdp2-full").sent_on_wire == pytest.approx(2 * PARAMETERS, rel=0.1)
    assert observed(results, "unishard-zero2").sent_counted == pytest.approx(PARAMETERS, rel=0.03)


def test_time_is_attributed(results):
    for entry in results.entries:
        spent = observed(results, entry.name).spent
        assert set(spent) == {"compute", "communication", "copies", "optimizer", "python"}
        assert min(spent["compute"], spent["optimizer"], spent["python"]) > 0, entry.name
        assert (spent["communication"] > 0) == (not entry.alone)


def test_start_up_is_measured(results):
    assert results.torch_import_seconds is not None
    for entry in results.entries:
        assert entry.import_seconds is not None
        assert observed(results, entry.name).setup_seconds > 0


def test_ratios_and_comparisons(results):
    ddp = results.entry("ddp")
    assert against(results, ddp) == (1.0, 1.0, 1.0)
    pairs = {(c.ours, c.peer) for c in comparisons(results)}
    assert pairs == {("unishard-zero3", "fsdp2-full"), ("unishard-zero3-code", "fsdp2-full")}
    assert all(c.throughput and c.memory and c.sent for c in comparisons(results))


def test_results_are_read_back_and_say_nothing_about_the_place(finished):
    results, folder = finished
    path = folder / "results.json"
    assert Results.load(path) == results
    text = path.read_text()
    assert json.loads(text)["schema_version"] == 1
    for private in (str(Path.cwd()), str(folder), platform.node(), os.path.expanduser("~")):
        assert private not in text


def test_what_is_no_results_file_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"schema_version": 1}')
    with pytest.raises(ConfigError, match=r"not a results\.json of this version: machine: Field required"):
        Results.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        Results.load(tmp_path / "absent.json")


def test_failures_are_reported_by_name_and_lose_nothing(tmp_path):
    [ddp] = choose(PLAN, ["ddp"]).contestants
    plan = PLAN.model_copy(update={"steps": 1, "curve": 0})
    results = Run(plan, [RAISING, DYING, ddp], tmp_path, say=lambda line: None).everything()
    raising, dying, ours = results.entries
    assert raising.error is not None
    assert "ValueError: no such stage" in raising.error
    assert dying.error is not None
    assert "rank 1 died with exit code 3" in dying.error
    assert ours.error is None
    assert len(ours.rounds) == 2
    log = (tmp_path / "ranks.log").read_text()
    assert "raising: rank" in log
    assert "in build_raising" in log


def test_deepspeed_trains_alike(tmp_path):
    pytest.importorskip("deepspeed")
    plan = PLAN.model_copy(update={"rounds": 0})
    names = ["ddp", "deepspeed-1-fused", "deepspeed-2-fused", "deepspeed-3-fused-overlap"]
    run = Run(plan, choose(plan, names).contestants, tmp_path, say=lambda line: None)
    run.observations()
    results = run.results
    for entry in results.entries:
        assert entry.error is None
        assert loss_deviation(results, entry) == pytest.approx(0.0, abs=2e-5)
        assert sum(observed(results, entry.name).held.values()) > 2 * PARAMETERS
