"""What becomes of an engine's messages: token ids to text, text to pieces, an ending to a verdict.

Owns incremental text, stop strings, logprobs and the account of a call. Knows no HTTP and no JSON shape.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal, NamedTuple, Protocol

from headway.core.ledger import Record
from headway.core.request import Request
from headway.core.work import Commit, TokenLogprobs
from headway.models.stops import StopMatcher
from headway.models.tokenizer import Tokenizer
from headway.placement.link import EngineLink, Reply
from headway.placement.wire import Admitted, Ended
from headway.server.errors import from_record
from headway.server.intake import Ask

FinishReason = Literal["stop", "length"]


class ShownToken(NamedTuple):
    """A token of the answer with its logprobs; `offset` is where its text starts, in characters of the answer."""

    token: int
    offset: int
    logprobs: TokenLogprobs


class Piece(NamedTuple):
    """The next part of an answer that may be shown."""

    text: str
    tokens: tuple[ShownToken, ...] = ()


class Finish(NamedTuple):
    """`stop_reason` is the stop string or the stop id that ended the answer, if the caller named it."""

    reason: FinishReason
    stop_reason: str | int | None
    num_tokens: int
    record: Record


class Answer:
    """One choice on its way from tokens to text."""

    def __init__(self, ask: Ask, request: Request, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self.stopped_by: str | None = None  # a stop string; the engine is to be told
        self._request = request
        self._eos_ids = tokenizer.eos_ids
        self._stop_ids = frozenset(request.stop_ids)
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=ask.skip_special_tokens)
        self._matcher = StopMatcher(ask.stops, include_stop=ask.include_stop) if ask.stops else None
        self._num_decoded = 0  # characters
        self._num_shown = 0
        self._waiting: list[ShownToken] = []  # whose text is not shown yet

    def has_stopped(self) -> bool:
        return self.stopped_by is not None

    def take(self, commit: Commit) -> Piece | None:
        """New tokens; the piece that they complete, if any. What comes after a stop is dropped."""
        shown: list[str] = []
        for index, token in enumerate(commit.tokens):
            if self.has_stopped():
                break
            self.num_tokens += 1
            if token in self._stop_ids and self.num_tokens > self._request.min_tokens:
                break  # by the engine's own rule, the last one
            if commit.logprobs:
                self._waiting.append(ShownToken(token, self._num_decoded, commit.logprobs[index]))
            text = self._detokenizer.feed((token,))
            if text:
                shown.append(self._pass(text))
        return self._piece("".join(shown)) if shown else None

    def end(self, record: Record) -> tuple[Piece | None, Finish]:
        """The last of the text, and how it ended. Raises ApiError if there is no complete answer."""
        if self.has_stopped():
            return None, Finish("stop", self.stopped_by, self.num_tokens, record)
        if record.kind != "finished":
            raise from_record(record)
        text = self._pass(self._detokenizer.flush())
        if self._matcher is not None and not self.has_stopped():
            text += self._matcher.rest()
        piece = self._piece(text, last=not self.has_stopped())
        if self.has_stopped():
            return piece, Finish("stop", self.stopped_by, self.num_tokens, record)
        named = record.stop_id if record.stop_id not in self._eos_ids else None
        return piece, Finish("stop" if record.reason == "stop" else "length", named, self.num_tokens, record)

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


class Update(NamedTuple):
    """Something happened to one choice: more text, its ending, or both."""

    choice: int
    piece: Piece | None
    finish: Finish | None = None


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


async def updates(link: EngineLink, ask: Ask, tokenizer: Tokenizer, meter: Meter) -> AsyncGenerator[Update, None]:
    """The answers of a call as they grow; one Update with a finish per choice. Raises ApiError.

    However this ends, nothing of the call is left running at the engine.
    """
    answers = [Answer(ask, request, tokenizer) for request in ask.requests]
    open_requests = dict(enumerate(ask.requests))
    try:
        async with aclosing(_replies(link, ask.requests)) as replies:
            async for index, reply in replies:
                answer, request = answers[index], ask.requests[index]
                if isinstance(reply, Ended):
                    meter.ended(open_requests.pop(index), reply.record)
                    yield Update(index, *answer.end(reply.record))
                elif isinstance(reply, Admitted):
                    meter.admitted(request, reply.predicted_ttft_s)
                elif not answer.has_stopped():
                    meter.delivered(request, len(reply.commit.tokens))
                    piece = answer.take(reply.commit)
                    if answer.has_stopped():
                        link.stop(request.id)
                    if piece is not None:
                        yield Update(index, piece)
    finally:
        for request in open_requests.values():
            meter.abandoned(request)


async def _replies(link: EngineLink, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Reply], None]:
    """The replies to all requests, each with its place. Left early, it cancels what is open."""
    open_ids = {request.id for request in requests}
    arrived: asyncio.Queue[tuple[int, Reply | Exception]] = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []

    async def pump(index: int, request: Request) -> None:
        try:
            async for reply in link.submit(request):
                arrived.put_nowait((index, reply))
        except Exception as error:
            arrived.put_nowait((index, error))

    try:
        if len(requests) == 1:  # the common case, without a queue in between
            async for reply in link.submit(requests[0]):
                if isinstance(reply, Ended):
                    open_ids.clear()
                yield 0, reply
            return
        tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
        while open_ids:
            index, news = await arrived.get()
            if isinstance(news, Exception):
                raise news
            if isinstance(news, Ended):
                open_ids.discard(news.record.request_id)
            yield index, news
    finally:
        for task in tasks:
            task.cancel()
        for request_id in open_ids:
            link.cancel(request_id)
