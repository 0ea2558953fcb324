"""Names in profiles and traces for what is no operator of torch's: waiting for peers, whole optimizer steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()


def labelled(name: str) -> AbstractContextManager[object]:
    """A range called `name` in the profile under way; costs nothing to speak of when there is none.

    >>> with labelled("unishard::example"):
    ...     pass
    """
    return record_function(name) if torch.autograd._profiler_enabled() else _NOTHING
