"""The JSON of answers, whole and as the chunks of a stream: what all shapes share, and that of completions.

Knows no HTTP and no engine. Chats are in `chat_shapes`, responses in `responses_shapes`.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from headway.core.work import TokenLogprobs
from headway.models.tokenizer import Tokenizer
from headway.server.intake import Ask
from headway.server.stream import Finish, Piece, ShownToken, Update
from headway.server.verdict import SloReport, milliseconds, reports, targets_met

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say
_encode = msgspec.json.Encoder().encode


class Timing(msgspec.Struct):
    """Our extension of usage: what was understood, predicted, measured and met. Of several answers the slowest
    counts."""

    slo_class: str | None
    tenant: str | None
    priority: int
    predicted_ttft_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    queue_ms: float | None
    total_ms: float | None
    preemptions: int
    recomputes: int
    cached_tokens: int
    slo_met: bool | None  # None: no target was asked for
    slo: dict[str, SloReport]


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptDetails
    headway: Timing


class RunningUsage(msgspec.Struct):
    """Of one choice, so far."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class PromptLogprob(msgspec.Struct):
    """A candidate for a place in the prompt; the `rank` of one that is not among the best is not known."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id; the first token has none


class CompletionLogprobs(msgspec.Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


AnyUsage = Usage | RunningUsage | UnsetType | None


class Envelope(msgspec.Struct):
    """Around choices of any kind, whole or in chunks."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: AnyUsage = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Shape(Protocol):
    """One of the forms that the same answers can take."""

    def chunks(self, update: Update) -> list[bytes]:
        """The stream's next events, as JSON."""

    def usage_chunk(self, usage: Usage) -> bytes:
        """The stream's last event, for callers who asked for it."""

    def whole(self, answers: Sequence[list[Update]], usage: Usage) -> bytes:
        """Everything at once: for each choice its updates in order."""


def usage_of(ask: Ask, finishes: Sequence[Finish]) -> Usage:
    """The account of a call: a prompt counts once, however many answers it gets."""
    records = [finish.record for finish in finishes]
    samples = ask.num_drawn
    prompt_tokens = sum(len(request.prompt) for request in ask.requests[::samples])
    cached_tokens = sum(record.num_cached_tokens for record in records[::samples])
    completion_tokens = sum(
        finish.num_tokens for finish in finishes
    )  # a stop string may leave out some that were drawn
    queue_s = [r.first_scheduled - r.arrival for r in records if r.first_scheduled is not None]
    predicted_s = [r.predicted_ttft_s for r in records if r.predicted_ttft_s is not None]
    asked = ask.requests[0]
    timing = Timing(
        slo_class=asked.slo_class or None,
        tenant=asked.tenant or None,
        priority=asked.priority,
        predicted_ttft_ms=milliseconds(max(predicted_s, default=None)),
        ttft_ms=milliseconds(max((r.ttft_s for r in records if r.ttft_s is not None), default=None)),
        tpot_ms=milliseconds(max((r.tpot_s for r in records if r.tpot_s is not None), default=None)),
        queue_ms=milliseconds(max(queue_s, default=None)),
        total_ms=milliseconds(max((r.ended - r.arrival for r in records if r.ended is not None), default=None)),
        preemptions=sum(record.num_preemptions for record in records),
        recomputes=sum(record.num_recomputes for record in records),
        cached_tokens=cached_tokens,
        slo_met=targets_met(records),
        slo=reports(records),
    )
    total_tokens = prompt_tokens + completion_tokens
    return Usage(prompt_tokens, total_tokens, completion_tokens, PromptDetails(cached_tokens), timing)


class CompletionShape:
    """/v1/completions"""

    def __init__(self, ask: Ask, tokenizer: Tokenizer) -> None:
        self._ask = ask
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._around: dict[int, Around] = {}  # choice -> what is around its text

    def chunks(self, update: Update) -> list[bytes]:
        bare = bare_text(update)
        if bare is not None and not self._ask.continuous_usage:
            around = self._around.get(update.choice)
            if around is None:
                empty = self._envelope([CompletionChoice(update.choice, "")], usage_so_far(self._ask, update))
                around = self._around[update.choice] = Around.of(empty, b'"text":""')
            return [around.spell(bare)]
        text = update.piece.text if update.piece is not None else ""
        choice = CompletionChoice(update.choice, text, self._logprobs([update]))
        return [self._envelope([self._finished(choice, update.finish)], usage_so_far(self._ask, update))]

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._envelope([], usage)

    def whole(self, answers: Sequence[list[Update]], usage: Usage) -> bytes:
        choices = []
        for index, updates in enumerate(answers):
            choice = CompletionChoice(index, text_of(updates), self._logprobs(updates))
            choice.prompt_logprobs = prompt_logprobs_of(self._ask, updates, self._tokenizer)
            choices.append(self._finished(choice, updates[-1].finish))
        return self._envelope(choices, usage)

    @staticmethod
    def _finished(choice: CompletionChoice, finish: Finish | None) -> CompletionChoice:
        if finish is not None:
            choice.finish_reason, choice.stop_reason = finish.reason, finish.stop_reason
        return choice

    def _envelope(self, choices: list[CompletionChoice], usage: AnyUsage) -> bytes:
        return _encode(Envelope(self._ask.id, "text_completion", self._created, self._ask.model, choices, usage))

    def _logprobs(self, updates: Sequence[Update]) -> CompletionLogprobs | None:
        shown = shown_tokens(updates)
        if not shown and not always_has_logprobs(self._ask):
            return None
        spell = self._tokenizer.token_text
        found = CompletionLogprobs([], [], [], [])
        for token, offset, logprobs in shown:
            found.text_offset.append(offset)
            found.tokens.append(spell(token))
            found.token_logprobs.append(None if logprobs is None else finite(logprobs.logprob))
            found.top_logprobs.append(None if logprobs is None else self._best(token, logprobs))
        return found

    def _best(self, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
        spell = self._tokenizer.token_text
        best: dict[str, float] = {}
        for other, logprob in (*logprobs.top[: self._ask.num_logprobs], (token, logprobs.logprob)):
            best.setdefault(spell(other), finite(logprob))  # the first of equal spellings is the likeliest
        return best


class Around(NamedTuple):
    """The JSON before and after a text that is all that differs between chunks: written once for a stream."""

    before: bytes
    after: bytes

    @classmethod
    def of(cls, empty: bytes, field: bytes) -> "Around":
        """From a chunk whose text is empty, which is where `field` stands: no string can hold these quotes."""
        before, after = empty.split(field)
        return cls(before + field[: -len(b'""')], after)

    def spell(self, text: str) -> bytes:
        return b"%b%b%b" % (self.before, _encode(text), self.after)


def bare_text(update: Update) -> str | None:
    """The text of an update that is nothing else, as almost every one is."""
    piece = update.piece
    return piece.text if update.finish is None and piece is not None and not piece.tokens else None


def usage_so_far(ask: Ask, update: Update) -> AnyUsage:
    """What a chunk says of it: nothing, null, or the choice's tokens by now."""
    if not ask.include_usage:
        return UNSET
    if not ask.continuous_usage:
        return None
    num_prompt = len(ask.requests[update.choice].prompt)
    return RunningUsage(num_prompt, num_prompt + update.num_tokens, update.num_tokens)


def prompt_logprobs_of(ask: Ask, updates: Sequence[Update], tokenizer: Tokenizer) -> PromptLogprobs | UnsetType:
    """Of one answer's prompt, in vLLM's shape, if they were asked for by their own name."""
    finish, num_top = updates[-1].finish, ask.num_prompt_logprobs
    if finish is None or num_top is None:
        return UNSET
    found: PromptLogprobs = [None]
    prompt = ask.requests[updates[-1].choice].prompt
    for token, logprobs in zip(prompt[1:], finish.prompt_logprobs, strict=True):
        place = {
            str(other): PromptLogprob(finite(logprob), rank, tokenizer.token_text(other))
            for rank, (other, logprob) in enumerate(logprobs.top[:num_top], 1)
        }
        place.setdefault(str(token), PromptLogprob(finite(logprobs.logprob), None, tokenizer.token_text(token)))
        found.append(place)
    return found


def text_of(updates: Sequence[Update]) -> str:
    return "".join(update.piece.text for update in updates if update.piece is not None)


def shown_tokens(updates: Sequence[Update]) -> list[ShownToken]:
    pieces: list[Piece] = [update.piece for update in updates if update.piece is not None]
    return [token for piece in pieces for token in piece.tokens]


def always_has_logprobs(ask: Ask) -> bool:
    """A whole answer that asked for them has the field even if it shows no token; a chunk without tokens has not."""
    return ask.num_logprobs is not None and not ask.stream


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
