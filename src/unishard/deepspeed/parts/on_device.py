"""`OnDevice`: build a model in a dtype and on a device of choice, the meta device too."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MAKERS = (
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.rand,
    torch.randn,
    torch.eye,
    torch.linspace,
)


class _Dtype(TorchFunctionMode):
    """Floating tensors made without a dtype get the chosen one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _MAKERS and (kwargs or {}).get("dtype") is None and made.is_floating_point():
            return made.to(self._dtype)
        return made


class OnDevice(AbstractContextManager[None]):
    """Modules built inside lie on `device` with floating parameters of `dtype`.

    >>> with OnDevice(dtype=torch.bfloat16, device="meta"):
    ...     layer = torch.nn.Linear(2, 2)
    >>> layer.weight.device.type, layer.weight.dtype
    ('meta', torch.bfloat16)
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "meta", enabled: bool = True) -> None:
        self.dtype, self.device, self.enabled = dtype, device, enabled
        self._stack = ExitStack()

    def __enter__(self) -> None:
        if self.enabled:
            self._stack.enter_context(torch.device(self.device))
            self._stack.enter_context(_Dtype(self.dtype))

    def __exit__(self, *failure: Any) -> None:
        self._stack.__exit__(*failure)
