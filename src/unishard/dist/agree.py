"""All ranks succeed or all raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from unishard.dist.collectives import Communicator
from unishard.errors import RankError


@contextmanager
def agree(comm: Communicator, what: str) -> Iterator[None]:
    """Run the block on every rank of `comm`; if it raises on any, raise on all.

    The rank that failed re-raises its own exception; the others raise `RankError` with that rank's cause.
    Nobody is left waiting in a collective that a failed rank will never enter.

    >>> from unishard.dist.collectives import SOLO
    >>> with agree(SOLO, "load the checkpoint"):
    ...     pass
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    causes = comm.all_gather_object(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    failed = [(rank, cause) for rank, cause in enumerate(causes) if cause is not None]
    if failed:
        rank, cause = failed[0]
        others = f" ({len(failed)} ranks failed)" if len(failed) > 1 else ""
        raise RankError(f"{what}: rank {rank} failed{others}: {cause}")


def require_same(comm: Communicator, what: str, value: str, remedy: str) -> None:
    """Raise `RankError` on every rank unless all ranks of `comm` pass the same `value`."""
    values = comm.all_gather_object(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise RankError(
                f"{what} differs between ranks: rank 0 has {values[0]}, rank {rank} has {other}; {remedy}"
            )
