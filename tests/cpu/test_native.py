"""The compiled operators against torch's: the same values, and the same bits however the work is cut.

Every library that this processor can run is tried, not only the one that would be chosen.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.work import Segment
from headway.kv.pool import KVPool, PoolShape
from headway.models.config import DecoderConfig
from headway.models.decoder import Layer, Linear
from headway.models.layers import rope_table
from headway.models.presets import preset
from headway.stages import native
from headway.stages.batch import Batch, PageLists, make_batch
from headway.stages.native import FOLDER, Library, NativeOperators
from headway.stages.operators import Operators
from headway.stages.tiling import Glance, Rates, Span, Tiling

PAGES = 400
RATES = Rates(1e12, 1e12, 1e12, 1e12, 1e12, 1e12, 1e12)
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


FOUND = list(native.libraries())
pytestmark = pytest.mark.skipif(
    not FOUND, reason="nothing is compiled here: a C++ compiler was missing at installation"
)
each_library = pytest.mark.parametrize("library", FOUND, ids=lambda library: library.kind)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def shape(num_heads: int = 6, num_kv_heads: int = 2, head_size: int = 64, window: int | None = None) -> DecoderConfig:
    config = preset("smollm2-135m")
    return replace(
        config, num_layers=2, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size,
        windows=(window, None),
    )  # fmt: skip


def pool_of(config: DecoderConfig, dtype: torch.dtype, page_tokens: int = 16) -> KVPool:
    pool = KVPool(PoolShape(PAGES, 2, page_tokens, config.num_kv_heads, config.head_size, dtype))
    generator = torch.Generator().manual_seed(5)
    pool.blocks_PL2KSD.copy_(torch.randn(pool.blocks_PL2KSD.shape, generator=generator).to(dtype))
    return pool


def segments_of(sizes: list[tuple[int, int]], page_tokens: int, seed: int) -> list[Segment]:
    """(tokens, context) each, on pages that are scattered and nobody else's."""
    order = np.random.default_rng(seed).permutation(PAGES).tolist()
    made = []
    for number, (num_tokens, context) in enumerate(sizes):
        pages = tuple(order.pop() for _ in range(-(-(context + num_tokens) // page_tokens)))
        made.append(Segment(f"r{number}", tuple(range(num_tokens)), context, context, pages, ()))
    return made


def queries(config: DecoderConfig, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """As a step has them: beside the keys and values of their rows."""
    qkv = torch.randn(num_rows, config.q_size + 2 * config.kv_size).to(dtype)
    return qkv[:, : config.q_size].view(num_rows, config.num_heads, config.head_size)


def seen(
    operators: Operators, batch: Batch, q: torch.Tensor, tiles: list[list[Glance]], layer: int = 0
) -> torch.Tensor:
    """What all queries see, tile by tile."""
    y = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
    look = operators.looking(batch, 0, q, y)
    for glances in tiles:
        look(operators.prepare(batch, glances))
    return y


def tiles_of(config: DecoderConfig, batch: Batch, operators: Operators, bound_s: float = 1.0) -> list[list[Glance]]:
    heads = (config.num_heads, config.num_kv_heads, config.head_size)
    return Tiling(RATES, bound_s).attention(batch.segments, *heads, 2, config.windows[0], gathers=operators.gathers)[0]


sizes = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 300)), min_size=1, max_size=5)
heads = st.sampled_from([(6, 2, 64), (9, 3, 64), (14, 2, 64), (4, 4, 96), (8, 1, 128), (2, 2, 32)])


@each_library
@each_dtype
@settings(max_examples=25)
@given(
    sizes=sizes, heads=heads, window=st.sampled_from([None, 1, 7, 64, 100]), page_tokens=st.sampled_from([4, 16, 48])
)
def test_attention_is_that_of_torch(
    library: Library,
    dtype: torch.dtype,
    sizes: list[tuple[int, int]],
    heads: tuple[int, int, int],
    window: int | None,
    page_tokens: int,
) -> None:
    """Any mixture of prompts, chunks and single tokens, any grouping of heads, any window and size of page."""
    config = shape(*heads, window)
    if not native.suits(library, config, dtype, torch.device("cpu")):
        return
    pool = pool_of(config, dtype, page_tokens)
    if sum(-(-sum(size) // page_tokens) for size in sizes) > PAGES:
        return
    batch = make_batch(segments_of(sizes, page_tokens, 1), PageLists(), page_tokens, torch.device("cpu"))
    q = queries(config, batch.num_rows, dtype).mul_(config.head_size**-0.5)
    theirs, ours = Operators(config, pool), NativeOperators(config, pool, library)
    expected = seen(theirs, batch, q, tiles_of(config, batch, theirs))
    found = seen(ours, batch, q, tiles_of(config, batch, ours))
    torch.testing.assert_close(found, expected, **CLOSE[dtype])


@each_library
@each_dtype
@settings(max_examples=20)
@given(
    length=st.integers(2, 200),
    context=st.integers(0, 150),
    cuts=st.lists(st.integers(1, 199), max_size=4),
    window=st.sampled_from([None, 50]),
    num_threads=st.sampled_from([1, 2, 3]),
)
def test_no_cut_changes_a_bit(
    library: Library,
    dtype: torch.dtype,
    length: int,
    context: int,
    cuts: list[int],
    window: int | None,
    num_threads: int,
) -> None:
    """A prompt in one block alone; in blocks, heads one by one, beside others, on other numbers of threads; and read in
    chunks: the same bits."""
    config = shape(9, 3, 64, window)
    pool, device = pool_of(config, dtype), torch.device("cpu")
    ours = NativeOperators(config, pool, library)
    segments = segments_of([(length, context), (17, 40), (1, 222)], 16, 2)
    alone = make_batch(segments[:1], PageLists(), 16, device)
    q = queries(config, length, dtype)
    whole = seen(ours, alone, q, [[Glance(0, Span(0, length), context, Span(0, 3))]])

    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    blocks = [Span(*pair) for pair in pairwise(edges)]
    company = make_batch([segments[1], segments[0], segments[2]], PageLists(), 16, device)
    beside = torch.cat([torch.randn(17, *q.shape[1:]).to(dtype), q, torch.randn(1, *q.shape[1:]).to(dtype)])
    tiles = [[Glance(0, Span(0, 17), 40, Span(0, 3)), Glance(2, Span(17 + length, 18 + length), 222, Span(0, 3))]]
    tiles += [
        [Glance(1, Span(17 + block.start, 17 + block.end), context + block.start, Span(head, head + 1))]
        for block in blocks
        for head in range(3)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        cut = seen(ours, company, beside, tiles)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(cut[17 : 17 + length], whole)

    for block in blocks:
        chunk = segments[0]._replace(
            tokens=segments[0].tokens[block.start : block.end], first_position=context + block.start
        )
        part = make_batch([chunk], PageLists(), 16, device)
        size = block.end - block.start
        glance = Glance(0, Span(0, size), context + block.start, Span(0, 3))
        assert torch.equal(seen(ours, part, q[block.start : block.end], [[glance]]), whole[block.start : block.end])


@each_library
@each_dtype
@settings(max_examples=15)
@given(sizes=sizes, heads=heads, normed=st.booleans())
def test_keys_and_values_get_to_their_pages(
    library: Library, dtype: torch.dtype, sizes: list[tuple[int, int]], heads: tuple[int, int, int], normed: bool
) -> None:
    """Rotated as torch does it, bit by bit, with nothing else in the pool touched."""
    config = shape(*heads)
    if not native.suits(library, config, dtype, torch.device("cpu")):
        return
    pools = [pool_of(config, dtype) for _ in range(2)]
    batch = make_batch(segments_of(sizes, 16, 3), PageLists(), 16, torch.device("cpu"))
    qkv = torch.randn(batch.num_rows, config.q_size + 2 * config.kv_size).to(dtype)
    norms = [torch.rand(config.head_size).to(dtype) if normed else None for _ in range(2)]
    nothing = Linear(torch.empty(0, 0))
    layer = Layer(torch.empty(0), nothing, norms[0], norms[1], nothing, torch.empty(0), nothing, nothing)
    rope = rope_table(config, 400)
    results = []
    for operators in (Operators(config, pools[0]), NativeOperators(config, pools[1], library)):
        own = qkv.clone()
        half = batch.num_rows // 2
        for rows in (slice(0, half), slice(half, batch.num_rows)):
            if rows.start < rows.stop:
                operators.place(batch, 1, layer, rope, own, rows)
        results.append(own[:, : config.q_size])
    if not normed:
        assert torch.equal(*results)
        assert torch.equal(pools[0].blocks_PL2KSD, pools[1].blocks_PL2KSD)
    torch.testing.assert_close(results[1], results[0], **CLOSE[dtype])
    torch.testing.assert_close(pools[1].blocks_PL2KSD, pools[0].blocks_PL2KSD, **CLOSE[dtype])


@each_library
@each_dtype
@settings(max_examples=30)
@given(
    num_rows=st.integers(1, 90),
    lanes=st.integers(1, 100),
    beside=st.integers(0, 40),
    num_threads=st.integers(1, 3),
)
def test_norm_and_activation_are_those_of_torch(
    library: Library, dtype: torch.dtype, num_rows: int, lanes: int, beside: int, num_threads: int
) -> None:
    """At any width, for rows that do not follow on each other, and far from zero, where an exponential over- or
    underflows; and a row alone has the bits that it has among others."""
    config, size = shape(), lanes * library.lib.headway_lanes()
    ours, theirs = (NativeOperators(config, pool_of(config, dtype), library), Operators(config, pool_of(config, dtype)))
    x = (torch.randn(num_rows, size + beside) * 20).to(dtype)[:, :size]
    weight = torch.randn(size).to(dtype)
    wide = (torch.randn(num_rows, 2 * size) * 60).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        normed, active = ours.norm(x, weight), ours.activate(wide)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(normed, theirs.norm(x, weight), **CLOSE[dtype])
    torch.testing.assert_close(active, theirs.activate(wide), **CLOSE[dtype])
    row = num_rows // 2
    assert torch.equal(ours.norm(x[row : row + 1], weight)[0], normed[row])
    assert torch.equal(ours.activate(wide[row : row + 1])[0], active[row])


@each_library
def test_a_weight_that_is_no_number_stays_one(library: Library) -> None:
    """Damaged weights are to be noticed where tokens are drawn, not rounded away."""
    config = shape()
    ours = NativeOperators(config, pool_of(config, torch.bfloat16), library)
    x = torch.randn(2, config.hidden_size).bfloat16()
    x[1, 3] = float("nan")
    normed = ours.norm(x, torch.ones(config.hidden_size, dtype=torch.bfloat16))
    assert normed[0].isfinite().all()
    assert normed[1].isnan().all()


@each_library
@each_dtype
def test_a_score_that_is_no_number_is_not_passed_over(library: Library, dtype: torch.dtype) -> None:
    """A damaged query spoils its own row, and a damaged key the rows that see it: those, wholly, and no others."""
    config = shape(6, 2, 64)
    pool = pool_of(config, dtype)
    batch = make_batch(segments_of([(80, 30)], 16, 4), PageLists(), 16, torch.device("cpu"))
    ours = NativeOperators(config, pool, library)
    tiles = tiles_of(config, batch, ours)
    q = torch.randn(80, 6, 64).to(dtype)
    damaged = q.clone()
    damaged[7, 2, 5] = float("nan")
    spoilt = seen(ours, batch, damaged, tiles).isnan()
    expected = torch.zeros(80, 6, dtype=torch.bool)
    expected[7, 2] = True
    assert torch.equal(spoilt.all(-1), expected)
    assert torch.equal(spoilt.any(-1), expected)

    pool.blocks_PL2KSD[batch.tables[0][100 // 16], 0, 0, 1, 100 % 16, 3] = float("nan")  # position 100: row 70
    spoilt = seen(ours, batch, q, tiles).isnan()
    expected = torch.zeros(80, 6, dtype=torch.bool)
    expected[70:, 3:] = True
    assert torch.equal(spoilt.all(-1), expected)
    assert torch.equal(spoilt.any(-1), expected)


@pytest.fixture
def looks_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library is looked for again in this test, and after it."""
    monkeypatch.delenv("HEADWAY_NATIVE", raising=False)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("looks_anew")
def test_a_switch_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """HEADWAY_NATIVE=0: torch's operators, whatever is there."""
    monkeypatch.setenv("HEADWAY_NATIVE", "0")
    assert native.library() is None


@pytest.mark.usefixtures("looks_anew")
def test_an_old_library_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built from other sources has other functions: it is left alone."""
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    assert native.library() is None


@pytest.mark.usefixtures("looks_anew")
def test_nothing_compiled_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert native.library() is None


@pytest.mark.usefixtures("looks_anew")
@pytest.mark.parametrize("num_useless", range(1, len(FOUND) + 1))
@pytest.mark.parametrize("fault", ["damaged", "another's", "a folder"])
def test_a_library_that_is_of_no_use_is_passed_over(
    fault: str, num_useless: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It cannot be loaded, or lacks the functions: the next best one is taken, and in the end none."""
    for number, found in enumerate(FOUND):
        path = tmp_path / f"kernels-{found.kind}.so"
        if number >= num_useless:
            path.symlink_to(FOLDER / path.name)
        elif fault == "damaged":
            path.write_bytes((FOLDER / path.name).read_bytes()[:50])
        elif fault == "another's":
            path.symlink_to(torch._C.__file__)
        else:
            path.mkdir()
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    chosen = native.library()
    assert [chosen.kind if chosen else None] == [*(found.kind for found in FOUND[num_useless:]), None][:1]
