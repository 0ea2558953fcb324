"""`unishard run`: start a training script on this machine's processes, through torchrun."""

from __future__ import annotations

import os
import sys

import typer


def run(
    context: typer.Context,
    script: str = typer.Argument(help="the training script, followed by its own arguments"),
    ranks: int = typer.Option(0, "--ranks", "-n", help="processes; default: one for each GPU, or 1"),
    as_deepspeed: bool = typer.Option(
        False,
        "--as-deepspeed",
        help="`import deepspeed` in the script, and in what it starts, means unishard",
    ),
    port: int = typer.Option(0, help="of the rendezvous on this machine; default: a free one"),
    module: bool = typer.Option(False, "--module", "-m", help="SCRIPT is a module, as with python -m"),
) -> None:
    """Run SCRIPT on several processes of this machine (options go before it)."""
    environment = dict(os.environ)
    if as_deepspeed:
        from unishard.deepspeed.hook import child_environment

        environment = child_environment(environment)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks or _processes())]
    command += ["--master_port", str(port)] if port else ["--standalone"]
    command += ["--module"] if module else []
    os.execve(sys.executable, [*command, script, *context.args], environment)


def _processes() -> int:
    import torch

    return torch.cuda.device_count() or 1
