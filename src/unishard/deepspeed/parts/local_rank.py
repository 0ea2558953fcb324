"""Run a script with `--local_rank=N` before its own arguments, as DeepSpeed's launcher starts scripts."""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    """`python -m unishard.deepspeed.parts.local_rank {file,module} SCRIPT ARGUMENTS`."""
    kind, script, *arguments = sys.argv[1:]
    sys.argv = [script, f"--local_rank={os.environ.get('LOCAL_RANK', '0')}", *arguments]
    if kind == "module":
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
