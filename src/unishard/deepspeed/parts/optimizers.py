"""`ops.*` optimizers: torch's and unishard's own, with DeepSpeed's constructor arguments.

Under the engine each steps whole shards through unishard's kernels; on plain parameters each is an ordinary optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unishard.errors import UnsupportedError
from unishard.optim.flat import register_rule_like
from unishard.optim.lion import Lion

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class _Adam(torch.optim.Adam):
    """Adam or AdamW by `adam_w_mode`; with bias correction."""

    def _setup(self, params: Params, decoupled: bool, options: dict[str, Any]) -> None:
        if not options.pop("bias_correction"):
            raise UnsupportedError(
                f"{type(self).__name__}(bias_correction=False): build it through the configuration: "
                '"optimizer": {"type": "AdamW", "params": {"bias_correction": false}}'
            )
        super().__init__(params, decoupled_weight_decay=decoupled, **options)

    def _state_dtype(self, param: Tensor) -> torch.dtype:
        """Of the moments of a half-precision parameter; the engine's shards are fp32, and so are their moments."""
        return param.dtype

    def step(self, closure: Any = None) -> Any:
        """As torch's. Half-precision parameters are updated in fp32 and rounded once."""
        narrow = {
            param: param.grad
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None and param.dtype.itemsize < 4 and not param.grad.is_sparse
        }
        if not narrow:
            return _torch_step()(self, closure)
        if closure is not None:
            raise UnsupportedError(
                f"{type(self).__name__}.step(closure): half-precision parameters step without one"
            )
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    if param in narrow:
                        _step_narrow(param, self.state[param], group, self._state_dtype(param))
        for param in narrow:
            param.grad = None
        _torch_step()(self)
        for param, grad in narrow.items():
            param.grad = grad
        return None


def _torch_step() -> Any:
    """`torch.optim.Adam.step` without the hooks around it, which run around ours."""
    step: Any = torch.optim.Adam.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _step_narrow(param: Tensor, state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> None:
    """One update of a half-precision parameter by torch's own Adam, on fp32 copies; moments rest in `dtype`."""
    from torch.optim.adam import adam

    if not state:
        state["step"] = torch.zeros(())
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        state.update({name: torch.zeros_like(param, dtype=dtype) for name in names})
    names = [name for name in state if name != "step"]
    wide = {name: state[name].float() for name in names}
    weight, first = param.float(), group["betas"]
    assert param.grad is not None
    adam(
        [weight], [param.grad.float()], [wide["exp_avg"]], [wide["exp_avg_sq"]],
        [wide["max_exp_avg_sq"]] if group["amsgrad"] else [], [state["step"]],
        foreach=False, decoupled_weight_decay=group["decoupled_weight_decay"], amsgrad=group["amsgrad"],
        beta1=first[0], beta2=first[1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=group["maximize"],
    )  # fmt: skip
    param.copy_(weight)
    for name in names:
        state[name].copy_(wide[name])


class FusedAdam(_Adam):
    """Adam on the device; `adam_w_mode` (the default) decays weights apart from the gradient.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.ones(1)
    >>> FusedAdam([weight], lr=0.1).step()
    >>> round(weight.item(), 6)
    0.9
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant; leave amsgrad out")
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        self._setup(params, adam_w_mode, {**options, "bias_correction": bias_correction})
        self.adam_w_mode, self.set_grad_none = adam_w_mode, set_grad_none

    def zero_grad(self, set_to_none: bool | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)


class DeepSpeedCPUAdam(_Adam):
    """Adam on the CPU; `adamw_mode` (the default) decays weights apart from the gradient."""

    def __init__(
        self,
        model_params: Params,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        options = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
        }
        self._setup(model_params, adamw_mode, {**options, "bias_correction": bias_correction})
        self.adam_w_mode, self.fp32_optimizer_states = adamw_mode, fp32_optimizer_states

    def _state_dtype(self, param: Tensor) -> torch.dtype:
        return torch.float32 if self.fp32_optimizer_states else param.dtype

    def step_subgroup(self, subgroup_id: int, closure: Any = None) -> Any:
        """As `step`, with the state kept under `subgroup_id`: parameters may be swapped between calls."""
        with _lent(self, subgroup_id):
            return self.step(closure)

    def rollback_subgroup(self, sub_group_id: int, closure: Any = None) -> None:
        """Undo the last `step_subgroup`, from the gradients it saw, which must still be there.

        Raises:
            RuntimeError: the part of the model has taken no step.
        """
        states: Any = self.state
        count = states[sub_group_id].get("step") if sub_group_id in states else None
        if count is None:
            raise RuntimeError(
                f"Cannot rollback optimizer state for sub_group_id {sub_group_id}: there is none"
            )
        if count == 0:
            raise RuntimeError(f"Cannot rollback sub_group_id {sub_group_id}: step count is 0")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _undo_adam(param, states[sub_group_id], group)


@contextmanager
def _lent(optimizer: torch.optim.Optimizer, key: Any) -> Iterator[None]:
    """Inside, each parameter steps with the state that is kept under `key`, one for all as in DeepSpeed."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    own = {param: optimizer.state.pop(param) for param in params if param in optimizer.state}
    state = optimizer.state.setdefault(key, {})
    try:
        for param in params:
            optimizer.state[param] = state
        yield
    finally:
        for param in params:
            optimizer.state.pop(param, None)
        optimizer.state.update(own)


def _undo_adam(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Take back what one step of Adam with bias correction did to `param` and `state`, given its gradient."""
    assert param.grad is not None
    first, second = group["betas"]
    step, grad = float(state["step"]), param.grad.detach().to(state["exp_avg"].dtype)
    values = param.detach().to(grad.dtype)
    spread = (state["exp_avg_sq"] / (1 - second**step)).sqrt().add_(group["eps"])
    values = values + group["lr"] * (state["exp_avg"] / (1 - first**step)) / spread
    decay = group["weight_decay"]
    if group["decoupled_weight_decay"]:
        values = values / (1 - group["lr"] * decay)
    elif decay:
        grad = grad + decay * values
    param.detach().copy_(values)
    state["exp_avg"].sub_(grad, alpha=1 - first).div_(first)
    state["exp_avg_sq"].addcmul_(grad, grad, value=second - 1).div_(second).clamp_(min=0)
    state["step"] -= 1


class FusedLion(Lion):
    """Lion on the device."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay)  # pyright: ignore
        self.set_grad_none = set_grad_none


class DeepSpeedCPULion(Lion):
    """Lion on the CPU."""

    def __init__(
        self,
        model_params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _need_fp32(self, fp32_optimizer_states)
        super().__init__(model_params, lr=lr, betas=tuple(betas), weight_decay=weight_decay)  # pyright: ignore


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """Adagrad on the CPU."""

    def __init__(
        self,
        model_params: Params,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _need_fp32(self, fp32_optimizer_states)
        if amsgrad:
            raise UnsupportedError(
                "DeepSpeedCPUAdagrad(amsgrad=True): there is no such variant; leave it out"
            )
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)


def _need_fp32(optimizer: Any, fp32_optimizer_states: bool) -> None:
    if not fp32_optimizer_states:
        raise UnsupportedError(
            f"{type(optimizer).__name__}(fp32_optimizer_states=False): states have the masters' dtype; leave it out"
        )


ALL = (FusedAdam, DeepSpeedCPUAdam, FusedLion, DeepSpeedCPULion, DeepSpeedCPUAdagrad)
for _ours, _like in ((FusedAdam, torch.optim.Adam), (DeepSpeedCPUAdam, torch.optim.Adam), (FusedLion, Lion),
                     (DeepSpeedCPULion, Lion), (DeepSpeedCPUAdagrad, torch.optim.Adagrad)):  # fmt: skip
    register_rule_like(_ours, _like)
