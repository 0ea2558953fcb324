"""DeepSpeed's logger and its helpers: messages of chosen ranks, warnings that come once."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class _Logger(logging.Logger):
    """The logger named DeepSpeed, with DeepSpeed's two additions."""

    @functools.cache  # noqa: B019 - one logger, for the whole process
    def warning_once(self, *args: Any, **options: Any) -> None:
        """Warn, once for each message."""
        self.warning(*args, **options)

    def log_dist_once(
        self, message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO
    ) -> None:
        """As the function of that name."""
        log_dist_once(message, ranks, level)


def _make() -> _Logger:
    made = _Logger("DeepSpeed", LEVELS.get(os.environ.get("DEEPSPEED_LOG_LEVEL", "").lower(), logging.INFO))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [unishard] %(message)s"))
    made.addHandler(handler)
    made.propagate = False
    return made


logger = _make()


class LoggerFactory:
    """Makes loggers in the format of the one above."""

    @staticmethod
    def create_logger(name: str | None = None, level: int = logging.WARNING) -> logging.Logger:
        """A logger called `name`. Raises `ValueError` without a name."""
        if name is None:
            raise ValueError("create_logger needs a name")
        made = logging.getLogger(name)
        made.setLevel(level)
        return made


def _chosen(ranks: Iterable[int] | None) -> bool:
    rank = dist.get_rank() if dist.is_initialized() else -1
    wanted = list(ranks or [])
    return rank < 0 or not wanted or -1 in wanted or rank in wanted


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Log on the given ranks; on all with none given, or -1 among them."""
    if _chosen(ranks):
        rank = dist.get_rank() if dist.is_initialized() else -1
        logger.log(level, "[Rank %d] %s", rank, message)


_said: set[tuple[str, tuple[int, ...]]] = set()


def log_dist_once(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """As `log_dist`, once for each message and ranks."""
    key = message, tuple(ranks or ())
    if key not in _said:
        _said.add(key)
        log_dist(message, key[1], level)


def print_dist(message: str, ranks: Iterable[int] | None = None) -> None:
    """Print on the given ranks."""
    if _chosen(ranks):
        print(message)


def warning_once(*args: Any, **options: Any) -> None:
    """Warn, once for each message."""
    logger.warning_once(*args, **options)


def get_log_level_from_string(log_level_str: str) -> int:
    """Python's number of a level's name. Raises `ValueError` for others."""
    level = LEVELS.get(log_level_str.lower())
    if level is None:
        raise ValueError(f"{log_level_str!r} is not a log level; use one of {', '.join(LEVELS)}")
    return level


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Set the level of the logger above, or of `custom_logger`, by name."""
    (custom_logger or logger).setLevel(get_log_level_from_string(log_level_str))


def get_current_level() -> int:
    """The level of the logger."""
    return logger.getEffectiveLevel()


def should_log_le(max_log_level_str: str) -> bool:
    """Whether messages of this level are shown."""
    return get_current_level() <= get_log_level_from_string(max_log_level_str)


def get_caller_func(frame: int = 3) -> str:
    """The name of the function `frame` levels up."""
    import sys

    return sys._getframe(frame).f_code.co_name


def instrument_w_nvtx(func: Any) -> Any:
    """Returned as it is: collectives and units are labelled for profilers where they run."""
    return func
