"""Notes on what runs without an error and is probably not meant; each is written once, on the first rank."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

log = logging.getLogger("unishard")


def compare_batch(inputs: Any, expected: int) -> None:
    """Say so where a batch has another number of samples than the configuration's micro-batch, `expected`.

    Gradients follow the batch, sample counts the configuration. Nothing is said of inputs whose leading sizes differ.
    """
    from torch.utils import _pytree as pytree

    sizes = {len(t) for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.ndim}
    if len(sizes) == 1 and expected not in sizes and dist.get_rank() == 0:
        log.warning(
            "unishard: the first batch has %d samples, and the configuration says train_micro_batch_size_per_gpu=%d. "
            "Gradients are the mean over what is passed; global_samples and train_batch_size() follow the latter. "
            "Give the DataLoader batch_size=%d, or change the configuration",
            *sizes,
            expected,
            expected,
        )


class EmptyStateNote:
    """A state-dict hook of the module: under ZeRO-3 `module.state_dict()` holds empty tensors, as in DeepSpeed."""

    def __init__(self) -> None:
        self.quiet = False

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if self.quiet:
            return
        for name, value in state.items():
            # `keep_vars=True` asks for the parameters themselves, which are empty and nobody's checkpoint.
            if type(value) is torch.Tensor and not value.numel():
                self.quiet = True
                if dist.get_rank() == 0:
                    log.warning(
                        "unishard: state_dict() of a ZeRO-3 model has empty tensors (%s, for one), and so has what "
                        "save_pretrained() writes: call save_16bit_model(), pass "
                        "state_dict=engine.module_state_dict(), or save inside deepspeed.zero.GatheredParameters",
                        name,
                    )
                return
