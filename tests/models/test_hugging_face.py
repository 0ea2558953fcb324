"""Models of Hugging Face's transformers, with random weights, through both doors under ZERO3, against one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import unishard

pytest.importorskip("transformers")

STEPS, RATE, EPS = 4, 1e-2, 1e-3
VOCABULARY, LENGTH = 61, 9

pytestmark = pytest.mark.hf


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=24, n_layer=3, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


BUILDERS: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "llama": llama}
BLOCKS: dict[str, Callable[[Any], Iterable[nn.Module]]] = {
    "gpt2": lambda model: model.transformer.h,
    "llama": lambda model: model.model.layers,
}


def tokens(step: int, rank: int) -> Tensor:
    draw = torch.Generator().manual_seed(97 * step + rank)
    return torch.randint(VOCABULARY, (3, LENGTH), generator=draw)


def loss_of(model: Any, step: int, rank: int) -> Tensor:
    batch = tokens(step, rank)
    return model(input_ids=batch, labels=batch).loss


def new_adamw(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=RATE, eps=EPS, weight_decay=0.1)


def train_alone(model: Any) -> list[float]:
    optimizer, losses, world = new_adamw(model.parameters()), [], dist.get_world_size()
    for step in range(STEPS):
        total = torch.stack([loss_of(model, step, rank) for rank in range(world)]).mean()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def through_config(name: str, model: Any) -> tuple[list[float], dict[str, Tensor]]:
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "eps": EPS, "weight_decay": 0.1}},
        "zero_optimization": {"stage": 3},
    }
    engine = unishard.initialize(model=model, config=config).engine
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine, step, dist.get_rank())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with unishard.gather(model):
        return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


def through_code(name: str, model: Any) -> tuple[list[float], dict[str, Tensor]]:
    for block in BLOCKS[name](model):
        unishard.fully_shard(block)
    unishard.fully_shard(model)
    optimizer, losses = new_adamw(model.parameters()), []
    for step in range(STEPS):
        loss = loss_of(model, step, dist.get_rank())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {n: p.detach().full_tensor().clone() for n, p in model.named_parameters()}


DOORS = {"config": through_config, "code": through_code}


def parity(name: str, door: str) -> None:
    torch.manual_seed(3)
    initial = BUILDERS[name]()
    alone = copy.deepcopy(initial)
    expected_losses = train_alone(alone)
    torch.manual_seed(3 + dist.get_rank())  # other ranks start elsewhere and must get rank 0's weights
    losses, weights = DOORS[door](name, BUILDERS[name]())
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    torch.testing.assert_close((mean / dist.get_world_size()).tolist(), expected_losses, rtol=1e-5, atol=0)
    before, after = dict(initial.named_parameters()), dict(alone.named_parameters())
    assert set(weights) == set(after)
    wanted = torch.cat([(after[n] - before[n]).detach().flatten() for n in after])
    error = torch.cat([(weights[n] - after[n]).detach().flatten() for n in after])
    assert error.norm() <= 2e-5 * wanted.norm(), f"{name} {door}: {error.norm() / wanted.norm():.1e}"


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.parametrize("name", list(BUILDERS))
def test_trains_as_one_process_does(name: str, door: str, ranks: Callable[..., Any]) -> None:
    ranks(parity, name, door, world_size=2, timeout=120)


def generates(name: str, door: str) -> None:
    """`generate` calls forward again and again under no_grad; ranks continue from different prompts alike."""
    torch.manual_seed(5)
    model = BUILDERS[name]()
    expected = model.generate(tokens(0, 0)[:1, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    if door == "config":
        unishard.initialize(
            model=model, config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        )
    else:
        for block in BLOCKS[name](model):
            unishard.fully_shard(block)
        unishard.fully_shard(model)
    found = model.generate(tokens(0, 0)[:1, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("door", list(DOORS))
def test_generate(door: str, ranks: Callable[..., Any]) -> None:
    ranks(generates, "gpt2", door, world_size=2, timeout=120)
