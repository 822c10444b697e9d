"""What the scheduler hands to a stage, and what comes back.

A *tile* is what runs between two yields. A *step* is one forward pass of a Work. A *Work* is one or more segments.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Segment(NamedTuple):
    """One request's share of a forward pass: `tokens` at positions first_position, first_position + 1, …

    `pages` hold positions 0 … first_position + len(tokens) - 1 of the request, in order; the first `context_tokens`
    positions are already in them. `logits_at` are the offsets in `tokens` after which a token is to be drawn,
    `scored_at` those after which the prompt goes on, and is to be told how likely its own next token was.
    """

    request_id: str
    tokens: tuple[int, ...]
    first_position: int
    context_tokens: int
    pages: tuple[int, ...]
    logits_at: tuple[int, ...]
    adapter: str | None = None
    scored_at: range = range(0)


@dataclass(frozen=True, slots=True)
class Work:
    """One step for one stage. Works are compared by identity of `id`; the id grows with every Work planned."""

    id: int
    stage: str
    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        return sum([len(segment.tokens) for segment in self.segments])


class Boundary(IntEnum):
    """What ends with a tile."""

    OPERATOR = 0  # or a part of one
    LAYER = 1


class Tile(NamedTuple):
    """Yielded by a stage when a tile is done: `number` of about `of` in this step.

    `left` names requests that have just left the step (dropped at a layer boundary): from here on the stage touches
    none of their pages.
    """

    number: int
    of: int
    operator: str
    left: tuple[str, ...] = ()
    boundary: Boundary = Boundary.OPERATOR


class TokenLogprobs(NamedTuple):
    """`logprob` of the drawn token and the best `top` (id, logprob), best first; natural logarithm."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Failure(NamedTuple):
    """Why a request gets no token: a word for a program, a sentence for a person."""

    code: str
    message: str


class Commit(NamedTuple):
    """Tokens that a step adds to a request: 0 … k of them, with logprobs beside each where asked.

    `failure` says why no token could be drawn: this request ends with it, the others in the step go on.
    `prompt_logprobs` are those of the prompt's next tokens, in order, where asked: each is told once. `vector` is what
    the whole prompt was condensed to, where that was asked. `complete`: nothing may follow these tokens.
    """

    request_id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    failure: Failure | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    vector: tuple[float, ...] = ()
    complete: bool = False


class Outcome(NamedTuple):
    """What a finished step gives back: one commit per segment that asked for logits, to draw from or to score by."""

    commits: tuple[Commit, ...]
    counters: Mapping[str, float] = {}
