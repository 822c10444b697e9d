"""What becomes of an engine's messages: token ids to text, text to pieces, an ending to a verdict.

Owns incremental text, stop strings, logprobs and the account of a call. Knows no HTTP and no JSON shape.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, Protocol

import msgspec

from headway.core.ledger import Record
from headway.core.request import Request
from headway.core.work import Commit, TokenLogprobs
from headway.models.stops import StopMatcher
from headway.models.tokenizer import Tokenizer
from headway.placement.link import EngineLink, Reply
from headway.placement.wire import Admitted, Delivered, Ended
from headway.server.errors import from_record
from headway.server.intake import Ask

FinishReason = Literal["stop", "length"]


class ShownToken(NamedTuple):
    """A token of the answer with its logprobs; `offset` is where its text starts, in characters of the answer. Only
    the first of an echoed prompt has none: nothing stands before it."""

    token: int
    offset: int
    logprobs: TokenLogprobs | None


class Piece(msgspec.Struct, frozen=True):
    """The next part of an answer that may be shown."""

    text: str
    tokens: tuple[ShownToken, ...] = ()


class Finish(NamedTuple):
    """`stop_reason` is the stop string or the stop id that ended the answer, if the caller named it. `mean_logprob` is
    that of the drawn tokens, and `prompt_logprobs` are those of the prompt from its second token on, if asked for."""

    reason: FinishReason
    stop_reason: str | int | None
    num_tokens: int
    record: Record
    mean_logprob: float | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Answer:
    """One choice on its way from tokens to text; with an `echo`, behind that text of its prompt."""

    def __init__(self, ask: Ask, request: Request, tokenizer: Tokenizer, echo: str | None = None) -> None:
        self.num_tokens = 0
        self.stopped_by: str | None = None  # a stop string; the engine is to be told
        self._request = request
        self._own_stop_ids = ask.own_stop_ids
        self._stop_ids = frozenset(request.stop_ids)
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=ask.skip_special_tokens)
        self._matcher = StopMatcher(ask.stops, include_stop=ask.include_stop) if ask.stops else None
        self._lists_tokens = ask.num_logprobs is not None
        self._lists_last = echo is not None  # whoever scores a prompt counts on its tokens and all that were drawn
        self._echo = echo  # as long as it is not shown
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._logprobs: list[float] = []
        self._num_decoded = len(echo or "")  # characters
        self._num_shown = len(echo or "")
        self._waiting: list[ShownToken] = []  # whose text is not shown yet

    def has_stopped(self) -> bool:
        return self.stopped_by is not None

    def take(self, commit: Commit) -> Piece | None:
        """New tokens; the piece that they complete, if any. What comes after a stop is dropped. An echo waits for the
        first token, so that clients measure a true time to it."""
        tokens, logprobs = commit.tokens, commit.logprobs
        self._prompt_logprobs += commit.prompt_logprobs
        shown: str | None = None
        for index, token in enumerate(tokens):
            if self.stopped_by is not None:
                break
            self.num_tokens += 1
            is_last = token in self._stop_ids and self.num_tokens > self._request.min_tokens  # by the engine's own rule
            if logprobs:
                self._note(token, logprobs[index], is_last=is_last)
            if is_last:
                break
            text = self._detokenizer.feed((token,))
            if text:
                shown = (shown or "") + self._pass(text)
        piece = None if shown is None else self._piece(shown)
        return piece if self._echo is None or not tokens else self._behind_echo(piece)

    def end(self, record: Record) -> tuple[Piece | None, Finish]:
        """The last of the text, and how it ended. Raises ApiError if there is no complete answer."""
        if self.has_stopped():
            return None, self._finish("stop", self.stopped_by, record)
        if record.kind != "finished":
            raise from_record(record)
        text = self._pass(self._detokenizer.flush())
        if self._matcher is not None and not self.has_stopped():
            text += self._matcher.rest()
        piece = self._behind_echo(self._piece(text, last=not self.has_stopped()))
        if self.has_stopped():
            return piece, self._finish("stop", self.stopped_by, record)
        named = record.stop_id if record.stop_id not in self._own_stop_ids else None
        return piece, self._finish("stop" if record.reason == "stop" else "length", named, record)

    def _finish(self, reason: FinishReason, stop_reason: str | int | None, record: Record) -> Finish:
        mean_logprob = sum(self._logprobs) / len(self._logprobs) if self._logprobs else None
        return Finish(reason, stop_reason, self.num_tokens, record, mean_logprob, tuple(self._prompt_logprobs))

    def _note(self, token: int, logprobs: TokenLogprobs, *, is_last: bool) -> None:
        self._logprobs.append(logprobs.logprob)
        if self._lists_tokens and (self._lists_last or not is_last):
            self._waiting.append(ShownToken(token, self._num_decoded, logprobs))

    def _behind_echo(self, piece: Piece | None) -> Piece | None:
        """With the prompt before it, if that is still to be shown."""
        if self._echo is None:
            return piece
        text, self._echo = self._echo, None
        tokens = self._prompt_tokens(text) if self._lists_tokens else ()
        return Piece(text, tokens) if piece is None else Piece(text + piece.text, tokens + piece.tokens)

    def _prompt_tokens(self, text: str) -> tuple[ShownToken, ...]:
        detokenizer = self._tokenizer.detokenizer(skip_special_tokens=False)
        offsets, num_decoded = [], 0
        for token in self._request.prompt:
            offsets.append(num_decoded)
            num_decoded += len(detokenizer.feed((token,)))
        before = num_decoded + len(detokenizer.flush()) - len(text)  # a mark or a space that the model wants in front
        logprobs = (None, *self._prompt_logprobs)
        return tuple(
            ShownToken(token, min(max(0, offset - before), len(text)), about)
            for token, offset, about in zip(self._request.prompt, offsets, logprobs, strict=True)
        )

    def _pass(self, text: str) -> str:
        """What of this text may be shown now."""
        self._num_decoded += len(text)
        if self._matcher is None or self.num_tokens <= self._request.min_tokens:
            return text
        passed = self._matcher.feed(text)
        self.stopped_by = passed.stop
        return passed.text

    def _piece(self, text: str, *, last: bool = False) -> Piece | None:
        self._num_shown += len(text)
        if not self._waiting:
            return Piece(text) if text else None
        ready = [token for token in self._waiting if last or token.offset < self._num_shown]
        self._waiting = self._waiting[len(ready) :]
        return Piece(text, tuple(ready)) if text or ready else None


class Update(msgspec.Struct, frozen=True):
    """Something happened to one choice, which has `num_tokens` by now: more text, its ending, or both."""

    choice: int
    piece: Piece | None
    finish: Finish | None = None
    num_tokens: int = 0


class Meter(Protocol):
    """Who wants to know how answers go."""

    def admitted(self, request: Request, predicted_ttft_s: float) -> None:
        """The engine took it in, and expects its first token so long after its arrival."""

    def delivered(self, request: Request, num_tokens: int) -> None:
        """So many more tokens have come, just now."""

    def ended(self, request: Request, record: Record) -> None:
        """The last word about a request, whatever it is."""

    def abandoned(self, request: Request) -> None:
        """Nobody waited for the last word."""


async def converse(
    link: EngineLink, ask: Ask, tokenizer: Tokenizer, meter: Meter, tell: Callable[[Update], None]
) -> None:
    """Tell the answers of a call as they grow, each piece in the moment it comes; one Update with a finish per choice.
    Raises ApiError.

    However this ends, nothing of the call is left running at the engine.
    """
    answers = [Answer(ask, request, tokenizer, ask.echo_of(place)) for place, request in enumerate(ask.requests)]
    open_requests = dict(enumerate(ask.requests))

    def hear(place: int, reply: Reply) -> None:
        answer, request = answers[place], ask.requests[place]
        if isinstance(reply, Delivered):
            if answer.has_stopped():
                return
            commit = reply.commit
            if commit.tokens:
                meter.delivered(request, len(commit.tokens))
            piece = answer.take(commit)
            if answer.has_stopped():
                link.stop(request.id)
            if piece is not None:
                tell(Update(place, piece, num_tokens=answer.num_tokens))
        elif isinstance(reply, Admitted):
            meter.admitted(request, reply.predicted_ttft_s)
        else:
            meter.ended(open_requests.pop(place), reply.record)
            tell(Update(place, *answer.end(reply.record), answer.num_tokens))

    try:
        await hear_out(link, ask.requests, hear)
    finally:
        for request in open_requests.values():
            meter.abandoned(request)


def shown_answers(ask: Ask, answers: Sequence[list[Update]]) -> list[list[Update]]:
    """Those to be shown, of complete answers in the order of the requests: all, or of each prompt the ones that are
    likeliest per token, best first."""
    if ask.num_answers == ask.num_drawn:
        return list(answers)
    shown: list[list[Update]] = []
    for start in range(0, len(answers), ask.num_drawn):
        ranked = sorted(answers[start : start + ask.num_drawn], key=_mean_logprob, reverse=True)
        shown += ranked[: ask.num_answers]
    return shown


def _mean_logprob(updates: list[Update]) -> float:
    finish = updates[-1].finish
    return -math.inf if finish is None or finish.mean_logprob is None else finish.mean_logprob


async def hear_out(link: EngineLink, requests: Sequence[Request], hear: Callable[[int, Reply], None]) -> None:
    """Submit them and have each reply heard with its request's place, until all have ended. What `hear` raises is
    raised here. Left early, it cancels what is open, and nothing more is heard."""
    open_ids = {request.id for request in requests}
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def heard(place: int, reply: Reply) -> None:
        if over.done():
            return
        if isinstance(reply, Ended):
            open_ids.discard(reply.record.request_id)
        try:
            hear(place, reply)
        except Exception as error:
            over.set_exception(error)
        else:
            if not open_ids:
                over.set_result(None)

    try:
        for place, request in enumerate(requests):
            link.submit(request, partial(heard, place))
        await over
    finally:
        over.cancel()
        for request_id in open_ids:
            link.cancel(request_id)
