"""What a run found, as it is saved in results.json."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unishard.bench.contestant import Contestant
from unishard.bench.machine import Machine
from unishard.bench.observe import RankObservation
from unishard.bench.plan import Plan
from unishard.bench.timing import RankTiming
from unishard.errors import ConfigError


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Round(_Model):
    """One contestant's throughput in one round.

    `seconds` are those of the slowest rank for all timed steps, `step_seconds` the slowest rank's for each; `reference`
    is the reference matrix product's GFLOP/s beside it, averaged over ranks; `left_behind` bytes of tensors that were
    still alive after it was torn down.
    """

    index: int
    position: int
    tokens_per_second: float
    seconds: float
    step_seconds: list[float]
    reference: float
    losses: list[float]
    left_behind: int

    @classmethod
    def of(cls, index: int, position: int, plan: Plan, ranks: list[RankTiming]) -> Round:
        """Bring all ranks' timings together."""
        seconds = max(r.seconds for r in ranks)
        return cls(
            index=index,
            position=position,
            tokens_per_second=plan.tokens_per_step * plan.steps / seconds,
            seconds=seconds,
            step_seconds=[max(each) for each in zip(*(r.step_seconds for r in ranks), strict=True)],
            reference=fmean(r.reference for r in ranks),
            losses=[fmean(each) for each in zip(*(r.losses for r in ranks), strict=True)],
            left_behind=max(r.left_behind for r in ranks),
        )


class Observation(_Model):
    """One contestant in fresh processes. Bytes are those of the rank that needs most, bytes sent and time by kind the
    ranks' mean, seconds the slowest rank's, losses the mean over ranks."""

    import_seconds: float
    import_growth: int
    setup_seconds: float
    first_step_seconds: float
    peak_setup: int
    peak: int
    resident_before_update: int
    live_before_update: int
    held: dict[str, int]
    sent_on_wire: float
    sent_counted: float | None
    own_network: bool
    losses: list[float]
    spent: dict[str, float]

    @classmethod
    def of(cls, ranks: list[RankObservation], own_network: bool) -> Observation:
        """Bring all ranks' findings together."""
        counted = [r.sent_counted for r in ranks if r.sent_counted is not None]
        largest = (
            "import_seconds",
            "import_growth",
            "setup_seconds",
            "first_step_seconds",
            "peak_setup",
            "peak",
            "resident_before_update",
            "live_before_update",
        )
        return cls(
            **{name: max(getattr(r, name) for r in ranks) for name in largest},
            held={kind: max(r.held.get(kind, 0) for r in ranks) for kind in ranks[0].held},
            sent_on_wire=fmean(r.sent_on_wire for r in ranks),
            sent_counted=fmean(counted) if counted else None,
            own_network=own_network,
            losses=[fmean(each) for each in zip(*(r.losses for r in ranks), strict=True)],
            spent={kind: fmean(r.spent[kind] for r in ranks) for kind in ranks[0].spent},
        )


class Entry(_Model):
    """One contestant's row and all that was found about it; `error` says why something is missing."""

    name: str
    family: str
    level: Literal["replicated", "zero1", "zero2", "zero3", "offload"]
    setting: str
    ours: bool
    alone: bool
    import_seconds: float | None = None
    """Added to `import torch` in a fresh interpreter."""
    observation: Observation | None = None
    rounds: list[Round] = Field(default_factory=list)
    error: str | None = None

    @classmethod
    def of(cls, contestant: Contestant) -> Entry:
        """An entry with nothing found yet."""
        names = ("name", "family", "level", "setting", "ours", "alone")
        return cls(**{name: getattr(contestant, name) for name in names})


class Results(_Model):
    """A whole run."""

    schema_version: Literal[1] = 1
    machine: Machine
    plan: Plan
    entries: list[Entry]
    left_out: dict[str, str] = Field(default_factory=dict)
    """Contestants that do not fit the plan or were excluded -> why."""
    torch_import_seconds: float | None = None
    interrupted: bool = False

    def entry(self, name: str) -> Entry | None:
        return next((e for e in self.entries if e.name == name), None)

    def save(self, path: Path) -> None:
        """Write JSON; a reader never sees half a file."""
        partial = path.with_suffix(".partial")
        partial.write_text(self.model_dump_json(indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote. Raises `ConfigError` for anything else."""
        try:
            return cls.model_validate_json(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ConfigError(
                f"{path} is not a results.json of this version: {where}: {first['msg']}"
            ) from None
