"""Lightning's Trainer with `UnishardStrategy` beside DDP; run on every rank."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import unishard
from unishard.config.load import load_config
from unishard.sharding.single import single_of

# Either of the two packages.
PACKAGE = os.environ.get("UNISHARD_TEST_LIGHTNING", "lightning.pytorch")
lightning: Any = importlib.import_module(PACKAGE)
callbacks: Any = importlib.import_module(f"{PACKAGE}.callbacks")
# The class is made for the package that is imported by then.
UnishardStrategy: Any = importlib.import_module("unishard.integrations.lightning").UnishardStrategy
WIDTH, BATCH = 8, 4
# Older ones draw random numbers of their own when a run is resumed.
DROPOUT = 0.2 if tuple(map(int, lightning.__version__.split(".")[:2])) >= (2, 6) else 0.0


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(32, WIDTH, generator=generator), torch.randn(32, 1, generator=generator))


def loader() -> DataLoader[Any]:
    return DataLoader(samples(), BATCH)


class Net(lightning.LightningModule):
    """A parameter of the module's own, used after a call of the module itself inside the step."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(4)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width, 1)
        self.shift = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1))
        self.losses: list[float] = []
        self.dtypes: set[torch.dtype] = set()
        self.tested: list[float] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks(inputs)
        self.dtypes.add(hidden.dtype)
        return self.head(hidden)

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return (self(inputs) + self.shift - targets).square().mean()

    def training_step(self, batch: Any, index: int) -> Any:
        loss = self.loss(batch)
        self.seen += 1
        self.losses.append(loss.item())
        self.log("loss", loss, sync_dist=True, on_step=False, on_epoch=True)
        return {"loss": loss}

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0]) + self.shift

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Momentum(Net):
    """Unlike AdamW it shows when gradients are scaled wrongly."""

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=5e-2, momentum=0.9)


class Manual(Momentum):
    """Its own accumulation and clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        last = index % 2 == 1
        with optimizer.toggle_model(sync_grad=last):
            loss = self.loss(batch)
            self.manual_backward(loss / 2)
        self.losses.append(loss.item())
        if last:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class OwnBackward(Momentum):
    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward(*args, **kwargs)


class Halved(Momentum):
    """Lightning and DeepSpeed's engine both divide the loss by the batches of a step, of which there are two here."""

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        (loss / 2).backward(*args, **kwargs)


class OwnClipping(Momentum):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


class BuiltLate(Net):
    """Its blocks are built in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = None
        self.rested: list[bool] = []

    def configure_model(self) -> None:
        if self.blocks is None:
            self.blocks = Net().blocks
            self.rested = [single_of(p) is not None for p in self.blocks.parameters()]


class WithLoader(Net):
    def train_dataloader(self) -> Any:
        return loader()


class NoOptimizer(Net):
    def configure_optimizers(self) -> Any:
        return None


class TwoOptimizers(Manual):
    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.head.parameters(), lr=0.1),
            torch.optim.SGD(self.blocks.parameters(), lr=0.1),
        ]


def trainer(strategy: Any, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "strategy": strategy, "accelerator": "cpu", "devices": 2, "max_epochs": 2, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    return lightning.Trainer(**(arguments | options))


def weights(run: Any, module: Net) -> dict[str, torch.Tensor]:
    if isinstance(run.strategy, UnishardStrategy):
        return run.strategy.engine.full_state_dict() or {}
    return {name: value.clone() for name, value in module.state_dict().items()}


def trained(strategy: Any, module: Net | None = None, **options: Any) -> dict[str, Any]:
    module = Net() if module is None else module
    run, ckpt = (
        trainer(strategy, **{k: v for k, v in options.items() if k != "ckpt_path"}),
        options.get("ckpt_path"),
    )
    data = () if isinstance(module, WithLoader) else (loader(), loader())
    run.fit(module, *data, ckpt_path=ckpt)
    found: dict[str, Any] = {
        "losses": module.losses,
        "weights": weights(run, module),
        "dtypes": module.dtypes,
    }
    found["metrics"] = {k: v.item() for k, v in run.callback_metrics.items()}
    found["rates"] = [g["lr"] for g in run.optimizers[0].param_groups]
    found["steps"], found["trainer"], found["module"] = run.global_step, run, module
    if isinstance(run.strategy, UnishardStrategy):
        engine = run.strategy.engine
        found["engine"] = {
            "preset": engine.config.sharding,
            "sizes": (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.micro_steps),
            "clipping": engine.gradient_clipping(),
        }
    return found


def evaluated(run: Any, module: Net) -> dict[str, Any]:
    return {
        "validate": run.validate(module, loader(), verbose=False),
        "test": run.test(module, loader(), verbose=False),
        "predict": torch.cat(run.predict(module, loader())),
    }


def matrix() -> Iterator[tuple[str, dict[str, Any]]]:
    """Case by case what is compared with DDP: (name, arguments of the Trainer and the module)."""
    yield "plain", {}
    yield "accumulated", {"accumulate_grad_batches": 3, "gradient_clip_val": 0.9, "module": Momentum}
    yield "by value", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    yield "manual", {"module": Manual}
    yield "own backward", {"module": OwnBackward}
    yield "own clipping", {"module": OwnClipping}
    yield "built late", {"module": BuiltLate}
    scheduler = callbacks.GradientAccumulationScheduler({0: 1, 1: 3})
    yield "accumulated later", {"callbacks": [scheduler], "module": Momentum}


def compare(results: dict[str, Any]) -> None:
    for name, options in matrix():
        module = options.pop("module", Net)
        for strategy in ("ddp", "NO_SHARD", "ZERO1", "ZERO2", "ZERO3"):
            if name not in ("plain", "accumulated") and strategy in ("NO_SHARD", "ZERO2"):
                continue
            chosen = strategy if strategy == "ddp" else UnishardStrategy(strategy)
            found = trained(chosen, module(), **options)
            if name == "plain":
                found["evaluated"] = evaluated(found["trainer"], found["module"])
            if name == "built late":
                found["rested"] = found["module"].rested
            results[f"{name} {strategy}"] = found


def checkpoints(results: dict[str, Any], folder: Path) -> None:
    def saving(at: str) -> Any:
        return callbacks.ModelCheckpoint(folder / at, monitor="val", save_last=True, save_top_k=1)

    for strategy in ("ddp", "ZERO2", "ZERO3"):

        def new(strategy: str = strategy) -> Any:
            return strategy if strategy == "ddp" else UnishardStrategy(strategy)

        options: dict[str, Any] = {"enable_checkpointing": True, "accumulate_grad_batches": 2}
        whole = trained(new(), Net(dropout=DROPOUT), max_epochs=3, **options)
        half = trained(new(), Net(dropout=DROPOUT), callbacks=[saving(strategy)], **options)
        last = folder / strategy / "last.ckpt"
        resumed = trained(new(), Net(dropout=DROPOUT), max_epochs=3, ckpt_path=last, **options)
        run, best = half["trainer"], half["trainer"].checkpoint_callback.best_model_path
        tested = run.test(Net(), loader(), ckpt_path="best", verbose=False)
        again = trainer(new()).test(Net(), loader(), ckpt_path=best, verbose=False)
        run.save_checkpoint(folder / strategy / "weights.ckpt", weights_only=True)
        results[f"saved {strategy}"] = {
            "whole": whole, "resumed": resumed, "best": best, "is folder": Path(best).is_dir(), "tested": tested,
            "again": again, "weights": weights(run, run.lightning_module), "half": half,
        }  # fmt: skip
    for strategy in ("ZERO3", "ZERO1"):
        options = {"max_epochs": 3, "accumulate_grad_batches": 2, "ckpt_path": folder / "ddp" / "last.ckpt"}
        results[f"from ddp {strategy}"] = trained(UnishardStrategy(strategy), Net(dropout=DROPOUT), **options)


def from_engine(folder: Path) -> dict[str, Any]:
    """Goes on from what an engine without a Trainer saved."""
    module, batch = Net(), next(iter(loader()))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    config = {"train_micro_batch_size_per_gpu": BATCH, "sharding": "ZERO2"}
    engine, *_ = unishard.initialize(model=module, optimizer=optimizer, config=config)
    engine.backward(engine(batch[0]).square().mean())
    engine.step()
    engine.save_checkpoint(folder, "engine")
    state = [engine.full_state_dict()]
    torch.distributed.broadcast_object_list(state)
    plain = Net()
    plain.load_state_dict(state[0])
    expected = trained("ddp", plain, max_epochs=1)["losses"][0]
    goes_on = trained(UnishardStrategy("ZERO3"), max_epochs=1, ckpt_path=folder / "engine")
    return {"losses": goes_on["losses"], "first": expected}


def configurations(results: dict[str, Any], folder: Path) -> None:
    path = folder / "ds_config.json"
    given: dict[str, Any] = {
        "train_batch_size": 24,
        "gradient_clipping": 0.1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_max_lr": 1e-2}},
    }
    path.write_text(json.dumps(given))
    results["file"] = trained(UnishardStrategy(str(path)), NoOptimizer())
    results["object"] = trained(UnishardStrategy(load_config(path)), NoOptimizer(), accumulate_grad_batches=3)
    given["train_micro_batch_size_per_gpu"] = 12
    for name, strategy in {"validated": UnishardStrategy(given), "validated ddp": "ddp"}.items():
        results[name] = trainer(strategy).validate(Net(), loader(), verbose=False)
    results["hook"] = trained(UnishardStrategy(stage=2), WithLoader())
    results["bf16"] = trained(UnishardStrategy("ZERO3"), precision="bf16-mixed")
    results["bf16 true"] = trained(UnishardStrategy("ZERO2"), precision="bf16-true")
    results["fp16"] = trained(
        UnishardStrategy("ZERO3", fp16={"enabled": True, "initial_scale_power": 8}), gradient_clip_val=0.1
    )
    results["fp32 clipped"] = trained(UnishardStrategy("ZERO3"), gradient_clip_val=0.1)


def refusals(folder: Path) -> dict[str, str]:
    fit: dict[str, tuple[Any, dict[str, Any], type[Net]]] = {
        "accumulation": ({"gradient_accumulation_steps": 4}, {"accumulate_grad_batches": 3}, Net),
        "clipping": ({"gradient_clipping": 1.0}, {"gradient_clip_val": 0.5}, Net),
        "precision": ({"fp16": {"enabled": True}}, {"precision": "bf16-mixed"}, Net),
        "double": ({}, {"precision": "64-true"}, Net),
        "micro": ({"train_micro_batch_size_per_gpu": 3}, {}, Net),
        "hook": ({"train_batch_size": 6}, {}, WithLoader),
        "optimizer": ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, {}, Net),
        "none": ({}, {}, NoOptimizer),
        "two": ({}, {}, TwoOptimizers),
        "manual": ({"gradient_accumulation_steps": 2}, {}, Manual),
        "averaging": ({}, {"callbacks": [callbacks.StochasticWeightAveraging(0.1)]}, Net),
    }
    seen = {}
    for name, (config, options, module) in fit.items():
        try:
            trained(UnishardStrategy(config), module(), **options)
        except (ValueError, NotImplementedError) as error:
            seen[name] = str(error)
    run = trained(UnishardStrategy("ZERO3"), max_epochs=1)["trainer"]
    for name, call in {
        "remote": lambda: run.save_checkpoint("s3://bucket/x.ckpt"),
        "weights": lambda: trained(UnishardStrategy("ZERO3"), ckpt_path=folder / "ZERO3" / "weights.ckpt"),
    }.items():
        try:
            call()
        except (NotImplementedError, RuntimeError) as error:
            seen[name] = str(error)
    return seen


def collectives() -> dict[str, Any]:
    run = trained(UnishardStrategy("ZERO3"), max_epochs=1)["trainer"]
    strategy, rank = run.strategy, run.global_rank
    strategy.barrier("here")
    return {
        "reduce": strategy.reduce(torch.tensor([float(rank)]), reduce_op="sum").item(),
        "mean": strategy.reduce(torch.tensor([float(rank)])).item(),
        "gather": strategy.all_gather(torch.tensor([rank])).flatten().tolist(),
        "broadcast": strategy.broadcast({"rank": rank}, src=1),
        "decision": (
            strategy.reduce_boolean_decision(rank == 0),
            strategy.reduce_boolean_decision(rank == 0, all=False),
        ),
    }


def twice() -> dict[str, Any]:
    """One module through two fits and, in between, another Trainer; each with another engine."""
    found: dict[str, Any] = {}
    for strategies in (
        ("ddp",) * 3,
        (UnishardStrategy("ZERO3"), UnishardStrategy("ZERO2"), UnishardStrategy("ZERO1")),
    ):
        module = Net()
        first = trained(strategies[0], module, max_epochs=1)
        other = trainer(strategies[1]).validate(module, loader(), verbose=False)
        again = trained(strategies[2], module, max_epochs=1)
        name = "ddp" if strategies[0] == "ddp" else "ours"
        found[name] = {"metrics": first["metrics"], "other": other, "losses": again["losses"]}
    return found


def through_deepspeed(folder: Path) -> dict[str, Any]:
    """Lightning's own strategy for DeepSpeed through the drop-in."""
    import unishard.deepspeed

    unishard.deepspeed.install()
    strategies: Any = importlib.import_module(f"{PACKAGE}.strategies")

    class OnCPU(strategies.DeepSpeedStrategy):
        def setup_environment(self) -> None:  # the check for CUDA is left out
            strategies.DDPStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    found: dict[str, Any] = {}
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.9}
    found["ddp"] = trained("ddp", Halved(), max_epochs=3, **options)
    for stage in (1, 2, 3):
        half = trained(OnCPU(stage=stage), Momentum(), **options)
        path = folder / f"deepspeed-{stage}.ckpt"
        half["trainer"].save_checkpoint(path)
        module = Momentum()
        resumed = trained(OnCPU(stage=stage), module, max_epochs=3, ckpt_path=path, **options)
        engine = resumed["trainer"].strategy.model
        weights = engine.module_state_dict()
        config = {"stage": engine.zero_optimization_stage(), "clipping": engine.gradient_clipping()}
        tested = resumed["trainer"].test(module, loader(), verbose=False)
        found[stage] = {"losses": half["losses"] + resumed["losses"], "weights": weights, "tested": tested}
        found[stage] |= {"engine": f"{type(engine).__module__}.{type(engine).__name__}", "config": config}
        found[stage]["steps"] = resumed["steps"]
    found["tested"] = found["ddp"]["trainer"].test(found["ddp"]["module"], loader(), verbose=False)
    late = trained(OnCPU(stage=3), BuiltLate(), precision="bf16-mixed")
    found["bf16"] = {key: late[key] for key in ("losses", "dtypes")}
    return found


def plain_loop(epochs: int) -> dict[str, Any]:
    """The same without Lightning, in the order of its sampler."""
    module = Net()
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    sampler = DistributedSampler(samples(), 1, 0, seed=0)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in DataLoader(samples(), BATCH, sampler=sampler):
            loss = module.loss(batch)
            module.losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {"losses": module.losses, "weights": dict(module.state_dict())}


def kept(value: Any) -> Any:
    """Without what cannot be saved."""
    if isinstance(value, dict):
        return {k: kept(v) for k, v in value.items() if not isinstance(v, lightning.Trainer | nn.Module)}
    return value


def main(folder: Path, mode: str) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results: dict[str, Any] = {}
    if mode == "two":
        compare(results)
        checkpoints(results, folder)
        configurations(results, folder)
        results["collectives"], results["twice"] = collectives(), twice()
        results["refusals"] = refusals(folder)
        results["from engine"] = from_engine(folder)
        results["deepspeed"] = through_deepspeed(folder)
        run = results["plain ZERO3"]["trainer"]
    elif mode == "launcher":
        results["launched"] = trained(UnishardStrategy("ZERO3"))
        run = results["launched"]["trainer"]
    else:
        for strategy in ("ZERO3", "ZERO2"):
            results[strategy] = trained(
                UnishardStrategy("ZERO1"),
                Net(),
                devices=1,
                max_epochs=3,
                ckpt_path=folder / strategy / "last.ckpt",
            )
        results["one"] = trained(UnishardStrategy("ZERO3"), devices=1)
        results["loop"] = plain_loop(epochs=2)
        results["loaded"] = Net.load_from_checkpoint(folder / "ZERO3" / "weights.ckpt").state_dict()
        run = results["one"]["trainer"]
    if run.is_global_zero:
        torch.save(kept(results), folder / f"{mode}.pt")
    run.strategy.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
