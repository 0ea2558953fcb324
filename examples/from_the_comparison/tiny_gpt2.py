"""The edit that all examples share: a tiny GPT-2 with random weights instead of `from_pretrained("gpt2")`, and data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

__all__ = ["GPT2Block", "Rows", "causal_lm", "dataloader", "dataset", "tiny_gpt2"]

VOCABULARY, LENGTH, PATTERNS = 64, 16, 8


class Rows(Dataset[dict[str, Tensor]]):
    """`size` rows of token ids (LENGTH,), int64: the same few again and again, so that every loss should fall."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.patterns = torch.randint(VOCABULARY, (PATTERNS, LENGTH), generator=generator)
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.patterns[index % PATTERNS]
        return {"input_ids": row, "labels": row}


class BatchModel(GPT2LMHeadModel):
    """A GPT-2 that is called with a whole batch, as the examples do: `model(batch).loss`."""

    def forward(self, batch: dict[str, Tensor] | None = None, **inputs: Any) -> Any:
        return super().forward(**(batch or {}), **inputs)


def _config(**options: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options,
    )  # fmt: skip


def tiny_gpt2(seed: int = 0) -> BatchModel:
    """A GPT-2 of 30 thousand parameters, to be called with a batch; the same one on every rank."""
    torch.manual_seed(seed)
    return BatchModel(_config())


def causal_lm(seed: int = 0, **options: Any) -> GPT2LMHeadModel:
    """The same weights in the class that `AutoModelForCausalLM` gives."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(_config(**options))


dataset = Rows(96)


def dataloader(batch_size: int, steps: int) -> DataLoader[dict[str, Tensor]]:
    """`steps` batches of `batch_size` rows for this rank. Needs the process group."""
    world = torch.distributed.get_world_size()
    rows = Rows(batch_size * steps * world)
    return DataLoader(rows, batch_size=batch_size, sampler=DistributedSampler(rows, shuffle=False))
