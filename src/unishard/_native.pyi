"""The compiled kernels (csrc/module.cpp): addresses, counts, dtype codes and scalars, none of them checked."""

from collections.abc import Sequence

Array = tuple[int, int]
"""Address, dtype code (0: fp32, 1: bf16, 2: fp16)."""
Piece = tuple[int, int, int]
"""Address, dtype code, elements."""
Target = tuple[int, ...]
"""Elements; parameter, gradient, two states and copy as address and dtype code; address 0 where absent."""

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def team() -> str: ...
def adam(
    targets: Sequence[Target],
    grad_scale: float,
    keep: float,
    l2: float,
    beta1: float,
    beta2: float,
    root_correction2: float,
    eps: float,
    step_size: float,
    threads: int,
    /,
) -> None: ...
def lion(
    targets: Sequence[Target],
    grad_scale: float,
    keep: float,
    beta1: float,
    beta2: float,
    lr: float,
    threads: int,
    /,
) -> None: ...
def adagrad(
    targets: Sequence[Target],
    grad_scale: float,
    l2: float,
    eps: float,
    step_size: float,
    threads: int,
    /,
) -> None: ...
def sgd(
    targets: Sequence[Target],
    grad_scale: float,
    l2: float,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    first: bool,
    threads: int,
    /,
) -> None: ...
def squared_norm(pieces: Sequence[Piece], threads: int, /) -> float: ...
def sum_pieces(
    out: int, numel: int, pieces: Sequence[Array], scale: float, beta: float, threads: int, /
) -> None: ...
def pack(out: Array, pieces: Sequence[Piece], scale: float, threads: int, /) -> None: ...
def checksum(data: int, nbytes: int, /) -> int: ...
def has_crc32() -> bool:
    """Whether this processor and build have `crc32`, which gives zlib's numbers."""

def crc32(data: int, nbytes: int, /) -> int: ...

class Swap:
    """Transfers between memory and files: `threads` blocks of `block` bytes in flight at most (csrc/swap.h)."""

    def __init__(self, threads: int, block: int, /) -> None: ...
    def start(
        self,
        descriptor: int,
        write: bool,
        data: int,
        nbytes: int,
        offset: int,
        checksums: int,
        alignment: int,
        /,
    ) -> int: ...
    def done(self, ticket: int, /) -> bool: ...
    def wait(self, ticket: int, seconds: float, /) -> tuple[int, int, int] | None:
        """Ending, errno and file offset (`unishard.offload.transfers.Outcome`); None after `seconds`."""
