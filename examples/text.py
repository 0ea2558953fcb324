"""Real text that lies on any machine: the Python standard library's sources, as byte-pair tokens."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor


def standard_library(limit: int) -> str:
    """Modules of the standard library in name order, top-level ones first, up to `limit` characters.

    Raises `FileNotFoundError` where Python was installed without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file for pattern in ("*.py", "asyncio/*.py", "email/*.py") for file in sorted(folder.glob(pattern))
    ]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no .py files; use a Python that was installed with its sources"
        )
    parts, size = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        parts.append(text)
        size += len(text)
        if size >= limit:
            break
    return "\n".join(parts)[:limit]


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer (Sennrich et al. 2016)."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    lines = text.splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


class Batches:
    """Random windows of a token stream. The same step gives the same global batch, however many ranks share it."""

    def __init__(
        self, tokens: Tensor, context: int, batch_size: int, rank: int, world_size: int, seed: int = 0
    ) -> None:
        self._tokens = tokens
        self._context = context
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one rank's batch."""
        return self._batch_size * self._context

    def smaller(self, batch_size: int) -> Batches:
        """The same stream in batches of another size."""
        return Batches(self._tokens, self._context, batch_size, self._rank, self._world_size, self._seed)

    def at(self, step: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """One rank's inputs and targets (this rank's by default), each (batch_size, context)."""
        rank = self._rank if rank is None else rank
        draw = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        total = self._batch_size * self._world_size
        starts = torch.randint(len(self._tokens) - self._context - 1, (total,), generator=draw)
        mine = starts[rank * self._batch_size : (rank + 1) * self._batch_size]
        windows = torch.stack([self._tokens[s : s + self._context + 1] for s in mine.tolist()])
        return windows[:, :-1], windows[:, 1:]
