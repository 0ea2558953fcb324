"""`DeepSpeedEngine`: unishard's engine under DeepSpeed's accessors and methods."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unishard.deepspeed.parts.accessors import CONFIG_ACCESSORS, config_accessors
from unishard.deepspeed.parts.checkpoint_names import (
    get_model_ckpt_name_for_rank,
    get_zero_ckpt_name_for_rank,
)
from unishard.deepspeed.parts.configuration import ConfigView
from unishard.deepspeed.parts.consolidation import SCRIPT
from unishard.deepspeed.parts.data import DataIO
from unishard.deepspeed.parts.fragments import note_optimizer
from unishard.deepspeed.parts.logs import logger
from unishard.deepspeed.parts.misuse import EmptyStateNote, compare_batch
from unishard.deepspeed.parts.mixed_precision import MixedPrecisionNames
from unishard.deepspeed.parts.timers import ThroughputTimer
from unishard.engine.engine import Engine
from unishard.errors import StateError, UnsupportedError
from unishard.optim.sharded import ShardedOptimizer
from unishard.sharding.precision import as_dtype

log = logging.getLogger("unishard")


class EngineMisuseError(StateError, AssertionError):
    """A call in a state that does not allow it, which DeepSpeed reports with an assertion."""


@config_accessors(CONFIG_ACCESSORS)
class DeepSpeedEngine(DataIO, MixedPrecisionNames, Engine):
    """What `deepspeed.initialize` returns first. See `unishard.Engine` for training, saving and loading.

    `config` is the user's dictionary, as in DeepSpeed; values after resolution are its attributes.
    """

    checkpoint_scripts = {"zero_to_torch.py": SCRIPT}

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_compiled = False
        self.sparse_tensor_module_names: set[str] = set()
        self.client_optimizer: Any = None
        self.collate_fn: Callable[[Any], Any] | None = None
        self.loaded_checkpoint_tag: str | None = None
        self._batch_compared = False
        self._empty_state_note = EmptyStateNote()
        self.module.register_state_dict_post_hook(self._empty_state_note)

    def complete(
        self, config: ConfigView, args: Any, collate_fn: Callable[[Any], Any] | None, client: Any
    ) -> None:
        """What only the door knows."""
        self.config = config  # pyright: ignore[reportAttributeAccessIssue]
        self.args, self.collate_fn, self.client_optimizer = args, collate_fn, client
        if self.optimizer is not None:
            note_optimizer(self.optimizer)
            shown: Any = self.optimizer
            shown.shows_norm = config.zero_optimization.compute_grad_norm
        autocast = config.torch_autocast
        if autocast.enabled:
            from unishard.deepspeed.parts.autocast import init_autocast_params

            init_autocast_params(self, as_dtype(autocast.dtype), autocast.lower_precision_safe_modules)
        self.tput_timer = ThroughputTimer(batch_size=self.train_batch_size())
        # Direct calls of backward() are divided by the accumulation steps here.
        self._warned_plain_backward = True

    # forward and backward -----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._batch_compared and torch.is_grad_enabled():
            self._batch_compared = True
            compare_batch((args, kwargs), self.train_micro_batch_size_per_gpu())
        if self.training and torch.is_grad_enabled():
            self.tput_timer.start()
        output = super().forward(*args, **kwargs)
        if self.gradient_accumulation_steps() > 1 and torch.is_grad_enabled():
            self._divide_in_plain_backward(output)
        return output

    def _divide_in_plain_backward(self, output: Any) -> None:
        """As DeepSpeed: `loss.backward()` without the engine divides by the accumulation steps too."""
        from torch.utils import _pytree as pytree

        leaves = [
            t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.grad_fn is not None
        ]
        # A loss among the outputs depends on the others: divided there, they must not be divided again.
        losses = [t for t in leaves if t.numel() == 1]
        for tensor in losses or leaves:
            tensor.register_hook(self._divided)

    def _divided(self, grad: torch.Tensor) -> torch.Tensor | None:
        return None if self._in_backward else grad / self.gradient_accumulation_steps()

    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        loss: torch.Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        *,
        tokens: float | torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """Differentiate a scalar loss, divided by the accumulation steps unless `scale_wrt_gas` is false.

        `allreduce_gradients` and `release_loss` of older versions are accepted.
        """
        unknown = set(ignored) - {"allreduce_gradients", "release_loss"}
        if unknown:
            raise TypeError(f"backward() got unexpected arguments: {', '.join(sorted(unknown))}")
        divided = super().backward(
            loss, tokens=tokens, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas
        )
        if tokens is None and scale_wrt_gas and loss.dtype.itemsize < 4:
            # What is shown of a half-precision loss is not rounded again.
            return loss.detach().float() / self.gradient_accumulation_steps()
        return divided

    def scale(self, loss: torch.Tensor, retain_graph: bool = False) -> torch.Tensor:
        """As `unishard.Engine.scale`; `retain_graph` is for the backward that follows, and changes nothing here."""
        if loss.numel() != 1 or not loss.requires_grad:
            raise EngineMisuseError(
                f"scale() takes the loss, a scalar tensor with a gradient, not shape {tuple(loss.shape)}"
            )
        return super().scale(loss)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        if not self._syncs:
            raise EngineMisuseError(
                "step() inside no_sync(): gradients have not met; leave the context first"
            )
        if not self._has_gradients():
            self._take_assigned()
        boundary = self.is_gradient_accumulation_boundary()
        super().step(lr_kwargs)
        self.tput_timer.stop(global_step=boundary)

    def _require_used(self, optimizer: ShardedOptimizer) -> None:
        try:
            super()._require_used(optimizer)
        except StateError as error:
            raise EngineMisuseError(str(error)) from None

    def _after_backward(self) -> None:
        super()._after_backward()
        if self.optimizer is not None:
            self.optimizer.micro_step_id += 1  # pyright: ignore[reportAttributeAccessIssue]

    def _take_assigned(self) -> None:
        """Gradients that the script put on parameters by hand, without a backward; they carry the loss scale."""
        taken = False
        for group in self.schedule.groups:
            for index in sorted(group.trainable):
                registration = group.registrations[index]
                grad = registration.whole.grad
                if grad is not None and tuple(grad.shape) == tuple(group.buffer.layout.shapes[index]):
                    registration.whole.grad = None
                    group.gradients.collect(index, grad, reduce_follows=True)
                    taken = True
            group.gradients.end_backward()
        self._scaled = self._scaled or taken

    def _optimizer(self) -> ShardedOptimizer:
        if self.optimizer is None:
            raise EngineMisuseError(
                "this engine has no optimizer: add an optimizer section to the configuration, or pass optimizer= to "
                "initialize; without one it only runs forward"
            )
        return self.optimizer

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As `unishard.Engine.no_sync`; inside another one, and under ZeRO-2 and 3, it raises, as DeepSpeed's does."""
        if self.zero_optimization_stage() > 1:
            raise EngineMisuseError(
                f"no_sync() under ZeRO-{self.zero_optimization_stage()}: scripts written for DeepSpeed count on "
                "gradients being sharded after each backward; leave it out, or keep sums local with "
                "coalesce_grad_reduction()"
            )
        if not self._syncs:
            raise EngineMisuseError(
                "no_sync() inside no_sync(): gradients stay local already; leave the inner one out"
            )
        with super().no_sync():
            yield

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Backwards inside keep their sums local; leaving reduces them once, before the next `step()`."""
        with Engine.no_sync(self):
            yield
        self.schedule.reduce_pending()

    def clip_fp32_gradients(self) -> None:
        """Nothing to do: `step()` clips, whatever the dtype."""

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Reduce what earlier backwards kept local. All ranks call together."""
        self.schedule.reduce_pending()

    # weights ------------------------------------------------------------------------------------------------

    def module_state_dict(
        self,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Whole parameters and buffers on every rank. All ranks call together."""
        quiet, self._empty_state_note.quiet = self._empty_state_note.quiet, True
        state = super().module_state_dict()
        self._empty_state_note.quiet = quiet
        if exclude_frozen_parameters:
            for name, param in self.module.named_parameters(remove_duplicate=False):
                if not param.requires_grad:
                    state.pop(name, None)
        named = {prefix + name: value for name, value in state.items()}
        if destination is None:
            return named
        destination.update(named)
        return destination

    def _consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Any] | None:
        """Whole weights in the compute dtype, in CPU memory of the first rank; `None` on others."""
        from unishard.engine.checkpointing import gather_16bit

        return gather_16bit(self, exclude_frozen=exclude_frozen_parameters)

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Any] | None:
        if self.zero_optimization_stage() != 3:
            raise ValueError(
                f"_zero3_consolidated_16bit_state_dict() is for ZeRO-3, and the stage is "
                f"{self.zero_optimization_stage()}; call module_state_dict()"
            )
        return self._consolidated_16bit_state_dict(exclude_frozen_parameters)

    def save_fp16_model(self, save_dir: str | Path, save_filename: str = "pytorch_model.bin") -> bool:
        """An older name of `save_16bit_model`."""
        return self.save_16bit_model(save_dir, save_filename)

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write whole weights in the compute dtype; returns whether it did.

        Under ZeRO-3, as DeepSpeed, only with `stage3_gather_16bit_weights_on_model_save`.
        """
        if self.zero_optimization_stage() == 3 and not self.zero_gather_16bit_weights_on_model_save():
            log.warning(
                "unishard: save_16bit_model wrote nothing: set "
                "zero_optimization.stage3_gather_16bit_weights_on_model_save to true"
            )
            return False
        return super().save_16bit_model(save_dir, save_filename, exclude_frozen_parameters)

    def load_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str, dict[str, Any]]:
        """As `unishard.Engine.load_checkpoint`: a missing checkpoint raises, any number of ranks may load."""
        if custom_load_fn is not None:
            raise UnsupportedError(
                "load_checkpoint(custom_load_fn=...): weights are read shard by shard, and never as one state dict; "
                "load without it and change weights inside zero.GatheredParameters"
            )
        path, client_state = super().load_checkpoint(
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
        )
        self.loaded_checkpoint_tag = Path(path).name
        return path, client_state

    def checkpoint_files(self, folder: Path, *, exclude_frozen: bool) -> Mapping[str, bytes]:
        if self.zero_optimization_stage() == 3:
            # DeepSpeed's files of that stage hold no whole weights.
            return {}
        from unishard.deepspeed.parts.model_states import NAME, model_states_file

        return {NAME: model_states_file(self, folder, exclude_frozen=exclude_frozen)}

    def _get_ckpt_name(self, checkpoints_path: str, tag: str, mp_placeholder: str | None = None) -> str:
        """Where scripts load module states from; of stage 3 there are none, the weights are in the shards alone."""
        return get_model_ckpt_name_for_rank(str(Path(checkpoints_path, str(tag))), mp_placeholder or "00")

    def _get_zero_ckpt_name(self, checkpoints_path: str, tag: str) -> str:
        """Where DeepSpeed would keep this rank's optimizer states. Checkpoints of this engine have other files."""
        return get_zero_ckpt_name_for_rank(
            str(Path(checkpoints_path, str(tag))), self.get_data_parallel_rank(), 0
        )

    _get_optimizer_ckpt_name = _get_zero_ckpt_name

    def _change_recovery_script_permissions(self, dst: str) -> None:
        """Let `dst`, a `zero_to_fp32.py` beside a checkpoint, be executed; where that cannot be, say so."""
        try:
            os.chmod(dst, os.stat(dst).st_mode | stat.S_IEXEC)
        except OSError as error:
            logger.info("unishard: %s is not made executable: %s", dst, error)

    # accessors that are more than a configuration value -------------------------------------------------------

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train batch, micro-batch, accumulation steps)."""
        return (
            self.train_batch_size(),
            self.train_micro_batch_size_per_gpu(),
            self.gradient_accumulation_steps(),
        )

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the accumulation steps so that a step takes `train_batch_size` samples, from the next step on."""
        per_micro = self.train_micro_batch_size_per_gpu() * self.dp_world_size
        if train_batch_size % per_micro:
            raise ValueError(
                f"set_train_batch_size({train_batch_size}): not a multiple of micro-batch x ranks = {per_micro}"
            )
        self._set_batch(
            train_batch_size=train_batch_size, gradient_accumulation_steps=train_batch_size // per_micro
        )

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch, and with it the batch; a loader that was built already keeps its own."""
        batch = micro_batch_size * self.gradient_accumulation_steps() * self.dp_world_size
        self._set_batch(train_micro_batch_size_per_gpu=micro_batch_size, train_batch_size=batch)

    def _set_batch(self, **sizes: int) -> None:
        view: Any = self.config
        resolved = view._resolved.model_copy(update=sizes)
        resolved._origins.update(dict.fromkeys(sizes, "override"))
        self.config = ConfigView({**view, **sizes}, resolved)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _config(self) -> ConfigView:
        """The settled configuration under the name that libraries read."""
        return self.config  # pyright: ignore[reportReturnType]

    def get_data_parallel_rank(self) -> int:
        return self.axes.replicate.rank * self.axes.shard.size + self.axes.shard.rank

    def get_tensor_parallel_rank(self) -> int:
        return 0

    get_model_parallel_rank = get_tensor_parallel_rank
    mp_world_size = 1
    seq_parallel_group = None

    def get_sequence_parallel_group(self) -> Any:
        return None

    @property
    def data_parallel_group(self) -> Any:
        return self.axes.shard.group or self.axes.replicate.group

    dp_process_group = seq_data_parallel_group = data_parallel_group

    @property
    def basic_optimizer(self) -> Any:
        return None if self.optimizer is None else self.optimizer.inner

    def optimizer_name(self) -> str | None:
        """The class of the script's own optimizer, or the configured type in lower case, as given."""
        if self.client_optimizer is not None:
            return type(self.client_optimizer).__name__
        section = self.config.get("optimizer")  # pyright: ignore[reportAttributeAccessIssue]
        return None if section is None else str(section["type"]).lower()

    def get_type(self) -> list[Any]:
        return (
            []
            if self.optimizer is None
            else [group.get("type", 0.0) for group in self.optimizer.param_groups]
        )

    def get_global_grad_norm(self) -> float | None:
        """As `unishard.Engine.get_global_grad_norm`; `None` with `zero_optimization.compute_grad_norm` false."""
        return None if self.optimizer is None else self.optimizer._global_grad_norm  # pyright: ignore

    def loss_scale_value(self) -> float:
        """The loss scale of the next backward."""
        return self.loss_scale  # pyright: ignore[reportReturnType]

    @property
    def communication_data_type(self) -> torch.dtype:
        return as_dtype(self.config.communication_data_type or self.config.compute_dtype)

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """(compute dtype, gradient accumulation dtype)."""
        return as_dtype(self.config.compute_dtype), as_dtype(self.config.grad_accum_dtype or "fp32")

    # life -----------------------------------------------------------------------------------------------------

    def compile(
        self,
        backend: Any = "inductor",
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the module in place; sharding stays outside compiled regions."""
        if schedule is not None:
            raise UnsupportedError(
                "engine.compile(schedule=...): DeepCompile's passes are not available; leave it out"
            )
        if self.is_compiled:
            return
        self.module.compile(backend=backend, **(compile_kwargs or {}))
        self.is_compiled = True

    def empty_partition_cache(self) -> None:
        """Release gathered parameters."""
        for unit in self.schedule.units:
            unit.reshard()

    def offload_states(self, *args: Any, **options: Any) -> None:
        """Bring states to CPU memory, where those of an engine on the CPU are already."""
        if self.device.type != "cpu":
            raise UnsupportedError(
                "engine.offload_states() is not available in this version; free memory with smaller models or stage 3"
            )

    reload_states = offload_states

    def set_custom_curriculum_learning_schedule(self, schedule_func_dict: Any) -> None:
        raise UnsupportedError(
            "curriculum learning is not available; order the samples in your own sampler (deepspeed_io(data_sampler=))"
        )

    def random_ltd_initialize(self) -> None:
        raise UnsupportedError("random layerwise token dropping is not available; drop tokens in the model")

    @property
    def dynamic_loss_scale_args(self) -> Any:
        return None


def is_engine(module: nn.Module) -> bool:
    """Whether `module` is an engine of this door."""
    return isinstance(module, DeepSpeedEngine)
