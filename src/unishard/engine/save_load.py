"""The engine's methods that save and load, as DeepSpeed's users call them."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unishard.engine.accessors import Accessors
from unishard.errors import StateError

if TYPE_CHECKING:
    from unishard.engine.checkpointing import Checkpoints
    from unishard.engine.engine import Engine


class SaveLoad(Accessors):
    """What `Engine` can do with checkpoints."""

    checkpoint_scripts: Mapping[str, str] = {}
    """Further files that stand beside checkpoints, by name."""
    _made_checkpoints: Checkpoints | None = None
    _syncs: bool
    _micro: int
    micro_steps: int

    def _as_engine(self) -> Engine:
        engine: Any = self
        return engine

    @property
    def _checkpoints(self) -> Checkpoints:
        # Made at first use: its imports would burden runs that save nothing.
        if self._made_checkpoints is None:
            from unishard.engine.checkpointing import Checkpoints

            self._made_checkpoints = Checkpoints(self._as_engine())
        return self._made_checkpoints

    def checkpoint_files(self, folder: Path, *, exclude_frozen: bool) -> Mapping[str, bytes]:
        """Further small files of a checkpoint that is going to be at `folder`, by name."""
        return {}

    def _checkpoint_boundary(self) -> None:
        """A step is over: raise what failed in the background; save and leave if a signal asked for it."""
        if self._made_checkpoints is not None:
            self._made_checkpoints.at_boundary()

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        keep_last: int | None = None,
        background: bool = False,
    ) -> bool:
        """Write everything that the run needs to go on, at any number of ranks, to `save_dir/tag`; returns True.

        The checkpoint appears whole or not at all. All ranks call together.

        Args:
            tag: default `global_step<N>`. client_state: values of your own; `load_checkpoint` returns them.
            save_latest: let the file `latest` name this one.
            exclude_frozen_parameters: leave out parameters that are not trained.
            keep_last: remove all but this many checkpoints, once this one is committed.
            background: return as soon as the state is copied; errors come with the next step, save, or
                `wait_for_checkpoints()`.

        Raises:
            CheckpointError, OSError: on every rank if any rank fails. StateError: inside `no_sync`.
        """
        if not self._syncs:
            raise StateError("save_checkpoint() inside no_sync(): leave the context first")
        self._checkpoints.save(
            save_dir,
            tag,
            client_state or {},
            latest=save_latest,
            exclude_frozen=exclude_frozen_parameters,
            keep_last=keep_last,
            background=background,
        )
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Continue from a checkpoint of any number of ranks, preset and mesh; returns (folder, client_state).

        Each rank reads what it holds. All ranks call together.

        Args:
            tag: default: what the file `latest` names, or the newest.
            load_module_strict: refuse parameters and buffers that only one side has. Shapes must always fit.
            load_module_only: weights and buffers, and nothing else.

        Raises:
            CheckpointError: on every rank, with a table of what does not match, before anything changes.
            CorruptCheckpointError: files that are missing, or bytes that are not those that were written.
        """
        path, client_state = self._checkpoints.load(
            load_dir,
            tag,
            strict=load_module_strict,
            optimizer=load_optimizer_states,
            scheduler=load_lr_scheduler_states,
            module_only=load_module_only,
        )
        # Gradients are not saved, and what was accumulated here belongs to other weights: the next step begins anew,
        # with the samples that follow the last whole one.
        self._micro = 0
        optimizer = self._as_engine().optimizer
        if optimizer is not None:
            optimizer.forget_delayed()
            self._as_engine().zero_grad()
        return str(path), client_state

    def auto_resume(self, load_dir: str | Path) -> dict[str, Any] | None:
        """Continue from the newest whole checkpoint in `load_dir`; returns its client_state, or `None` without one.

        All ranks agree on which one it is.
        """
        if not self._checkpoints.exists(load_dir):
            return None
        return self.load_checkpoint(load_dir, self._checkpoints.newest(load_dir))[1]

    def wait_for_checkpoints(self) -> None:
        """Return once every background save is committed. Raises what went wrong."""
        if self._made_checkpoints is not None:
            self._made_checkpoints.queue.wait()

    def save_on_signal(
        self,
        save_dir: str | Path,
        signals: Sequence[int] = (signal.SIGTERM, signal.SIGUSR1),
        keep_last: int | None = None,
    ) -> None:
        """At the next boundary after any rank got one of `signals`, save to `save_dir` and exit with status 0."""
        self._checkpoints.save_on_signal(save_dir, signals, keep_last)

    def full_state_dict(self) -> dict[str, Any] | None:
        """The whole model's state dict with fp32 master weights, in CPU memory of the first rank; `None` on others.

        All ranks call together.
        """
        from unishard.engine.checkpointing import gather_weights

        return gather_weights(self._as_engine())

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write a plain state dict in the compute dtype, which `torch.load(weights_only=True)` reads; returns True."""
        from unishard.engine.checkpointing import save_16bit

        save_16bit(self._as_engine(), save_dir, save_filename, exclude_frozen=exclude_frozen_parameters)
        return True
