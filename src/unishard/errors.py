"""Every exception unishard raises on purpose.

Each class also derives from the built-in type that PyTorch raises for the same mistake, so that
`except ValueError` in an existing script keeps working. A message names who (rank, parameter or key),
the offending value, and the remedy.
"""

from __future__ import annotations


class UnishardError(Exception):
    """Base of all errors raised by unishard."""


class ConfigError(UnishardError, ValueError):
    """A configuration key or value that cannot be honoured, or a combination of them."""


class ShardingError(UnishardError, ValueError):
    """A module, parameter, mesh or policy that cannot be sharded as asked."""


class MisuseError(ShardingError, AssertionError):
    """A call that cannot be meant, which torch's `fully_shard` reports with an assertion: a module sharded twice."""


class UnevenShardingError(ShardingError, NotImplementedError):
    """A dim that the ranks do not divide, where uneven chunks are not possible."""


class ArgumentTypeError(UnishardError, TypeError):
    """An argument of a type that has no meaning there."""


class StateError(UnishardError, RuntimeError):
    """A call made in a state that does not allow it, such as `step()` during backward."""


class UnsupportedError(UnishardError, NotImplementedError):
    """Something that exists elsewhere and not (yet) here; the message says what to use instead."""


class NonFiniteError(UnishardError, RuntimeError):
    """Training stopped because gradients stayed non-finite; names the first offending tensor."""


class KernelError(UnishardError, ValueError):
    """A tensor or option that a kernel cannot take: dtype, device, length, memory that is not contiguous."""


class RankError(UnishardError, RuntimeError):
    """Another rank failed in a step that all ranks take together; carries that rank's cause."""


class CheckpointError(UnishardError, RuntimeError):
    """A checkpoint that cannot be written, or does not fit what it is loaded into."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint whose bytes are not those that were written: truncated, changed, or with files missing."""


class OffloadError(UnishardError, RuntimeError):
    """State that rests outside the device cannot be stored or read back as it was stored."""
