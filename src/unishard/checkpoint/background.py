"""Saving while training goes on: a snapshot first, then a thread that writes, agrees through the store and commits."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from pathlib import Path

from unishard.checkpoint.entries import Contents, Staging
from unishard.checkpoint.meeting import GroupMeeting, StoreMeeting, world
from unishard.checkpoint.saving import Place, begin, finish

log = logging.getLogger("unishard")


class PendingSave:
    """A save under way. `result()` waits for it."""

    def __init__(self, place: Place, draft: Path, contents: Contents, staging: Staging) -> None:
        self.folder = place.parent / place.tag
        self.staging = staging
        """Holds `contents` until this has ended."""
        self._error: BaseException | None = None
        self._raised = False
        # The draft's name is unique and the same on all ranks.
        meeting = StoreMeeting(draft.name)

        def run() -> None:
            try:
                started = time.monotonic()
                finish(place, draft, contents, meeting)
                if meeting.rank == 0:
                    log.info(
                        "unishard: saved %s in %.1f s, in the background",
                        self.folder,
                        time.monotonic() - started,
                    )
            except BaseException as error:
                self._error = error

        # Not a daemon: a program that ends normally waits for its checkpoint.
        self._thread = threading.Thread(target=run, name=f"save {place.tag}")
        self._thread.start()

    def done(self) -> bool:
        """Whether it has ended, well or badly."""
        return not self._thread.is_alive()

    def result(self) -> Path:
        """Wait, and return the committed folder. Raises what the save raised, on every rank."""
        self._thread.join()
        if self._error is not None:
            self._raised = True
            raise self._error
        return self.folder

    def check(self) -> None:
        """Raise the error of a save that ended badly, once."""
        if self.done() and self._error is not None and not self._raised:
            self.result()


class SaveQueue:
    """At most `limit` saves at a time: starting one more waits for the oldest."""

    def __init__(self, limit: int = 1) -> None:
        self._limit = limit
        self._pending: deque[PendingSave] = deque()
        self._unused: list[Staging] = []

    def start(self, place: Place, contents: Contents) -> PendingSave:
        """Copy what is to be written and save it in the background. All ranks call together.

        Training may go on as soon as this returns: what changes from then on does not change the checkpoint.
        """
        while len(self._pending) >= self._limit:
            self._oldest().result()
        draft = begin(place, GroupMeeting(world()))
        staging = self._unused.pop() if self._unused else Staging()
        pending = PendingSave(place, draft, contents.snapshot(staging), staging)
        self._pending.append(pending)
        return pending

    def _oldest(self) -> PendingSave:
        """Take it out; it ends before the next save starts, and leaves its memory to that."""
        pending = self._pending.popleft()
        self._unused.append(pending.staging)
        return pending

    def check(self) -> None:
        """Raise the error of a save that ended badly; forget those that ended well."""
        while self._pending and self._pending[0].done():
            self._oldest().check()

    def wait(self) -> None:
        """Return once everything is committed; raise the first error."""
        while self._pending:
            self._oldest().result()
