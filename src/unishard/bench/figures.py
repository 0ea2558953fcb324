"""The report's plots, as data and layouts for plotly.js."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

from unishard.bench.ratios import by_round
from unishard.bench.results import Entry, Results
from unishard.bench.spent import KINDS

OURS, THEIRS = "#1f6feb", "#8b949e"
_SERIES = ("#1f6feb", "#d29922", "#2da44e", "#8250df", "#cf222e")


class Figure(NamedTuple):
    """A plot and what to say about it."""

    title: str
    text: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]


def figures(results: Results) -> list[Figure]:
    """All plots for which there is data."""
    drawn = [_ratios(results), _drift(results), _memory(results), _sent(results), _spent(results)]
    drawn += [_losses(results), _startup(results)]
    return [figure for figure in drawn if figure.traces]


def _ratios(results: Results) -> Figure:
    """A box a contestant, with every round as a point."""
    base = by_round(results.entry("ddp") or results.entries[0]) if results.entries else {}
    traces = []
    for entry in results.entries:
        rounds = [r for r in entry.rounds if r.index in base]
        traces.append(
            {
                "type": "box",
                "name": entry.name,
                "y": [r.tokens_per_second / base[r.index] for r in rounds],
                "text": [
                    f"round {r.index + 1}: {r.tokens_per_second:,.0f} tokens/s, reference {r.reference:.0f} GFLOP/s"
                    for r in rounds
                ],
                "boxpoints": "all",
                "jitter": 0.4,
                "pointpos": 0,
                "marker": {"color": OURS if entry.ours else THEIRS},
                "showlegend": False,
            }
        )
    traces = [t for t in traces if t["y"]]
    name = "ddp" if results.entry("ddp") else results.entries[0].name if results.entries else ""
    return Figure(
        "Throughput against ddp, round by round",
        "Each point is one round: the contestant's tokens/s over those of ddp in the same round. Blue is unishard.",
        traces,
        {"yaxis": {"title": {"text": f"tokens/s, {name} = 1"}, "rangemode": "tozero"}},
    )


def _drift(results: Results) -> Figure:
    """The reference product in the order of measurement."""
    rounds = sorted(
        ((r.index, r.position, e.name, r.reference) for e in results.entries for r in e.rounds),
        key=lambda r: r[:2],
    )
    middle = median(r[3] for r in rounds) if rounds else 1.0
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(range(len(rounds))),
        "y": [r[3] / middle for r in rounds],
        "text": [f"round {r[0] + 1}, {r[2]}" for r in rounds],
        "line": {"color": THEIRS},
    }
    return Figure(
        "How steady the machine was",
        "The reference matrix product beside each contestant, in the order in which they ran; 1 is its median.",
        [trace] if rounds else [],
        {"xaxis": {"title": {"text": "measurement"}}, "yaxis": {"title": {"text": "GFLOP/s, median = 1"}}},
    )


def _memory(results: Results) -> Figure:
    """Stacked persistent bytes with the peak above."""
    seen = _observed(results)
    names = [e.name for e, _ in seen]
    kinds = ("parameters", "gradients", "optimizer")
    stacks = {kind: [o.held.get(kind, 0) / 1e6 for _, o in seen] for kind in kinds}
    stacks["other tensors"] = [max(0, o.live_before_update - sum(o.held.values())) / 1e6 for _, o in seen]
    traces = _bars(names, stacks)
    for label, values, symbol in (
        ("peak resident", [o.peak / 1e6 for _, o in seen], "line-ew"),
        ("resident before the update", [o.resident_before_update / 1e6 for _, o in seen], "circle-open"),
    ):
        marker = {"symbol": symbol, "size": 14, "color": "#24292f", "line": {"width": 2, "color": "#24292f"}}
        traces.append(
            {"type": "scatter", "mode": "markers", "name": label, "x": names, "y": values, "marker": marker}
        )
    return Figure(
        "Memory of one rank",
        "Bars: tensors alive right before the update, by kind. Marks: growth of the process, which also holds "
        "activations, buffers of C++ code and what the C heap keeps.",
        traces if seen else [],
        {"barmode": "stack", "yaxis": {"title": {"text": "MB"}}},
    )


def _sent(results: Results) -> Figure:
    seen = _observed(results)
    names = [e.name for e, _ in seen]
    traces = _bars(names, {"on the wire": [o.sent_on_wire / 1e6 for _, o in seen]})
    counted = [(e.name, o.sent_counted / 1e6) for e, o in seen if o.sent_counted is not None]
    if counted:
        marker = {"symbol": "circle-open", "size": 11, "color": "#24292f"}
        x, y = map(list, zip(*counted, strict=True))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "unishard's counter",
                "x": x,
                "y": y,
                "marker": marker,
            }
        )
    return Figure(
        "Bytes that one rank sends in one step",
        "The loopback interface's own counter, headers included, divided by the ranks.",
        traces if seen else [],
        {"yaxis": {"title": {"text": "MB"}}},
    )


def _spent(results: Results) -> Figure:
    seen = _observed(results)
    stacks = {kind: [1000 * o.spent.get(kind, 0.0) for _, o in seen] for kind in KINDS}
    return Figure(
        "Where a step's time goes",
        "Under the torch profiler, which makes every operator and the Python around it slower.",
        _bars([e.name for e, _ in seen], stacks) if seen else [],
        {"barmode": "stack", "yaxis": {"title": {"text": "ms a step"}}},
    )


def _losses(results: Results) -> Figure:
    traces = [
        {"type": "scatter", "mode": "lines", "name": e.name, "y": o.losses, "opacity": 0.7}
        for e, o in _observed(results)
    ]
    return Figure(
        "Loss curves",
        "All start from the same weights and see the same data; click a name to hide it.",
        traces,
        {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "loss (nats)"}}},
    )


def _startup(results: Results) -> Figure:
    seen = _observed(results)
    base = results.torch_import_seconds or 0.0
    stacks = {
        "import torch": [base for _ in seen],
        "import the library": [e.import_seconds or 0.0 for e, _ in seen],
        "build": [o.setup_seconds for _, o in seen],
        "first step": [o.first_step_seconds for _, o in seen],
    }
    return Figure(
        "From the start of Python to the end of the first step",
        "Imports in a fresh interpreter, the rest in a fresh process; compiling DeepSpeed's operators counts where it "
        "happens, once a machine.",
        _bars([e.name for e, _ in seen], stacks) if seen else [],
        {"barmode": "stack", "yaxis": {"title": {"text": "s"}}},
    )


def _observed(results: Results) -> list[tuple[Entry, Any]]:
    return [(entry, entry.observation) for entry in results.entries if entry.observation is not None]


def _bars(names: Sequence[str], stacks: dict[str, list[float]]) -> list[dict[str, Any]]:
    return list(_bar_traces(names, stacks))


def _bar_traces(names: Sequence[str], stacks: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    for index, (label, values) in enumerate(stacks.items()):
        color = _SERIES[index % len(_SERIES)]
        yield {"type": "bar", "name": label, "x": list(names), "y": values, "marker": {"color": color}}
