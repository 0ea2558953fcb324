"""A checkpoint that is being read to be written in another format: tensors in small pieces, and the values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from unishard.checkpoint.boxes import Box, boxes_of_run, pieces, whole
from unishard.checkpoint.catalog import TensorInfo, keys_of
from unishard.checkpoint.convert.format import Opened, Options, Progress, silent
from unishard.checkpoint.keys import CLIENT, ENGINE, GROUPS, MODEL, STATE
from unishard.checkpoint.storage import Reader
from unishard.errors import CheckpointError

PIECE = 4 << 20
"""Bytes of a tensor that are in memory at a time."""


class Source:
    """Reads what `options` select of an opened checkpoint. Use as a context manager.

    Weights are the tensors below `model.`, buffers included; state those below `optim.state.`.
    """

    def __init__(
        self, opened: Opened, options: Options, progress: Progress = silent, *, trust: bool = False
    ) -> None:
        self.opened = opened
        self._catalog = opened.catalog
        self._options = options
        self._trust = trust
        self._reader = Reader(opened.folder, opened.catalog, progress=progress)

    def __enter__(self) -> Source:
        self._reader.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._reader.__exit__(*exception)

    @property
    def about(self) -> dict[str, Any]:
        return self._catalog.about

    def weights(self) -> dict[str, TensorInfo]:
        """By parameter or buffer name, tied ones once, in the dtype that they are to have."""
        names = keys_of(MODEL, self._catalog.tensors)
        if self._options.exclude_frozen:
            frozen = self._frozen()
            names = [name for name in names if name not in frozen]
        return {name: self._wanted(self._catalog.tensors[f"{MODEL}.{name}"]) for name in names}

    def _frozen(self) -> set[str]:
        frozen = self.about.get("frozen")
        if frozen is None:
            raise CheckpointError(
                f"{self.opened.folder} does not say which weights are frozen, so they cannot be left out"
            )
        return set(frozen)

    def ties(self) -> dict[str, str]:
        """Further names of tied weights, with the name under which they are kept."""
        prefix = f"{MODEL}."
        return {
            alias.removeprefix(prefix): name.removeprefix(prefix)
            for alias, name in self._catalog.aliases.items()
            if alias.startswith(prefix) and name.startswith(prefix)
        }

    def _wanted(self, info: TensorInfo) -> TensorInfo:
        dtype = self._options.dtype
        if dtype is None or not info.dtype.is_floating_point:
            return info
        return TensorInfo(info.shape, dtype, info.chunks, info.value)

    def states(self) -> dict[str, dict[str, TensorInfo]]:
        """Optimizer state by parameter name and kind; empty if only weights are wanted."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for key in keys_of(STATE, self._catalog.tensors) if not self._options.weights_only else ():
            name, _, kind = key.rpartition(".")
            found.setdefault(name, {})[kind] = self._catalog.tensors[f"{STATE}.{key}"]
        return found

    def state_values(self) -> dict[str, dict[str, Any]]:
        """Optimizer state that is no tensor, by parameter name and kind."""
        found: dict[str, dict[str, Any]] = {}
        for key in keys_of(STATE, self._catalog.blobs) if not self._options.weights_only else ():
            name, _, kind = key.rpartition(".")
            found.setdefault(name, {})[kind] = self._reader.blob(f"{STATE}.{key}", trust=self._trust)
        return found

    def groups(self) -> list[dict[str, Any]]:
        """Options of the optimizer's parameter groups, `params` being names."""
        found: dict[int, dict[str, Any]] = {}
        for key in keys_of(GROUPS, self._catalog.blobs) if not self._options.weights_only else ():
            position, option = key.split(".", 1)
            found.setdefault(int(position), {})[option] = self._reader.blob(
                f"{GROUPS}.{key}", trust=self._trust
            )
        return [found[position] for position in sorted(found)]

    def engine(self) -> dict[str, Any]:
        """Counters, loss scale and schedule; empty where the checkpoint has none."""
        return self._reader.blob(ENGINE, trust=self._trust) if ENGINE in self._catalog.blobs else {}

    def client_state(self) -> dict[str, Any]:
        return self._reader.blob(CLIENT, trust=self._trust) if CLIENT in self._catalog.blobs else {}

    def step(self) -> int:
        """Updates that the run had made."""
        return int(self.engine().get("global_steps") or self.about.get("step") or 0)

    def weight_pieces(self, name: str) -> Iterator[tuple[Box, torch.Tensor]]:
        """A weight in boxes of at most 4 MB, in element order, in the wanted dtype."""
        key = f"{MODEL}.{name}"
        return self.pieces(key, self._wanted(self._catalog.tensors[key]).dtype)

    def pieces(self, key: str, dtype: torch.dtype | None = None) -> Iterator[tuple[Box, torch.Tensor]]:
        """Any tensor by its key, in boxes of at most 4 MB, in element order."""
        info = self._catalog.tensors[key]
        for box in pieces(info.shape, max(1, PIECE // info.dtype.itemsize)):
            target = torch.empty(box.sizes, dtype=dtype or info.dtype)
            self._reader.fill(key, box, target)
            yield box, target

    def run(self, key: str, start: int, stop: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Elements [start, stop) of a tensor in row order, in flat pieces of at most 4 MB."""
        info = self._catalog.tensors[key]
        step = max(1, PIECE // info.dtype.itemsize)
        for first in range(start, stop, step):
            for box in boxes_of_run(info.shape, first, min(first + step, stop)):
                target = torch.empty(box.sizes, dtype=dtype)
                self._reader.fill(key, box, target)
                yield target.view(-1)

    def small(self, key: str) -> torch.Tensor:
        """A whole tensor: for counters."""
        info = self._catalog.tensors[key]
        target = torch.empty(info.shape, dtype=info.dtype)
        self._reader.fill(key, whole(info.shape), target)
        return target

    def nbytes(self) -> int:
        """Of everything that will be read."""
        states = sum(i.nbytes for kinds in self.states().values() for i in kinds.values())
        return states + sum(self._catalog.tensors[f"{MODEL}.{name}"].nbytes for name in self.weights())
