"""A run from start to end: fresh processes for what must not be polluted, shared ones for interleaved rounds."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from unishard.bench.contestant import Contestant
from unishard.bench.machine import describe_machine
from unishard.bench.observe import observe_contestant
from unishard.bench.plan import Plan
from unishard.bench.ranks import RankFault, Ranks
from unishard.bench.results import Entry, Observation, Results, Round
from unishard.bench.startup import import_seconds
from unishard.bench.timing import time_contestant

Say = Callable[[str], None]
"""Takes one line of progress."""


class Run:
    """Measures `contestants` as `plan` says and keeps what it finds in `results`, also when it is cut short.

    Args:
        folder: where results.json is saved after each part, and ranks.log holds what libraries print.
        say: called with lines of progress.

    Example:
        >>> run = Run(Plan(size="tiny"), [], Path("."), say=print)
        >>> run.results.entries
        []
    """

    def __init__(self, plan: Plan, contestants: Sequence[Contestant], folder: Path, say: Say) -> None:
        self.plan = plan
        self.contestants = list(contestants)
        self.folder = folder
        self.say = say
        self.results = Results(
            machine=describe_machine(), plan=plan, entries=[Entry.of(c) for c in contestants]
        )
        self._entries = {entry.name: entry for entry in self.results.entries}

    def everything(self) -> Results:
        """All parts. Ctrl-C ends the run, and what was measured is saved and returned."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "ranks.log").unlink(missing_ok=True)
        try:
            if self.plan.curve:
                self.imports()
                self.observations()
            self.rounds()
        except KeyboardInterrupt:
            self.results.interrupted = True
            self.say("interrupted: reporting what was measured so far")
        self._save()
        return self.results

    def imports(self) -> None:
        """Import times; contestants that import the same share one measurement."""
        self.say("import times, in fresh interpreters")
        for modules in dict.fromkeys(c.imports for c in self.contestants):
            try:
                torch_seconds, added = import_seconds(modules)
            except subprocess.CalledProcessError:
                continue  # the contestant itself will say why, when it is built
            self.results.torch_import_seconds = torch_seconds
            for contestant in self.contestants:
                if contestant.imports == modules:
                    self._entries[contestant.name].import_seconds = added

    def observations(self) -> None:
        """Memory, traffic, time by kind, loss curve and start-up, each contestant in fresh processes."""
        for number, contestant in enumerate(self.contestants, 1):
            self.say(f"in fresh processes: {contestant.name} ({number} of {len(self.contestants)})")
            try:
                self._entries[contestant.name].observation = self._observe(contestant)
            except RankFault as fault:
                self._failed(contestant, fault)
            self._save()

    def _observe(self, contestant: Contestant) -> Observation:
        plan = self.plan
        size, threads = (1, plan.threads * plan.ranks) if contestant.alone else (plan.ranks, plan.threads)
        with self._ranks(size, threads, private_network=True) as ranks:
            found = ranks.call(observe_contestant, contestant, plan)
            return Observation.of(found, ranks.own_network)

    def rounds(self) -> None:
        """Throughput: every contestant once a round, in the same processes and the same process group."""
        ranks: Ranks | None = None
        try:
            for index in range(self.plan.rounds):
                for position, contestant in enumerate(self.contestants):
                    entry = self._entries[contestant.name]
                    if entry.error is not None:
                        continue
                    self.say(f"round {index + 1} of {self.plan.rounds}: {contestant.name}")
                    ranks = ranks or self._ranks(self.plan.ranks, self.plan.threads)
                    only = [0] if contestant.alone else None
                    try:
                        found = ranks.call(time_contestant, contestant, self.plan, only=only)
                        entry.rounds.append(Round.of(index, position, self.plan, found))
                    except RankFault as fault:
                        self._failed(contestant, fault)
                        ranks = None  # they are gone; the next contestant gets new ones
                    self._save()
        finally:
            if ranks is not None:
                ranks.kill()

    def _ranks(self, size: int, threads: int, private_network: bool = False) -> Ranks:
        log = str(self.folder / "ranks.log")
        return Ranks(
            size,
            threads=threads,
            timeout=self.plan.timeout,
            log=log,
            transport=self.plan.transport,
            private_network=private_network,
        )

    def _failed(self, contestant: Contestant, fault: RankFault) -> None:
        self._entries[contestant.name].error = str(fault)
        self.say(f"{contestant.name} failed: {fault}")
        with (self.folder / "ranks.log").open("a") as log:
            log.write(f"{contestant.name}: {fault}\n{fault.trace}\n")

    def _save(self) -> None:
        self.results.save(self.folder / "results.json")
