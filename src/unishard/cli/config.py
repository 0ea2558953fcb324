"""`unishard config show` and `unishard config check`: read a ds_config without a model, a launcher or torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unishard.config import Problem, ResolvedConfig, check, load_config, resolve
from unishard.config.batch import TRIAD, implied_world_size
from unishard.errors import ConfigError

app = typer.Typer(help="Show or check a ds_config.", no_args_is_help=True)

PathArgument = Annotated[Path, typer.Argument(help="The ds_config, a JSON file.", metavar="DS_CONFIG")]
WorldOption = Annotated[
    int | None, typer.Option("--world-size", min=1, help="Data-parallel ranks; default: $WORLD_SIZE.")
]
HiddenOption = Annotated[
    int | None,
    typer.Option("--hidden-size", min=1, help='The model\'s width, for bucket sizes left to "auto".'),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a dotted key, as KEY=VALUE in JSON.", metavar="KEY=VALUE"),
]


@app.command()
def show(
    path: PathArgument,
    world_size: WorldOption = None,
    hidden_size: HiddenOption = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    full: Annotated[bool, typer.Option("--all", help="Also print keys of features that are off.")] = False,
) -> None:
    """Print the resolved config with the origin of each value."""
    console = _console()
    try:
        size, source = _world(path, world_size)
        resolved = resolve(
            path,
            dp_world_size=size,
            world_size_source=source,
            hidden_size=hidden_size,
            overrides=_overrides(overrides),
        )
    except ConfigError as error:
        _fail(console, str(error))
    if as_json:
        rows = resolved.as_table(full=True)
        origins = {row.key: row.origin for row in rows}
        report = {"config": resolved.as_dict(), "origins": origins, "log_lines": list(resolved.log_lines)}
        typer.echo(json.dumps(report, indent=2))
        return
    console.print(_table(resolved, f"{path} for {size} data-parallel rank(s), from {source}", full))
    for line in resolved.log_lines:
        console.print(f"[dim]translated:[/] {escape(line)}")


@app.command(name="check")
def check_command(
    path: PathArgument,
    world_size: WorldOption = None,
    hidden_size: HiddenOption = None,
    overrides: SetOption = None,
) -> None:
    """List every problem at once; exit code 1 if there is any."""
    console = _console()
    size, source = world_size, "--world-size"
    try:
        if size is None and "WORLD_SIZE" in os.environ:
            size, source = _world(path, None)
        problems = check(
            path,
            dp_world_size=size,
            world_size_source=source,
            hidden_size=hidden_size,
            overrides=_overrides(overrides),
        )
    except ConfigError as error:
        _fail(console, str(error))
    if problems:
        _list(console, path, problems)
        raise typer.Exit(1)
    console.print(f"{escape(str(path))}: no problems")


def _world(path: Path, option: int | None) -> tuple[int, str]:
    """The data-parallel size to resolve for, and where it is from."""
    if option is not None:
        return option, "--world-size"
    if (launched := os.environ.get("WORLD_SIZE")) is not None:
        if not launched.isdecimal() or int(launched) < 1:
            raise ConfigError(
                f"WORLD_SIZE={launched!r} in the environment is no number of ranks; pass --world-size"
            )
        return int(launched), "WORLD_SIZE in the environment"
    config = load_config(path)
    given = [getattr(config, key) for key in TRIAD]
    sizes = [value if isinstance(value, int) else None for value in given]
    if (implied := implied_world_size(*sizes)) is not None:
        return implied, "the batch sizes themselves"
    return 1, "an assumption; pass --world-size"


def _overrides(given: list[str] | None) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for item in given or []:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: write KEY=VALUE, such as optimizer.params.lr=1e-4")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    return overrides


def _table(resolved: ResolvedConfig, title: str, full: bool) -> Table:
    table = Table("key", "value", "origin", title=escape(title))
    for row in resolved.as_table(full=full):
        style = "dim" if row.origin == "default" else None
        table.add_row(escape(row.key), escape(json.dumps(row.value)), row.origin, style=style)
    return table


def _list(console: Console, path: Path, problems: list[Problem]) -> None:
    console.print(f"{escape(str(path))}: {len(problems)} problem(s)")
    for problem in problems:
        console.print(f"  [bold]{escape(problem.key)}[/]: {escape(problem.message)}", highlight=False)


def _fail(console: Console, message: str) -> None:
    console.print(escape(message), highlight=False)
    raise typer.Exit(1)


def _console() -> Console:
    console = Console()
    # Redirected output must not be folded at 80 columns: it is searched and compared.
    return console if console.is_terminal else Console(width=200, soft_wrap=True)
