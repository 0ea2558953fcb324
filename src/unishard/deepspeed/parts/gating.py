"""Gating functions of mixtures of experts, and helpers about expert parameters.

Routes are those of GShard (arXiv:2006.16668) for one and two experts, and top-k with a capacity in general.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Routes = tuple[Tensor, Tensor, Tensor, Tensor]
"""(auxiliary loss, combine weights (S, E, C), dispatch mask (S, E, C), tokens of each expert (E,))."""


def _capacity(tokens: int, experts: int, factor: float, least: int) -> int:
    return max(math.ceil(tokens / experts * factor), least)


def topkgating(
    logits: Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: Any = None,
    drop_policy: str = "probs",
    sparse_routes: bool = False,
) -> Routes:
    """Each token goes to its `k` best experts, as far as they have room.

    Args:
        logits: (S, E). capacity_factor: room of an expert in units of S k / E, at least `min_capacity`.
        drop_tokens: False makes room for every token. drop_policy: "probs" drops the least probable of an expert,
        "position" the last.
    """
    tokens, experts = logits.shape
    gates = F.softmax(logits.float(), dim=1)
    chosen = torch.topk(gates, k, dim=1).indices
    mask = torch.zeros_like(gates).scatter_(1, chosen, 1.0)
    counts = mask.sum(0).to(torch.long)
    loss = (gates.mean(0) * mask.mean(0)).mean() * experts * experts / k
    room = _capacity(tokens * k, experts, capacity_factor, min_capacity) if drop_tokens else int(counts.max())
    room = min(room, tokens)
    if drop_tokens and drop_policy == "probs":
        best = torch.topk(gates * mask, room, dim=0).indices
        mask = mask * torch.zeros_like(mask).scatter_(0, best, 1.0)
    place = torch.cumsum(mask, 0) - 1
    mask = mask * (place < room)
    weights = gates * mask
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
    slots = F.one_hot((place * mask).long().clamp(min=0), room).to(weights.dtype)
    combine = weights.unsqueeze(-1) * slots * mask.unsqueeze(-1)
    return loss, combine, combine.bool(), counts


def top1gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    used_token: Tensor | None = None,
    noisy_gate_policy: str | None = None,
    drop_tokens: bool = True,
    use_rts: bool = True,
    ep_group: Any = None,
    sparse_routes: bool = False,
    use_tutel: bool = False,
) -> Routes:
    """Each token goes to its best expert, weighed by its probability.

    `noisy_gate_policy="RSample"` chooses with Gumbel noise; `use_rts` drops at random where an expert is full, instead
    of the last tokens. `used_token` (S,) masks tokens out.
    """
    tokens, experts = logits.shape
    gates = F.softmax(logits.float(), dim=1)
    noisy = logits
    if noisy_gate_policy == "RSample":
        noisy = logits - torch.empty_like(logits.float()).exponential_().log()
    mask = F.one_hot(noisy.argmax(1), experts).to(gates.dtype)
    if used_token is not None:
        mask = mask * used_token.unsqueeze(1)
    counts = mask.sum(0).to(torch.long)
    loss = (gates.mean(0) * mask.mean(0)).sum() * experts
    room = _capacity(tokens, experts, capacity_factor, min_capacity) if drop_tokens else int(counts.max())
    room = min(room, tokens)
    order = (
        mask * torch.rand_like(mask) if use_rts else mask * torch.arange(tokens, 0, -1).unsqueeze(1).to(mask)
    )
    kept = torch.topk(order, room, dim=0).indices
    mask = mask * torch.zeros_like(mask).scatter_(0, kept, 1.0)
    place = (torch.cumsum(mask, 0) - 1) * mask
    slots = F.one_hot(place.sum(1).long().clamp(min=0), room).to(gates.dtype)
    combine = (gates * mask).unsqueeze(-1) * slots.unsqueeze(1)
    return loss, combine, combine.bool(), counts


def top2gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: Any = None,
    top2_2nd_expert_sampling: bool = True,
    sparse_routes: bool = False,
) -> Routes:
    """Each token goes to its two best experts (the second drawn with Gumbel noise), weights normalized to 1."""
    tokens, experts = logits.shape
    gates = F.softmax(logits.float(), dim=1)
    first = F.one_hot(gates.argmax(1), experts).to(gates.dtype)
    noisy = logits.float()
    if top2_2nd_expert_sampling:
        noisy = noisy - torch.empty_like(noisy).exponential_().log()
    second = F.one_hot(noisy.masked_fill(first.bool(), -math.inf).argmax(1), experts).to(gates.dtype)
    counts = (first + second).sum(0).to(torch.long)
    loss = (gates.mean(0) * first.mean(0)).mean() * experts * experts
    room = _capacity(2 * tokens, experts, capacity_factor, min_capacity) if drop_tokens else int(counts.max())
    place_1 = torch.cumsum(first, 0) - 1
    place_2 = torch.cumsum(second, 0) - 1 + first.sum(0, keepdim=True)
    first, second = first * (place_1 < room), second * (place_2 < room)
    weight_1, weight_2 = (gates * first).sum(1), (gates * second).sum(1)
    total = (weight_1 + weight_2).clamp(min=torch.finfo(gates.dtype).eps)
    combine = torch.zeros(tokens, experts, room, dtype=gates.dtype, device=gates.device)
    for mask, place, weight in ((first, place_1, weight_1), (second, place_2, weight_2)):
        slots = F.one_hot((place * mask).sum(1).long().clamp(min=0, max=room - 1), room).to(gates.dtype)
        combine = combine + (weight / total)[:, None, None] * mask.unsqueeze(-1) * slots.unsqueeze(1)
    return loss, combine, combine.bool(), counts


def is_moe_param(param: Tensor) -> bool:
    """Whether `param` was marked as an expert's (`allreduce` is false)."""
    return not getattr(param, "allreduce", True)


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """(whether there are expert layers, how many experts): there are none here."""
    return False, 0


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    """Whether a parameter group is one of experts."""
    return bool(param_group.get("moe", False))


def split_params_into_shared_and_expert_params(params: Iterable[nn.Parameter]) -> tuple[list[Any], list[Any]]:
    """(parameters that all ranks share, experts' parameters)."""
    given = list(params)
    return [p for p in given if not is_moe_param(p)], [p for p in given if is_moe_param(p)]


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | list[dict[str, Any]], max_group_size: float = 178956971
) -> list[dict[str, Any]]:
    """Parameter groups with experts' parameters in groups of their own (`moe` true, by `group_name`)."""
    groups = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    result: list[dict[str, Any]] = []
    for group in groups:
        shared, experts = split_params_into_shared_and_expert_params(group["params"])
        result.append({**group, "params": shared})
        by_name: dict[str, list[Any]] = {}
        for param in experts:
            by_name.setdefault(getattr(param, "group_name", "experts"), []).append(param)
        result += [{**group, "params": ps, "moe": True, "name": name} for name, ps in by_name.items()]
    return result


def configure_moe_param_groups(model_parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters or groups as optimizer groups with experts apart."""
    given = list(model_parameters)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    return split_params_into_different_moe_groups_for_optimizer(groups)
