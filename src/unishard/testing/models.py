"""Small deterministic models, each with one property that breaks naive sharding.

Every model maps one input tensor to one output tensor, and its loss is a mean over the batch. The mean of
the ranks' losses on equal batches therefore equals the loss of one process on the batches put together.
`MODELS` lists them, so that a parity test iterates over all.

Example:
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = MODELS["mlp"]()
    >>> batch = model.example_batch(seed=1, batch_size=4)
    >>> model.loss(model(batch.inputs), batch.targets).shape
    torch.Size([])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional


class Batch(NamedTuple):
    """One micro-batch: inputs (B, ...) and targets (B, ...)."""

    inputs: Tensor
    targets: Tensor


class ToyModel(nn.Module, ABC):
    """What a parity test needs from a model."""

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (B, ...) for inputs (B, ...)."""

    @abstractmethod
    def example_batch(self, seed: int, batch_size: int) -> Batch:
        """The same batch for the same seed, whatever the global generator's state."""

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar fp32 mean squared error, whatever dtype the outputs arrive in."""
        return functional.mse_loss(outputs.float(), targets.float())

    def shard_units(self) -> list[nn.Module]:
        """The submodules that the code door shards one by one, in forward order, before the model itself."""
        return []


class _Regression(ToyModel):
    """A model from (B, `width_in`) to (B, `width_out`), fp32."""

    width_in: int = 6
    width_out: int = 3

    def example_batch(self, seed: int, batch_size: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(batch_size, self.width_in, generator=generator)
        return Batch(inputs, torch.randn(batch_size, self.width_out, generator=generator))


@final
class MLP(_Regression):
    """Three linear layers whose odd sizes divide by no world size."""

    width_in, width_out = 13, 5

    def __init__(self, hidden: int = 17, *, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Linear(self.width_in, hidden, bias=bias),
                nn.Linear(hidden, hidden + 2, bias=bias),
                nn.Linear(hidden + 2, self.width_out, bias=bias),
            ]
        )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for layer in self.layers[:-1]:
            hidden = torch.tanh(layer(hidden))
        return self.layers[-1](hidden)

    def shard_units(self) -> list[nn.Module]:
        return list(self.layers)


class Block(nn.Module):
    """Pre-norm causal attention and MLP, (B, T, width) to (B, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(self.norm_attention(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        hidden = hidden + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        mlp = self.down(functional.gelu(self.up(self.norm_mlp(hidden))))
        return hidden + functional.dropout(mlp, self.dropout, self.training)


@final
class TinyTransformer(ToyModel):
    """A GPT in miniature: token and position embeddings, `blocks`, a head that may share the embedding."""

    def __init__(
        self,
        vocabulary: int = 37,
        width: int = 12,
        depth: int = 2,
        heads: int = 2,
        length: int = 7,
        *,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.vocabulary, self.length = vocabulary, length
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) for token ids (B, T), int64."""
        places = torch.arange(inputs.shape[1], device=inputs.device)
        hidden = self.tokens(inputs) + self.positions(places)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))

    def example_batch(self, seed: int, batch_size: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocabulary, (batch_size, self.length + 1), generator=generator)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar fp32 mean cross-entropy over all tokens."""
        return functional.cross_entropy(outputs.float().flatten(0, 1), targets.flatten())

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)


def tied_transformer() -> TinyTransformer:
    """A `TinyTransformer` whose head is its token embedding."""
    return TinyTransformer(tied=True)


@final
class TiedModel(_Regression):
    """One weight used by the first and the last of three layers, each its own shard unit."""

    width_in = width_out = 7

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(7, 7)
        self.middle = nn.Linear(7, 7)
        self.decode = nn.Linear(7, 7)
        self.decode.weight = self.encode.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.middle(torch.tanh(self.encode(inputs)))))

    def shard_units(self) -> list[nn.Module]:
        return [self.encode, self.middle, self.decode]


class Adapted(nn.Module):
    """A frozen linear layer with a trainable low-rank side path (LoRA, arXiv 2106.09685)."""

    def __init__(self, width_in: int, width_out: int, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width_in, width_out)
        self.frozen.requires_grad_(False)
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.frozen(inputs) + self.up(self.down(inputs))


@final
class PartlyFrozen(_Regression):
    """Adapters around frozen layers, then one layer frozen whole, then one trained whole."""

    width_in, width_out = 11, 5

    def __init__(self) -> None:
        super().__init__()
        self.adapted = nn.ModuleList([Adapted(11, 9, 2), Adapted(9, 9, 3)])
        self.frozen = nn.Linear(9, 9)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(9, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for layer in self.adapted:
            hidden = torch.tanh(layer(hidden))
        return self.head(self.frozen(hidden))

    def shard_units(self) -> list[nn.Module]:
        return [*self.adapted, self.frozen]


@final
class UnusedBranch(_Regression):
    """Two branches that a sample may or may not take: parameters unused on some ranks, or on all.

    Samples are routed one by one (by the sign of their first two features), as experts are, so a batch put
    together from the ranks' batches gives what the ranks give. `example_batch` sends all samples of a batch
    one way: seed % 3 = 0 to the first branch, 1 to the second, 2 to neither.
    """

    width_in, width_out = 6, 3

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 9)
        self.first = nn.Linear(9, 9)
        self.second = nn.Linear(9, 9, bias=False)
        self.head = nn.Linear(9, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(inputs))
        for branch, feature in ((self.first, 0), (self.second, 1)):
            chosen = (inputs[:, feature] > 0).nonzero().flatten()
            if len(chosen):
                hidden = hidden.index_add(0, chosen, branch(hidden[chosen]))
        return self.head(hidden)

    def example_batch(self, seed: int, batch_size: int) -> Batch:
        inputs, targets = super().example_batch(seed, batch_size)
        signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])[seed % 3]
        return Batch(torch.cat([inputs[:, :2].abs() * signs, inputs[:, 2:]], dim=1), targets)

    def shard_units(self) -> list[nn.Module]:
        return [self.first, self.second]


@final
class TinyShapes(_Regression):
    """Parameters with fewer rows than ranks: a scalar, one element, one row, two rows, and a plain matrix."""

    width_in, width_out = 5, 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))
        self.offset = nn.Parameter(torch.randn(1))
        self.row = nn.Parameter(torch.randn(1, 5))
        self.pair = nn.Parameter(torch.randn(2, 5))
        self.head = nn.Linear(7, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        scaled = inputs * self.row * self.scale + self.offset  # (B, 5)
        return self.head(torch.cat([scaled, inputs @ self.pair.t()], dim=1))


@final
class WithBuffers(_Regression):
    """Buffers of every kind: persistent and not, float and integer, constant and updated in forward.

    The running statistics are used in evaluation only, so that training does not depend on how samples are
    spread over ranks.
    """

    width_in, width_out = 7, 3
    offset: Tensor
    sign: Tensor
    running_mean: Tensor
    seen: Tensor

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.body = nn.Linear(7, 7)
        self.head = nn.Linear(7, 3)
        self.register_buffer("offset", torch.randn(7))
        self.register_buffer("sign", torch.randn(7).sign(), persistent=False)
        self.register_buffer("running_mean", torch.zeros(7))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs) * self.sign + self.offset
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(hidden.mean(0).to(self.running_mean.dtype), self.momentum)
                self.seen += len(inputs)
        else:
            hidden = hidden - self.running_mean
        return self.head(torch.tanh(hidden))

    def shard_units(self) -> list[nn.Module]:
        return [self.body]


@final
class NonContiguous(_Regression):
    """A transposed matrix and a permuted 3-D weight: strides that a flat copy must not change."""

    width_in, width_out = 6, 3

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(9, 6).t())  # (6, 9), strides (1, 6)
        self.permuted = nn.Parameter(torch.randn(3, 9, 2).permute(2, 1, 0))  # (2, 9, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(inputs @ self.transposed)
        return self.head(torch.einsum("bi,kio->bo", hidden, self.permuted))


@final
class RepeatedForward(_Regression):
    """One layer called three times in a forward, and a method other than `forward` that uses parameters."""

    width_in, width_out = 7, 7

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(7, 7)
        self.head = nn.Linear(7, 7)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for _ in range(3):
            hidden = torch.tanh(self.cell(hidden))
        return self.decode(hidden)

    def decode(self, hidden: Tensor) -> Tensor:
        """The head alone, (B, 7) to (B, 7): a second entry point."""
        return self.head(hidden)

    def shard_units(self) -> list[nn.Module]:
        return [self.cell]


MODELS = {
    "mlp": MLP,
    "transformer": TinyTransformer,
    "tied_transformer": tied_transformer,
    "tied": TiedModel,
    "partly_frozen": PartlyFrozen,
    "unused_branch": UnusedBranch,
    "tiny_shapes": TinyShapes,
    "with_buffers": WithBuffers,
    "non_contiguous": NonContiguous,
    "repeated_forward": RepeatedForward,
}
"""Name -> a function of no arguments that builds the model from the global generator."""
