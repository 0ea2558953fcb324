"""What every config field is made of: its treatment, its rule for `"auto"`, and its value type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, PlainValidator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

AUTO = "auto"


@dataclass(frozen=True)
class Honoured:
    """The key does what its documentation says."""


@dataclass(frozen=True)
class Translated:
    """The key is accepted and stands for something else here: one log line says what.

    `neutral` lists values, besides the default, that already describe what happens and need no line.
    """

    meaning: str
    neutral: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Refused:
    """The key asks for something that is not here: an error says why, and what to use instead.

    `asks` tells whether a value asks for it; by default, any value but the field's own default and `neutral`.
    """

    reason: str
    instead: str
    neutral: tuple[Any, ...] = ()
    asks: Callable[[Any], bool] | None = None


Treatment = Honoured | Translated | Refused


@dataclass(frozen=True)
class Auto:
    """Marks a field that takes `"auto"`, and says what fills it when no override does.

    `fill`: "default" (the field's default), "batch" (the batch triad), "lr" (the optimizer's learning rate),
    "hidden" (`formula` of the model's hidden size), or "override" (nothing: the value must be given).
    """

    fill: Literal["default", "batch", "lr", "hidden", "override"] = "default"
    formula: Callable[[int], int] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def let_auto_pass(value: Any, inner: Callable[[Any], Any]) -> Any:
            return value if isinstance(value, str) and value == AUTO else inner(value)

        return core_schema.no_info_wrap_validator_function(let_auto_pass, handler(source))


class Section(BaseModel):
    """A frozen section of the config: unknown keys and values of another type are errors."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        ser_json_inf_nan="strings",
    )


def marker(field: Any, kind: type | tuple[type, ...]) -> Any:
    """The first annotation of `kind` on a pydantic field, or None."""
    return next((mark for mark in field.metadata if isinstance(mark, kind)), None)


def not_available(feature: str, instead: str, **options: Any) -> Refused:
    """A `Refused` for a feature that this version lacks."""
    return Refused(f"{feature} is not available in this version", instead, **options)


def enabled(section: Any) -> bool:
    """Whether a section, or when it has no switch of its own anything inside it, is switched on."""
    if isinstance(section, BaseModel):
        section = {name: getattr(section, name) for name in type(section).model_fields}
    if isinstance(section, dict):
        if "enabled" in section:
            return section["enabled"] not in (False, None, 0, AUTO)
        return any(enabled(value) for value in section.values())
    return False


def _integral(value: Any) -> Any:
    # JSON has no integer exponent form, so ds_configs write 5e8.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[int, BeforeValidator(_integral), Field(ge=1)]
Size = Annotated[int, BeforeValidator(_integral), Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]

_DTYPES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
    "bf16": "bf16", "bfloat16": "bf16",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
}  # fmt: skip


def dtype_name(value: Any) -> Any:
    """One of fp32, bf16, fp16 for any usual name of a dtype, `torch.dtype` objects included.

    Raises `PydanticCustomError` for others.

    >>> dtype_name("bfloat16"), dtype_name("torch.half")
    ('bf16', 'fp16')
    """
    if value is None:
        return None
    spelled = str(value).lower().removeprefix("torch.")
    if spelled not in _DTYPES:
        near = get_close_matches(spelled, [name for name in _DTYPES if name[-1].isdigit()], n=1, cutoff=0.8)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        text = f"unknown dtype {value!r}; use fp32, bf16 or fp16{hint}"
        raise PydanticCustomError("unknown_dtype", "{text}", {"text": text})
    return _DTYPES[spelled]


Dtype = Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(dtype_name)]


def _print_interval(value: Any) -> int | float:
    if value is None or value in ("inf", "Infinity", math.inf):
        return math.inf
    value = _integral(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        text = f'expected an integer of at least 1, null or "inf" (never), got {value!r}'
        raise PydanticCustomError("print_interval", "{text}", {"text": text})
    return value


PrintInterval = Annotated[int | float, PlainValidator(_print_interval)]


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(_pair)]
