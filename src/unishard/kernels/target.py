"""What one optimizer step reads and writes for one flat range of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Target(NamedTuple):
    """One contiguous range of parameters with everything that belongs to it, all of the same number of elements.

    Attributes:
        param: fp32 master weights, or bf16 or fp16 weights without master. Updated.
        grad: fp32, bf16 or fp16, whatever the dtype of `param`. Read only.
        state: the tensors that the rule's `state_names` list, each fp32 or bf16. Updated.
        copy: bf16 or fp16; receives the new parameters, rounded to nearest even. None for none.

    >>> import torch
    >>> from unishard.kernels import SgdRule, update
    >>> target = Target(torch.ones(2), torch.ones(2, dtype=torch.bfloat16), copy=torch.zeros(2).half())
    >>> update([target], SgdRule(lr=0.25)); target.copy
    tensor([0.7500, 0.7500], dtype=torch.float16)
    """

    param: Tensor
    grad: Tensor
    state: tuple[Tensor, ...] = ()
    copy: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with the name that messages use."""
        yield "param", self.param
        yield "grad", self.grad
        for index, tensor in enumerate(self.state):
            yield f"state[{index}]", tensor
        if self.copy is not None:
            yield "copy", self.copy
