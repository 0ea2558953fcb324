"""`checkpoint`: a function whose intermediate results are computed again in backward."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute

from unishard.checkpointing.inputs import Inputs
from unishard.checkpointing.rng import Draws
from unishard.checkpointing.settings import Settings, current

_log = logging.getLogger("unishard")


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, keeping for backward only the inputs that gradients flow to, as `configure` says.

    In backward the function runs again with the same random numbers (the generators of the CPU and of the inputs'
    devices, and every state of `get_cuda_rng_tracker()`) and under the same autocast. It may return anything, and take
    tensors in tuples, lists and dicts. Without gradients it simply runs. Built on torch's non-reentrant checkpointing.

    Raises `StateError` where `contiguous_checkpointing` has no room left.

    >>> x = torch.ones(3, requires_grad=True)
    >>> checkpoint(torch.sin, x).sum().backward()
    >>> bool(torch.equal(x.grad, torch.cos(x.detach())))
    True
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    settings, inputs = current(), Inputs(args, kwargs)
    draws = Draws(inputs.tensors())

    def run(inputs: Inputs) -> Any:
        given, named = inputs.back()
        if not inputs.at_rest:
            with _observed(settings, "forward"):
                return function(*given, **named)
        with _observed(settings, "recomputation"), draws.again():
            return function(*given, **named)

    # Random numbers are restored here: torch looks for devices among tensors, and is given none.
    outputs = recompute(run, inputs, use_reentrant=False, preserve_rng_state=False)
    inputs.leave(settings)
    return outputs


non_reentrant_checkpoint = checkpoint
"""DeepSpeed has two; here there is one."""


@contextmanager
def _observed(settings: Settings, what: str) -> Iterator[None]:
    wait = settings.synchronize and torch.accelerator.is_available()
    if wait:
        torch.accelerator.synchronize()
    started = time.perf_counter()
    try:
        yield
    finally:
        if wait:
            torch.accelerator.synchronize()
        if settings.profile:
            _log.info("checkpoint: %s took %.2f ms", what, 1000 * (time.perf_counter() - started))
