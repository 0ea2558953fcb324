"""The results as tables: for the terminal, for Markdown and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from rich import box
from rich.markup import escape
from rich.table import Table

from unishard.bench.ratios import (
    STEADY,
    Spread,
    against,
    by_round,
    comparisons,
    loss_deviation,
    spread,
    steady_rounds,
)
from unishard.bench.results import Entry, Observation, Results
from unishard.bench.spent import KINDS

NOTHING = "–"


@dataclass(frozen=True)
class Sheet:
    """A table of text; the first column is left-aligned, the others right."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def as_rich(self) -> Table:
        table = Table(title=escape(self.title), caption=escape(self.note), box=box.SIMPLE_HEAD)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def as_markdown(self) -> str:
        lines = [
            f"**{self.title}**",
            "",
            _line(self.columns),
            "|---" + "|--:" * (len(self.columns) - 1) + "|",
        ]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", self.note, ""] if self.note else [*lines, ""])


def sheets(results: Results) -> list[Sheet]:
    """Throughput, memory, efficiency, and unishard against peers of the same level."""
    return [throughput(results), memory(results), efficiency(results), peers(results)]


def heading(results: Results) -> list[str]:
    """What was run, where, and how it was measured, a line each."""
    plan, machine = results.plan, results.machine
    shape = plan.shape
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    lines = [
        f"{plan.size} GPT (width {shape.width}, depth {shape.depth}, vocabulary {shape.vocabulary}), {plan.dtype}, "
        f"{plan.ranks} ranks of {plan.threads} thread(s), {shape.micro_batch} x {shape.sequence} tokens a rank and "
        f"micro-batch, accumulation {plan.accumulation}, recomputation {'on' if plan.recompute else 'off'}, "
        f"seed {plan.seed}; unishard's ranks "
        + (
            "read each other's memory" if plan.transport == "memory" else "exchange messages as between hosts"
        ),
        f"{machine.cpu}, {machine.cores} cores, {machine.memory / 2**30:.0f} GiB, {machine.system}; "
        f"Python {machine.python}, {versions}; load average at the start {machine.load:.1f}",
        f"throughput: {plan.rounds} interleaved rounds of {plan.steps} steps after {plan.warmup} in shared processes; "
        "everything else: once, in fresh processes that have run nothing else",
    ]
    if machine.allocator:
        lines.append("C heap: " + ", ".join(f"{k}={v}" for k, v in sorted(machine.allocator.items())))
    lines += _left_out(results)
    lines += [f"failed: {entry.name}: {entry.error}" for entry in results.entries if entry.error]
    return [*lines, "interrupted: some measurements are missing"] if results.interrupted else lines


def _left_out(results: Results) -> list[str]:
    """One line a reason, with everybody whom it concerns."""
    concerned: dict[str, list[str]] = {}
    for name, reason in results.left_out.items():
        concerned.setdefault(reason, []).append(name)
    return [f"left out, {reason}: {', '.join(names)}" for reason, names in concerned.items()]


def throughput(results: Results) -> Sheet:
    """Tokens/s with spread, memory, and the ratio to ddp."""
    columns = (
        "configuration",
        "tokens/s",
        "min – max",
        "peak MB/rank",
        "against ddp",
        "min – max",
        "reference",
        "steady",
    )
    sheet = Sheet(
        "Throughput",
        columns,
        note="medians over rounds; the ratio is formed within each round; reference: GFLOP/s of a matrix product "
        "beside each contestant; steady: rounds in which it differed by at most "
        f"{STEADY:.0%} from ddp's, so that the ratio is the contestants' and not the machine's",
    )
    for entry in results.entries:
        rates, ratio = spread(list(by_round(entry).values())), against(results, entry)
        peak = _megabytes(entry.observation.peak) if entry.observation else NOTHING
        reference = f"{median(r.reference for r in entry.rounds):.0f}" if entry.rounds else NOTHING
        middle = f"{rates.median:,.0f}" if rates else _missing(entry)
        between = f"{rates.least:,.0f} – {rates.most:,.0f}" if rates else NOTHING
        steady = steady_rounds(results, entry)
        share = f"{steady[0]} of {steady[1]}" if steady else NOTHING
        sheet.rows.append([entry.name, middle, between, peak, *_ratio(ratio), reference, share])
    return sheet


def memory(results: Results) -> Sheet:
    """Peaks and what persists, MB a rank."""
    columns = (
        "configuration",
        "peak",
        "peak in set-up",
        "before update",
        "tensors",
        *_HELD,
        "other",
        "library",
    )
    sheet = Sheet(
        "Memory, MB a rank",
        columns,
        note="peak and set-up: growth of the resident size (VmHWM) since before the model was built; before update: "
        "what is resident then, and the tensors alive then, of which parameters (with master weights), gradients and "
        "optimizer state persist; library: growth by its imports, not in the peak",
    )
    for entry in results.entries:
        seen = entry.observation
        if seen is None:
            sheet.rows.append([entry.name, _missing(entry), *[NOTHING] * (len(columns) - 2)])
            continue
        other = seen.live_before_update - sum(seen.held.values())
        numbers = [seen.peak, seen.peak_setup, seen.resident_before_update, seen.live_before_update]
        numbers += [*(seen.held.get(kind, 0) for kind in _HELD), other, seen.import_growth]
        sheet.rows.append([entry.name, *map(_megabytes, numbers)])
    return sheet


def efficiency(results: Results) -> Sheet:
    """Scaling, traffic, where time goes, start-up and the loss."""
    columns = ("configuration", "scaling", "MB sent", "counted", *KINDS, "import s", "start s", "loss off by")
    sheet = Sheet(
        "Efficiency",
        columns,
        note="scaling: tokens/s against one process with all threads; MB sent: by each rank in one step, on the wire "
        "and by unishard's own counter; shares of a step under the profiler; import: added to import torch; start: "
        "building it and the first step; loss off by: largest distance from ddp's loss curve",
    )
    for entry in results.entries:
        scaling, seen = against(results, entry, "plain"), entry.observation
        row = [entry.name, f"{scaling.median:.2f}" if scaling else NOTHING]
        if seen is None:
            sheet.rows.append([*row, *[NOTHING] * (len(columns) - 2)])
            continue
        off, imports = loss_deviation(results, entry), entry.import_seconds
        row += [
            _traffic(seen.sent_on_wire),
            NOTHING if seen.sent_counted is None else _traffic(seen.sent_counted),
        ]
        row += _shares(seen)
        row += [NOTHING if imports is None else f"{imports:.2f}"]
        row += [
            f"{seen.setup_seconds + seen.first_step_seconds:.1f}",
            NOTHING if off is None else f"{off:.1e}",
        ]
        sheet.rows.append(row)
    return sheet


def peers(results: Results) -> Sheet:
    """unishard beside each peer of the same level."""
    sheet = Sheet(
        "unishard against peers of the same level",
        ("pair", "tokens/s", "min – max", "peak memory", "bytes sent"),
        note="ratios; tokens/s against the fastest setting of each round, memory and bytes against the leanest setting",
    )
    for each in comparisons(results):
        memory = NOTHING if each.memory is None else f"{each.memory:.2f}"
        sent = NOTHING if each.sent is None else f"{each.sent:.2f}"
        sheet.rows.append([f"{each.ours} / {each.peer}", *_ratio(each.throughput), memory, sent])
    return sheet


_HELD = ("parameters", "gradients", "optimizer")


def _shares(seen: Observation) -> list[str]:
    total = sum(seen.spent.values())
    return [f"{seen.spent.get(kind, 0.0) / total:.0%}" if total else NOTHING for kind in KINDS]


def _ratio(ratio: Spread | None) -> list[str]:
    if ratio is None:
        return [NOTHING, NOTHING]
    return [f"{ratio.median:.2f}", f"{ratio.least:.2f} – {ratio.most:.2f}"]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}" if count >= 1e8 or not count else f"{count / 1e6:,.1f}"


def _traffic(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def _missing(entry: Entry) -> str:
    return "failed" if entry.error else NOTHING


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
