"""`ops.op_builder`: nothing is built here; a builder tells whether the operation's kernel came with the package."""

from __future__ import annotations

from typing import Any

from unishard.deepspeed.parts.builder_names import BUILDER_NAMES, KERNEL_OF, THROUGH_CONFIGURATION
from unishard.errors import UnsupportedError


class OpBuilder:
    """One operation by its builder's name."""

    NAME = ""

    def __init__(self, name: str | None = None) -> None:
        self.name = name or self.NAME

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether the operation runs here."""
        return type(self).__name__ in (*KERNEL_OF, *THROUGH_CONFIGURATION)

    def load(self, verbose: bool = False) -> Any:
        """The module with the operation's functions: unishard's kernels, which are called through optimizers."""
        if not self.is_compatible():
            raise UnsupportedError(
                f"{type(self).__name__}.load(): this operation is not available in unishard"
            )
        if type(self).__name__ in THROUGH_CONFIGURATION:
            raise UnsupportedError(
                f"{type(self).__name__}.load(): there is no module to call; offload_param and offload_optimizer with "
                '"device": "nvme" read and write asynchronously by themselves'
            )
        import unishard.kernels

        return unishard.kernels

    def builder_available(self) -> bool:
        """Nothing is compiled at run time."""
        return False


def _name(builder: str) -> str:
    words = "".join(f"_{c.lower()}" if c.isupper() else c for c in builder.removesuffix("Builder"))
    return words.lstrip("_").replace("c_p_u_", "cpu_").replace("_i_o", "_io")


BUILDERS: dict[str, type[OpBuilder]] = {
    name: type(name, (OpBuilder,), {"NAME": _name(name), "__module__": __name__}) for name in BUILDER_NAMES
}
ALL_OPS = {builder.NAME: builder() for builder in BUILDERS.values()}


def __getattr__(name: str) -> Any:
    if name in BUILDERS:
        return BUILDERS[name]
    raise AttributeError(name)


def compatible_ops() -> dict[str, bool]:
    """`ops.__compatible_ops__`: operation -> whether it runs here."""
    return {name: builder.is_compatible() for name, builder in ALL_OPS.items()}
