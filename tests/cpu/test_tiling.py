"""How operators are cut: every cell is covered exactly once, and no tile is planned longer than the bound."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.work import Segment
from headway.stages.recorded import Part, most_layers
from headway.stages.tiling import AIM, MIN_QUERIES, Rates, Tiling, spans

RATES = st.builds(
    Rates,
    linear_flops=st.floats(1e9, 1e14),
    linear_bytes=st.floats(1e8, 1e12),
    attention_flops=st.floats(1e8, 1e14),
    copy_bytes=st.floats(1e8, 1e12),
    elements=st.floats(1e6, 1e11),
    activations=st.floats(1e6, 1e11),
    logits=st.floats(1e6, 1e11),
)


@given(st.integers(0, 5000), st.integers(1, 6000))
def test_spans_cover_everything_once_in_near_equal_parts(length, longest):
    parts = spans(length, longest)
    assert parts[0].start == 0
    assert parts[-1].end == length
    assert all(one.end == two.start for one, two in pairwise(parts))
    sizes = [part.end - part.start for part in parts]
    assert max(sizes) <= longest
    assert max(sizes) - min(sizes) <= 1


@given(RATES, st.integers(1, 9000), st.sampled_from((64, 896, 4096)), st.sampled_from((64, 9728, 151936)))
def test_a_linear_tile_is_planned_within_the_bound(rates, num_rows, d_in, d_out):
    """Unless it is the smallest that is ever cut: one row by 64 columns."""
    tiling = Tiling(rates, 0.010)
    grid = tiling.linear(num_rows, d_in, d_out, 2)
    assert grid.rows[-1].end == num_rows
    assert grid.columns[-1].end == d_out
    height = max(rows.end - rows.start for rows in grid.rows)
    width = max(columns.end - columns.start for columns in grid.columns)
    compute_s, read_s = 2 * height * width * d_in / rates.linear_flops, width * d_in * 2 / rates.linear_bytes
    assert compute_s <= 0.010 * AIM * 1.01 or (height == 1 and width <= 64)
    assert read_s <= 0.010 * AIM * 1.01 or width <= 64


@settings(deadline=None)
@given(RATES, st.lists(st.tuples(st.integers(1, 700), st.integers(0, 3000)), min_size=1, max_size=6))
def test_every_query_looks_once_through_every_head(rates, shapes):
    """Whatever the mixture of prompts, chunks and single tokens: each (row, key-value head) is in one glance."""
    segments = [
        Segment(f"r{number}", tuple(range(length)), context, context, (), ())
        for number, (length, context) in enumerate(shapes)
    ]
    seen = set()
    for tile in Tiling(rates, 0.010).attention(segments, 8, 2, 64, 2)[0]:
        assert tile, "an empty tile"
        for glance in tile:
            start = sum(len(segment.tokens) for segment in segments[: glance.segment])
            assert glance.first_query == segments[glance.segment].first_position + glance.rows.start - start
            for row in range(glance.rows.start, glance.rows.end):
                for head in range(glance.heads.start, glance.heads.end):
                    assert (row, head) not in seen
                    seen.add((row, head))
    assert len(seen) == 2 * sum(length for length, _ in shapes)


def test_a_long_prompt_is_cut_into_small_blocks_of_queries():
    """8192 tokens on a machine that does 200 GFLOP/s in attention: blocks of a few dozen queries at most."""
    rates = Rates(4e11, 1.5e10, 2e11, 5e9, 1e8, 1e8, 1e8)
    segment = Segment("r", tuple(range(8192)), 0, 0, (), ())
    tiles = Tiling(rates, 0.010).attention([segment], 14, 2, 64, 2)[0]
    heights = [glance.rows.end - glance.rows.start for tile in tiles for glance in tile]
    assert MIN_QUERIES <= max(heights) <= 64


@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("context", [0, 8192, 32768, 131072])
@pytest.mark.parametrize("length", [1, 64, 8192])
def test_no_glance_is_planned_longer_than_the_bound(length, context, window):
    """Llama-3.2-1B's heads on a 2-core machine: prompts, chunks and tokens, up to the model's whole context."""
    rates = Rates(4e11, 1.5e10, 1.7e11, 1e10, 6e8, 6e8, 1e8)
    segment = Segment("r", tuple(range(length)), context, context, (), ())
    tiling = Tiling(rates, 0.010)
    costs = [cost_s for _, cost_s in tiling._glances([segment], 32, 8, 64, 2, window)]
    assert max(costs) <= 0.010
    straight = list(tiling._glances([segment], 32, 8, 64, 2, window, gathers=False))
    assert max(cost_s for _, cost_s in straight) <= 0.010
    assert all(glance.rows.start < glance.rows.end for glance, _ in straight), "nothing is only gathered"
    if window is not None and context > window:
        unlimited = tiling._glances([segment], 32, 8, 64, 2, None)
        assert sum(costs) < sum(cost_s for _, cost_s in unlimited), "a window's keys are fewer"


def test_attention_is_foreseen_as_its_tiles_are():
    """What a layer's takes in all, for tokens behind long contexts and for prompts, is about what its glances take."""
    rates = Rates(4e11, 1.5e10, 1.7e11, 1e10, 6e8, 6e8, 1e8)
    tiling = Tiling(rates, 0.010)
    for lengths in ([(1, 8192)] * 16, [(1, 131072)], [(512, 0)], [(256, 4096), (64, 0)]):
        segments = [Segment(f"r{n}", (0,) * length, at, at, (), ()) for n, (length, at) in enumerate(lengths)]
        in_tiles = sum(cost_s for _, cost_s in tiling._glances(segments, 32, 8, 64, 2, None, gathers=False))
        assert 0.4 * in_tiles <= tiling.attention_s(segments, 32, 8, 64, 2) <= 1.1 * in_tiles


def test_rows_are_drawn_from_as_many_at_a_time_as_keep_the_bound():
    """A draw from 150,000 logits takes 1.5 ms at this rate: four of them in the 6 ms that a tile is planned to take."""
    tiling = Tiling(Rates(1e14, 1e12, 1e12, 1e10, 1e12, 1e12, 1e8), 0.010)
    parts = tiling.draws(32, 150_000)
    assert max(rows.end - rows.start for rows in parts) == 4
    assert [parts[0].start, parts[-1].end] == [0, 32]


def test_the_longest_part_of_a_recording():
    """Parts say how many layers are done after them; the last one, the head, adds none."""
    parts = [Part("layers", 3, lambda: None), Part("layers", 5, lambda: None), Part("head", 5, lambda: None)]
    assert most_layers(parts) == 3


def test_the_middle_of_the_mlp_is_cut_by_what_the_activation_costs():
    """Fast matrix products and slow small operators: the height of a tile follows the slower of the two."""
    tiling = Tiling(Rates(1e14, 1e12, 1e12, 1e10, 2e8, 2e8, 1e8), 0.010)
    grid = tiling.linear(4096, 896, 9728, 2, highest=tiling.most_active_rows(9728))
    assert max(rows.end - rows.start for rows in grid.rows) * 9728 <= 0.010 * AIM * 2e8
