"""The root of the command line; each subject has a file and a subcommand."""

from __future__ import annotations

import typer

from unishard.cli.bench import bench
from unishard.cli.checkpoint import app as checkpoint_app
from unishard.cli.config import app as config_app
from unishard.cli.run import run

app = typer.Typer(
    name="unishard",
    help="Sharded data-parallel training for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_app, name="ckpt")
app.command()(bench)
# What follows the script is the script's.
app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    }
)(run)


@app.callback()
def _root() -> None:
    """Keep subcommands named, also while there is only one."""


if __name__ == "__main__":
    app()
