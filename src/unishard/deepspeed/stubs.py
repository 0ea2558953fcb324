"""Names that exist so that importing them works, and that say at first use what is missing."""

from __future__ import annotations

from typing import Any, NoReturn

from unishard.errors import UnsupportedError


def refuse(name: str, note: str) -> NoReturn:
    """Raise `UnsupportedError` for the use of `name`."""
    raise UnsupportedError(f"{name} is not available in unishard: {note}")


class _RefusingType(type):
    """Classes that cannot be instantiated; `isinstance` with them is false, so libraries that only ask go on."""

    _name: str
    _note: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(cls._name, cls._note)

    def __getattr__(cls, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        refuse(f"{cls._name}.{attribute}", cls._note)


def stub(name: str, note: str) -> Any:
    """A class (for names in CapWords) or a function that raises `UnsupportedError` when used.

    >>> missing = stub("deepspeed.moe.layer.MoE", "experts come later")
    >>> isinstance(3, missing)
    False
    >>> missing(16)
    Traceback (most recent call last):
    ...
    unishard.errors.UnsupportedError: deepspeed.moe.layer.MoE is not available in unishard: experts come later
    """
    last = name.rpartition(".")[2]
    if last.lstrip("_")[:1].isupper():
        return _RefusingType(last, (), {"_name": name, "_note": note, "__module__": name.rpartition(".")[0]})

    def refusing(*args: Any, **kwargs: Any) -> NoReturn:
        refuse(name, note)

    refusing.__name__ = refusing.__qualname__ = last
    refusing.__doc__ = f"Not available in unishard: {note}"
    return refusing
