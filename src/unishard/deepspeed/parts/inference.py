"""`init_inference` and `tp_model_init`, as far as they ask for nothing but a module that runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unishard.deepspeed.parts.accelerator import get_accelerator
from unishard.errors import UnsupportedError


def _tp_size(config: dict[str, Any]) -> int:
    section = config.get("tensor_parallel", config.get("tp", {}))
    size = section.get("tp_size", 1) if isinstance(section, dict) else getattr(section, "tp_size", 1)
    return max(size, config.get("mp_size", 1))


class InferenceEngine(nn.Module):
    """A module in eval mode, in the dtype asked for."""

    def __init__(self, model: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        if _tp_size(config) > 1:
            raise UnsupportedError(
                f"init_inference(tensor_parallel={_tp_size(config)}): apply torch.distributed.tensor.parallel to the "
                "model, and run it as it is"
            )
        if config.get("replace_with_kernel_inject") or config.get("quant", {}).get("enabled"):
            raise UnsupportedError(
                "init_inference: there are no inference kernels here; leave replace_with_kernel_inject and quant out"
            )
        dtype = config.get("dtype", torch.float16)
        self.module = model.to(get_accelerator().current_device_name())
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            self.module.to(dtype)
        self.module.eval()
        self._config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def init_inference(model: nn.Module, config: Any = None, **kwargs: Any) -> InferenceEngine:
    """`model` ready to run: on the device, in eval mode and in `dtype` (default fp16, as in DeepSpeed)."""
    from unishard.deepspeed.parts.configuration import raw_config

    return InferenceEngine(model, {**(raw_config(config) if config is not None else {}), **kwargs})


def tp_model_init(
    model: nn.Module, tp_size: int, dtype: torch.dtype, config: Any = None, **kwargs: Any
) -> nn.Module:
    """`model` in `dtype`; only `tp_size=1`."""
    if tp_size > 1:
        raise UnsupportedError(
            f"tp_model_init(tp_size={tp_size}): apply torch.distributed.tensor.parallel and shard with "
            "unishard.fully_shard"
        )
    return model.to(dtype)


def default_inference_config() -> dict[str, Any]:
    """The keys that `init_inference` reads."""
    return {"dtype": torch.float16, "tensor_parallel": {"tp_size": 1}, "replace_with_kernel_inject": False}
