"""`unishard ckpt inspect|verify|convert|diff|consolidate`: checkpoints of every format, on one process."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unishard.errors import UnishardError

if TYPE_CHECKING:
    from unishard.checkpoint.convert.format import Hints, Opened

app = typer.Typer(help="Look into checkpoints, check them, and convert them.", no_args_is_help=True)

PathArgument = Annotated[
    Path, typer.Argument(help="A checkpoint (file or folder), or a folder of several.", metavar="CHECKPOINT")
]
TagOption = Annotated[
    str | None, typer.Option("--tag", "-t", help="Which of several; default: what the file 'latest' names.")
]
FormatOption = Annotated[
    str | None, typer.Option("--from", help="The format, where the files do not tell.", metavar="FORMAT")
]
RanksOption = Annotated[
    int | None,
    typer.Option("--ranks", help="For deepspeed: how many ranks load it; default: as many as wrote SOURCE."),
]
StageOption = Annotated[
    int | None,
    typer.Option("--zero-stage", help="For deepspeed: 1, 2 or 3; default: as SOURCE's configuration says."),
]
GroupsOption = Annotated[
    Path | None,
    typer.Option(
        "--groups",
        help="A JSON list with the parameter names of each optimizer group, for state that is stored by position.",
        metavar="FILE",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def inspect(
    path: PathArgument,
    tag: TagOption = None,
    format: FormatOption = None,
    groups: GroupsOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    config: Annotated[
        bool, typer.Option("--config", help="Print the configuration it was written with.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds: step, sizes, parameters, who wrote it and with which configuration."""
    from unishard.checkpoint.convert.report import report

    console = _console()
    opened = _open(console, path, tag, format, groups)
    found = report(opened)
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
        return
    console.print(_overview(opened, found), highlight=False)
    if tensors:
        console.print(_tensors(found))
    if config:
        typer.echo(json.dumps(found["config"], indent=2, default=str))
    for note in opened.notes:
        console.print(f"note: {escape(note)}", highlight=False)


@app.command()
def verify(
    path: PathArgument, tag: TagOption = None, format: FormatOption = None, groups: GroupsOption = None
) -> None:
    """Read everything and compare it with the checksums that the format has; exit code 1 if anything is wrong."""
    from unishard.checkpoint.convert import verify as check
    from unishard.checkpoint.convert.report import CHECKED

    console = _console()
    opened = _open(console, path, tag, format, groups)
    try:
        problems = list(check(opened))
    except UnishardError as error:
        _fail(console, error)
    for problem in problems:
        console.print(escape(problem), highlight=False)
    if problems:
        raise typer.Exit(1)
    console.print(f"{escape(str(opened.folder))}: {CHECKED[opened.format]}; no problems", highlight=False)


@app.command()
def convert(
    source: PathArgument,
    target: Annotated[Path, typer.Argument(help="Where to write; must not exist.", metavar="TARGET")],
    to: Annotated[
        str, typer.Option("--to", help="unishard, deepspeed-universal, deepspeed, dcp, safetensors or torch.")
    ],
    tag: TagOption = None,
    format: FormatOption = None,
    groups: GroupsOption = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the weights: fp32, bf16 or fp16; default: as they are.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    like: Annotated[
        Path | None,
        typer.Option(
            "--like", help="A Hugging Face model folder: its configuration and tokenizer come along."
        ),
    ] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer out.")] = False,
    exclude_frozen: Annotated[
        bool, typer.Option("--exclude-frozen", help="Leave frozen weights out.")
    ] = False,
    torch_optimizer: Annotated[
        bool,
        typer.Option(
            "--torch-optimizer", help="For DeepSpeed runs that step with one of torch's optimizers."
        ),
    ] = False,
    ranks: RanksOption = None,
    zero_stage: StageOption = None,
    new_tag: Annotated[
        str | None, typer.Option("--new-tag", help="Name of the folder inside TARGET.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare checksums first.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at TARGET.")] = False,
) -> None:
    """Write a checkpoint in another format, a few MB at a time."""
    from unishard.checkpoint.convert import Options
    from unishard.checkpoint.convert import convert as run
    from unishard.checkpoint.convert.consolidate import parse_size
    from unishard.checkpoint.convert.report import parse_dtype

    console = _console()
    try:
        options = Options(
            dtype=parse_dtype(dtype),
            max_shard_bytes=parse_size(max_shard_size),
            weights_only=weights_only,
            exclude_frozen=exclude_frozen,
            like=like,
            torch_optimizer=torch_optimizer,
            ranks=ranks,
            zero_stage=zero_stage,
            overwrite=overwrite,
            tag=new_tag,
        )
        hints = _hints(groups)
        written = run(source, target, to, options, tag=tag, format=format, hints=hints, check=check)
    except (UnishardError, OSError) as error:
        _fail(console, error)
    console.print(f"wrote {escape(str(written.path))}", highlight=False)
    for note in written.notes:
        console.print(f"note: {escape(note)}", highlight=False)


@app.command()
def diff(
    first: PathArgument,
    second: PathArgument,
    tag: TagOption = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Compare weights and buffers.")
    ] = False,
    values: Annotated[bool, typer.Option(help="Compare elements, not shapes alone.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Compare two checkpoints of any formats; exit code 1 if they differ."""
    from unishard.checkpoint.convert import compare

    console = _console()
    opened = [_open(console, path, tag, None, None) for path in (first, second)]
    if weights_only:
        opened = [_weights(each) for each in opened]
    try:
        rows = list(compare(opened[0], opened[1], values=values))
    except UnishardError as error:
        _fail(console, error)
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2))
    elif rows:
        table = Table("key", str(first), str(second), "largest difference")
        for row in rows:
            largest = "" if row.largest is None else f"{row.largest:.3g}"
            table.add_row(escape(row.key), escape(row.first), escape(row.second), largest)
        console.print(table)
    else:
        console.print("no differences")
    if rows:
        raise typer.Exit(1)


@app.command()
def consolidate(
    path: PathArgument,
    target: Annotated[
        Path,
        typer.Argument(
            help="A folder, or a file ending in .bin, .pt, .pth or .safetensors.", metavar="TARGET"
        ),
    ],
    tag: TagOption = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file in a folder.")] = "5GB",
    safe_serialization: Annotated[
        bool, typer.Option("--safe-serialization", help="Write safetensors into a folder.")
    ] = False,
    exclude_frozen: Annotated[
        bool, typer.Option("--exclude-frozen", help="Leave frozen weights out.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at TARGET.")] = False,
) -> None:
    """Write the fp32 weights for inference, as DeepSpeed's zero_to_fp32.py does."""
    from unishard.checkpoint.convert import convert_zero_checkpoint_to_fp32_state_dict as run

    console = _console()
    try:
        written = run(
            path, target, max_shard_size, safe_serialization, tag, exclude_frozen, overwrite=overwrite
        )
    except (UnishardError, OSError) as error:
        _fail(console, error)
    console.print(f"wrote {escape(str(written.path))}", highlight=False)
    for note in written.notes:
        console.print(f"note: {escape(note)}", highlight=False)


def _open(console: Console, path: Path, tag: str | None, format: str | None, groups: Path | None) -> Opened:
    from unishard.checkpoint.convert import open_checkpoint

    try:
        return open_checkpoint(path, tag=tag, format=format, hints=_hints(groups))
    except (UnishardError, OSError) as error:
        _fail(console, error)


def _hints(groups: Path | None) -> Hints:
    from unishard.checkpoint.convert import Hints
    from unishard.errors import CheckpointError

    if groups is None:
        return Hints()
    try:
        named = json.loads(groups.read_text(encoding="utf-8"))
        if not all(isinstance(name, str) for names in named for name in names):
            raise ValueError("not a list of lists of names")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"--groups {groups}: {error}; it must be a JSON list with a list of parameter names for each group"
        ) from error
    return Hints(named)


def _weights(opened: Opened) -> Opened:
    catalog = opened.catalog
    kept = {key: info for key, info in catalog.tensors.items() if key.startswith("model.")}
    return replace(opened, catalog=replace(catalog, tensors=kept, blobs={}))


def _overview(opened: Opened, found: dict[str, Any]) -> Table:
    table = Table(title=escape(found["path"]), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    about = found["about"]
    writer = " ".join(str(about[key]) for key in ("writer", "version") if about.get(key))
    when = about.get("time")
    rows = {
        "format": found["format"],
        "written by": writer + (f" with torch {about['torch']}" if about.get("torch") else ""),
        "written at": None
        if when is None
        else f"{datetime.fromtimestamp(when, timezone.utc):%Y-%m-%d %H:%M} UTC",
        "converted from": about.get("converted_from"),
        "ranks": about.get("ranks"),
        "step": found["step"],
        "samples": found["counters"].get("global_samples"),
        "parameters and buffers": f"{found['elements']:,} elements in {found['weights']} tensors, {found['dtypes']}",
        "tied": ", ".join(f"{alias} = {name}" for alias, name in found["tied"].items()),
        "optimizer": found["optimizer"],
        "learning rates": ", ".join(f"{rate:g}" for rate in found["learning_rates"]),
        "loss scale": (found["counters"].get("loss_scale") or {}).get("scale"),
        "client state": ", ".join(found["client_state"]),
        "size": f"{found['bytes']:,} bytes in {found['files']} files",
        "configuration": _short(found["config"]),
    }
    for name, value in rows.items():
        if value not in (None, ""):
            table.add_row(name, escape(str(value)))
    return table


def _short(config: Any) -> str:
    text = "" if not config else json.dumps(config, default=str)
    return text if len(text) < 600 else f"{text[:560]} ... (--config prints all)"


def _tensors(found: dict[str, Any]) -> Table:
    table = Table("tensor", "shape", "dtype", "bytes")
    for row in found["tensors"]:
        table.add_row(escape(row["key"]), str(tuple(row["shape"])), row["dtype"], f"{row['bytes']:,}")
    return table


def _fail(console: Console, error: Exception) -> NoReturn:
    console.print(escape(str(error)), highlight=False)
    raise typer.Exit(1)


def _console() -> Console:
    console = Console()
    # Redirected output must not be folded at 80 columns: it is searched and compared.
    return console if console.is_terminal else Console(width=200, soft_wrap=True)
