"""What `UnishardStrategy` adds to Lightning's `DDPStrategy`; `lightning.py` puts the two together."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from unishard.dist.mesh import leave_process_group_at_exit
from unishard.engine.engine import Engine
from unishard.engine.initialize import Makers, initialize
from unishard.errors import CheckpointError, ConfigError, StateError, UnsupportedError
from unishard.integrations.lightning_arguments import (
    TrainerArguments,
    completed,
    configuration,
    for_inference,
)
from unishard.sharding.in_place import restore_in_place
from unishard.sharding.init import init_sharded
from unishard.sharding.placement import Placement, preset
from unishard.sharding.unit import units_under

_Base: Any = object
"""Lightning's `DDPStrategy` comes in where the class is made."""

log = logging.getLogger("unishard")

_STATE = "lightning"
"""The key of the Trainer's state among the client state of a checkpoint."""
_AVERAGING = ("StochasticWeightAveraging", "WeightAveraging")


class LightningEngine(Engine):
    """The engine under Lightning's loop, which says when a step is over."""

    def _after_backward(self) -> None:
        """A `backward` of the module's own is as good: Lightning has divided the loss."""

    def take_micro_batch(self, size: int) -> None:
        """Count samples by batches of `size`."""
        batch = size * self.gradient_accumulation_steps() * self.dp_world_size
        self.config = self.config.model_copy(
            update={"train_micro_batch_size_per_gpu": size, "train_batch_size": batch}
        )


class StrategyParts(_Base):
    """Trains, evaluates and saves a LightningModule on unishard's engine.

    Args:
        config: a ds_config (a dictionary, a path or a `Config`), or the name of a preset; default: ZERO3.
        stage: of ZeRO, instead of a preset.
        options: further keys of the configuration, of the top level or of `zero_optimization`.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin, process_group_backend,
            timeout: as of Lightning's `DDPStrategy`.

    Raises:
        ConfigError: keys that are unknown or contradict each other, or, when training starts, the Trainer's arguments.

    For example `Trainer(strategy=UnishardStrategy("ds_config.json"), accelerator="cpu", devices=2)`, or
    `UnishardStrategy("ZERO2", offload_optimizer={"device": "nvme", "nvme_path": "/local"})`.
    """

    strategy_name = "unishard"
    library: Any
    """`lightning.pytorch` or `pytorch_lightning`."""
    core: Any
    """Lightning's module `core.optimizer`."""
    precision_class: Any

    def __init__(
        self,
        config: Any = None,
        *,
        stage: int | None = None,
        accelerator: Any = None,
        parallel_devices: Any = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: Any = None,
        **options: Any,
    ) -> None:
        self.config = configuration(config, {"stage": stage, **options})
        """As given; what the engine trains with is `engine.config`."""
        self._engine: LightningEngine | None = None
        self._micro_batch_is_assumed = False
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=None,
            process_group_backend=process_group_backend,
            **({} if timeout is None else {"timeout": timeout}),
        )
        self.precision_plugin = precision_plugin

    @property
    def engine(self) -> LightningEngine:
        """The engine of the run under way or just over. Raises `StateError` before the first."""
        if self._engine is None:
            raise StateError(
                "the strategy has no engine yet: it is built when trainer.fit(), validate(), test() or predict() starts"
            )
        return self._engine

    # what the Trainer sets -------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Any:
        if self._precision_plugin is None:
            # Not before somebody asks: the Trainer takes one that is there for the user's.
            self._precision_plugin = self.precision_class(self, "32-true")
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        """Of Lightning's plugins only the precision counts: the engine computes in it."""
        if plugin is not None and type(plugin).__module__.partition(".")[0] not in (
            "lightning",
            "pytorch_lightning",
            "lightning_fabric",
            "unishard",
        ):
            raise ConfigError(
                f"plugins={type(plugin).__name__}: a precision plugin of your own would be bypassed by the engine; use "
                "Trainer(precision=...) or the configuration's sections bf16, fp16 and torch_autocast"
            )
        self._precision_plugin = None if plugin is None else self.precision_class(self, str(plugin.precision))

    def setup_distributed(self) -> None:
        first = not dist.is_initialized()
        super().setup_distributed()
        if first:
            leave_process_group_at_exit()  # Lightning would leave it while gloo still handles the last message

    # building --------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        self.accelerator.setup(trainer)
        module = self.lightning_module
        module._device = self.root_device
        if trainer.state.fn == "fit":
            self._refuse_averaging(trainer)
            self._setup_training(trainer, module)
        elif self._engine is None or self._engine.module is not module:
            facts = TrainerArguments(precision=self.precision_plugin.precision)
            self._build(module, completed(for_inference(self.config), facts, self.world_size).config, None)
        self.model = self.engine

    def _refuse_averaging(self, trainer: Any) -> None:
        named = [
            type(callback).__name__
            for callback in trainer.callbacks
            if any(cls.__name__ in _AVERAGING for cls in type(callback).__mro__)
        ]
        if named:
            raise ConfigError(
                f"{named[0]} reads whole weights after each step, and they are sharded; remove the callback"
            )

    def _setup_training(self, trainer: Any, module: Any) -> None:
        self._release(module)
        optimizers, schedulers = self.core._init_optimizers_and_lr_schedulers(module)
        own = [o for o in optimizers if not isinstance(o, self.core._MockOptimizer)]
        if len(own) > 1:
            raise ConfigError(
                f"configure_optimizers() returns {len(own)} optimizers; the engine steps one: put the parameters into "
                "groups of one optimizer"
            )
        micro = _micro_batch(trainer.fit_loop._data_source.instance)
        config = self._completed(trainer, own[0] if own else None, schedulers, micro)
        if not own and config.get("optimizer") is None:
            raise ConfigError(
                "configure_optimizers() returns no optimizer, and the configuration has no section optimizer; give one"
            )
        engine = self._build(module, config, own[0] if own else None)
        self.optimizers = [engine.optimizer]  # pyright: ignore[reportAttributeAccessIssue]
        self.lr_scheduler_configs = schedulers

    def _completed(
        self, trainer: Any, optimizer: Any, schedulers: list[Any], micro: int | None
    ) -> dict[str, Any]:
        """The configuration with what the Trainer says, and the Trainer's loop with what the configuration says."""
        algorithm = trainer.gradient_clip_algorithm
        arguments = TrainerArguments(
            accumulation=trainer.accumulate_grad_batches,
            clip=trainer.gradient_clip_val,
            clip_algorithm=None if algorithm is None else str(getattr(algorithm, "value", algorithm)),
            precision=self.precision_plugin.precision,
            micro_batch=micro,
            optimizer=None if optimizer is None else type(optimizer).__name__,
            scheduler=type(schedulers[0].scheduler).__name__ if schedulers else None,
        )
        done = completed(self.config, arguments, self.world_size)
        self._micro_batch_is_assumed = done.assumed
        if self.lightning_module.automatic_optimization:
            trainer.accumulate_grad_batches = done.accumulation
            trainer.gradient_clip_val = done.clip or None
        elif done.accumulation != 1:
            raise ConfigError(
                f"the configuration means {done.accumulation} batches a step, and with manual optimization the module "
                "says when it steps; leave gradient_accumulation_steps and train_batch_size out"
            )
        return done.config

    def _build(self, module: nn.Module, config: Mapping[str, Any], optimizer: Any) -> LightningEngine:
        self._release(module)
        move_buffers(module, self.root_device)
        engine, *_ = initialize(
            model=module,
            optimizer=optimizer,
            config=config,
            device=self.root_device,
            makers=Makers(engine=LightningEngine),
        )
        engine.set_gradient_accumulation_boundary(True)
        self._engine = engine  # pyright: ignore[reportAttributeAccessIssue]
        return self.engine

    def _release(self, module: nn.Module) -> None:
        """Make a module that an earlier run sharded whole again: it gets another engine."""
        if next(iter(units_under(module)), None) is not None:
            restore_in_place(module)
        if self._engine is not None:
            self._engine, self.optimizers, self.lr_scheduler_configs = None, [], []

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """`configure_model` builds sharded what rests sharded."""
        with self._init_context():
            yield

    def _init_context(self) -> AbstractContextManager[None]:
        name = self.config.get("sharding")
        zero = self.config.get("zero_optimization")
        if name is None:
            sharded = isinstance(zero, Mapping) and zero.get("stage") == 3
        else:
            sharded = preset(str(name)).parameter is Placement.SHARD
        return init_sharded(device=self.root_device) if sharded else nullcontext()

    def model_to_device(self) -> None:
        """`initialize` puts parameters where they belong."""

    def on_train_start(self) -> None:
        """The loader is there now, also where a hook makes it."""
        loaded, engine = _micro_batch(self.lightning_module.trainer.train_dataloader), self.engine
        known = engine.train_micro_batch_size_per_gpu()
        if loaded is None or loaded == known:
            return
        if not self._micro_batch_is_assumed:
            raise ConfigError(
                f"the configuration means micro-batches of {known} samples (train_batch_size = "
                f"{engine.train_batch_size()}), and the training loader has batch_size={loaded}; keep one"
            )
        engine.take_micro_batch(loaded)

    # the loop --------------------------------------------------------------------------------------------------

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Backwards inside are not the last of their step."""
        engine = self.engine
        engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            engine.set_gradient_accumulation_boundary(True)

    def pre_backward(self, closure_loss: Any) -> None:
        """DDP's preparation is not needed."""

    def post_backward(self, closure_loss: Any) -> None:
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the batch

    def teardown(self) -> None:
        """Leave the engine as it is: checkpoints are saved after a run, too, and the next run may go on with it."""
        if self._engine is not None:
            self._engine.destroy()
            self.model = self._engine
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # checkpoints -----------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is neither parameter nor buffer, such as metrics' persistent state; the engine saves the rest."""
        module = self.lightning_module
        ours = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
        return {name: value for name, value in module.state_dict().items() if name not in ours}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: the engine saves it."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a sharded checkpoint, a folder, or with `weights_only=True` a file with the whole weights."""
        if storage_options is not None or "://" in str(filepath):
            raise UnsupportedError(
                f"save_checkpoint({str(filepath)!r}, storage_options={storage_options!r}): ranks write into a folder "
                "of a file system that all of them see; give a path there"
            )
        path = Path(self.broadcast(str(filepath))).absolute()
        if "optimizer_states" not in checkpoint:
            state = self.engine.full_state_dict()
            if state is not None:
                whole = {**checkpoint, "state_dict": state | checkpoint["state_dict"]}
                self.checkpoint_io.save_checkpoint(whole, path)
            return
        packed = io.BytesIO()
        torch.save(checkpoint, packed)
        state = torch.frombuffer(bytearray(packed.getvalue()), dtype=torch.uint8)
        self.engine.save_checkpoint(path.parent, path.name, {_STATE: state}, save_latest=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights, and optimizer state when fitting; returns what else the Trainer restores.

        A folder of any number of ranks, or a file that another of Lightning's strategies wrote.
        """
        path, module = Path(checkpoint_path).absolute(), self.lightning_module
        fitting = module.trainer.state.fn == "fit"
        options = {} if weights_only is None else {"weights_only": weights_only}
        if path.is_dir():
            _, client = self._load(path, fitting)
            if _STATE not in client:
                return self._without_trainer(path)
            # As Lightning's own files, unless the caller says otherwise: hyperparameters may be of any class.
            packed = io.BytesIO(client[_STATE].numpy().tobytes())
            return torch.load(packed, map_location="cpu", **({"weights_only": False} | options))
        checkpoint = self.checkpoint_io.load_checkpoint(path, **options)
        if fitting and not checkpoint.get("optimizer_states"):
            raise CheckpointError(
                f"{path} holds weights and no optimizer state; start from them with "
                f"{type(module).__name__}.load_from_checkpoint(path), and fit without ckpt_path"
            )
        self._load(path, fitting)
        ours = {
            name for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
        }
        rest = {name: value for name, value in checkpoint["state_dict"].items() if name not in ours}
        return {**checkpoint, "state_dict": rest, "optimizer_states": []}

    def _load(self, path: Path, fitting: bool) -> tuple[str, dict[str, Any]]:
        strict = bool(getattr(self.lightning_module, "strict_loading", True))
        return self.engine.load_checkpoint(path, load_module_strict=strict, load_module_only=not fitting)

    def _without_trainer(self, path: Path) -> dict[str, Any]:
        log.warning(
            "unishard: %s holds no state of a Trainer: weights and optimizer go on, epochs begin anew", path
        )
        return {
            "pytorch-lightning_version": self.library.__version__,
            "state_dict": {},
            "optimizer_states": [],
            "lr_schedulers": [],
            "epoch": 0,
            "global_step": 0,
        }

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """What `lightning_module_state_dict` gave; weights are in place."""
        if checkpoint["state_dict"]:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=False)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """`load_checkpoint` did it."""


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Put on `device` what is not a parameter; those go there shard by shard."""
    metric = getattr(sys.modules.get("torchmetrics"), "Metric", ())
    for part in module.modules():
        if isinstance(part, metric):
            part.to(device)
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(device)


def _micro_batch(loader: Any) -> int | None:
    """Samples of one batch, where the loader is a single one that says so."""
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(holder, "batch_size", None)
        if isinstance(size, int):
            return size
    return None
