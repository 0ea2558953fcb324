"""The root of the command line; each subject has a file and a subcommand."""

from __future__ import annotations

import typer

from unishard.cli.bench import bench
from unishard.cli.checkpoint import app as checkpoint_app
from unishard.cli.config import app as config_app

app = typer.Typer(
    name="unishard",
    help="Sharded data-parallel training for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_app, name="ckpt")
app.command()(bench)


@app.callback()
def _root() -> None:
    """Keep subcommands named, also while there is only one."""


if __name__ == "__main__":
    app()
