"""The engine's checkpoints: everything a run needs to go on as if it had not stopped, at any number of ranks."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unishard.checkpoint import commit
from unishard.checkpoint.background import PendingSave, SaveQueue
from unishard.checkpoint.catalog import Catalog, keys_of
from unishard.checkpoint.entries import Contents, Entry
from unishard.checkpoint.keys import CLIENT, ENGINE, GROUPS, MODEL, RANDOM, STATE, TRUST
from unishard.checkpoint.loading import check_entries, differences, open_any, read_entries, require_match
from unishard.checkpoint.meeting import GroupMeeting, world
from unishard.checkpoint.progress import bar
from unishard.checkpoint.saving import Place, begin, finish
from unishard.checkpoint.storage import Reader
from unishard.checkpoint.training import (
    Names,
    adopt_names,
    model_contents,
    optimizer_contents,
    optimizer_differences,
    optimizer_entries,
    optimizer_parts,
    persistent_buffers,
    put_plain_state,
)
from unishard.engine.sampling import PositionedSampler
from unishard.errors import CheckpointError
from unishard.sharding.group import WEIGHTS

if TYPE_CHECKING:
    from unishard.engine.engine import Engine

log = logging.getLogger("unishard")


def default_tag(engine: Engine) -> str:
    """As DeepSpeed names them."""
    return f"global_step{engine.global_steps}"


def contents_of(engine: Engine, client_state: Mapping[str, Any], *, exclude_frozen: bool) -> Contents:
    """All that is saved of a run, as this rank sees it."""
    comm = world()
    contents = model_contents(engine.module, engine.schedule.groups, comm, exclude_frozen=exclude_frozen)
    if engine.optimizer is not None:
        optimizer = optimizer_contents(engine.optimizer, engine.module, comm)
        contents.entries |= optimizer.entries
        contents.blobs |= optimizer.blobs
    contents.blobs[f"{RANDOM}.{comm.rank}"] = random_state()
    if comm.rank == 0:
        contents.blobs[ENGINE] = engine_state(engine)
        contents.blobs[CLIENT] = dict(client_state)
    return contents


def engine_state(engine: Engine) -> dict[str, Any]:
    """Counters, loss scale, schedule, and the configuration for whoever asks."""
    optimizer, scheduler = engine.optimizer, engine.lr_scheduler
    return {
        "global_steps": engine.global_steps,
        "micro_steps": engine.micro_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "loss_scale": None if optimizer is None else optimizer.scaler.state_dict(),
        "lr_scheduler": scheduler.state_dict() if hasattr(scheduler, "state_dict") else None,
    }


def random_state() -> dict[str, Any]:
    """The generators of this process."""
    numpy_kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(numpy_kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *map(float, rest)),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Continue with the generators of another process."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class TagError(CheckpointError, AssertionError):
    """Ranks that save one checkpoint under several tags, which DeepSpeed reports with an assertion."""


def common_tag(tag: str, mode: str) -> str:
    """The tag that all ranks save under: the first rank's.

    Where others differ: `mode` "fail" raises `TagError` on every rank, "warn" warns, "ignore" says nothing.
    """
    tags = world().all_gather_object(tag)
    if len(set(tags)) > 1 and mode != "ignore":
        shown = ", ".join(f"rank {rank} {given!r}" for rank, given in enumerate(tags[:8]))
        text = f"save_checkpoint: ranks give different tags ({shown})"
        if mode == "fail":
            raise TagError(f"{text}; leave the tag out, or pass one and the same")
        if world().rank == 0:
            log.warning("unishard: %s; the first rank's is used", text)
    return tags[0]


class Checkpoints:
    """Saving and loading for one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.queue = SaveQueue()
        self._signalled: int | None = None
        self._on_signal: tuple[Path, int | None] | None = None

    # saving ------------------------------------------------------------------------------------------------

    def save(
        self,
        folder: str | Path,
        tag: str | None,
        client_state: Mapping[str, Any],
        *,
        latest: bool,
        exclude_frozen: bool,
        keep_last: int | None,
        background: bool,
    ) -> Path | PendingSave:
        """Write a checkpoint of the run. All ranks call together; raises on all or on none."""
        engine = self._engine
        engine.complete_update()
        if any(
            group.gradients.unreduced or group.gradients.shard is not None for group in engine.schedule.groups
        ):
            log.warning(
                "unishard: a checkpoint between the micro-batches of a step leaves out the gradients accumulated so far"
            )
        if keep_last is not None and keep_last < 1:
            raise CheckpointError(
                f"keep_last={keep_last}: keep at least 1 checkpoint, or leave it out to keep all"
            )
        about = {
            "step": engine.global_steps,
            "samples": engine.global_samples,
            "frozen_excluded": exclude_frozen,
            "sharding": engine.config.sharding,
            "frozen": [name for name, param in engine.module.named_parameters() if not param.requires_grad],
            "config": engine.config.as_dict(),
        }
        name = str(tag or default_tag(engine))
        name = common_tag(name, engine.config.checkpoint.tag_validation.lower())
        scripts = {"zero_to_fp32.py": EXPORTER, **engine.checkpoint_scripts}
        parent = Path(folder).absolute()
        files = engine.checkpoint_files(parent / name, exclude_frozen=exclude_frozen)
        place = Place(parent, name, about, latest, keep_last, scripts, files)
        contents = contents_of(engine, client_state, exclude_frozen=exclude_frozen)
        if background and not contents.all_here:
            log.warning(
                "unishard: state that rests on a tier has no snapshot in memory; saving in the foreground"
            )
        elif background:
            return self.queue.start(place, contents)
        self.queue.wait()  # so that an older one is not committed after this one, and named by `latest`
        meeting = GroupMeeting(world())
        with bar(f"saving {place.tag}", contents.nbytes, show=meeting.rank == 0) as progress:
            return finish(place, begin(place, meeting), contents, meeting, progress)

    # loading -----------------------------------------------------------------------------------------------

    def find(self, folder: str | Path, tag: str | None) -> Path:
        """The checkpoint that the first rank finds; raises on every rank if there is none."""
        meeting = GroupMeeting(world())
        found, failure = None, None
        if meeting.rank == 0:
            try:
                from unishard.engine.foreign_checkpoints import find_checkpoint

                found = str(find_checkpoint(Path(folder).absolute(), tag))
            except Exception as error:
                failure = error
        return Path(meeting.meet(f"find a checkpoint in {folder}", failure, found)[0])

    def newest(self, folder: str | Path) -> str:
        """The tag of the highest step, by what the first rank finds."""
        tags = self._ask_first(folder)
        return tags[-1]

    def exists(self, folder: str | Path) -> bool:
        """Whether the first rank finds any whole checkpoint."""
        return bool(self._ask_first(folder))

    def _ask_first(self, folder: str | Path) -> list[str]:
        meeting = GroupMeeting(world())
        tags, failure = [], None
        if meeting.rank == 0:
            try:
                from unishard.engine.foreign_checkpoints import foreign_tags

                parent = Path(folder).absolute()
                commit.restore(parent)
                tags = [tag for _, tag in commit.committed(parent)] or foreign_tags(parent)
            except Exception as error:
                failure = error
        return meeting.meet(f"look for checkpoints in {folder}", failure, tags)[0]

    def load(
        self,
        folder: str | Path,
        tag: str | None,
        *,
        strict: bool,
        optimizer: bool,
        scheduler: bool,
        module_only: bool,
    ) -> tuple[Path, dict[str, Any]]:
        """Load what `find` gives. All ranks call together; raises on all or on none before anything changes."""
        from unishard.engine.foreign_checkpoints import complete_counters, hints_of, own_options

        path, meeting = self.find(folder, tag), GroupMeeting(world())
        opened = open_any(path, meeting, hints_of(self._engine))
        place, catalog = opened.folder, opened.catalog
        with_optimizer = optimizer and not module_only and self._engine.optimizer is not None
        entries, rows = self._model_entries(catalog, strict)
        options: dict[int, dict[str, Any]] = {}
        if with_optimizer:
            options, more = self._optimizer_options(place, catalog, meeting)
            rows += more
        require_match(rows, path, meeting)
        # Everything that will be read is checked on all ranks first: a damaged checkpoint changes nothing. State that
        # is not there yet is made, read once, and dropped again if it is damaged.
        module, updater = self._engine.module, self._engine.optimizer if with_optimizer else None
        fresh = updater is not None and updater.fresh
        parts = optimizer_parts(catalog, updater, module) if updater is not None and not fresh else []
        state = check_entries(
            place, catalog, entries + parts, meeting, then=lambda reader: _values(reader, catalog)
        )
        kept = optimizer_entries(catalog, updater, module) if updater is not None else []
        total = sum(part.tensor.nbytes for entry in (*entries, *kept) for part in entry.held)
        with bar(f"loading {path.name}", total, show=meeting.rank == 0) as progress:
            if updater is not None and fresh:
                try:
                    read_entries(place, catalog, kept, meeting, verify=False, fresh=True, progress=progress)
                except BaseException:
                    updater.forget_state()
                    raise
                kept = []
            read_entries(place, catalog, entries + kept, meeting, verify=False, progress=progress)
        self._refresh()
        if opened.format != "unishard" or catalog.about.get("converted_from", "unishard") != "unishard":
            options = own_options(self._engine, options)
            complete_counters(self._engine, state)
        self._take_over(state, options, scheduler=scheduler and not module_only, module_only=module_only)
        return path, state.get(CLIENT) or {}

    def _model_entries(
        self, catalog: Catalog, strict: bool
    ) -> tuple[list[Entry], list[tuple[str, str, str]]]:
        engine = self._engine
        contents = model_contents(engine.module, engine.schedule.groups, world())
        adopt_names(catalog, contents.aliases)
        wanted = {key: entry.shape for key, entry in contents.entries.items()}
        present = [
            key
            for name in keys_of(MODEL, catalog.tensors)
            if (key := f"{MODEL}.{name}") not in contents.aliases
        ]
        rows = differences(catalog, wanted, present)
        if catalog.about.get("frozen_excluded"):
            frozen = {f"{MODEL}.{n}" for n, p in engine.module.named_parameters() if not p.requires_grad}
            rows = [row for row in rows if not (row[1] == "missing" and row[0] in frozen)]
        if not strict:
            rows = [row for row in rows if "missing" not in row and "unexpected" not in row]
        return [e for key, e in contents.entries.items() if catalog.find(key) is not None], rows

    def _optimizer_options(
        self, path: Path, catalog: Catalog, meeting: GroupMeeting
    ) -> tuple[dict[int, dict[str, Any]], list[tuple[str, str, str]]]:
        """The stored options of each parameter group, and what of the optimizer does not match."""
        optimizer = self._engine.optimizer
        options: dict[int, dict[str, Any]] = {}
        first = Names(self._engine.module).aliases
        if not keys_of(GROUPS, catalog.blobs) and not keys_of(STATE, catalog.tensors):
            raise CheckpointError(
                f"{path} holds weights and no optimizer state; pass load_module_only=True to start from the weights"
            )

        def read(reader: Reader) -> None:
            for key in keys_of(GROUPS, catalog.blobs):
                position, option = key.split(".", 1)
                options.setdefault(int(position), {})[option] = reader.blob(f"{GROUPS}.{key}")
            for stored in options.values():
                stored["params"] = [first.get(name, name) for name in stored.get("params", ())]

        read_entries(path, catalog, (), meeting, then=read)
        if optimizer is None:
            return options, []
        return options, optimizer_differences(catalog, optimizer, self._engine.module, options)

    def _refresh(self) -> None:
        """Whole parameters at rest follow the shards that were read."""
        groups = self._engine.schedule.groups
        for group in groups:
            torch.autograd.graph.increment_version([group.buffer.shard])
            group.forget_gathered()
        for group in groups:
            if group.resident:
                group.unshard()
                group.wait()
        self._engine.schedule.drain()

    def _take_over(
        self,
        state: Mapping[str, Any],
        options: Mapping[int, Mapping[str, Any]],
        *,
        scheduler: bool,
        module_only: bool,
    ) -> None:
        engine, saved = self._engine, state.get(ENGINE)
        optimizer = engine.optimizer
        if optimizer is not None and options:
            optimizer.take_over(options)
            put_plain_state(
                optimizer, engine.module, {key: state[f"{STATE}.{key}"] for key in keys_of(STATE, state)}
            )
        if module_only or saved is None:
            return
        engine.global_steps, engine.micro_steps = saved["global_steps"], saved["micro_steps"]
        engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()
        engine.global_samples = saved["global_samples"]
        if optimizer is not None:
            optimizer.skipped_steps = saved["skipped_steps"]
            if options and saved["loss_scale"] is not None:
                optimizer.scaler.load_state_dict(saved["loss_scale"])
        if scheduler and engine.lr_scheduler is not None and saved["lr_scheduler"] is not None:
            engine.lr_scheduler.load_state_dict(saved["lr_scheduler"])
        generators = state.get(f"{RANDOM}.{world().rank}")
        if generators is not None:
            set_random_state(generators)
        loader = engine.training_dataloader
        if loader is not None and isinstance(loader.sampler, PositionedSampler):
            loader.sampler.resume_at(engine.global_samples)

    # signals -----------------------------------------------------------------------------------------------

    def save_on_signal(self, folder: str | Path, signals: Sequence[int], keep_last: int | None) -> None:
        """At the next boundary after any rank got one of `signals`, save to `folder` and end the program."""
        self._on_signal = Path(folder), keep_last
        for number in signals:
            signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: Any) -> None:
        self._signalled = number

    def at_boundary(self) -> None:
        """After a step: raise what went wrong in the background; save and leave if a signal asked for it.

        Raises `SystemExit` on every rank once the checkpoint is committed.
        """
        self.queue.check()
        if self._on_signal is None:
            return
        flag = torch.tensor([self._signalled or 0], dtype=torch.int64)
        number = int(world().all_reduce_control(flag.to(self._engine.device), "max").item())
        if not number:
            return
        folder, keep_last = self._on_signal
        self.queue.wait()
        path = self.save(
            folder, None, {}, latest=True, exclude_frozen=False, keep_last=keep_last, background=False
        )
        log.warning("unishard: saved %s on %s; leaving", path, signal.Signals(number).name)
        raise SystemExit(0)


def _values(reader: Reader, catalog: Catalog) -> dict[str, Any]:
    """This rank's values, and what of the optimizer's state is not tensors; absent ones are left out (checkpoints of
    other origin, other numbers of ranks)."""
    trust = os.environ.get(TRUST) == "1"
    plain = [f"{STATE}.{key}" for key in keys_of(STATE, catalog.blobs)]
    wanted = (ENGINE, CLIENT, f"{RANDOM}.{world().rank}", *plain)
    return {key: reader.blob(key, trust=trust) for key in wanted if key in catalog.blobs}


# The script that users of DeepSpeed's checkpoints look for.
EXPORTER = '''#!/usr/bin/env python
"""Write one file of fp32 weights from a checkpoint here: zero_to_fp32.py FOLDER OUTPUT [--tag TAG]"""

from unishard.checkpoint.convert.consolidate import main

if __name__ == "__main__":
    main()
'''


def gather_16bit(engine: Engine, *, exclude_frozen: bool) -> dict[str, torch.Tensor] | None:
    """Whole weights in the compute dtype and buffers, in CPU memory of the first rank; `None` on others.

    Groups are gathered one by one, so other ranks need no memory for the whole model. All ranks call together.
    """
    engine.complete_update()
    first, state = world().rank == 0, {}
    frozen = {id(p) for p in engine.module.parameters() if not p.requires_grad}
    names: dict[int, list[str]] = {}
    for param_name, param in engine.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(param_name)
    for group in engine.schedule.groups:
        held = group.shown_whole
        group.unshard()
        group.wait()
        for registration in group.registrations if first else ():
            param = registration.visible
            if not (exclude_frozen and id(param) in frozen):
                value = registration.whole.detach().to("cpu", copy=True)
                state.update(dict.fromkeys(names.get(id(param), ()), value))
        if not held:
            group.reshard()
    if not first:
        return None
    for buffer_name, buffer in persistent_buffers(engine.module):
        state[buffer_name] = buffer.detach().to("cpu", copy=True)
    return state


def gather_weights(engine: Engine) -> dict[str, Any] | None:
    """What `state_dict()` of the whole model would be, weights as fp32 masters, in CPU memory of the first rank; `None`
    on others.

    Parameters are gathered one by one. All ranks call together.
    """
    from unishard.sharding.whole_state import ParameterHome, whole_state

    engine.complete_update()
    first, weights = world().rank == 0, {}
    names: dict[int, list[str]] = {}
    for name, param in engine.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    for group in engine.schedule.groups:
        with group.in_memory(WEIGHTS, changed=False):
            for index, registration in enumerate(group.registrations):
                home = ParameterHome(group, index)
                whole = whole_state(home, home.local(group.buffer.shard))
                if first:
                    weights.update(dict.fromkeys(names.get(id(registration.visible), ()), whole.cpu()))
    if not first:
        return None
    shown = {name: value for name, value in engine.module.state_dict().items() if name not in weights}
    copied = {k: v.to("cpu", copy=True) if isinstance(v, torch.Tensor) else v for k, v in shown.items()}
    return weights | copied


def save_16bit(engine: Engine, folder: str | Path, name: str, *, exclude_frozen: bool) -> Path:
    """Write a plain state dict in the compute dtype, which `torch.load(weights_only=True)` reads, from the first rank.

    All ranks call together; raises on all or on none.
    """
    meeting, path = GroupMeeting(world()), Path(folder) / name
    state, failure = gather_16bit(engine, exclude_frozen=exclude_frozen), None
    if state is not None:
        try:
            _save_aside(state, path)
        except Exception as error:
            failure = error
    meeting.meet(f"write {path}", failure)
    return path


def _save_aside(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
