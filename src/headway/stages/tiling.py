"""How long an operator may be before it is cut: tiles of rows, of columns, of queries, so that none exceeds the bound.

Rates are measured once, before the first request, and never change: the cut of a step is a function of its shape alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from headway.core.work import Segment

AIM = 0.5  # of the bound: what a tile is planned to take, so that a noisy one still keeps it
MIN_ROWS = 64  # lower linear tiles would read the weights too often to be efficient: cut columns instead
MIN_QUERIES = 16
MAX_SCORE_BYTES = 8 << 20  # attention scores of a tile stay in the cache


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device does in a second."""

    linear_flops: float
    linear_bytes: float  # of weights, when few rows use them
    attention_flops: float
    copy_bytes: float  # gathering pages
    elements: float  # of small operators


class Span(NamedTuple):
    start: int
    end: int


class Grid(NamedTuple):
    """Row and column spans of one linear operator; a tile is one of each."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]


class Glance(NamedTuple):
    """A block of queries of one segment over some key-value heads: `rows` in the step, `first_query` its position."""

    segment: int
    rows: Span
    first_query: int
    heads: Span


class Tiling:
    """Cuts operators into tiles that take about half of `bound_s` seconds."""

    def __init__(self, rates: Rates, bound_s: float) -> None:
        self.rates = rates
        self.aim_s = bound_s * AIM

    def linear(self, num_rows: int, d_in: int, d_out: int, element_bytes: int) -> Grid:
        """The grid for x (num_rows, d_in) @ (d_in, d_out)."""
        flops = 2.0 * d_in * self.rates.linear_flops**-1
        bytes_ = d_in * element_bytes * self.rates.linear_bytes**-1
        height = max(MIN_ROWS, int(self.aim_s / (flops * d_out)))
        height = min(height, num_rows)
        width = int(self.aim_s / max(flops * height, bytes_))
        return Grid(spans(num_rows, height), spans(d_out, max(64, width - width % 64)))

    def elementwise(self, num_rows: int, num_elements: int) -> tuple[Span, ...]:
        """Row spans for an operator that touches `num_elements` per row."""
        return spans(num_rows, max(1, int(self.aim_s * self.rates.elements / num_elements)))

    def attention(
        self,
        segments: list[Segment],
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        element_bytes: int,
    ) -> list[list[Glance]]:
        """Tiles of attention, each a list of glances: long prompts are cut, decoding requests share a tile."""
        tiles: list[list[Glance]] = [[]]
        taken_s = 0.0
        for glance, cost_s in self._glances(segments, num_heads, num_kv_heads, head_size, element_bytes):
            if tiles[-1] and taken_s + cost_s > self.aim_s:
                tiles.append([])
                taken_s = 0.0
            tiles[-1].append(glance)
            taken_s += cost_s
        return tiles

    def _glances(
        self, segments: list[Segment], num_heads: int, num_kv_heads: int, head_size: int, element_bytes: int
    ) -> Iterator[tuple[Glance, float]]:
        groups = num_heads // num_kv_heads
        row = 0
        for index, segment in enumerate(segments):
            num_rows = len(segment.tokens)
            num_keys = segment.first_position + num_rows
            gather_s = 2.0 * num_keys * head_size * element_bytes / self.rates.copy_bytes  # one key-value head
            query_s = 4.0 * num_keys * groups * head_size / self.rates.attention_flops  # one row, one such head
            heads_at_once = min(
                num_kv_heads,
                max(1, int(0.5 * self.aim_s / gather_s)),
                max(1, int(0.5 * self.aim_s / (query_s * min(MIN_QUERIES, num_rows)))),
            )
            for heads in spans(num_kv_heads, heads_at_once):
                num_kv = heads.end - heads.start
                height = int((self.aim_s - gather_s * num_kv) / (query_s * num_kv))
                height = min(height, MAX_SCORE_BYTES // (num_kv * groups * num_keys * element_bytes))
                for number, block in enumerate(spans(num_rows, max(MIN_QUERIES, height))):
                    cost_s = query_s * num_kv * (block.end - block.start) + (gather_s * num_kv if number == 0 else 0)
                    rows = Span(row + block.start, row + block.end)
                    yield Glance(index, rows, segment.first_position + block.start, heads), cost_s
            row += num_rows


def spans(length: int, longest: int) -> tuple[Span, ...]:
    """0 … length in equal parts, none longer than `longest`."""
    count = max(1, ceil(length / max(1, longest)))
    edges = [length * part // count for part in range(count + 1)]
    return tuple(Span(start, end) for start, end in pairwise(edges))
