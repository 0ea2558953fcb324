"""A ds_config as DeepSpeed's users give it: read raw, completed with DeepSpeed's own defaults, checked."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unishard.config import Config, ResolvedConfig
from unishard.config.load import read
from unishard.deepspeed.parts.logs import logger
from unishard.errors import ConfigError


class DeepSpeedConfigError(ConfigError, AssertionError):
    """A configuration that cannot be honoured. DeepSpeed asserts for some of them, so this is an AssertionError too."""


DEFAULTS: dict[str, Any] = {"gradient_clipping": 1.0, "steps_per_print": math.inf}
"""Where DeepSpeed 0.19's defaults differ from unishard's own."""


def raw_config(source: Any) -> dict[str, Any]:
    """The keys of `source` (a path, mapping, base64 string, `Config` or `DeepSpeedConfig`) as given; {} for `None`."""
    if source is None:
        return {}
    given = getattr(source, "_param_dict", source)
    if isinstance(given, Config):
        return read(given).tree
    try:
        return copy.deepcopy(read(given).tree)
    except ConfigError as error:
        if (
            not isinstance(given, (str, os.PathLike))
            or not os.path.isfile(given)
            or "not JSON" not in str(error)
        ):
            raise
        return read(_hjson(Path(given), error)).tree


def _hjson(path: Path, error: ConfigError) -> dict[str, Any]:
    """A file that is Hjson (JSON with comments), which DeepSpeed reads too, if the package hjson is there."""
    try:
        import hjson  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(f"{error}; for Hjson, pip install hjson") from error
    try:
        return dict(hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique))
    except hjson.HjsonDecodeError:
        raise error from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ConfigError(f"keys given more than once: {', '.join(repeated)}; keep one of each")
    return dict(pairs)


def with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with DeepSpeed's own defaults where it says nothing (or `"auto"`, which nobody filled)."""
    completed = dict(raw)
    for key, value in DEFAULTS.items():
        if completed.get(key, "auto") == "auto":
            completed[key] = value
    if "optimizer_in_backward" in completed and "gradient_clipping" not in raw:
        completed["gradient_clipping"] = 0.0
    if completed.get("zero_allow_untested_optimizer") in (0, 1):
        completed["zero_allow_untested_optimizer"] = bool(completed["zero_allow_untested_optimizer"])
    zero = completed.get("zero_optimization")
    if isinstance(zero, Mapping):
        completed["zero_optimization"] = _todays_keys(zero)
    return completed


def without_max_grad_norm(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without `optimizer.params.max_grad_norm`: reading one only warns of it, building an engine refuses."""
    section = config.get("optimizer")
    params = section.get("params") if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or not isinstance(params, Mapping) or "max_grad_norm" not in params:
        return config
    logger.warning("optimizer.params.max_grad_norm is not the optimizer's; set gradient_clipping instead")
    kept = {key: value for key, value in params.items() if key != "max_grad_norm"}
    return {**config, "optimizer": {**section, "params": kept}}


_OLD_OFFLOAD = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}


_STAGE3 = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
    "use_all_reduce_for_fetch_params", "allgather_sequential",
)  # fmt: skip
"""Keys that DeepSpeed takes with and without `stage3_`."""


def _todays_keys(zero: Mapping[str, Any]) -> dict[str, Any]:
    """`zero_optimization` with other spellings that DeepSpeed reads, its offload flags of old among them, in one."""
    section = {f"stage3_{key}" if key in _STAGE3 else key: value for key, value in zero.items()}
    for old, new in _OLD_OFFLOAD.items():
        if section.get(old) is True and not section.get(new):
            del section[old]
            section[new] = {"device": "cpu"}
    return section


class ConfigView(dict[str, Any]):
    """`engine.config`: the user's own keys, as DeepSpeed shows them; attributes are the resolved values."""

    def __init__(self, raw: Mapping[str, Any], resolved: ResolvedConfig) -> None:
        super().__init__(raw)
        self._resolved = resolved

    def __getattr__(self, name: str) -> Any:
        if name == "_resolved":
            raise AttributeError(name)
        # DeepSpeed has the keys of data_types beside the sections.
        holder = self._resolved.data_types if name == "param_dtype" else self._resolved
        return getattr(holder, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)
