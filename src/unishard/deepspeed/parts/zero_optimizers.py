"""`engine.optimizer` under DeepSpeed's class names: one sharded optimizer, shown as each of theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from unishard.config import ResolvedConfig
from unishard.deepspeed.parts.flat_state import flat_masters, put_masters, show_flat_state
from unishard.deepspeed.parts.optimizers import DeepSpeedCPUAdam, FusedAdam
from unishard.optim.flat import Piece
from unishard.optim.loss_scale import NoLossScale, StaticLossScale
from unishard.optim.sharded import ShardedOptimizer
from unishard.sharding.leaves import is_leaf
from unishard.sharding.whole_state import ParameterHome, whole_state


class DeepSpeedOptimizer(ShardedOptimizer):
    """What every engine's optimizer is. `optimizer` is the torch optimizer that steps this rank's shards."""

    attempted_steps = 0
    """Steps so far, skipped ones included."""
    shows_norm = True
    """Whether scripts see the norm of gradients: not with `zero_optimization.compute_grad_norm` false."""
    micro_step_id = 0
    """Backwards since gradients were last forgotten."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.inner

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().step(closure)
        self.attempted_steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.micro_step_id = 0

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped because gradients were not finite."""
        return self.skipped

    @property
    def loss_scaler(self) -> Any:
        """The loss scale's state: `cur_scale`, `loss_scale` and the settings it was built with."""
        return ScalerView(self)

    @property
    def loss_scale_config(self) -> Any:
        """As `loss_scaler`."""
        return ScalerView(self)

    @property
    def dynamic_loss_scale(self) -> bool:
        return hasattr(self.scaler, "window")

    @property
    def clip_grad(self) -> float:
        return self._rules.max_norm

    @property
    def _global_grad_norm(self) -> float | None:
        return self.grad_norm if self.shows_norm else None

    @property
    def check_grad_overflow(self) -> bool:
        """Whether a step with gradients that are not finite is skipped."""
        return self.skips_overflow

    @property
    def _epilogue_ran_this_backward(self) -> bool:
        return self.micro_step_id > 0

    def needs_scaler(self) -> bool:
        """Whether a loss has to be multiplied by the loss scale before its backward."""
        return not isinstance(self.scaler, NoLossScale)

    def get_loss_scale(self) -> float:
        return self.loss_scale

    def override_loss_scale(self, loss_scale: float) -> None:
        """Scale losses by `loss_scale` from now on, whatever the configuration says."""
        self.external_loss_scale, self.custom_loss_scaler = checked_scale(loss_scale), True
        self._loss_scale = StaticLossScale(self.external_loss_scale)

    def _set_loss_scale(self, value: float) -> None:
        """Move the scale to `value`; a dynamic one goes on from there."""
        self.loss_scaler.cur_scale = checked_scale(value)

    def set_lr(self, lr: float) -> None:
        """Give every parameter group the rate `lr`."""
        for group in self.param_groups:
            group["lr"] = lr

    def get_lr(self) -> float:
        return float(self.param_groups[0]["lr"])

    def _params(self, group: int) -> list[nn.Parameter]:
        """The user's parameters of one parameter group."""
        return [piece.group.registrations[piece.index].visible for piece in self.members[group]]

    def _masters(self, group: int) -> list[torch.Tensor]:
        """This rank's fp32 parts of the parameters of one parameter group."""
        return [piece.param.detach() for piece in self.members[group]]

    def _trained(self, group: int) -> list[Piece]:
        return [piece for piece in self.members[group] if piece.index in piece.group.trainable]

    def refresh_fp32_params(self) -> None:
        """Master weights follow the parameters by themselves; nothing to do."""

    def destroy(self) -> None:
        """Nothing is registered anywhere that would need removing."""

    def _reduced(self, group: int) -> list[torch.Tensor]:
        """This rank's parts of the reduced gradients of one group's trained parameters; zeros where there is none.

        The loss scale is still in them.
        """
        found = []
        for piece in self._trained(group):
            gradients = piece.group.gradients.shard
            if gradients is None:
                found.append(torch.zeros_like(piece.param.detach()))
            else:
                found.append(piece.group.buffer.local(piece.index, gradients))
        return found

    def _get_norm_groups(self) -> list[torch.Tensor]:
        """For each parameter group the 2-norm of this rank's parts of its gradients, without the loss scale."""
        return [
            torch.linalg.vector_norm(_flat(self._reduced(group)).float()) / self.loss_scale
            for group in range(len(self.members))
        ]


class PlainOptimizer(DeepSpeedOptimizer):
    """fp32 on every rank. DeepSpeed hands out the torch optimizer itself there, so this passes for it."""

    shown_as: type[torch.optim.Optimizer] | None = None
    """What a configured optimizer is to scripts; `None`: whatever steps the shards."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        inner = self.__dict__.get("inner")
        return type(self) if inner is None else self.shown_as or type(inner)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self.inner

    __hash__ = object.__hash__


class PlainFusedAdam(PlainOptimizer):
    """As `PlainOptimizer`, for `"type": "Adam"` and `"AdamW"`."""

    shown_as = FusedAdam


class ZeROOptimizer(DeepSpeedOptimizer):
    """Base of the optimizers of ZeRO."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        show_flat_state(self)

    _STATE, _MASTERS = "base_optimizer_state", "single_partition_of_fp32_groups"

    def state_dict(self) -> dict[str, Any]:
        """This rank's part under DeepSpeed's keys: loss scale, flat fp32 elements and flat state of each group."""
        own = super().state_dict()
        return {
            "zero_stage": 3 if isinstance(self, DeepSpeedZeroOptimizer_Stage3) else 2,
            "loss_scaler": own["loss_scale"],
            "dynamic_loss_scale": self.dynamic_loss_scale,
            "overflow": self.overflow,
            "clip_grad": self.clip_grad,
            self._STATE: own["inner"],
            self._MASTERS: flat_masters(self.members),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue with what `state_dict` gave on the same rank of as many. All ranks call together."""
        if self._STATE not in state_dict:
            super().load_state_dict(state_dict)
            return
        super().load_state_dict({"inner": state_dict[self._STATE], "loss_scale": state_dict["loss_scaler"]})
        put_masters(self.members, state_dict[self._MASTERS])
        self._refresh(self._schedule.groups)

    nccl_start_alignment_factor = 2
    """Parts of `parallel_partitioned_bit16_groups` start at multiples of this many elements."""

    @property
    def averaged_gradients(self) -> dict[int, list[torch.Tensor]]:
        """For each parameter group this rank's parts of the reduced gradients; empty before a backward."""
        if not any(p.group.gradients.shard is not None for pieces in self.members for p in pieces):
            return {}
        return {group: self._reduced(group) for group in range(len(self.members))}

    def get_fp32_grad_partitions(self) -> dict[int, dict[int, torch.Tensor]]:
        """This rank's parts of the reduced gradients in fp32, by parameter group and position in it."""
        return {
            group: {
                index: _filled(grad.float(), piece)
                for index, (grad, piece) in enumerate(zip(grads, self._trained(group), strict=True))
            }
            for group, grads in self.averaged_gradients.items()
        }

    @property
    def parallel_partitioned_bit16_groups(self) -> list[list[torch.Tensor]]:
        """For each parameter group every rank's equal part of its weights, flat, in the compute dtype: copies."""
        groups = []
        for group in range(len(self.members)):
            params = self._params(group)
            ranks = self.members[group][0].group.axes.shard.size if params else 1
            flat = _flat([p.detach() for p in params])
            align = ranks * self.nccl_start_alignment_factor
            flat = torch.nn.functional.pad(flat, (0, -flat.numel() % align))
            groups.append(list(flat.chunk(ranks)))
        return groups

    def _set_fp32_optimizer_param_groups(self) -> None:
        """Nothing to do: `optimizer` always holds the shards that it steps."""

    _clear_fp32_optimizer_param_groups = _set_fp32_optimizer_param_groups

    @property
    def single_partition_of_fp32_groups(self) -> list[torch.Tensor]:
        """For each parameter group this rank's fp32 elements, flat: a copy when they lie in several shards."""
        return [_flat(self._masters(group)) for group in range(len(self.members))]

    @property
    def bit16_groups(self) -> list[list[nn.Parameter]]:
        """For each parameter group the parameters that compute."""
        return [self._params(group) for group in range(len(self.members))]

    fp16_groups = bit16_groups

    @property
    def params_in_partition(self) -> list[list[nn.Parameter]]:
        """For each parameter group, the parameters of which this rank holds a part."""
        return [
            [p.group.registrations[p.index].visible for p in pieces if p.param.numel()]
            for pieces in self.members
        ]


class DeepSpeedZeroOptimizer(ZeROOptimizer):
    """ZeRO-1 and 2."""


class DeepSpeedZeroOptimizer_Stage3(ZeROOptimizer):
    """ZeRO-3. Of DeepSpeed's sub-groups, which its optimizer steps one by one, each holds one parameter here."""

    _STATE, _MASTERS = "optimizer_state_dict", "fp32_flat_groups"

    @property
    def _parts(self) -> list[Piece]:
        """This rank's parts of all parameters; empty ones are left out."""
        return [piece for pieces in self.members for piece in pieces if piece.param.numel()]

    @property
    def fp16_groups(self) -> list[list[nn.Parameter]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """For each sub-group its parameters."""
        return [[piece.group.registrations[piece.index].visible] for piece in self._parts]

    @property
    def fp32_partitioned_groups_flat(self) -> list[nn.Parameter]:
        """For each sub-group this rank's fp32 elements, as the torch optimizer holds them."""
        return [piece.param for piece in self._parts]

    @property
    def fp16_partitioned_groups(self) -> list[list[torch.Tensor]]:
        """For each parameter group this rank's parts, in the dtype they rest in."""
        return [self._masters(group) for group in range(len(self.members))]

    @property
    def leaf_parameters(self) -> dict[nn.Module, list[nn.Parameter]]:
        """The parameters of each leaf module."""
        (model,) = self._schedule.root.modules
        return {module: list(module.parameters()) for module in model.modules() if is_leaf(module)}


class BF16_Optimizer(ZeROOptimizer):
    """bf16 without a sharded model."""

    @property
    def fp32_groups_flat_partition(self) -> list[torch.Tensor]:
        return self.single_partition_of_fp32_groups

    @property
    def fp32_groups_gradients_flat(self) -> list[torch.Tensor]:
        """For each parameter group the reduced gradients, whole and flat: copies. All ranks read it together."""
        return [
            _flat(
                [
                    whole_state(ParameterHome(piece.group, piece.index), grad.float())
                    for piece, grad in zip(self._trained(group), self._reduced(group), strict=True)
                ]
            )
            for group in range(len(self.members))
        ]

    @property
    def fp32_groups_gradient_flat_partition(self) -> list[torch.Tensor]:
        """For each parameter group this rank's parts of the reduced gradients, flat."""
        return [_flat(self._reduced(group)).float() for group in range(len(self.members))]


class FP16_Optimizer(DeepSpeedOptimizer):
    """fp16 without a sharded model; DeepSpeed has bf16 under this name, too."""

    @property
    def low_precision_dtype(self) -> torch.dtype:
        """What parameters compute in."""
        return self.pieces[0].group.buffer.compute

    @property
    def fp32_groups_flat(self) -> list[torch.Tensor]:
        return [_flat(self._masters(group)) for group in range(len(self.members))]

    @property
    def fp16_groups(self) -> list[list[nn.Parameter]]:
        return [self._params(group) for group in range(len(self.members))]


class FP16_UnfusedOptimizer(FP16_Optimizer):
    """fp16 with an optimizer that steps tensor by tensor; here the same."""

    @property
    def fp32_groups(self) -> list[list[torch.Tensor]]:
        return [self._masters(group) for group in range(len(self.members))]


class ScalerView:
    """A loss scale under DeepSpeed's attribute names."""

    _NAMES = {
        "cur_scale": "scale",
        "loss_scale": "scale",
        "scale_window": "window",
        "min_scale": "min_scale",
        "min_loss_scale": "min_scale",
        "scale_factor": "growth_factor",
        "delayed_shift": "hysteresis",
        "consecutive_hysteresis": "consecutive_hysteresis",
        "init_scale": "initial",
        "cur_hysteresis": "_hysteresis_left",
    }

    def __init__(self, optimizer: DeepSpeedOptimizer) -> None:
        self._optimizer, self._scaler = optimizer, optimizer.scaler

    def __setattr__(self, name: str, value: Any) -> None:
        # A scale that a script assigns is the optimizer's; everything else is only read here.
        target = self if name.startswith("_") else self._scaler
        object.__setattr__(target, self._NAMES.get(name, name), value)

    @property
    def cur_iter(self) -> int:
        """Updates of the scale so far."""
        return self._optimizer.attempted_steps

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._scaler, self._NAMES.get(name, name))

    @property
    def dynamic(self) -> bool:
        return hasattr(self._scaler, "window")

    @property
    def dynamic_loss_scale(self) -> bool:
        return self.dynamic

    @property
    def use_grad_scaling(self) -> bool:
        return not isinstance(self._scaler, NoLossScale)


def checked_scale(value: float) -> float:
    """`value` as a loss scale. Raises `ValueError` unless it is finite and positive.

    >>> checked_scale(128)
    128.0
    """
    scale = float(value)
    if not math.isfinite(scale):
        raise ValueError(f"loss_scale must be finite, and is {scale}")
    if scale <= 0:
        raise ValueError(f"loss_scale must be greater than 0, and is {scale}")
    return scale


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    if not tensors:
        return torch.empty(0)
    return tensors[0].view(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _filled(grad: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A part with the padding behind it, where its parameter lies alone and so the ranks' parts are equally long."""
    layout = piece.group.buffer.layout
    missing = layout.shard_numel - grad.numel()
    return torch.nn.functional.pad(grad, (0, missing)) if len(layout.shapes) == 1 and missing else grad


def optimizer_class(rc: ResolvedConfig, torch_adam: bool = False) -> type[ShardedOptimizer]:
    """The class that DeepSpeed's users expect under this configuration.

    `torch_adam`: it asks for torch's own Adam, which the settled configuration does not remember.
    """
    stage = rc.zero_optimization.stage
    if stage == 3:
        return DeepSpeedZeroOptimizer_Stage3
    if stage in (1, 2):
        return BF16_Optimizer if _accumulates_in_fp32(rc, stage) else DeepSpeedZeroOptimizer
    fused = adam_class(rc) is not None and not torch_adam
    if rc.bf16.enabled or rc.fp16.enabled:
        return FP16_Optimizer if fused else FP16_UnfusedOptimizer
    return PlainFusedAdam if fused else PlainOptimizer


def adam_class(rc: ResolvedConfig) -> type[torch.optim.Adam] | None:
    """DeepSpeed's class for a configured Adam; `None` for other optimizers."""
    if rc.optimizer is None or str(rc.optimizer.type).lower() not in ("adam", "adamw"):
        return None
    return FusedAdam if rc.zero_optimization.offload_optimizer is None else DeepSpeedCPUAdam


def show_as_configured(inner: torch.optim.Optimizer, rc: ResolvedConfig) -> None:
    """Let scripts find the class that DeepSpeed would have built; it steps as torch's own, which it derives from."""
    shown = adam_class(rc)
    if shown is not None and type(inner) in (torch.optim.Adam, torch.optim.AdamW):
        inner.__class__ = shown
        inner.adam_w_mode = inner.defaults["decoupled_weight_decay"]  # pyright: ignore[reportAttributeAccessIssue]
        inner.set_grad_none = inner.fp32_optimizer_states = True  # pyright: ignore[reportAttributeAccessIssue]


def _accumulates_in_fp32(rc: ResolvedConfig, stage: int) -> bool:
    """DeepSpeed runs ZeRO-1 in bf16 with fp32 accumulation on its bf16 optimizer."""
    return stage == 1 and bool(rc.bf16.enabled) and rc.grad_accum_dtype == "fp32"


def parameters_of(optimizer: ShardedOptimizer) -> Iterator[nn.Parameter]:
    """The user's parameters that `optimizer` updates."""
    for piece in optimizer.pieces:
        yield piece.group.registrations[piece.index].visible
