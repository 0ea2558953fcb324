"""`python -m unishard.kernels`: what is active, and how fast it runs here."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from unishard.kernels.measure import Measured, cases, measure
from unishard.kernels.table import active, missing


def main() -> None:
    """Print one row for each operation."""
    parser = argparse.ArgumentParser(prog="python -m unishard.kernels", description=__doc__)
    parser.add_argument(
        "--numel", type=int, default=1 << 22, help="elements of each tensor (default: 4 million)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    Console().print(
        report([measure(case, device) for case in cases(options.numel, device)], device, options.numel)
    )


def report(rows: list[Measured], device: torch.device, numel: int) -> Table:
    """The table that is printed."""
    table = Table(title=f"kernels on {device.type}: {numel:,} elements, {how(device)}", title_justify="left")
    table.add_column("operation")
    table.add_column("implementation")
    for heading in ("GB/s", "against torch"):
        table.add_column(heading, justify="right")
    for row in rows:
        speed, speedup = f"{row.gigabytes_per_second:.1f}", f"{row.speedup:.1f}x"
        table.add_row(row.case.label, row.implementation, speed, speedup)
    table.caption = (
        "GB/s: bytes that must be read and written. Against torch: the reference's time over this one's."
    )
    return table


def how(device: torch.device) -> str:
    """Instruction set and threads, or why there is neither."""
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    if active(device.type) == "native":
        from unishard.kernels.native import instruction_set, thread_team

        return f"{instruction_set()}, {threads} ({thread_team()})"
    if device.type == "cpu":
        return f"{threads}; {missing('native', 'cpu') or 'compiled kernels not chosen'}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else active(device.type)


if __name__ == "__main__":
    main()
