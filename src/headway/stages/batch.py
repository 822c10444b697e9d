"""Segments as tensors: what every operator of a step needs to know about its rows. No padding, no mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.core.work import Segment
from headway.stages.tiling import Span

Ints = NDArray[np.int64]


class PageLists:
    """The page numbers of open requests as arrays. They grow by a page now and then, and are needed at every token."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], Ints]] = {}

    def of(self, segment: Segment) -> Ints:
        known, array = self._known.get(segment.request_id, ((), np.empty(0, np.int64)))
        if known != segment.pages:  # quick when equal: the numbers are the same objects
            grown = segment.pages[: len(known)] == known
            new = np.array(segment.pages[len(known) :] if grown else segment.pages, np.int64)
            array = np.concatenate((array, new)) if grown else new
            self._known[segment.request_id] = segment.pages, array
        return array

    def forget(self, request_id: str) -> None:
        self._known.pop(request_id, None)


@dataclass(frozen=True)
class Batch:
    """N rows, the segments' tokens one after another. `pages_N`, `slots_N`: where a row's key and value belong."""

    segments: list[Segment]
    rows: list[Span]  # of each segment
    tokens_N: Tensor
    positions_N: Tensor
    pages_N: Tensor
    slots_N: Tensor
    table: Tensor  # page numbers of all segments, one after another
    asked_rows: Tensor  # rows whose logits are asked, in order of segments
    table_lengths: list[int]
    asked_by: list[str]  # whose they are
    asked_for: list[int]  # the position of the token to be drawn, or scored, from each

    @property
    def num_rows(self) -> int:
        return self.rows[-1].end if self.rows else 0

    @cached_property
    def tables(self) -> tuple[Tensor, ...]:
        """Page numbers of each segment, in order."""
        return tuple(self.table.split(self.table_lengths))


def make_batch(segments: Sequence[Segment], page_lists: PageLists, page_tokens: int, device: torch.device) -> Batch:
    """Lay the segments out in rows. One copy to the device for all numbers, however many segments there are."""
    rows: list[Span] = []
    tokens: list[int] = []
    asked_rows: list[int] = []
    asked_by: list[str] = []
    asked_for: list[int] = []
    tables: list[Ints] = []
    for segment in segments:
        start, first = len(tokens), segment.first_position
        tokens += segment.tokens
        rows.append(Span(start, len(tokens)))
        offsets = (*segment.scored_at, *segment.logits_at)
        asked_rows += [start + offset for offset in offsets]
        asked_by += [segment.request_id] * len(offsets)
        asked_for += [first + offset + 1 for offset in offsets]
        tables.append(page_lists.of(segment)[: (first + len(segment.tokens) - 1) // page_tokens + 1])
    table = np.concatenate(tables)
    sizes = [len(segment.tokens) for segment in segments]
    lengths = [len(each) for each in tables]
    before = [segment.first_position - span.start for segment, span in zip(segments, rows, strict=True)]
    positions = np.arange(len(tokens)) + np.repeat(before, sizes)
    table_starts = np.repeat(np.cumsum([0, *lengths[:-1]]), sizes)
    numbers = (
        np.array(tokens, np.int64),
        positions,
        table[table_starts + positions // page_tokens],
        positions % page_tokens,
        table,
        np.array(asked_rows, np.int64),
    )
    there = torch.from_numpy(np.concatenate(numbers)).to(device).split([len(each) for each in numbers])
    tokens_N, positions_N, pages_N, slots_N, pages, asked = there
    return Batch(
        segments=list(segments),
        rows=rows,
        tokens_N=tokens_N,
        positions_N=positions_N,
        pages_N=pages_N,
        slots_N=slots_N,
        table=pages,
        asked_rows=asked,
        table_lengths=lengths,
        asked_by=asked_by,
        asked_for=asked_for,
    )
