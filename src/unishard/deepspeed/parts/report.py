"""`deepspeed.env_report`: what is installed."""

from __future__ import annotations

import platform

import torch

from unishard.deepspeed.parts.op_builders import ALL_OPS, compatible_ops
from unishard.deepspeed.release import VERSION
from unishard.version import __version__


def main(hide_operator_status: bool = False, hide_errors_and_warnings: bool = False) -> None:
    """Print operations, versions and the device."""
    if not hide_operator_status:
        for name, runs in compatible_ops().items():
            print(f"{name} {'.' * (30 - len(name))} {'runs' if runs else 'absent'}")
    print(f"unishard {__version__}, in the place of deepspeed {VERSION}")
    print(f"torch {torch.__version__}, python {platform.python_version()}, {len(ALL_OPS)} operations known")


def cli_main() -> None:
    """The console command."""
    main()
