"""Building models larger than memory: parameters sharded as they are created, or made unit by unit from nothing."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unishard.dist.mesh import Axes, axes_of, build_mesh, ensure_process_group
from unishard.errors import ShardingError
from unishard.sharding.parameter import ParameterRecord
from unishard.sharding.single import SingleShard, shard_single, single_of

ParamInit = Callable[[nn.Module], None]


@contextmanager
def init_sharded(
    mesh: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Shard every parameter of modules built inside as soon as its module's `__init__` is over, like `zero.Init`.

    At no time does a rank hold more whole parameters than one module's own. Rank 0's values count. Functions of torch
    that touch a released parameter inside the context (an outer module's `nn.init.normal_(self.proj.weight)`) find it
    whole, and what they write is kept. Afterwards `initialize` and `fully_shard` take the shards over group by group.

    Args:
        mesh: the data-parallel mesh; default: all ranks. dtype: cast floating parameters. device: build there.

    >>> from unishard.sharding.single import full_shape
    >>> with init_sharded():
    ...     layer = nn.Linear(3, 2)
    >>> layer.weight.shape, full_shape(layer.weight)
    (torch.Size([0]), torch.Size([2, 3]))
    """
    if not enabled:
        yield
        return
    target = torch.device(device) if device is not None else torch.get_default_device()
    ensure_process_group(target)
    axes = axes_of(mesh if mesh is not None else build_mesh(target.type))
    build = _ShardingBuild(axes, dtype)
    with target, build.wrapped_inits(), _Reopening(build):
        yield
    build.close_all()
    build.shard_late()


class _ShardingBuild:
    """What is whole for the moment, and how to release it."""

    def __init__(self, axes: Axes, dtype: torch.dtype | None) -> None:
        self._axes = axes
        self._dtype = dtype
        self._open: dict[int, tuple[nn.Parameter, SingleShard]] = {}
        self._running: Counter[int] = Counter()
        self._on_meta: list[nn.Module] = []
        """Modules that were built without memory (`torch.nn.utils.skip_init`) and may have got it since."""

    def touch(self, params: Sequence[tuple[nn.Parameter, SingleShard]]) -> None:
        """Make `params` whole and release others that an earlier function needed."""
        wanted = {id(p) for p, _ in params}
        for key in [key for key in self._open if key not in wanted]:
            param, single = self._open.pop(key)
            single.close(param)
        for param, single in params:
            if not single.open and not single.opening:
                single.reopen(param)
                self._open[id(param)] = (param, single)

    def close_all(self) -> None:
        self.touch([])

    def shard_late(self) -> None:
        """Shard what had no memory when its module's `__init__` was over, and has now."""
        for module in self._on_meta:
            self._shard_own(module)
        self._on_meta.clear()

    @contextmanager
    def wrapped_inits(self) -> Iterator[None]:
        """Run `_built` after the outermost `__init__` of each module, also of classes defined in the meantime."""
        originals: dict[type, Any] = {}

        def wrap(cls: type) -> None:
            if "__init__" not in cls.__dict__ or cls in originals:
                return
            original = originals[cls] = cls.__dict__["__init__"]

            @functools.wraps(original)
            def init(module: nn.Module, *args: Any, **kwargs: Any) -> None:
                self._running[id(module)] += 1
                try:
                    original(module, *args, **kwargs)
                finally:
                    self._running[id(module)] -= 1
                if not self._running[id(module)]:
                    del self._running[id(module)]
                    self._built(module)

            cls.__init__ = init  # pyright: ignore[reportAttributeAccessIssue]

        def wrap_new(cls: type, **kwargs: Any) -> None:
            wrap(cls)

        for cls in _subclasses(nn.Module):
            wrap(cls)
        nn.Module.__init_subclass__ = classmethod(wrap_new)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            del nn.Module.__init_subclass__
            for cls, original in originals.items():
                cls.__init__ = original  # pyright: ignore[reportAttributeAccessIssue]

    def _built(self, module: nn.Module) -> None:
        self.close_all()
        if any(param is not None and param.is_meta for param in module._parameters.values()):
            self._on_meta.append(module)
        self._shard_own(module)

    def _shard_own(self, module: nn.Module) -> None:
        for param in module._parameters.values():
            if param is not None and param.numel() and single_of(param) is None and not param.is_meta:
                shard_single(param, self._axes, self._dtype)


class _Reopening(TorchFunctionMode):
    """Lets torch functions find released parameters whole."""

    def __init__(self, build: _ShardingBuild) -> None:
        super().__init__()
        self._build = build

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        released = []
        for leaf in pytree.tree_leaves((args, kwargs)):
            single = single_of(leaf) if isinstance(leaf, torch.Tensor) else None
            if single is not None and all(p is not leaf for p, _ in released):
                released.append((leaf, single))
        if released:
            self._build.touch(released)
        return func(*args, **kwargs)


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def require_initializable(model: nn.Module, param_init_fn: ParamInit | None = None) -> None:
    """Raise `ShardingError` naming every module with meta tensors of its own that nobody can fill."""
    if param_init_fn is not None:
        return
    stuck = [
        f"{name or 'the root'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if _own_meta(module) and not callable(getattr(module, "reset_parameters", None))
    ]
    if stuck:
        raise ShardingError(
            f"cannot materialize from the meta device: {', '.join(stuck)} hold tensors of their own and have no "
            "reset_parameters(); add one, pass param_init_fn=, or load a checkpoint with unishard.load_safetensors"
        )


def _own_meta(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(t is not None and t.is_meta for t in tensors)


@torch.no_grad()
def materialize(
    records: Sequence[ParameterRecord], device: torch.device, param_init_fn: ParamInit | None = None
) -> None:
    """Give the modules that hold `records` real, initialised tensors; parameters stay the same Python objects."""
    modules = dict.fromkeys(home.module for record in records for home in record.homes)
    for module in modules:
        if _own_meta(module):
            fill_module(module, device, param_init_fn)


@torch.no_grad()
def fill_module(module: nn.Module, device: torch.device, param_init_fn: ParamInit | None = None) -> None:
    """Materialize one module's own meta tensors and initialise them."""
    for param in module._parameters.values():
        if param is not None and param.is_meta:
            real = nn.Parameter(torch.empty_like(param, device=device), requires_grad=param.requires_grad)
            torch.utils.swap_tensors(param, real)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.empty_like(buffer, device=device)
    if param_init_fn is not None:
        param_init_fn(module)
    else:
        reset: Any = module.reset_parameters
        reset()
