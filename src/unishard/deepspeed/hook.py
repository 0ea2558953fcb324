"""The drop-in: `import deepspeed` resolves to `unishard.deepspeed`, and so does the distribution's metadata."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from unishard.errors import StateError

log = logging.getLogger("unishard")

NAME, TARGET = "deepspeed", "unishard.deepspeed"
ENVIRONMENT = "UNISHARD_AS_DEEPSPEED"
"""Set to 1, new Python processes that have the bootstrap folder on PYTHONPATH install the drop-in at their start."""


class AliasFinder:
    """Finds `deepspeed` and everything below it in `unishard.deepspeed`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME and not fullname.startswith(f"{NAME}."):
            return None
        found = importlib.util.find_spec(TARGET + fullname.removeprefix(NAME))
        if found is None:
            return None
        locations = found.submodule_search_locations
        spec = importlib.machinery.ModuleSpec(
            fullname,
            AliasLoader(),  # pyright: ignore[reportArgumentType]
            origin=found.origin,
            is_package=locations is not None,
        )
        if locations is not None and spec.submodule_search_locations is not None:
            spec.submodule_search_locations.extend(locations)
        spec.has_location = found.origin is not None
        return spec

    def find_distributions(self, context: Any = None) -> Iterable[Any]:
        """The metadata of the drop-in, for whoever asks for `deepspeed`."""
        if getattr(context, "name", None) in (None, NAME):
            from unishard.deepspeed.distribution import DropInDistribution

            yield DropInDistribution()

    def invalidate_caches(self) -> None:
        return None


class AliasLoader:
    """Hands out the module of `unishard.deepspeed` itself: one module object under two names."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(TARGET + spec.name.removeprefix(NAME))
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just written the alias's spec over the module's own.
        module.__spec__ = self._own


def installed() -> bool:
    """Whether `import deepspeed` means unishard in this process."""
    return any(isinstance(finder, AliasFinder) for finder in sys.meta_path)


def install() -> None:
    """Let `import deepspeed` and its metadata mean `unishard.deepspeed`, in this process.

    Call it before anything imports deepspeed. Does nothing the second time. Raises `StateError` if the real package
    was imported already: two engines would share one process's parameters and hooks.
    """
    if installed():
        return
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        raise StateError(
            f"deepspeed {getattr(loaded, '__version__', '?')} from {getattr(loaded, '__file__', '?')} is imported "
            "already: call unishard.deepspeed.install() before the first `import deepspeed` (imports of transformers "
            "or accelerate may be that), or start the script with `unishard run --as-deepspeed`"
        )
    if "accelerate" in sys.modules and importlib.util.find_spec(NAME) is None:
        log.warning(
            "unishard: accelerate was imported before unishard.deepspeed.install(), and saw no deepspeed then: call "
            "install() first, or start the script with `unishard run --as-deepspeed`"
        )
    sys.meta_path.insert(0, AliasFinder())  # pyright: ignore[reportArgumentType]
    importlib.invalidate_caches()


def uninstall() -> None:
    """Undo `install`: later imports of deepspeed find the real package, if there is one."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, AliasFinder)]
    for name in [name for name in sys.modules if name == NAME or name.startswith(f"{NAME}.")]:
        if getattr(sys.modules[name], "__name__", "").startswith(TARGET):
            del sys.modules[name]


def child_environment(environment: dict[str, str] | None = None) -> dict[str, str]:
    """`environment` (default: this process's) with what makes new Python processes install the drop-in."""
    given = dict(os.environ if environment is None else environment)
    folder = str(Path(__file__).parent / "bootstrap")
    paths = [path for path in given.get("PYTHONPATH", "").split(os.pathsep) if path and path != folder]
    return {**given, ENVIRONMENT: "1", "PYTHONPATH": os.pathsep.join([folder, *paths])}
