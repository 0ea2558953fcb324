"""Plain values of DeepSpeed's top-level modules."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500
default_pg_timeout = timedelta(minutes=30)
INFERENCE_GENERIC_MODE = "generic"
INFERENCE_SPECIALIZED_MODE = "specialized"
CROSS_RANK, CROSS_SIZE, LOCAL_RANK = "CROSS_RANK", "CROSS_SIZE", "LOCAL_RANK"
git_hash = git_branch = "unishard"


def __getattr__(name: str) -> Any:
    if name == "__compatible_ops__":
        from unishard.deepspeed.parts.op_builders import compatible_ops

        return compatible_ops()
    if name == "installed_ops":
        import importlib.util

        from unishard.deepspeed.parts.op_builders import ALL_OPS

        built = importlib.util.find_spec("unishard._native") is not None
        return {name: built and name in ("cpu_adam", "cpu_lion", "cpu_adagrad") for name in ALL_OPS}
    if name == "torch_info":
        import torch

        cuda = ".".join((torch.version.cuda or "0.0").split(".")[:2])
        return {
            "version": ".".join(torch.__version__.split(".")[:2]),
            "bf16_support": True,
            "cuda_version": cuda,
            "nccl_version": "0.0",
            "hip_version": "0.0",
        }
    if name == "accelerator_name":
        from unishard.deepspeed.parts.accelerator import get_accelerator

        return get_accelerator().device_name()
    raise AttributeError(name)
