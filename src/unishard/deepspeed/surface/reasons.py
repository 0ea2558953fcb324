"""Why names are absent, and what to use instead."""

from __future__ import annotations

PIPELINE = "pipeline parallelism is not part of this version; use ZeRO-3 with smaller micro-batches"
EXPERTS = "expert parallelism is not part of this version; train the experts data-parallel under ZeRO-3"
TENSOR = (
    "tensor parallelism through this door is not part of this version; apply torch.distributed.tensor.parallel and "
    "shard with unishard.fully_shard"
)
SEQUENCE = "sequence parallelism is not part of this version; lower the micro-batch, or recompute activations"
INFERENCE = "inference kernels are not part of unishard; run the model in eval mode, or serve it elsewhere"
LAUNCHER = "the multi-node launcher is not part of this version; use torchrun, or `unishard run` on one node"
TUNING = "the autotuner is not part of this version; try micro-batch sizes and stages by hand"
FLOPS = "the FLOPs profiler is not part of this version; use torch.utils.flop_counter.FlopCounterMode"
OFFLOAD = "offload is not part of this version; keep states on the device, under ZeRO-3"
DATA = "DeepSpeed's data pipeline is not part of unishard; sample and order the data in your own loader"
COMPRESSED = "compressed communication is not part of this version; use AdamW"
INTERNAL = "an internal of DeepSpeed's own implementation, with nothing behind it here"
WHOLE = "it needs norms of whole tensors, and optimizers here see shards; use AdamW"
CONVERT = (
    "checkpoints here have other files, which load at any number of ranks and any stage; `unishard ckpt convert --to "
    "deepspeed` writes DeepSpeed's"
)
