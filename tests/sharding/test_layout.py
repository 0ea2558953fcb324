"""The layout: every element once, equal contiguous shards, boundaries on rows or blocks, little padding."""

from __future__ import annotations

import doctest
import inspect
import re
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unishard.errors import ShardingError
from unishard.sharding import layout as layout_module
from unishard.sharding import layout_search
from unishard.sharding.layout import FlatLayout, Granularity, matrix_shape, plan_layout, rectangles

Shapes = list[tuple[int, ...]]


def gpt2(d: int, conv1d: bool) -> Shapes:
    def weight(inputs: int, outputs: int) -> tuple[int, int]:
        return (inputs, outputs) if conv1d else (outputs, inputs)

    attention = [(d,), (d,), weight(d, 3 * d), (3 * d,), weight(d, d), (d,)]
    return [*attention, (d,), (d,), weight(d, 4 * d), (4 * d,), weight(4 * d, d), (d,)]


def llama(hidden: int, inner: int, kv: int) -> Shapes:
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]


def moe(hidden: int, inner: int, kv: int, experts: int, router: tuple[int, int]) -> Shapes:
    attention, norms = llama(hidden, inner, kv)[:4], [(hidden,), (hidden,)]
    expert = [(inner, hidden), (hidden, inner), (inner, hidden)]
    return [*attention, router, *(expert * experts), *norms]


WIDTHS = {"small": 768, "medium": 1024, "large": 1280, "xl": 1600}
GPT2_BLOCKS = {
    f"gpt2-{size} {form}": gpt2(width, form == "conv1d")
    for size, width in WIDTHS.items()
    for form in ("conv1d", "linear")
}
GPT2_ROOTS: dict[str, Shapes] = {
    f"gpt2-{size} root": [(50257, width), (1024, width), (width,), (width,)] for size, width in WIDTHS.items()
}
LLAMA_7B: dict[str, Shapes] = {
    "llama-7b block": llama(4096, 11008, 4096),
    "llama-7b root": [(32000, 4096), (4096,), (32000, 4096)],
}
OTHERS: dict[str, Shapes] = {
    "llama-70b block": llama(8192, 28672, 1024),
    "llama-70b root": [(32000, 8192), (8192,), (32000, 8192)],
    "mixtral block": moe(4096, 14336, 1024, 8, (4096, 8)),
    "mixtral stacked": [*llama(4096, 1, 1024)[:4], (8, 4096), (8, 28672, 4096), (8, 4096, 14336)],
    "moe 64 experts": moe(2048, 1408, 2048, 64, (64, 2048)),
}
MODELS = GPT2_BLOCKS | GPT2_ROOTS | LLAMA_7B | OTHERS
WORLDS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000, 1023, 1024)

tiny_shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=8)
sizes = st.sampled_from([1, 7, 64, 100, 256, 768, 1000, 1408, 2048, 2304, 3072, 11008, 50257])
large_shapes = st.lists(st.lists(sizes, min_size=1, max_size=2).map(tuple), min_size=1, max_size=30)
ranks = st.one_of(st.integers(1, 16), st.integers(1, 1024))


def least_shard(layout: FlatLayout) -> int:
    return -(-layout.payload // layout.world_size)


# --- properties -----------------------------------------------------------------------------------------


@given(tiny_shapes, ranks)
@settings(max_examples=300, deadline=None)
def test_each_element_lies_in_one_place_and_rectangles_say_which(shapes: Shapes, world: int) -> None:
    layout = plan_layout(shapes, world)
    seen: list[tuple[int, int]] = []
    for rank in range(world):
        end = 0
        for piece in layout.pieces(rank):
            assert piece.shard_start >= end
            assert piece.numel > 0
            end = piece.shard_start + piece.numel
            buffer_start = rank * layout.shard_numel + piece.shard_start
            assert buffer_start == layout.offsets[piece.index] + piece.param_start
            assert 1 <= len(piece.rectangles) <= 3
            columns = matrix_shape(shapes[piece.index])[1]
            covered = [
                row * columns + column
                for r in piece.rectangles
                for row in range(r.row_start, r.row_stop)
                for column in range(r.col_start, r.col_stop)
            ]
            assert covered == list(range(piece.param_start, piece.param_start + piece.numel))
            assert sum(r.numel for r in piece.rectangles) == piece.numel
            seen.extend((piece.index, element) for element in covered)
        assert end <= layout.shard_numel
    assert sorted(seen) == [(i, e) for i, numel in enumerate(layout.numels) for e in range(numel)]


@given(large_shapes, ranks)
@settings(max_examples=300, deadline=None)
def test_shards_are_equal_and_boundaries_keep_the_granularity(shapes: Shapes, world: int) -> None:
    layout = plan_layout(shapes, world)
    layout.validate()
    assert layout.numel == world * layout.shard_numel == layout.payload + layout.padding
    next_start = [0] * len(shapes)
    for rank in sorted({*range(min(world, 64)), world // 2, world - 1}):
        for piece in layout.pieces(rank):
            unit = matrix_shape(shapes[piece.index])[1] if layout.granularity.name == "rows" else 1
            assert piece.param_start % unit == 0
            assert piece.param_start % layout.granularity.block == 0
            if rank < min(world, 64):
                assert piece.param_start == next_start[piece.index]
                next_start[piece.index] += piece.numel
            if layout.granularity.name == "rows":
                assert len(piece.rectangles) == 1


@given(st.one_of(tiny_shapes, large_shapes), ranks, st.sampled_from([0.0, 0.01, 0.03, 0.2]))
@settings(max_examples=400, deadline=None)
def test_waste_is_under_the_limit_or_the_least_possible(shapes: Shapes, world: int, limit: float) -> None:
    layout = plan_layout(shapes, world, max_waste=limit)
    assert layout.waste < limit or layout.shard_numel == least_shard(layout)


@given(large_shapes, ranks)
@settings(max_examples=60, deadline=None)
def test_planning_again_gives_the_same_layout(shapes: Shapes, world: int) -> None:
    assert plan_layout(shapes, world) == plan_layout([list(shape) for shape in shapes], world)


# --- real models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_real_models_waste_under_3_percent_at_every_size(model: str) -> None:
    for world in WORLDS:
        layout = plan_layout(MODELS[model], world)
        layout.validate()
        assert layout.waste < 0.03, layout.describe()
        assert layout.alignment == 16, layout.describe()
        assert layout.granularity.block % 64 == 0, layout.describe()
        starts = [p.param_start for r in {0, world // 3, world - 1} for p in layout.pieces(r)]
        assert all(start % 64 == 0 for start in starts)


@pytest.mark.parametrize(
    ("model", "most"),
    [(m, 16) for m in (*GPT2_BLOCKS, *GPT2_ROOTS)]
    + [(m, 64) for m in GPT2_BLOCKS if m.endswith("small linear")]
    + [(m, 128) for m in LLAMA_7B]
    + [("mixtral block", 1024), ("moe 64 experts", 1024), ("llama-70b block", 512)],
)
def test_real_models_keep_whole_rows_up_to(model: str, most: int) -> None:
    for world in range(1, 17) if most <= 16 else [w for w in WORLDS if w <= most]:
        layout = plan_layout(MODELS[model], world)
        assert layout.granularity.name == "rows", layout.describe()


@pytest.mark.parametrize(
    ("model", "world", "name", "block", "waste"),
    [
        ("gpt2-small conv1d", 16, "rows", 256, 0.0194),
        ("gpt2-small conv1d", 32, "blocks", 256, 0.0009),
        ("gpt2-small conv1d", 1024, "blocks", 128, 0.0171),
        ("llama-7b block", 128, "rows", 256, 0.0026),
        ("llama-7b block", 1024, "blocks", 256, 0.0013),
        ("llama-70b block", 1024, "rows", 256, 0.0294),
        ("mixtral block", 1024, "rows", 256, 0.0115),
    ],
)
def test_reached_waste_stays_as_reported(model: str, world: int, name: str, block: int, waste: float) -> None:
    layout = plan_layout(MODELS[model], world)
    assert layout.granularity == Granularity(name, block)  # pyright: ignore[reportArgumentType]
    assert layout.waste == pytest.approx(waste, abs=1e-4)


def test_planning_is_fast_at_1024_ranks() -> None:
    many = list(chain(MODELS["moe 64 experts"] * 10, [(d, 1000 + d) for d in range(1, 60)]))
    for shapes, limit in ((MODELS["moe 64 experts"], 0.05), (many, 0.5)):
        best = min(_seconds(lambda shapes=shapes: plan_layout(shapes, 1024)) for _ in range(3))
        assert best < limit
    layout = plan_layout(many, 1024)
    assert min(_seconds(lambda: [layout.pieces(rank) for rank in range(1024)]) for _ in range(3)) < 0.2


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --- edges ----------------------------------------------------------------------------------------------


def test_one_rank_has_no_padding_and_the_natural_order() -> None:
    layout = plan_layout([(3, 5), (), (0, 7), (2,)], 1)
    assert layout.offsets == (0, 15, 16, 16)
    assert (layout.padding, layout.granularity.name, layout.shard_numel) == (0, "rows", 18)
    assert [piece.index for piece in layout.pieces(0)] == [0, 1, 3]


@pytest.mark.parametrize("shapes", [[], [(0,)], [(0, 4), (4, 0)]])
@pytest.mark.parametrize("world", [1, 3])
def test_nothing_to_place(shapes: Shapes, world: int) -> None:
    layout = plan_layout(shapes, world)
    layout.validate()
    assert (layout.shard_numel, layout.numel, layout.waste) == (0, 0, 0.0)
    assert all(layout.pieces(rank) == () for rank in range(world))


@pytest.mark.parametrize("shapes", [[()], [(3,)], [(2, 2), ()], [(300,)], [(16, 16), (16,)]])
@pytest.mark.parametrize("world", [2, 5, 1024])
def test_tiny_groups_are_placed_too(shapes: Shapes, world: int) -> None:
    layout = plan_layout(shapes, world)
    layout.validate()
    assert layout.waste < 0.03 or layout.shard_numel == least_shard(layout)
    assert sum(piece.numel for rank in range(world) for piece in layout.pieces(rank)) == layout.payload


def test_small_parameters_fill_the_gaps_that_rows_leave() -> None:
    # a boundary at 40 is on a row of the matrix only when 8 elements come first: the bias goes there
    layout = plan_layout([(9, 8), (8,)], 2, max_waste=0.0)
    assert (layout.shard_numel, layout.granularity.name) == (40, "rows")
    assert plan_layout([(12, 9), (4,)], 2, max_waste=0.0).offsets == (0, 108)
    swapped = plan_layout([(10, 9), (4,), (4,)], 2, max_waste=0.0)
    assert (swapped.offsets, swapped.granularity.name) == ((4, 0, 94), "rows")


def test_a_larger_block_is_kept_where_it_fits_and_shrunk_where_not() -> None:
    block = MODELS["gpt2-small conv1d"]
    assert plan_layout(block, 64, block=2048).granularity == Granularity("blocks", 2048)
    assert plan_layout(block, 1024, block=2048).granularity == Granularity("blocks", 128)
    assert plan_layout([(1000, 997)], 300, block=100).granularity == Granularity("blocks", 100)


def test_rectangles_of_a_range() -> None:
    assert [(r.row_start, r.row_stop, r.col_start, r.col_stop) for r in rectangles((4, 10), 7, 32)] == [
        (0, 1, 7, 10),
        (1, 3, 0, 10),
        (3, 4, 0, 2),
    ]
    assert len(rectangles((4, 10), 12, 15)) == 1
    assert len(rectangles((4, 10), 10, 30)) == 1
    assert rectangles((4, 10), 5, 5) == ()


def test_describe_says_ranks_elements_padding_and_granularity() -> None:
    assert plan_layout(MODELS["llama-7b block"], 128).describe() == (
        "128 ranks x 1,585,152 elements, 0.26 % padding, whole rows"
    )
    assert plan_layout(MODELS["gpt2-small conv1d"], 1024).describe() == (
        "1,024 ranks x 7,040 elements, 1.71 % padding, blocks of 128 elements"
    )
    assert plan_layout([(4,)], 1).describe().startswith("1 rank x 4 elements")


def test_layout_needs_no_torch_and_its_examples_hold() -> None:
    for module in (layout_module, layout_search):
        imported = re.findall(r"^\s*(?:from|import) (\S+)", inspect.getsource(module), re.MULTILINE)
        assert not [name for name in imported if name.startswith("torch")]
    results = doctest.testmod(layout_module)
    assert results.attempted >= 5
    assert results.failed == 0


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"world_size": 0}, "world_size is 0; a layout needs at least 1 rank"),
        ({"block": 0}, "block is 0; pass a block of at least 1"),
        ({"max_waste": -0.1}, "max_waste is -0.1"),
        ({"max_waste": float("nan")}, "max_waste is nan"),
        ({"shapes": [(2, 3), (4, -1)]}, r"shape 1: \(4, -1\) has a negative dimension"),
        ({"shapes": [(2.5,)]}, r"shape 0: \(2.5,\) is not a sequence of integers"),
        ({"shapes": [7]}, "shape 0: 7 is not a sequence of integers"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    given_arguments: dict[str, object] = {"shapes": [(2, 3)], "world_size": 2} | arguments
    with pytest.raises(ShardingError, match=words):
        plan_layout(**given_arguments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_layout_is_refused(rank: int) -> None:
    with pytest.raises(ShardingError, match=f"rank {rank} has no shard; this layout has 2 ranks"):
        plan_layout([(4, 4)], 2).pieces(rank)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offsets": (0,)}, "1 offsets for 2 parameters"),
        ({"offsets": (0, 12)}, "parameter 1 starts at 12, inside its neighbour that ends at 16"),
        ({"offsets": (-4, 16)}, "negative offset -4"),
        ({"offsets": (0, 17)}, "parameters end at 21, past the 20 elements"),
        ({"shard_numel": 0}, "past the 0 elements"),
        ({"world_size": 0}, "world_size 0"),
        ({"shard_numel": 11}, "boundary lies 11 elements inside parameter 0"),
        ({"granularity": Granularity("blocks", 8)}, "off the multiples of 8"),
        ({"granularity": Granularity("cells", 1)}, "unknown granularity 'cells'"),  # pyright: ignore
    ],
)
def test_validate_names_what_is_wrong(change: dict[str, object], words: str) -> None:
    good = FlatLayout(((8, 2), (4,)), (0, 16), 2, 10, Granularity("rows", 2))
    good.validate()
    with pytest.raises(ShardingError, match=words):
        replace(good, **change).validate()  # pyright: ignore[reportArgumentType]
