"""Top-level keys about how gradients are scaled and travel."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from unishard.config.fields import (
    Auto,
    Count,
    Dtype,
    Honoured,
    Section,
    Translated,
    enabled,
    not_available,
)


class CommsLogger(Section):
    """`comms_logger`: known, refused when enabled."""

    enabled: Any = False
    verbose: Any = False
    prof_all: Any = True
    debug: Any = False
    prof_ops: Any = []


class CommunicationKeys(Section):
    """Top-level keys about gradients on the wire and the ranks that share them."""

    communication_data_type: Annotated[Dtype | None, Auto(), Honoured()] = None
    seq_parallel_communication_data_type: Annotated[
        Dtype | None, Translated("there is no sequence parallelism to communicate for")
    ] = "fp32"
    prescale_gradients: Annotated[bool, Honoured()] = False
    gradient_predivide_factor: Annotated[float, Field(gt=0), Honoured()] = 1.0
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], Honoured()] = "mean"
    data_parallel_size: Annotated[Count | None, Honoured()] = None
    sequence_parallel_size: Annotated[
        Count, not_available("sequence parallelism", "set it to 1, and lower the micro-batch or use stage 3")
    ] = 1
    use_data_before_expert_parallelism: Annotated[
        bool, not_available("expert parallelism", "set it to false")
    ] = False
    comms_logger: Annotated[
        CommsLogger,
        not_available("comms_logger", "profile a few steps with torch.profiler", asks=enabled),
    ] = CommsLogger()
