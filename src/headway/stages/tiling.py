"""How long an operator may be before it is cut: tiles of rows, of columns, of queries, so that none exceeds the bound.

Rates are measured once, before the first request, and never change: the cut of a step is a function of its shape alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from headway.core.work import Segment

AIM = 0.6  # of the bound: what a tile is planned to take, so that a noisy one still keeps it
TALL_ROWS = 512  # every tile of rows reads the weights anew: rather cut columns than make tiles lower than this
MIN_COLUMNS = 64
MIN_QUERIES = 16  # fewer at a time would read keys too often: look through fewer heads at once instead
MAX_SCORE_BYTES = 8 << 20  # attention scores of a tile stay in the cache


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device does in a second."""

    linear_flops: float  # what passes a gate included, where a product ends as one
    linear_bytes: float  # of weights, when few rows use them
    attention_flops: float
    copy_bytes: float  # gathering pages, or reading them for one query
    elements: float  # of small operators between norm and attention
    activations: float  # gate and up elements, of which the MLP's middle is made
    logits: float  # from which a token is drawn, or scored, by whoever does that: the host


class Span(NamedTuple):
    start: int
    end: int


class Grid(NamedTuple):
    """Row and column spans of one linear operator; a tile is one of each."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]


class Glance(NamedTuple):
    """A block of queries of one segment over some key-value heads: `rows` in the step, `first_query` its position.

    One without rows only gathers the keys and values that those after it look at.
    """

    segment: int
    rows: Span
    first_query: int
    heads: Span


class Tiling:
    """Cuts operators into tiles that take about half of `bound_s` seconds."""

    def __init__(self, rates: Rates, bound_s: float) -> None:
        self.rates = rates
        self.aim_s = bound_s * AIM

    def linear(
        self,
        num_rows: int,
        d_in: int,
        d_out: int,
        element_bytes: int,
        highest: int | None = None,
        step: int = 1,
    ) -> Grid:
        """The grid for x (num_rows, d_in) @ (d_in, d_out), no tile of more than `highest` rows. Columns are cut at
        multiples of `step`."""
        cell_s = 2.0 * d_in / self.rates.linear_flops  # one row, one column
        read_s = d_in * element_bytes / self.rates.linear_bytes  # one column's weights
        height = min(num_rows, highest or num_rows, max(TALL_ROWS, int(self.aim_s / (cell_s * d_out))))
        narrowest = min(d_out, max(MIN_COLUMNS, step))
        if cell_s * height * narrowest > self.aim_s:
            height = max(1, int(self.aim_s / (cell_s * narrowest)))
        width = max(narrowest, int(self.aim_s / max(cell_s * height, read_s)))
        if step == 1:
            return Grid(spans(num_rows, height), spans(d_out, max(MIN_COLUMNS, width - width % MIN_COLUMNS)))
        parts = spans(ceil(d_out / step), width // step)
        return Grid(spans(num_rows, height), tuple(Span(a * step, min(d_out, b * step)) for a, b in parts))

    def linear_s(self, num_rows: int, d_in: int, d_out: int, element_bytes: int) -> float:
        """What a linear operator takes: to read its weights, or its arithmetic."""
        cells = d_in * d_out
        return max(2.0 * num_rows * cells / self.rates.linear_flops, cells * element_bytes / self.rates.linear_bytes)

    def most_active_rows(self, width: int) -> int:
        """How many rows of `width` elements the activation of the MLP may take at a time."""
        return max(1, int(self.aim_s * self.rates.activations / width))

    def elementwise(self, num_rows: int, num_elements: int) -> tuple[Span, ...]:
        """Row spans for a small operator that touches `num_elements` per row."""
        return spans(num_rows, max(1, int(self.aim_s * self.rates.elements / num_elements)))

    def draws(self, num_rows: int, vocab_size: int) -> tuple[Span, ...]:
        """Row spans of logits, from each of which the host draws a token, or scores the prompt's next one."""
        return spans(num_rows, max(1, int(self.aim_s * self.rates.logits / vocab_size)))

    def attention(
        self,
        segments: list[Segment],
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        element_bytes: int,
        window: int | None = None,
        *,
        gathers: bool = True,
    ) -> tuple[list[list[Glance]], float]:
        """Tiles of attention, each a list of glances: long prompts are cut, decoding requests share a tile. Without
        `gathers` no glance is there to copy keys and values only. And the seconds that all are planned to take."""
        tiles: list[list[Glance]] = [[]]
        taken_s = all_s = 0.0
        sizes = (num_heads, num_kv_heads, head_size, element_bytes)
        for glance, cost_s in self._glances(segments, *sizes, window, gathers):
            if tiles[-1] and taken_s + cost_s > self.aim_s:
                tiles.append([])
                taken_s = 0.0
            tiles[-1].append(glance)
            taken_s += cost_s
            all_s += cost_s
        return tiles, all_s

    def attention_s(
        self,
        segments: list[Segment],
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        element_bytes: int,
        window: int | None = None,
    ) -> float:
        """What one layer's takes at least: every key and value is read once, as fast as weights are, or every query's
        arithmetic is done, whichever takes longer."""
        num_keys = pairs = 0.0
        for segment in segments:
            n, first = len(segment.tokens), segment.first_position
            num_keys += first + n if window is None else min(first, window) + n
            pairs += n * (first + n / 2 if window is None else min(first + n / 2, window))
        rate = max(self.rates.copy_bytes, self.rates.linear_bytes)
        read_s = 2.0 * num_keys * num_kv_heads * head_size * element_bytes / rate
        return max(read_s, 4.0 * pairs * num_heads * head_size / self.rates.attention_flops)

    def _glances(
        self,
        segments: list[Segment],
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        element_bytes: int,
        window: int | None,
        gathers: bool = True,
    ) -> Iterator[tuple[Glance, float]]:
        groups = num_heads // num_kv_heads
        start = 0
        for index, segment in enumerate(segments):
            num_rows, first = len(segment.tokens), segment.first_position
            num_gathered = first + num_rows - (0 if window is None else max(0, first - window + 1))
            num_keys = num_gathered if window is None else min(num_gathered, window + MIN_QUERIES)
            # of one key-value head: copying its keys and values, reading them once for a block, one query's arithmetic
            gather_s = 2.0 * num_gathered * head_size * element_bytes / self.rates.copy_bytes if gathers else 0.0
            read_s = 2.0 * num_keys * head_size * element_bytes / self.rates.copy_bytes
            query_s = 4.0 * num_keys * groups * head_size / self.rates.attention_flops
            block_s = max(read_s, query_s * min(MIN_QUERIES, num_rows))
            heads_at_once = min(num_kv_heads, max(1, int(self.aim_s / max(gather_s, block_s))))
            for heads in spans(num_kv_heads, heads_at_once):
                num_kv = heads.end - heads.start
                if gathers:
                    yield Glance(index, Span(start, start), first, heads), gather_s * num_kv
                height = int(self.aim_s / (query_s * num_kv))
                if gathers:  # else scores never leave the processor's registers and first cache
                    height = min(height, MAX_SCORE_BYTES // (num_kv * groups * num_keys * element_bytes))
                for block in spans(num_rows, max(1, height)):
                    cost_s = max(read_s, query_s * (block.end - block.start)) * num_kv
                    yield (
                        Glance(index, Span(start + block.start, start + block.end), first + block.start, heads),
                        cost_s,
                    )
            start += num_rows


def spans(length: int, longest: int) -> tuple[Span, ...]:
    """0 … length in equal parts, none longer than `longest`."""
    count = max(1, ceil(length / max(1, longest)))
    edges = [length * part // count for part in range(count + 1)]
    return tuple(Span(start, end) for start, end in pairwise(edges))
