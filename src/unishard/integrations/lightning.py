"""PyTorch Lightning on unishard: a strategy for `lightning` and `pytorch_lightning`.

    import lightning
    from unishard.integrations.lightning import UnishardStrategy

    trainer = lightning.Trainer(strategy=UnishardStrategy("ZERO3"), accelerator="gpu", devices=8)
    trainer.fit(model, loader)

It takes a ds_config (a dictionary or a path), the name of a preset, or nothing (ZERO3), and further keys as options.
Importing this module imports no Lightning; the class is made at its first use, for the one of the two packages that is
imported by then.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unishard.integrations.lightning_strategy import StrategyParts as UnishardStrategy

__all__ = ["UnishardStrategy"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_made: dict[str, type] = {}


def _package() -> str:
    """The Lightning that the script uses: of the two packages the one that is imported, else one that can be."""
    for name in _PACKAGES:
        if name in sys.modules:
            return name
    for name in _PACKAGES:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return name
    raise ImportError("UnishardStrategy needs PyTorch Lightning: pip install 'unishard[lightning]'")


def _make(package: str) -> type:
    from unishard.integrations.lightning_precision import PrecisionParts
    from unishard.integrations.lightning_strategy import StrategyParts

    lightning = importlib.import_module(package)
    ddp = importlib.import_module(f"{package}.strategies").DDPStrategy
    plain = importlib.import_module(f"{package}.plugins.precision").Precision
    precision = type("UnishardPrecision", (PrecisionParts, plain), {"__module__": __name__})
    return type(
        "UnishardStrategy",
        (StrategyParts, ddp),
        {
            "__module__": __name__,
            "__doc__": StrategyParts.__doc__,
            "library": lightning,
            "core": importlib.import_module(f"{package}.core.optimizer"),
            "precision_class": precision,
        },
    )


def __getattr__(name: str) -> Any:
    if name != "UnishardStrategy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    package = _package()
    if package not in _made:
        _made[package] = _make(package)
    return _made[package]
