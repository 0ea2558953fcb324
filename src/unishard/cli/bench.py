"""`unishard bench`: unishard and its peers side by side on this machine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from unishard.bench.plan import SIZES, Plan
from unishard.errors import ConfigError, UnishardError

if TYPE_CHECKING:
    from unishard.bench.registry import Chosen
    from unishard.bench.results import Results

NamesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--contestants", "-c", help="Names, families or patterns, separated by commas. Default: all."
    ),
]
WithoutOption = Annotated[list[str] | None, typer.Option("--without", help="Names or patterns to leave out.")]


def bench(
    contestants: NamesOption = None,
    without: WithoutOption = None,
    size: Annotated[str, typer.Option(help=f"The model: {', '.join(SIZES)}.")] = "30m",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    ranks: Annotated[int, typer.Option(help="Processes.")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads of each rank.")] = 1,
    transport: Annotated[
        str, typer.Option(help="memory, or sockets: how unishard's ranks exchange tensors.")
    ] = "memory",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of throughput.")] = 3,
    steps: Annotated[int, typer.Option(help="Timed steps of each contestant in a round.")] = 4,
    warmup: Annotated[int, typer.Option(help="Steps before those.")] = 2,
    accumulation: Annotated[int, typer.Option(help="Micro-batches of one step.")] = 1,
    recompute: Annotated[bool, typer.Option("--recompute", help="Activation checkpointing.")] = False,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences a rank; default: the size's.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of a sequence; default: the size's.")] = None,
    curve: Annotated[int, typer.Option(help="Steps in fresh processes; 0: throughput only.")] = 12,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds for one contestant in one round.")] = 600.0,
    out: Annotated[Path, typer.Option(help="Folder of the output.")] = Path("runs/bench"),
    listed: Annotated[bool, typer.Option("--list", help="Show the contestants and end.")] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Write the report of this results.json again.")
    ] = None,
) -> None:
    """Measure unishard and its peers: throughput, memory, traffic, where time goes, loss.

    Writes results.json, report.html and tables.md to the output folder.
    """
    console = _console()
    try:
        if source is not None:
            from unishard.bench.results import Results

            _report(Results.load(source), source.parent, console)
            return
        plan = _plan(
            size=size,
            dtype=dtype,
            ranks=ranks,
            threads=threads,
            transport=transport,
            rounds=rounds,
            steps=steps,
            warmup=warmup,
            accumulation=accumulation,
            recompute=recompute,
            micro_batch=micro_batch,
            sequence=sequence,
            curve=curve,
            seed=seed,
            timeout=timeout,
        )
        _measure(plan, _split(contestants), _split(without), out, listed, console)
    except UnishardError as error:
        console.print(escape(str(error)), highlight=False)
        raise typer.Exit(1) from None


def _console() -> Console:
    """At least as wide as the tables: squeezed into 80 columns they are unreadable."""
    return Console(width=max(Console().width, 150))


def _plan(**options: object) -> Plan:
    try:
        return Plan(**options)  # pyright: ignore[reportArgumentType]
    except ValidationError as error:
        problems = [(str(e["loc"][0]), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        raise ConfigError(
            "\n".join(f"--{name.replace('_', '-')}: {text}" for name, text in problems)
        ) from None


def _split(given: list[str] | None) -> list[str]:
    return [name.strip() for each in given or [] for name in each.split(",") if name.strip()]


def _measure(
    plan: Plan, only: list[str], without: list[str], out: Path, listed: bool, console: Console
) -> None:
    # The registry imports torch, which no other command needs.
    from unishard.bench.registry import choose, contestants
    from unishard.bench.run import Run

    if listed:
        for contestant in contestants():
            console.print(f"[bold]{contestant.name}[/]: {escape(contestant.setting)}", highlight=False)
        return
    chosen = choose(plan, only, without)
    run = Run(plan, chosen.contestants, out, lambda line: console.print(escape(line), style="dim"))
    run.results.left_out = _left_out(chosen, without)
    # A scheduler that ends the run deserves what was measured as much as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = run.everything()
    _report(results, out, console)
    if results.interrupted:
        raise typer.Exit(130)
    if any(entry.error for entry in results.entries):
        raise typer.Exit(1)


def _left_out(chosen: Chosen, without: list[str]) -> dict[str, str]:
    return chosen.left_out | dict.fromkeys(without, "excluded with --without")


def _report(results: Results, folder: Path, console: Console) -> None:
    from unishard.bench.report import write_report
    from unishard.bench.tables import heading, sheets

    for line in heading(results):
        console.print(escape(line), highlight=False)
    tables = sheets(results)
    for sheet in tables:
        console.print(sheet.as_rich())
    lines = "\n".join(f"- {line}" for line in heading(results))
    (folder / "tables.md").write_text(lines + "\n\n" + "\n".join(sheet.as_markdown() for sheet in tables))
    write_report(results, folder / "report.html")
    console.print(f"wrote results.json, report.html and tables.md to {escape(str(folder))}", highlight=False)
