"""The operations as Triton kernels, for CUDA tensors.

None of them has run on a GPU yet: they are compiled for NVIDIA targets, and run under Triton's interpreter on the CPU
(`TRITON_INTERPRET=1`), where they are compared with the reference.
"""

from __future__ import annotations

from unishard.kernels.triton.flat import pack, squared_norm, sum_pieces
from unishard.kernels.triton.steps import adagrad, adam, lion, sgd

__all__ = ["adagrad", "adam", "lion", "pack", "sgd", "squared_norm", "sum_pieces"]
