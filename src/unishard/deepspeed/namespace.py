"""The modules below `unishard.deepspeed`: made from the surface table when they are imported, names resolved when used.

Only what the table lists exists. A module is a view: its names are objects of `unishard.deepspeed.parts` and of the
core, or stubs that raise `UnsupportedError` when they are called.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from unishard.deepspeed.entries import Entry, Names
from unishard.deepspeed.stubs import stub

ROOT = "unishard.deepspeed"


class SurfaceModule(ModuleType):
    """A module whose names come from the table. What is assigned to it (a monkeypatch) stays on it."""

    def __getattr__(self, name: str) -> Any:
        path = _path_of(self.__name__)
        entry = _names(path).get(name)
        if entry is not None:
            value = _resolve(entry, path, name)
        elif _exists(below := f"{path}.{name}" if path else name):
            value = importlib.import_module(f"{ROOT}.{below}")
        else:
            raise AttributeError(f"module {_public(path)!r} has no attribute {name!r}{_hint(path, name)}")
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # A name of the table that is also a submodule (utils.z3_leaf_module) stays what the table says.
        if isinstance(value, SurfaceModule) and name in _names(_path_of(self.__name__)):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *_names(_path_of(self.__name__))})


def _resolve(entry: Entry, path: str, name: str) -> Any:
    if entry.home is not None:
        home, _, attribute = entry.home.partition(":")
        found = importlib.import_module(home)
        return getattr(found, attribute) if attribute else found
    if entry.is_constant:
        return entry.constant
    return stub(f"{_public(path)}.{name}", entry.note)


def _hint(path: str, name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, _names(path), n=1, cutoff=0.8)
    known = "; `python -m unishard.deepspeed` lists what exists"
    return f"; did you mean {near[0]!r}?" if near else known


def _public(path: str) -> str:
    return f"deepspeed.{path}" if path else "deepspeed"


def _path_of(name: str) -> str:
    return name.removeprefix(ROOT).removeprefix(".")


def _names(path: str) -> Names:
    from unishard.deepspeed.surface import SURFACE

    return SURFACE.get(path, {})


def _exists(path: str) -> bool:
    """Whether the table has a module at `path`, or one below it."""
    from unishard.deepspeed.surface import SURFACE, packages

    return path in SURFACE or path in packages()


class SurfaceFinder:
    """Finds modules below `unishard.deepspeed` that are in the table and have no file."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{ROOT}.") or not _exists(_path_of(fullname)):
            return None
        from unishard.deepspeed.surface import packages

        origin = getattr(sys.modules.get(ROOT), "__file__", None)
        is_package = _path_of(fullname) in packages()
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=origin, is_package=is_package)  # pyright: ignore[reportArgumentType]
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return SurfaceModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        names = _names(_path_of(module.__name__))
        module.__file__ = module.__spec__.origin if module.__spec__ is not None else None
        module.__doc__ = f"`{_public(_path_of(module.__name__))}`, as far as unishard has it."
        module.__dict__["__all__"] = [name for name in names if not name.startswith("_")]


def become_surface(name: str) -> None:
    """Let the real package `name` take its names from the table too, and find the modules below it."""
    module = sys.modules[name]
    module.__class__ = SurfaceModule
    if not any(isinstance(finder, SurfaceFinder) for finder in sys.meta_path):
        sys.meta_path.append(SurfaceFinder())  # pyright: ignore[reportArgumentType]
