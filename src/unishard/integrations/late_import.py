"""Names that accelerate and transformers leave out where they were imported while no DeepSpeed was to be found."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_ACCELERATE = "accelerate.utils.deepspeed"
_NAMES = (
    "DeepSpeedEngineWrapper",
    "DeepSpeedOptimizerWrapper",
    "DeepSpeedSchedulerWrapper",
    "DummyOptim",
    "DummyScheduler",
    "HfDeepSpeedConfig",
    "get_active_deepspeed_plugin",
    "map_pytorch_optim_to_deepspeed",
)


def complete_imported_modules() -> None:
    """Give modules that were imported before the drop-in was there what they import when a DeepSpeed is there.

    Imports nothing that is not imported already, except the module of accelerate that holds the names.
    """
    for name in ("accelerate.utils", "accelerate.accelerator", "transformers.trainer"):
        module = sys.modules.get(name)
        if module is not None and not hasattr(module, "DeepSpeedSchedulerWrapper"):
            _complete(module)
    integration = sys.modules.get("transformers.integrations.deepspeed")
    if integration is not None and not hasattr(integration.HfDeepSpeedConfig, "is_zero3"):
        _derive_again(integration)


def _complete(module: ModuleType) -> None:
    home = importlib.import_module(_ACCELERATE)
    for name in _NAMES:
        if hasattr(home, name):
            setattr(module, name, getattr(home, name))


def _derive_again(integration: ModuleType) -> None:
    """Its configuration classes derive from accelerate's, or from nothing: run the module again in the same namespace,
    so that functions others hold see the new classes."""
    importlib.reload(integration)
    package = sys.modules["transformers.integrations"]
    for name in [name for name in vars(package) if name in vars(integration) and not name.startswith("__")]:
        setattr(package, name, getattr(integration, name))
