"""The engine's methods about dtypes that subclasses and scripts call by DeepSpeed's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unishard.deepspeed.parts.config_models import DtypeEnum


class MixedPrecisionNames:
    """What a module would be cast to, and the cast by itself; `initialize` does its own while it shards."""

    _config: Any
    module: nn.Module

    def _mixed_precision_dtypes(self) -> tuple[torch.dtype | None, torch.dtype | None]:
        """(of parameters, of floating buffers); `None` leaves them as they are."""
        engine: Any = self
        compute = torch.half if engine.fp16_enabled() else torch.bfloat16
        param = compute if engine.fp16_enabled() or engine.bfloat16_enabled() else None
        buffer = self._config.buffer_dtype
        return param, None if buffer is None else DtypeEnum(buffer).value

    def _assert_valid_mixed_precision_config(self) -> None:
        """Raise `AssertionError` where `data_types.param_dtype` is not what fp16 and bf16 say."""
        engine: Any = self
        asked = self._config.param_dtype
        if asked is None:
            return
        compute = torch.half if engine.fp16_enabled() else torch.float32
        compute = torch.bfloat16 if engine.bfloat16_enabled() else compute
        if DtypeEnum(asked).value != compute:
            raise AssertionError(
                f"data_types.param_dtype {asked} contradicts fp16 and bf16, under which parameters are {compute}; "
                "enable the section of that dtype, or leave param_dtype out"
            )

    def _cast_module_mixed_precision(
        self,
        param_dtype: torch.dtype | None,
        buffer_dtype: torch.dtype | None,
        is_zero_init_model: bool,
        keep_pattern: Any = None,
    ) -> None:
        """Cast `module` in place: parameters unless they are sharded already, buffers where a dtype is given."""
        if param_dtype is not None and not is_zero_init_model:
            for param in filter(_wide, self.module.parameters()):
                param.data = param.data.to(param_dtype)
        if buffer_dtype is not None:
            for buffer in filter(_wide, self.module.buffers()):
                buffer.data = buffer.data.to(buffer_dtype)


def _wide(tensor: torch.Tensor) -> bool:
    """Floats that compute: quantized ones, of a byte and less, keep their dtype."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1
