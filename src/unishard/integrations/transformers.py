"""Hugging Face's Trainer on unishard: `deepspeed=` and `fsdp=` arguments run on one engine.

Change one import line:

    from unishard.integrations.transformers import Trainer, TrainingArguments

    args = TrainingArguments(output_dir="out", fsdp="full_shard auto_wrap", bf16=True)
    model = AutoModelForCausalLM.from_pretrained("path")  # under full_shard: read shard by shard
    Trainer(model=model, args=args, train_dataset=rows).train()

or keep transformers' own classes (`Seq2SeqTrainer`, TRL's) and call `use_unishard(args)` on their arguments before the
model is built. From the first use on, `import deepspeed` means `unishard.deepspeed` in this process, because
transformers and accelerate reach an engine under that name; nothing has to be installed as deepspeed. Importing this
module alone changes nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from unishard.errors import ConfigError
from unishard.integrations.fsdp_arguments import translate

if TYPE_CHECKING:
    from transformers import Trainer as Trainer
    from transformers import TrainingArguments as TrainingArguments

log = logging.getLogger("unishard")

__all__ = ["Trainer", "TrainingArguments", "use_unishard"]

Arguments = TypeVar("Arguments")


def use_unishard(args: Arguments = None) -> Arguments:
    """Let `args`, any `transformers.TrainingArguments`, train on unishard; returns them, changed in place.

    `deepspeed=` is kept. `fsdp=` and `fsdp_config=` become the configuration that does the same, found afterwards in
    `args.deepspeed`, with a log line for each key that stands for something else here. Without arguments, only later
    `TrainingArguments(deepspeed=...)` are prepared for. Call it before the model is built: full_shard then loads
    `from_pretrained` weights shard by shard.

    Raises:
        ConfigError: the arguments ask for no sharding, or for what cannot be honoured (all of it at once).
        StateError: the real DeepSpeed was imported in this process already.
    """
    from unishard.deepspeed.hook import install
    from unishard.integrations.late_import import complete_imported_modules

    _quiet_install(install)
    complete_imported_modules()
    given: Any = args
    if given is None or given.deepspeed:
        return args
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not given.fsdp:
        raise ConfigError(
            "ACCELERATE_USE_FSDP is set (by `accelerate launch`): the Trainer would run torch's FSDP; launch with "
            "torchrun or `unishard run`, and pass fsdp= and fsdp_config= to TrainingArguments"
        )
    if not given.fsdp:
        raise ConfigError(
            "the arguments ask for no sharding: pass deepspeed= (a ds_config) or fsdp= to TrainingArguments, or use "
            "transformers.Trainer for training without"
        )
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or given.world_size)
    translation = translate(given.fsdp, given.fsdp_config, ranks_per_node)
    if given.process_index == 0:
        for line in translation.lines:
            log.info("unishard: %s", line)
    if translation.recompute:
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if hasattr(given, name):
                setattr(given, name, True)
    _ask_for(given, translation.config)
    return args


def _quiet_install(install: Any) -> None:
    """`install` warns of modules that were imported before; here they are completed afterwards."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        install()
    finally:
        log.setLevel(level)


def _ask_for(args: Any, config: dict[str, Any]) -> None:
    """Make `args` what they are after `TrainingArguments(deepspeed=config)`."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    args.fsdp, args.fsdp_plugin_args = None, None
    # transformers would give all ranks but the first empty weights, and wait for torch's FSDP to fill them.
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    args.deepspeed = config
    # What accelerate knows of this process was settled without a sharded engine in view: let it look again.
    args.__dict__.pop("_setup_devices", None)
    _ = args.device
    args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(config)
    args.hf_deepspeed_config.trainer_config_process(args)
    args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config)


def _require_wrapped_classes(model: Any, args: Any) -> None:
    """FSDP refuses names of classes that no module has; so do we, rather than gather in other units than asked."""
    wanted = args.deepspeed.get("zero_optimization", {}).get("leaf_module") if _translated(args) else None
    if model is None or wanted is None:
        return
    present = {type(module).__name__ for module in model.modules()}
    missing = sorted(set(wanted["classes"]) - present)
    if missing:
        raise ConfigError(
            f"fsdp_config['transformer_layer_cls_to_wrap'] names {', '.join(missing)}, and no module of "
            f"{type(model).__name__} is of that class; it has {', '.join(sorted(present))}"
        )


@contextmanager
def _without_engine(trainer: Any) -> Iterator[None]:
    """Evaluate before training with the bare model, gathering one module at a time what is sharded already.

    transformers would make an engine without an optimizer, and only under stage 3, which could not train afterwards.
    """
    from unishard.sharding.hooks import gathering_singles

    trainer.is_deepspeed_enabled = False
    try:
        with gathering_singles(trainer.model):
            yield
    finally:
        trainer.is_deepspeed_enabled = True
        # Nor may accelerate take the model for prepared, or leave its casts around forward.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        trainer.accelerator._models.clear()
        vars(trainer.model).pop("_is_accelerate_prepared", None)


def _translated(args: Any) -> bool:
    return isinstance(args.deepspeed, dict) and "sharding" in args.deepspeed


def _make_classes() -> dict[str, type]:
    use_unishard()
    import transformers

    class UnishardArguments(transformers.TrainingArguments):
        """`transformers.TrainingArguments` whose `deepspeed=` or `fsdp=` run on unishard's engine."""

        def __post_init__(self) -> None:
            super().__post_init__()
            use_unishard(self)

    class UnishardTrainer(transformers.Trainer):
        """`transformers.Trainer` on unishard's engine; takes transformers' own arguments too."""

        def __init__(self, model: Any = None, args: Any = None, *rest: Any, **options: Any) -> None:
            if args is None:
                raise ConfigError("Trainer needs args=, with deepspeed= or fsdp= in them")
            use_unishard(args)
            _require_wrapped_classes(model, args)
            super().__init__(model, args, *rest, **options)

        def evaluation_loop(self, *given: Any, **options: Any) -> Any:
            if self.deepspeed is not None:
                return super().evaluation_loop(*given, **options)
            with _without_engine(self):
                return super().evaluation_loop(*given, **options)

    made = {"Trainer": UnishardTrainer, "TrainingArguments": UnishardArguments}
    for name, cls in made.items():
        cls.__name__ = cls.__qualname__ = name  # pickled with checkpoints, under the name it is found by
    return made


def __getattr__(name: str) -> Any:
    if name not in ("Trainer", "TrainingArguments"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    globals().update(_make_classes())
    return globals()[name]
