"""Tables and the page, from results made by hand."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from unishard.bench import report
from unishard.bench.machine import Machine
from unishard.bench.plan import Plan
from unishard.bench.ratios import comparisons
from unishard.bench.results import Entry, Observation, Results, Round
from unishard.bench.spent import KINDS
from unishard.bench.tables import heading, sheets
from unishard.errors import UnsupportedError

MACHINE = Machine(
    cpu="Some CPU",
    cores=2,
    memory=2**34,
    system="Linux x86_64",
    python="3.12.0",
    versions={"torch": "2.13.0"},
    allocator={"MALLOC_ARENA_MAX": "1"},
    load=0.5,
)


def round_of(index: int, rate: float) -> Round:
    return Round(
        index=index,
        position=0,
        tokens_per_second=rate,
        seconds=1.0,
        step_seconds=[1.0],
        reference=100.0 + index,
        losses=[2.0],
        left_behind=0,
    )


def observation(peak: int, sent: float, loss: float = 2.0, counted: float | None = None) -> Observation:
    return Observation(
        import_seconds=0.1,
        import_growth=1_000_000,
        setup_seconds=0.5,
        first_step_seconds=0.25,
        peak_setup=peak // 2,
        peak=peak,
        resident_before_update=peak // 2,
        live_before_update=60_000_000,
        held={"parameters": 10_000_000, "gradients": 20_000_000, "optimizer": 25_000_000},
        sent_on_wire=sent,
        sent_counted=counted,
        own_network=True,
        losses=[3.0, loss],
        spent=dict(zip(KINDS, (0.5, 0.2, 0.1, 0.1, 0.1), strict=True)),
    )


def entry(name: str, rates: list[float], seen: Observation | None, level="zero3", **options) -> Entry:
    rounds = [round_of(index, rate) for index, rate in enumerate(rates)]
    fixed = {"family": name, "setting": "</script><script>alert(1)", "ours": False, "alone": False}
    return Entry(name=name, level=level, rounds=rounds, observation=seen, **{**fixed, **options})


@pytest.fixture
def results() -> Results:
    entries = [
        entry("ddp", [100.0, 200.0, 400.0], observation(1_000_000_000, 4e6, 2.0), level="replicated"),
        entry("fast-a", [80.0, 100.0], observation(900_000_000, 8e6), family="fast"),
        entry("fast-b", [40.0, 150.0], observation(800_000_000, 6e6), family="fast"),
        entry("mine", [160.0, 300.0], observation(400_000_000, 3e6, 2.5, 2.9e6), ours=True),
        entry("broken", [], None, error="rank 0: it broke"),
    ]
    return Results(
        machine=MACHINE,
        plan=Plan(size="tiny"),
        entries=entries,
        left_out={"x": "at least 4 ranks needed", "y": "at least 4 ranks needed"},
    )


def row(results: Results, title: str, name: str) -> list[str]:
    [sheet] = [s for s in sheets(results) if s.title.startswith(title)]
    [found] = [r for r in sheet.rows if r[0] == name]
    return found


def test_ratios_are_formed_within_rounds(results):
    # Medians of all rounds would give 230 / 200; ddp's third round has no partner.
    mine = results.entry("mine")
    assert mine is not None
    mine.rounds[1].reference = 60.0  # somebody else was busy
    assert row(results, "Throughput", "mine")[1:] == [
        "230",
        "160 – 300",
        "400",
        "1.55",
        "1.50 – 1.60",
        "80",
        "1 of 2",
    ]


def test_the_fastest_setting_of_each_round_counts_and_the_leanest_for_memory(results):
    [pair] = [c for c in comparisons(results) if c.ours == "mine"][:1]
    assert pair.peer == "fast"
    assert pair.throughput is not None
    assert (pair.throughput.least, pair.throughput.most) == (2.0, 2.0)
    assert (pair.memory, pair.sent) == (0.5, 0.5)


def test_memory_and_efficiency_rows(results):
    assert row(results, "Memory", "mine")[1:] == [
        *("400", "200", "200", "60.0"),
        *("10.0", "20.0", "25.0", "5.0", "1.0"),
    ]
    cells = row(results, "Efficiency", "mine")
    assert cells[2:4] == ["3.0", "2.9"]
    assert cells[4:9] == ["50%", "20%", "10%", "10%", "10%"]
    assert cells[-2:] == ["0.8", "5.0e-01"]


def test_failures_and_what_was_left_out_are_said(results):
    text = "\n".join(heading(results))
    assert "failed: broken: rank 0: it broke" in text
    assert "left out, at least 4 ranks needed: x, y" in text
    assert "C heap: MALLOC_ARENA_MAX=1" in text
    assert "interrupted" not in text
    assert row(results, "Throughput", "broken")[1] == "failed"
    results.interrupted = True
    assert "interrupted" in "\n".join(heading(results))


def test_markdown_tables_have_as_many_cells_as_columns(results):
    for sheet in sheets(results):
        lines = [line for line in sheet.as_markdown().splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert len(lines) == len(sheet.rows) + 2


class Page(HTMLParser):
    """Collects what could make a browser go elsewhere, and the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [
            f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")
        ]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_needs_no_network(results, monkeypatch):
    monkeypatch.setattr(report, "_plotly", lambda: "/* the library */")
    page = Page()
    text = report.render(results)
    page.feed(text)
    assert page.outside == []
    assert not {"link", "iframe", "img", "object"} & set(page.tags)
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert page.tags.count("script") == 2, "a setting's text opened a script of its own"
    assert page.tags.count("table") == 4
    everything = " ".join(page.texts)
    assert all(e.name in everything for e in results.entries)
    assert len(re.findall(r"id='plot\d+'", text)) == 7


def test_the_page_carries_its_library(results):
    pytest.importorskip("plotly")
    text = report.render(results)
    assert "Plotly.newPlot" in text
    assert len(text) > 1_000_000
    page = Page()
    page.feed(text)
    assert page.outside == []


def test_without_plotly_the_page_is_refused_with_the_remedy(results, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UnsupportedError, match=r"unishard\[bench\].*--from results.json"):
        report.write_report(results, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_run_without_anything_still_has_a_page(monkeypatch):
    monkeypatch.setattr(report, "_plotly", lambda: "")
    assert "unishard bench" in report.render(Results(machine=MACHINE, plan=Plan(size="tiny"), entries=[]))
