"""Tools for testing distributed code: a pool of rank processes and small models.

Importing this package is cheap; `unishard.testing.parity` and `unishard.testing.models` are imported by
their own names.
"""

from __future__ import annotations

from unishard.testing.pool import RankFailure, RankPool, RankTimeout, shared_pool

__all__ = ["RankFailure", "RankPool", "RankTimeout", "shared_pool"]
