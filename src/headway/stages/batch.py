"""Segments as tensors: what every operator of a step needs to know about its rows. No padding, no mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.core.work import Segment
from headway.stages.tiling import Span


@dataclass(frozen=True, slots=True)
class Batch:
    """N rows, the segments' tokens one after another. `pages_N`, `slots_N`: where a row's key and value belong."""

    segments: list[Segment]
    rows: list[Span]  # of each segment
    tokens_N: Tensor
    positions_N: Tensor
    pages_N: Tensor
    slots_N: Tensor
    tables: list[Tensor]  # page numbers of each segment, in order
    asked_rows: Tensor  # rows whose logits are asked, in order of segments
    asked_by: list[str]  # whose they are
    asked_for: list[int]  # the position of the token to be drawn from each

    @property
    def num_rows(self) -> int:
        return self.rows[-1].end if self.rows else 0


def make_batch(segments: Sequence[Segment], page_tokens: int, device: torch.device) -> Batch:
    """Lay the segments out in rows."""
    rows: list[Span] = []
    tokens: list[int] = []
    asked_rows: list[int] = []
    asked_by: list[str] = []
    asked_for: list[int] = []
    positions: list[Tensor] = []
    pages: list[Tensor] = []
    tables: list[Tensor] = []
    for segment in segments:
        start = len(tokens)
        tokens += segment.tokens
        rows.append(Span(start, len(tokens)))
        asked_rows += [start + offset for offset in segment.logits_at]
        asked_by += [segment.request_id] * len(segment.logits_at)
        asked_for += [segment.first_position + offset + 1 for offset in segment.logits_at]
        where = torch.arange(segment.first_position, segment.first_position + len(segment.tokens))
        table = torch.tensor(segment.pages[: (int(where[-1]) // page_tokens) + 1])
        positions.append(where)
        pages.append(table[where // page_tokens])
        tables.append(table.to(device))
    positions_N = torch.cat(positions)
    return Batch(
        segments=list(segments),
        rows=rows,
        tokens_N=torch.tensor(tokens, device=device),
        positions_N=positions_N.to(device),
        pages_N=torch.cat(pages).to(device),
        slots_N=(positions_N % page_tokens).to(device),
        tables=tables,
        asked_rows=torch.tensor(asked_rows, dtype=torch.int64, device=device),
        asked_by=asked_by,
        asked_for=asked_for,
    )
