"""Which optimizers may step shards: those that treat every element alone.

A rank holds 1-D pieces of parameters. An update that looks at a whole tensor (its norm, its rows, its
singular vectors) or at the whole model would give other results on pieces, without any error.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from unishard.errors import UnsupportedError

_log = logging.getLogger(__name__)

_NORM = "it scales each update by norms of the whole tensor"
_MATRIX = "it works on whole matrices, and a shard is a 1-D piece of one"
_GLOBAL = "it estimates a step size from sums over the whole model"
_COMPRESSED = "it compresses its own communication, which unishard does outside the optimizer"
_MUP = "it reads the width of each parameter, which a 1-D piece does not carry"

# By class name, since most live in packages that need not be installed.
_REFUSED = {
    "lbfgs": "it needs a closure and dot products over the whole model",
    "adafactor": "it keeps row and column statistics and clips by the RMS of the whole tensor",
    "muon": _MATRIX,
    "muonwithauxadam": _MATRIX,
    "shampoo": _MATRIX,
    "distributedshampoo": _MATRIX,
    "soap": _MATRIX,
    "galoreadamw": _MATRIX,
    "sparseadam": "it takes sparse gradients, and reduced gradient shards are dense",
    "lamb": _NORM,
    "fusedlamb": _NORM,
    "lars": _NORM,
    "novograd": _NORM,
    "fusednovograd": _NORM,
    "onebitlamb": _NORM,
    "onebitadam": _COMPRESSED,
    "zerooneadam": _COMPRESSED,
    "muadam": _MUP,
    "muadamw": _MUP,
    "musgd": _MUP,
    "prodigy": _GLOBAL,
    "dadaptadam": _GLOBAL,
    "dadaptsgd": _GLOBAL,
    "dadaptlion": _GLOBAL,
    "lomo": "it updates parameters inside backward",
    "adalomo": "it updates parameters inside backward",
}

_KNOWN = frozenset(
    getattr(torch.optim, name)
    for name in (
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    )
)

_REMEDY = (
    "Use AdamW, Adam, SGD, Lion, Adagrad or another elementwise class such as 'torch.optim.RMSprop'; "
    "a custom class must update each element from its own gradient and state only."
)


def refusal(name: str) -> str | None:
    """Why an optimizer of class name `name` cannot step shards, or None when nothing is known against it.

    >>> refusal("SparseAdam")
    'it takes sparse gradients, and reduced gradient shards are dense'
    >>> refusal("AdamW") is None
    True
    """
    return _REFUSED.get(name.lower())


def elementwise(cls: type) -> bool:
    """Whether nothing is known against stepping shards with `cls` or any class it derives from.

    A class that unishard does not know gives True; `require_elementwise` tries such a class out.

    >>> elementwise(torch.optim.RMSprop), elementwise(torch.optim.LBFGS)
    (True, False)
    """
    return all(refusal(base.__name__) is None for base in cls.__mro__)


def require_elementwise(cls: type[Optimizer], options: Mapping[str, Any] | None = None) -> None:
    """Raise unless `cls(params, **options)` may step shards; log a warning when that cannot be found out.

    Raises:
        UnsupportedError: when the class is known, or seen in a trial of three steps, to need whole tensors.

    >>> require_elementwise(torch.optim.AdamW)
    """
    for base in cls.__mro__:
        reason = refusal(base.__name__)
        if reason is not None:
            raise UnsupportedError(f"optimizer {_name(cls)} cannot step shards: {reason}. {_REMEDY}")
    if cls in _KNOWN:
        return
    verdict = probe(cls, options or {})
    if verdict is None:
        _log.warning(
            "optimizer %s could not be tried on the CPU; unishard takes it to be elementwise", _name(cls)
        )
    elif not verdict:
        raise UnsupportedError(
            f"optimizer {_name(cls)} cannot step shards: a matrix stepped whole and the same matrix stepped "
            f"in 1-D pieces came out different. {_REMEDY}"
        )


def check_client_optimizer(optimizer: Optimizer) -> None:
    """Raise unless an optimizer that the user built may step shards.

    Raises:
        UnsupportedError: as `require_elementwise`.
    """
    accepted = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in optimizer.defaults.items() if key in accepted and key != "params"}
    require_elementwise(type(optimizer), options)


def probe(cls: type[Optimizer], options: Mapping[str, Any]) -> bool | None:
    """Whether three steps on a 6 × 8 fp32 matrix equal three on its 1-D pieces; None if it will not run.

    >>> probe(torch.optim.RMSprop, {"momentum": 0.9})
    True
    """
    if "lr" in options:
        options = {**options, "lr": 0.01}  # a warm-up may start from 0, where all optimizers agree
    generator = torch.Generator().manual_seed(0)
    weight, *grads = torch.randn(4, 6, 8, generator=generator).unbind()
    with torch.random.fork_rng(devices=[]):
        try:
            whole = _stepped(cls, options, [weight], [[grad] for grad in grads])
        except Exception:  # any failure of a foreign constructor means only that it cannot be tried here
            return None
        try:
            pieces = _stepped(cls, options, _cut(weight), [_cut(grad) for grad in grads])
        except Exception:  # it runs on a matrix and not on its pieces
            return False
    return torch.allclose(whole, pieces, rtol=1e-5, atol=1e-6)


def _cut(matrix: Tensor) -> list[Tensor]:
    flat = matrix.flatten()
    return [flat[:1], flat[1:19], flat[19:]]


def _stepped(
    cls: type[Optimizer],
    options: Mapping[str, Any],
    tensors: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
) -> Tensor:
    params = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
    optimizer = cls(params, **options)  # pyright: ignore[reportCallIssue]
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return torch.cat([param.detach().flatten() for param in params])


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
