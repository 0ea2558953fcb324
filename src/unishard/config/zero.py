"""`zero_optimization` with every key DeepSpeed knows, and unishard's own keys about sharding."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from unishard.config.fields import (
    Auto,
    Count,
    Honoured,
    Int,
    Refused,
    Section,
    Size,
    Translated,
    not_available,
)
from unishard.config.offload import Aio, OffloadGradient, OffloadOptimizer, OffloadParam

_OLD_OPTIMIZER = ("DeepSpeed removed this key", 'use offload_optimizer: {"device": "cpu"}')
_OLD_PARAM = ("DeepSpeed removed this key", 'use offload_param: {"device": "cpu"}')
_ZEROPP = "remove the key: parameters and gradients travel in communication_data_type"
_GROUPS = "parameters and gradients travel in groups, usually one per transformer block, whatever this size"
_ALWAYS_FLAT = Translated("gradients always land in one contiguous buffer per group")
_COLLECTIVE = Translated("the collective follows from the sharding and the backend")


class ZenFlow(Section):
    """`zero_optimization.zenflow`: known, refused when present."""

    topk_ratio: Any = 0.1
    select_strategy: Any = "auto"
    select_interval: Any = "auto"
    update_interval: Any = "auto"
    overlap_step: Any = False
    offload: Any = False
    auto_ratio: Any = 0.99
    full_warm_up_rounds: Any = 0
    pt_reserved_cores_perc: Any = 0.5
    steps_per_epoch: Any = None


class LeafModule(Section):
    """`zero_optimization.leaf_module`: modules gathered as one, by class, path, or end of path."""

    classes: Annotated[list[str], Honoured()] = []
    names: Annotated[list[str], Honoured()] = []
    name_suffixes: Annotated[list[str], Honoured()] = []


class ReduceKeys(Section):
    """Keys of stages 1 and 2: buckets, collectives, gradients."""

    contiguous_gradients: Annotated[bool, _ALWAYS_FLAT] = True
    reduce_scatter: Annotated[bool, _COLLECTIVE] = True
    reduce_bucket_size: Annotated[
        Count, Auto("hidden", lambda hidden: hidden * hidden), Translated(_GROUPS)
    ] = 5 * 10**8
    use_multi_rank_bucket_allreduce: Annotated[bool, _COLLECTIVE] = True
    allgather_partitions: Annotated[bool, _COLLECTIVE] = True
    allgather_bucket_size: Annotated[Size, Translated(_GROUPS)] = 5 * 10**8
    overlap_comm: Annotated[
        bool | None, Translated("reductions always run asynchronously during backward", (True,))
    ] = None
    compute_grad_norm: Annotated[
        bool,
        Translated("the norm comes from the pass that unscales and clips, and is available all the same"),
    ] = True
    ignore_unused_parameters: Annotated[bool, Honoured()] = True
    legacy_stage1: Annotated[bool, Translated("there is one implementation of ZeRO-1")] = False
    round_robin_gradients: Annotated[
        bool, Translated("every rank has an equal part of each group, so none waits for another's copies")
    ] = False
    parameter_alignment: Annotated[bool, Translated("the layout of each group chooses its own padding")] = (
        False
    )


class GatherKeys(Section):
    """Keys of stage 3: when parameters are gathered and released."""

    sub_group_size: Annotated[Size, Translated("the optimizer steps group by group, whatever this size")] = (
        10**9
    )
    stage3_prefetch_bucket_size: Annotated[
        Size,
        Auto("hidden", lambda hidden: int(0.9 * hidden * hidden)),
        Translated(
            "gathers run ahead in the order recorded in the step before, one group at a time; with 0, none does"
        ),
    ] = 5 * 10**7
    stage3_param_persistence_threshold: Annotated[
        Size,
        Auto("hidden", lambda hidden: 10 * hidden),
        Translated("small parameters travel with their block, so none is kept whole"),
    ] = 10**5
    stage3_model_persistence_threshold: Annotated[Size, Translated("no parameter is kept whole")] = (
        sys.maxsize
    )
    stage3_max_live_parameters: Annotated[
        Size, Auto(), Translated("at most three groups are gathered at a time")
    ] = 10**9
    stage3_max_reuse_distance: Annotated[
        Size,
        Auto(),
        Translated(
            "a group is released after its last use in forward and after its backward; with 0, groups are single "
            "modules, and none stays whole from forward to backward"
        ),
    ] = 10**9
    stage3_gather_16bit_weights_on_model_save: Annotated[
        bool,
        Auto(),
        Translated(
            "full weights are gathered where asked for, with unishard.gather; the DeepSpeed door's save_16bit_model "
            "follows this key"
        ),
    ] = False
    stage3_gather_fp16_weights_on_model_save: Annotated[
        bool, Translated("an old name; full weights are gathered where asked for, with unishard.gather")
    ] = False
    stage3_module_granularity_threshold: Annotated[
        Int, Translated("groups are chosen by repeated blocks, then by size")
    ] = 0
    stage3_use_all_reduce_for_fetch_params: Annotated[bool, _COLLECTIVE] = False
    stage3_allgather_sequential: Annotated[bool, Translated("gathers need no bucket to copy through")] = False
    memory_efficient_linear: Annotated[bool, Translated("linear layers are left as they are")] = True
    override_module_apply: Annotated[bool, Translated("torch.nn.Module is never patched")] = True
    log_trace_cache_warnings: Annotated[bool, Translated("there is no trace cache to warn about")] = False
    enable_sanity_checks: Annotated[bool, Translated("the checks are always on")] = False
    leaf_module: LeafModule | None = None


class OffloadKeys(Section):
    """Keys about states kept elsewhere than on the device, compressed communication and checkpoints."""

    offload_param: Annotated[OffloadParam | None, Honoured()] = None
    offload_optimizer: Annotated[OffloadOptimizer | None, Honoured()] = None
    offload_gradient: Annotated[OffloadGradient | None, Honoured()] = None
    cpu_offload: Annotated[bool | None, Refused(*_OLD_OPTIMIZER, neutral=(False,))] = None
    cpu_offload_param: Annotated[bool | None, Refused(*_OLD_PARAM, neutral=(False,))] = None
    cpu_offload_params: Annotated[bool | None, Refused(*_OLD_PARAM, neutral=(False,))] = None
    cpu_offload_use_pin_memory: Annotated[
        bool | None, Translated("memory that is copied from is pinned where there is an accelerator")
    ] = None
    zenflow: Annotated[ZenFlow | None, not_available("zenflow", "remove the section")] = None
    save_muon_momentum_buffer_in_memory: Annotated[
        bool, Translated("all state of the optimizer rests where offload_optimizer says")
    ] = False
    zero_quantized_weights: Annotated[bool, not_available("quantized gathering (ZeRO++)", _ZEROPP)] = False
    zero_quantized_nontrainable_weights: Annotated[
        bool, not_available("quantized frozen weights", _ZEROPP)
    ] = False
    zero_quantized_gradients: Annotated[bool, not_available("quantized reduction (ZeRO++)", _ZEROPP)] = False
    zeropp_loco_param: Annotated[Any, not_available("LoCo error feedback", _ZEROPP)] = None
    load_from_fp32_weights: Annotated[
        bool, Translated("fp32 master weights start from the model's own weights, in their dtype")
    ] = True
    elastic_checkpoint: Annotated[bool, Translated("it concerns DeepSpeed's own checkpoint files")] = False
    pipeline_loading_checkpoint: Annotated[
        bool,
        Translated("a rank reads only its own parts of a checkpoint, so no rank waits for another's memory"),
    ] = False

    @property
    def offloads(self) -> bool:
        """Whether any state is asked to rest elsewhere."""
        sections = (self.offload_param, self.offload_optimizer, self.offload_gradient)
        return any(section is not None and section.device != "none" for section in sections)


class ZeroOptimization(ReduceKeys, GatherKeys, OffloadKeys):
    """`zero_optimization`: stages 0 to 3, hybrid sharding, and their tuning keys."""

    stage: Annotated[Int, Field(ge=0, le=3), Honoured()] = 0
    mics_shard_size: Annotated[Int, Field(ge=-1), Honoured()] = -1
    mics_hierarchical_params_gather: Annotated[
        bool, not_available("hierarchical gathering", "set it to false; mics_shard_size alone works")
    ] = False
    zero_hpz_partition_size: Annotated[
        Size,
        Translated(
            "trains as HYBRID_SHARD with dp_shard of this size: gathers stay inside that many ranks, as with "
            "hpZ; gradients and optimizer states are shared by those ranks only, which takes more memory",
            (0,),
        ),
    ] = 1


class Mesh(Section):
    """`mesh`: data-parallel ranks as (dp_replicate, dp_shard); a missing size follows from the world size."""

    dp_replicate: Annotated[Count | None, Honoured()] = None
    dp_shard: Annotated[Count | None, Honoured()] = None


def _preset_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return {"FULL_SHARD": "ZERO3", "DDP": "NO_SHARD"}.get(value.upper(), value.upper())


Preset = Literal[
    "NO_SHARD",
    "ZERO1",
    "ZERO2",
    "SHARD_GRAD_OP",
    "ZERO3",
    "HYBRID_ZERO1",
    "HYBRID_ZERO2",
    "HYBRID_SHARD_GRAD_OP",
    "HYBRID_SHARD",
]


class ShardingKeys(Section):
    """Top-level keys about sharding; those without DeepSpeed's prefix or name are unishard's own: `sharding`, `mesh`,
    `overlap_param_gather` and `optimizer_in_backward`."""

    zero_optimization: ZeroOptimization = ZeroOptimization()
    aio: Aio = Aio()
    sharding: Annotated[Preset | None, BeforeValidator(_preset_name), Honoured()] = None
    mesh: Annotated[Mesh | None, Honoured()] = None
    overlap_param_gather: Annotated[bool, Honoured()] = False
    optimizer_in_backward: Annotated[bool, Honoured()] = False
    zero_allow_untested_optimizer: Annotated[bool, Honoured()] = False
    zero_force_ds_cpu_optimizer: Annotated[
        bool, Translated("on the CPU known optimizers step through native kernels, others as they are")
    ] = True
    allgather_size: Annotated[Size | None, Translated("an old name of allgather_bucket_size; " + _GROUPS)] = (
        None
    )
    disable_allgather: Annotated[bool, _COLLECTIVE] = False
