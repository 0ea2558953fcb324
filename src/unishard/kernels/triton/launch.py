"""How kernels are launched."""

from __future__ import annotations

from typing import Any

import triton

BLOCK = 1024
"""Elements that one program handles at a time."""


def blocks(numel: int) -> int:
    return triton.cdiv(numel, BLOCK)


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on `programs` programs.

    Multiply-adds are not fused: beside the memory traffic that costs nothing, and results are those of the CPU kernels.
    """
    kernel[(programs,)](*arguments, BLOCK=BLOCK, enable_fp_fusion=False, **constants)
