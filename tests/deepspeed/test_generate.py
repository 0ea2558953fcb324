"""`generate()` under ZeRO-3 where ranks finish after different numbers of tokens: all get their own text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import unishard.deepspeed as deepspeed

pytest.importorskip("transformers")
pytestmark = [pytest.mark.hf]

VOCABULARY = 61
LENGTHS = (2, 9, 5)
"""New tokens each rank asks for."""


def new_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0)
    return GPT2LMHeadModel(shape).eval()


def prompt(rank: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(rank))


def options(rank: int, stop: int | None) -> dict[str, Any]:
    """A length of its own for each rank, or a token after which only some ranks stop."""
    length = {"max_new_tokens": LENGTHS[rank]} if stop is None else {"max_new_tokens": 12}
    eos = stop if stop is not None and rank == 0 else None
    return {"do_sample": False, "pad_token_id": 0, "eos_token_id": eos, **length}


def engine_of(model: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 3},
    }
    return deepspeed.initialize(model=model, config=config)[0]


def generated(way: str, by_token: bool) -> tuple[list[int], bool]:
    rank = dist.get_rank()
    alone = new_model()
    # The first token that rank 0 generates for its first row ends that row; a second stop token ends the other.
    first = alone.generate(prompt(0), do_sample=False, max_new_tokens=1, pad_token_id=0)[:, -1].tolist()
    stop: Any = first if by_token else None
    expected = alone.generate(prompt(rank), **options(rank, stop))
    engine = engine_of(new_model())
    engine.eval()
    assert all(p.numel() == 0 for p in engine.module.parameters()), "nothing was sharded"
    if way == "synced":
        found = engine.module.generate(prompt(rank), synced_gpus=True, **options(rank, stop))
    elif way == "engine":
        found = engine.generate(prompt(rank), synced_gpus=True, **options(rank, stop))
    else:  # whole parameters for as long as it lasts: every rank goes its own way
        from unishard.deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters(list(engine.module.parameters())):
            found = engine.module.generate(prompt(rank), **options(rank, stop))
    # Training goes on afterwards.
    engine.train()
    tokens = prompt(rank)
    engine.backward(engine(tokens, labels=tokens).loss)
    engine.step()
    return [expected.shape[1] - 4, found.shape[1] - 4], torch.equal(found, expected)


@pytest.mark.parametrize("by_token", [False, True], ids=["lengths", "stop tokens"])
@pytest.mark.parametrize("way", ["synced", "engine", "gathered"])
def test_ranks_finish_at_different_lengths(way: str, by_token: bool, ranks: Callable[..., Any]):
    seen = ranks(generated, way, by_token, world_size=2, timeout=60)
    lengths = [expected for (expected, _), _ in seen]
    assert lengths == ([1, 12] if by_token else list(LENGTHS[:2]))
    assert [found for (_, found), _ in seen] == lengths
    assert all(same for _, same in seen)
