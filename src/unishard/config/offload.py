"""`offload_param`, `offload_optimizer` and `aio`: which states rest elsewhere than where they are computed with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from unishard.config.fields import Auto, Count, Honoured, Section, Size, Translated, not_available

_PINNED = Translated("memory that is copied from is pinned where there is an accelerator")
_BUFFERS = Translated("one group is read ahead and one is written behind, in buffers of the groups' sizes")
_PIPELINED = Translated("the next group is read and the one before written back while one is updated, always")
Device = Annotated[Literal["none", "cpu", "nvme"], Auto(), Honoured()]


class OffloadParam(Section):
    """`zero_optimization.offload_param`: where shards of parameters rest.

    With `max_in_cpu`, that many elements of each rank stay in host memory, and nvme takes the rest.
    """

    device: Device = "none"
    nvme_path: Annotated[str | None, Honoured()] = None
    buffer_count: Annotated[Count, _BUFFERS] = 5
    buffer_size: Annotated[Size, Auto(), _BUFFERS] = 10**8
    max_in_cpu: Annotated[Size | None, Auto(), Honoured()] = None
    pin_memory: Annotated[bool, _PINNED] = False


class OffloadOptimizer(Section):
    """`zero_optimization.offload_optimizer`: where optimizer state and fp32 master weights rest.

    `ratio` is the share of elements that is offloaded; the last groups of the model stay. `delayed_update`, a key of
    unishard's own, carries out each update during the next backward, with parameters one step old until then.
    """

    device: Device = "none"
    nvme_path: Annotated[str | None, Honoured()] = None
    buffer_count: Annotated[Count, _BUFFERS] = 4
    pin_memory: Annotated[bool, _PINNED] = False
    pipeline: Annotated[bool, _PIPELINED] = False
    pipeline_read: Annotated[bool, _PIPELINED] = False
    pipeline_write: Annotated[bool, _PIPELINED] = False
    fast_init: Annotated[
        bool, Translated("state is made of zeros at the first step, without reading any")
    ] = False
    ratio: Annotated[float, Field(ge=0, le=1), Honoured()] = 1.0
    delayed_update: Annotated[bool, Honoured()] = False
    super_offload: Annotated[bool, not_available("super_offload", "set it to false")] = False
    cpuadam_cores_perc: Annotated[
        float, Translated("it divides cores for super_offload, which is not there")
    ] = 0.8


class OffloadGradient(Section):
    """`zero_optimization.offload_gradient`, a section of unishard's own: where reduced gradients rest until the update.

    Without it they rest where optimizer state does, as `offload_optimizer` says.
    """

    device: Device = "none"
    nvme_path: Annotated[str | None, Honoured()] = None
    pin_memory: Annotated[bool, _PINNED] = False


class Aio(Section):
    """`aio`: block I/O of the nvme tier."""

    block_size: Annotated[Count, Honoured()] = 1048576
    queue_depth: Annotated[Count, Honoured()] = 8
    thread_count: Annotated[Count, Translated("requests are in flight queue_depth at a time")] = 1
    intra_op_parallelism: Annotated[Count, Translated("requests are in flight queue_depth at a time")] = 1
    single_submit: Annotated[bool, Translated("requests are submitted as they become due")] = False
    overlap_events: Annotated[bool, Translated("submitting and completing always overlap", (True,))] = True
    use_gds: Annotated[Any, not_available("GPUDirect storage", "set it to false")] = False
