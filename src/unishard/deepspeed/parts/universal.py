"""`checkpoint.ds_to_universal`: a checkpoint of the engine (or of DeepSpeed) as a universal one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of DeepSpeed's converter.

    >>> parse_arguments(["--input_folder", "run/global_step5", "--output_folder", "run/universal"]).strict
    True
    """
    parser = argparse.ArgumentParser(description="Convert a checkpoint into a universal one.")
    parser.add_argument("--input_folder", required=True, help="a checkpoint: SAVE_DIR/TAG")
    parser.add_argument("--output_folder", required=True, help="the folder to make")
    parser.add_argument("--num_extract_workers", type=int, default=4, help="accepted; one process converts")
    parser.add_argument("--num_merge_workers", type=int, default=2, help="accepted; one process converts")
    parser.add_argument("--keep_temp_folder", action="store_true", help="accepted; there is none")
    parser.add_argument(
        "--no_strict", dest="strict", action="store_false", help="accepted; conversion is always strict"
    )
    parser.add_argument("--inject_missing_state", action="store_true", help="accepted; nothing is injected")
    return parser.parse_args(arguments)


def main(args: Any = None) -> None:
    """Write `args.input_folder` as a universal checkpoint to `args.output_folder`, on this process alone.

    The engine loads either at any number of ranks; DeepSpeed's loader needs the universal one for that.

    Raises:
        CheckpointError: nothing to convert, or a checkpoint without optimizer state.
    """
    from unishard.checkpoint.convert import Options, convert

    args = parse_arguments() if args is None else args
    source, target = Path(args.input_folder).absolute(), Path(args.output_folder).absolute()
    latest = target.parent / "latest"
    before = latest.read_bytes() if latest.is_file() else None
    done = convert(
        source, target.parent, "deepspeed-universal", Options(tag=target.name, overwrite=True), check=False
    )
    if before is not None:
        # A converter does not decide where a run continues.
        latest.write_bytes(before)
    for note in done.notes:
        print(f"unishard: {note}")
