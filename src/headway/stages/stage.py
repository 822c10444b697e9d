"""The contract between a stage and whoever drives it, and the fake that ships beside the real ones.

A stage knows no scheduler and no clock: it runs a Work to the end, yielding after every tile. The yield is always a
safe point: the caller may resume it, run another Work first, or close it for good.
"""

from collections.abc import Callable, Generator
from typing import Protocol

from headway.core.request import Request
from headway.core.work import Boundary, Commit, Outcome, Segment, Tile, TokenLogprobs, Work

Running = Generator[Tile, None, Outcome]


class Stage(Protocol):
    """Anything that turns Works into Outcomes."""

    def open(self, request: Request) -> None:
        """A request may appear in Works from now on."""

    def close(self, request_id: str) -> None:
        """It will not appear again."""

    def run(self, work: Work) -> Running:
        """One step. Tiles are numbered from 0; nothing happens before the first `next`."""

    def drop(self, work_id: int, request_id: str) -> None:
        """The member is to leave at the next layer boundary; the tile yielded there names it in `left`."""


class FakeStage:
    """A stage with arithmetic that can be done by hand, and a memory that shows when pages are mixed up.

    Its pages hold tokens instead of keys and values. The next token of a request is
    `next_token(all its tokens so far)`, read back from its pages: whoever gets another's page, or a page given away
    too early, answers wrongly. Token t of a prompt has the logprob -t / 1000; its vector is the next token and 1. A
    step has `num_layers` layers of `tiles_per_layer` tiles; before each tile ends, `spend(num_tokens)` is called, where
    a simulation advances its clock.
    """

    VOCABULARY = 1009

    def __init__(
        self,
        page_tokens: int,
        num_layers: int = 4,
        tiles_per_layer: int = 3,
        spend: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
        self.page_tokens = page_tokens
        self.num_layers = num_layers
        self.tiles_per_layer = tiles_per_layer
        self.spend = spend
        self.memory: dict[tuple[int, int], int] = {}  # (page, offset in it) -> token
        self.open_requests: set[str] = set()
        self._requests: dict[str, Request] = {}
        self._leaving: dict[int, set[str]] = {}

    @classmethod
    def next_token(cls, tokens: tuple[int, ...]) -> int:
        """Depends on every token and on its place."""
        return sum((place + 1) * (token + 1) for place, token in enumerate(tokens)) % cls.VOCABULARY

    def open(self, request: Request) -> None:
        assert request.id not in self.open_requests
        self.open_requests.add(request.id)
        self._requests[request.id] = request

    def close(self, request_id: str) -> None:
        self.open_requests.discard(request_id)
        self._requests.pop(request_id, None)

    def drop(self, work_id: int, request_id: str) -> None:
        self._leaving.setdefault(work_id, set()).add(request_id)

    def run(self, work: Work) -> Running:
        segments = list(work.segments)
        assert all(segment.request_id in self.open_requests for segment in segments)
        of = self.num_layers * self.tiles_per_layer
        number = 0
        try:
            for _ in range(self.num_layers):
                leaving = self._leaving.pop(work.id, set())
                segments = [segment for segment in segments if segment.request_id not in leaving]
                left = tuple(sorted(leaving))
                for segment in segments:
                    self._write(segment)
                for place in range(self.tiles_per_layer):
                    self.spend(sum(len(segment.tokens) for segment in segments))
                    ends = Boundary.LAYER if place == self.tiles_per_layer - 1 else Boundary.OPERATOR
                    yield Tile(number, of, "fake", left, ends)
                    number, left = number + 1, ()
            commits = map(self._commit, segments)
            return Outcome(tuple(commit for commit in commits if any(commit[1:])))
        finally:
            self._leaving.pop(work.id, None)

    def _write(self, segment: Segment) -> None:
        for offset, token in enumerate(segment.tokens):
            page, slot = divmod(segment.first_position + offset, self.page_tokens)
            self.memory[segment.pages[page], slot] = token

    def _commit(self, segment: Segment) -> Commit:
        request = self._requests[segment.request_id]
        first, prompt = segment.first_position + 1, request.prompt
        scores = tuple(TokenLogprobs(-prompt[first + offset] / 1000, ()) for offset in segment.scored_at)
        drawn = (self.next_token(self._written(segment)),) if segment.logits_at else ()
        ends = segment.first_position + len(segment.tokens) == len(prompt)
        vector = (float(self.next_token(self._written(segment))), 1.0) if request.pooling and ends else ()
        return Commit(segment.request_id, drawn, prompt_logprobs=scores, vector=vector)

    def _written(self, segment: Segment) -> tuple[int, ...]:
        """All tokens of the request, up to the end of the segment."""
        end = segment.first_position + len(segment.tokens)
        places = (divmod(position, self.page_tokens) for position in range(end))
        return tuple(self.memory[segment.pages[page], slot] for page, slot in places)
