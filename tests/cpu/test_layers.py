"""Whole layers in one call against the same operators one by one, bit for bit, and when steps are run so.

Every library that this processor can run is tried, not only the one that would be chosen.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.bench.exactness import Bench
from headway.core.work import Boundary, Segment, Tile
from headway.models.config import DecoderConfig, parse_config
from headway.models.decoder import Linear
from headway.models.weights import random_decoder
from headway.stages import native
from headway.stages.language import LanguageStage
from headway.stages.layers import whole_layers
from headway.stages.matrices import LayerMatrices, Matrices, matrices_of
from headway.stages.native import Library, NativeOperators
from headway.stages.operators import Operators
from headway.stages.panels import IntegerPanels, Panels
from headway.stages.step import MOST_ROWS_WHOLE
from headway.stages.tiling import Rates, Tiling

FAST = Rates(1e12, 1e12, 1e12, 1e12, 1e12, 1e12, 1e12)
VOCABULARY = 200
FOUND = list(native.libraries())
pytestmark = pytest.mark.skipif(not FOUND, reason="nothing is compiled here")
each_library = pytest.mark.parametrize("library", FOUND, ids=lambda library: library.kind)
KINDS: list[tuple[type[Panels], torch.dtype]] = [
    (Panels, torch.bfloat16),
    (IntegerPanels, torch.bfloat16),
    (Panels, torch.float32),
]
each_kind = pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=["bfloat16", "int8", "float32"])


def config(architecture: str = "Qwen2ForCausalLM", window: int | None = None) -> DecoderConfig:
    parsed = parse_config(
        {
            "architectures": [architecture],
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 320,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    )
    return replace(parsed, windows=(None, window, window))


def bench_of(
    kind: type[Panels], dtype: torch.dtype, library: Library, shape: DecoderConfig, *, gates: bool = False
) -> Bench:
    """Of which the stage runs whole layers where it can. `gates`: the middle of an MLP is made where its sums are."""
    model = random_decoder(shape, 0, dtype)
    heads = [torch.rand(shape.head_size).to(dtype) + 0.5 if shape.qk_norm else None for _ in range(2)]

    def biased(linear: Linear) -> Linear:
        return Linear(linear.weight, torch.randn(len(linear.weight)).to(dtype) if shape.qkv_bias else None)

    layers = [
        layer._replace(
            q_norm=heads[0],
            k_norm=heads[1],
            qkv=biased(layer.qkv),
            o=biased(layer.o),
            gate_up=biased(layer.gate_up),
            down=biased(layer.down),
        )
        for layer in model.layers
    ]
    model = model._replace(layers=tuple(layers))
    bench = Bench(model, FAST, num_pages=100)

    def panels(linear: Linear) -> Panels:
        return kind(linear, library)

    made = [
        LayerMatrices(panels(layer.qkv), panels(layer.o), kind(layer.gate_up, library, gates=gates), panels(layer.down))
        for layer in model.layers
    ]
    matrices = Matrices(tuple(made), panels(model.head))
    bench.stage = LanguageStage(model, bench.pool, Tiling(FAST, 0.010), bench.sampler, matrices)
    bench.stage.operators = NativeOperators(shape, bench.pool, library)
    bench.stage.layers = whole_layers(model, matrices, bench.stage.operators)
    assert bench.stage.layers is not None
    return bench


def tiles_of(bench: Bench, segments: list[Segment]) -> list[Tile]:
    return list(bench.stage.run(bench.work(*segments)))


def operators_in(tiles: list[Tile]) -> set[str]:
    return {tile.operator for tile in tiles}


def prompts(bench: Bench, sizes: list[int], seed: int) -> Iterator[Segment]:
    generator = torch.Generator().manual_seed(seed)
    page = 0
    for number, size in enumerate(sizes):
        pages = range(page, page + -(-(size + 1) // bench.page_tokens))
        tokens = torch.randint(0, VOCABULARY, (size,), generator=generator).tolist()
        yield bench.prompt(f"r{number}", tokens, pages)
        page = pages.stop


@each_library
@each_kind
@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    architecture=st.sampled_from(["Qwen2ForCausalLM", "Qwen3ForCausalLM"]),
    window=st.none() | st.integers(1, 70),
    gates=st.booleans(),
    num_threads=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_a_whole_layer_is_its_operators_one_by_one(
    library: Library,
    kind: type[Panels],
    dtype: torch.dtype,
    sizes: list[int],
    architecture: str,
    window: int | None,
    gates: bool,
    num_threads: int,
    seed: int,
) -> None:
    """Prompts in one step, and then a token of each: logits, keys and values, with biases or norms of heads, of layers
    that look back a little or all the way, and of products that end as a gate or do not."""
    shape = config(architecture, window)
    if not native.suits(library, shape, dtype, torch.device("cpu")):
        return
    with torch.inference_mode():
        bench = bench_of(kind, dtype, library, shape, gates=gates)
        whole, results = bench.stage.layers, []
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            for layers in (whole, None):
                bench.stage.layers = layers
                bench.pool.blocks_PL2KSD.zero_()
                bench.sampler.logits.clear()
                asked = list(prompts(bench, sizes, seed))
                tiles = tiles_of(bench, asked)
                length = [len(segment.tokens) for segment in asked]
                steps = [Segment(s.request_id, (7,), n, n, s.pages, (0,)) for s, n in zip(asked, length, strict=True)]
                tiles += tiles_of(bench, steps)
                assert ("layer" in operators_in(tiles)) == (layers is not None)
                assert all(tile.number < tile.of for tile in tiles)
                is_gated = bench.stage.matrices.layers[0].gate_up.gates
                assert layers is not None or ("activation" in operators_in(tiles)) != is_gated
                results.append((dict(bench.sampler.logits), bench.pool.blocks_PL2KSD.clone()))
        finally:
            torch.set_num_threads(before)
    (ours, pool), (theirs, their_pool) = results
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name], strict=True))
    assert torch.equal(pool, their_pool)


def test_a_whole_layer_ends_where_a_step_may_be_suspended_or_left() -> None:
    with torch.inference_mode():
        bench = bench_of(Panels, torch.float32, FOUND[0], config())
        tiles = tiles_of(bench, list(prompts(bench, [40, MOST_ROWS_WHOLE - 40], 1)))
    assert operators_in(tiles) == {"embedding", "layer", "head", "sample"}
    assert [tile.boundary for tile in tiles if tile.operator == "layer"] == [Boundary.LAYER] * 3


SLOW_RATES = {  # one at a time; 40 rows of the small shape take more than 6 ms by each
    "linear_flops": 2e9,
    "linear_bytes": 1e8,
    "attention_flops": 1e7,
    "copy_bytes": 1e5,
    "elements": 3e6,
    "activations": 3e6,
}


@pytest.mark.parametrize("rate", SLOW_RATES)
def test_a_layer_that_takes_longer_than_a_tile_is_cut(rate: str) -> None:
    """Whatever it is that takes long: each part of it counts."""
    with torch.inference_mode():
        bench = bench_of(Panels, torch.float32, FOUND[0], config())
        bench.stage.tiling = Tiling(replace(FAST, **{rate: SLOW_RATES[rate]}), 0.010)
        assert "layer" not in operators_in(tiles_of(bench, list(prompts(bench, [40], 1))))
        bench.stage.tiling = Tiling(replace(FAST, **{rate: 1000 * SLOW_RATES[rate]}), 0.010)
        assert "layer" in operators_in(tiles_of(bench, list(prompts(bench, [40], 1))))


def test_what_ends_as_a_gate_takes_no_time_of_its_own() -> None:
    """However slow activations are elsewhere: neither is the layer cut for it, nor are there tiles of it."""
    slow = replace(FAST, activations=1.0)
    with torch.inference_mode():
        bench = bench_of(Panels, torch.float32, FOUND[0], config(), gates=True)
        bench.stage.tiling = Tiling(slow, 0.010)
        assert "layer" in operators_in(tiles_of(bench, list(prompts(bench, [40], 1))))
        cut = tiles_of(bench, list(prompts(bench, [MOST_ROWS_WHOLE, 1], 1)))
    assert "gate_up" in operators_in(cut)
    assert "activation" not in operators_in(cut)
    assert [tile.number for tile in cut] == list(range(cut[0].of))


def test_the_parts_of_a_layer_are_added_up() -> None:
    """Attention in one tile of two thirds of what a tile is to take, and as much of small operators: each of the two
    leaves a layer whole, both do not."""
    shape, asked = config(), [Segment("r", (1,) * 40, 0, 0, (0, 1, 2), (39,))]
    sizes = (shape.num_heads, shape.num_kv_heads, shape.head_size, 4)
    tiles, seconds = Tiling(FAST, 0.010).attention(asked, *sizes, gathers=False)
    assert len(tiles) == 1
    slow = replace(FAST, attention_flops=FAST.attention_flops * seconds / 0.004)
    small = 40 * (shape.q_size + 2 * shape.kv_size + 2 * shape.hidden_size)
    found = []
    with torch.inference_mode():
        bench = bench_of(Panels, torch.float32, FOUND[0], shape)
        for rates in (slow, replace(FAST, elements=small / 0.004), replace(slow, elements=small / 0.004)):
            bench.stage.tiling = Tiling(rates, 0.010)
            found.append("layer" in operators_in(tiles_of(bench, list(prompts(bench, [40], 1)))))
    assert found == [True, True, False]


def test_one_row_too_many_and_layers_are_cut() -> None:
    with torch.inference_mode():
        bench = bench_of(Panels, torch.float32, FOUND[0], config())
        many = tiles_of(bench, list(prompts(bench, [MOST_ROWS_WHOLE, 1], 1)))
    assert {"qkv", "rope", "attention", "o", "gate_up", "activation", "down"} <= operators_in(many)


def test_what_is_left_of_a_cut_step_may_go_on_in_whole_layers() -> None:
    """Its progress is that of its layers, and the bits of who stays are those of a step without the one that leaves."""
    with torch.inference_mode():
        bench = bench_of(Panels, torch.float32, FOUND[0], config())
        stays, leaves = prompts(bench, [30, MOST_ROWS_WHOLE], 2)
        work = bench.work(stays, leaves)
        tiles = []
        for tile in bench.stage.run(work):
            tiles.append(tile)
            if tile.operator == "qkv" and len(tiles) < 4:
                bench.stage.drop(work.id, leaves.request_id)
        (first,) = (number for number, tile in enumerate(tiles) if tile.left)
        assert tiles[0].operator == "embedding"
        assert operators_in(tiles[first:]) == {"layer", "head", "sample"}
        assert all(tile.number < tile.of for tile in tiles)
        assert [tile.number for tile in tiles[first:]] == list(range(2, 2 + len(tiles) - first))
        together = bench.sampler.logits.pop(stays.request_id)
        tiles_of(bench, [stays])
        alone = bench.sampler.logits.pop(stays.request_id)
    assert torch.equal(together[0], alone[0])


def test_who_leaves_a_step_of_whole_layers_leaves_it_at_the_next_one() -> None:
    """The others' bits are those of a step without it."""
    with torch.inference_mode():
        bench = bench_of(Panels, torch.float32, FOUND[0], config())
        stays, leaves = prompts(bench, [30, 20], 2)
        work = bench.work(stays, leaves)
        left: list[str] = []
        for tile in bench.stage.run(work):
            if tile.operator == "layer" and not left:
                bench.stage.drop(work.id, leaves.request_id)
            left += tile.left
        assert left == [leaves.request_id]
        together = bench.sampler.logits.pop(stays.request_id)
        tiles_of(bench, [stays])
        alone = bench.sampler.logits.pop(stays.request_id)
    assert torch.equal(together[0], alone[0])
    assert leaves.request_id not in bench.sampler.logits


def test_where_another_multiplies_there_are_no_whole_layers() -> None:
    """Torch's matrices or operators are called one by one."""
    model = random_decoder(config(), 0, torch.float32)
    bench = Bench(model, FAST, num_pages=10)
    assert whole_layers(model, matrices_of(model), NativeOperators(model.config, bench.pool, FOUND[0])) is None
    assert whole_layers(model, matrices_of(model), Operators(model.config, bench.pool)) is None
