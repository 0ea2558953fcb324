"""`Config`: the whole of a ds_config, as given."""

from __future__ import annotations

from typing import Any

from pydantic import PrivateAttr, ValidationError

from unishard.config.activation_checkpointing import ActivationCheckpointingKeys
from unishard.config.batch import BatchKeys
from unishard.config.communication import CommunicationKeys
from unishard.config.monitoring import MonitoringKeys
from unishard.config.optimizer import OptimizerKeys
from unishard.config.precision import PrecisionKeys
from unishard.config.removed import RemovedKeys
from unishard.config.scheduler import SchedulerKeys
from unishard.config.unavailable import UnavailableKeys
from unishard.config.zero import ShardingKeys


class Config(
    # pydantic orders fields from the last base to the first.
    RemovedKeys,
    UnavailableKeys,
    MonitoringKeys,
    ActivationCheckpointingKeys,
    CommunicationKeys,
    ShardingKeys,
    PrecisionKeys,
    SchedulerKeys,
    OptimizerKeys,
    BatchKeys,
):
    """A ds_config with DeepSpeed's keys and unishard's own; values may still be `"auto"`.

    Raises `ConfigError` listing every unknown key and wrong value. `resolve` makes it ready for a model.

    >>> Config(train_batch_size=8, zero_optimization={"stage": 2}).zero_optimization.stage
    2
    """

    _source: str = PrivateAttr("dict")
    _lines: tuple[str, ...] = PrivateAttr(())

    def __init__(self, **keys: Any) -> None:
        try:
            super().__init__(**keys)
        except ValidationError as error:
            from unishard.config.problems import config_error, problems_of

            raise config_error(problems_of(error, type(self))) from error
