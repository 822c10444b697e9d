"""From the hidden states of a prompt to one vector: their mean, or the last of them, of length one.

Owns what is known of each open prompt that wants one. A prompt may come in pieces, and a piece may come again after a
step that was given up, or all of them after its pages were taken away: pieces are kept by where they begin, so that
nothing counts twice. Sums are float64, so that how a prompt was cut does not show in the float32 of its vector.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headway.core.request import Request
from headway.core.work import Commit, Failure, Segment
from headway.stages.tiling import Span

NOT_FINITE = Failure(
    "not_finite", "The model's hidden states are not finite: its weights are damaged or overflow in this dtype."
)


@dataclass(slots=True)
class _Session:
    request: Request
    pieces: dict[int, Tensor] = field(default_factory=dict)  # by their first position, (E,), float64


class Pooler:
    """The sessions of all open requests that want a vector."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}

    def open(self, request: Request) -> None:
        if request.pooling:
            self._sessions[request.id] = _Session(request)

    def close(self, request_id: str) -> None:
        """Forget a request; one that wanted no vector is no error."""
        self._sessions.pop(request_id, None)

    def wanted(self, segment: Segment) -> Span | None:
        """Which rows of the segment go into its request's vector, counted from its first; None: no vector is wanted."""
        session = self._sessions.get(segment.request_id)
        if session is None:
            return None
        num_rows = len(segment.tokens)
        if session.request.pooling == "mean":
            return Span(0, num_rows)
        return Span(num_rows - 1, num_rows) if self._ends(session, segment) else Span(0, 0)

    def take(self, segment: Segment, sum_E: Tensor) -> Commit | None:
        """The sum of the wanted rows, float64. The vector, if these were the last."""
        session = self._sessions[segment.request_id]
        session.pieces = {first: piece for first, piece in session.pieces.items() if first < segment.first_position}
        session.pieces[segment.first_position] = sum_E
        if not self._ends(session, segment):
            return None
        total = torch.stack([session.pieces[first] for first in sorted(session.pieces)]).sum(0)
        length = float(total.norm())
        if not math.isfinite(length):
            return Commit(segment.request_id, (), failure=NOT_FINITE)
        unit = (total / length if length else total).float()
        return Commit(segment.request_id, (), vector=tuple(unit.tolist()))

    @staticmethod
    def _ends(session: _Session, segment: Segment) -> bool:
        return segment.first_position + len(segment.tokens) == len(session.request.prompt)
