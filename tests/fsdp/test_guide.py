"""What guides to FSDP1 tell people to type, on a CPU."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from unishard.fsdp import BackwardPrefetch, CPUOffload, MixedPrecision, ShardingStrategy
from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from unishard.testing.models import Block, TinyTransformer


class Output(NamedTuple):
    loss: Tensor


class LanguageModel(nn.Module):
    """A model that takes a batch and returns its loss, as Hugging Face's do."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = TinyTransformer()

    def forward(self, batch: dict[str, Tensor]) -> Output:
        return Output(self.transformer.loss(self.transformer(batch["input_ids"]), batch["labels"]))


def loader(steps: int) -> list[dict[str, Tensor]]:
    made = [TinyTransformer().example_batch(10 * step + dist.get_rank(), 4) for step in range(steps)]
    return [{"input_ids": batch.inputs, "labels": batch.targets} for batch in made]


def train(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    losses = []
    for batch in loader(1) * steps:
        optimizer.zero_grad()
        outputs = model(batch)
        loss = outputs.loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def case_basic_setup() -> None:
    model = FSDP(
        LanguageModel(),
        mixed_precision=MixedPrecision(
            param_dtype=torch.float16, reduce_dtype=torch.float16, buffer_dtype=torch.float16
        ),
        auto_wrap_policy=transformer_auto_wrap_policy(transformer_layer_cls={Block}),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        device_id=None,
        limit_all_gathers=True,
    )
    losses = train(model, 8)
    assert losses[-1] < losses[0] - 0.1


def case_offload_by_size() -> None:
    model = FSDP(
        LanguageModel(),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        cpu_offload=CPUOffload(offload_params=True),
        mixed_precision=MixedPrecision(
            param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16
        ),
        auto_wrap_policy=size_based_auto_wrap_policy(min_num_params=1000),
        backward_prefetch=BackwardPrefetch.BACKWARD_PRE,
        forward_prefetch=True,
        limit_all_gathers=True,
        use_orig_params=False,
        device_id=torch.device("cpu"),
    )
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
        check_fn=lambda submodule: isinstance(submodule, Block),
    )
    assert len(FSDP.fsdp_modules(model)) > 2
    assert "FullyShardedDataParallel(" in repr(model.transformer), "nested, as print(model) shows"
    assert sum(type(m).__name__ == "CheckpointWrapper" for m in model.modules()) == 2
    losses = train(model, 8)
    assert losses[-1] < losses[0] - 0.1


def case_from_ddp() -> None:
    """torch's own names, mixed with ours."""
    import torch.distributed.fsdp as theirs

    model = FSDP(
        LanguageModel(),
        mixed_precision=theirs.MixedPrecision(param_dtype=torch.bfloat16),
        sharding_strategy=theirs.ShardingStrategy.SHARD_GRAD_OP,
        cpu_offload=theirs.CPUOffload(offload_params=True),
        backward_prefetch=theirs.BackwardPrefetch.BACKWARD_POST,
        auto_wrap_policy=functools.partial(
            theirs.wrap.transformer_auto_wrap_policy, transformer_layer_cls={Block}
        ),
    )
    assert len(FSDP.fsdp_modules(model)) == 3
    train(model)


def case_forgotten_policy() -> None:
    """Works, and is one unit."""
    model = FSDP(LanguageModel())
    assert len(FSDP.fsdp_modules(model)) == 1
    train(model)


def case_profiler() -> None:
    from torch.profiler import ProfilerActivity, profile

    model = FSDP(LanguageModel())
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        train(model, 2)
    assert prof.key_averages().table(sort_by="cpu_time_total", row_limit=3)


def case_checkpoints() -> None:
    """torch's objects for our model; `test_state_dict_type.py` has the guides' code with files."""
    import torch.distributed.fsdp as theirs

    model = FSDP(
        LanguageModel(), auto_wrap_policy=transformer_auto_wrap_policy(transformer_layer_cls={Block})
    )
    policy = theirs.FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
    with FSDP.state_dict_type(model, theirs.StateDictType.FULL_STATE_DICT, policy):
        state_dict = model.state_dict()
    assert bool(state_dict) == (dist.get_rank() == 0)
    if state_dict:
        LanguageModel().load_state_dict(state_dict)
    with FSDP.state_dict_type(model, theirs.StateDictType.FULL_STATE_DICT):
        model.load_state_dict(model.state_dict())


CASES = {name.removeprefix("case_"): case for name, case in globals().items() if name.startswith("case_")}


@pytest.mark.parametrize("name", CASES)
def test_guide(ranks, name):
    ranks(CASES[name])
