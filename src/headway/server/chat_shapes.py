"""The JSON of /v1/chat/completions: whole, and as the chunks of a stream. Knows no HTTP and no engine.

Where an answer may call tools, its text is read as it comes: what is outside of calls is content, a call is told by its
name first and then by its arguments piece by piece.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from headway.grammar.calls import Argued, Called, Heard, Reader, Reading, Said
from headway.models.tokenizer import Tokenizer
from headway.server.intake import Ask
from headway.server.messages import CalledFunction, ToolCall
from headway.server.shapes import (
    AnyUsage,
    Around,
    Envelope,
    PromptLogprobs,
    Usage,
    always_has_logprobs,
    bare_text,
    finite,
    prompt_logprobs_of,
    shown_tokens,
    text_of,
    usage_so_far,
)
from headway.server.stream import Finish, ShownToken, Update
from headway.server.tools import call_id

_encode = msgspec.json.Encoder().encode


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class CallDelta(msgspec.Struct, omit_defaults=True):
    """Id, type and name once, then pieces of the arguments."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatShape:
    """/v1/chat/completions. The role goes out with the first token, so that clients measure a true time to it."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer) -> None:
        self._ask = ask
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._begun: set[int] = set()
        self._around: dict[int, Around] = {}  # choice -> what is around its text
        self._readers: dict[int, Reader] = {}

    def chunks(self, update: Update) -> list[bytes]:
        index, finish, ask = update.choice, update.finish, self._ask
        bare = bare_text(update)
        if bare is not None and index in self._around:
            return [self._around[index].spell(bare)]
        usage = usage_so_far(ask, update)
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(self._chunk(ChatChunkChoice(index, Delta("assistant", "")), usage))
            if ask.calls is None and not ask.continuous_usage:
                empty = self._chunk(ChatChunkChoice(index, Delta(content="")), usage)
                self._around[index] = Around.of(empty, b'"content":""')
        deltas = self._deltas(update)
        logprobs = self._logprobs([update])
        if not deltas and (finish is not None or logprobs is not None):
            deltas = [Delta()]
        choices = [ChatChunkChoice(index, delta) for delta in deltas]
        if choices:
            choices[0].logprobs = logprobs
        if finish is not None:
            choices[-1].finish_reason, choices[-1].stop_reason = self._reason(index, finish), finish.stop_reason
        return chunks + [self._chunk(choice, usage) for choice in choices]

    def _deltas(self, update: Update) -> list[Delta]:
        text = "" if update.piece is None else update.piece.text
        if self._ask.calls is None:
            return [] if update.piece is None else [Delta(content=text)]
        reader = self._readers.setdefault(update.choice, Reader(self._ask.calls))
        deltas, heard = [], reader.feed(text)
        number = reader.num_calls - sum(isinstance(one, Called) for one in heard) - 1
        for one in heard if update.finish is None else heard + reader.end():
            number += isinstance(one, Called)
            deltas.append(_delta(one, number, self._ask.calls))
        return deltas

    def _reason(self, index: int, finish: Finish) -> str:
        reader = self._readers.get(index)
        called = reader is not None and reader.num_calls > 0
        return "tool_calls" if called and finish.reason == "stop" else finish.reason

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._envelope("chat.completion.chunk", [], usage)

    def whole(self, answers: Sequence[list[Update]], usage: Usage) -> bytes:
        choices = [self._choice(index, updates) for index, updates in enumerate(answers)]
        prompt_logprobs = prompt_logprobs_of(self._ask, answers[0], self._tokenizer)
        return self._envelope("chat.completion", choices, usage, prompt_logprobs)

    def _choice(self, index: int, updates: list[Update]) -> ChatChoice:
        choice = ChatChoice(index, self._message(index, text_of(updates)), self._logprobs(updates))
        finish = updates[-1].finish
        if finish is not None:
            choice.finish_reason, choice.stop_reason = self._reason(index, finish), finish.stop_reason
        return choice

    def _message(self, index: int, text: str) -> ChatMessage:
        if self._ask.calls is None:
            return ChatMessage(text)
        reader = self._readers[index] = Reader(self._ask.calls)
        said, calls = "", []
        for one in reader.feed(text) + reader.end():
            match one:
                case Said(more):
                    said += more
                case Called(name):
                    calls.append(ToolCall(call_id(one, self._ask.calls), CalledFunction(name, "")))
                case Argued(more):
                    calls[-1].function.arguments += more
        return ChatMessage(said or None, tool_calls=calls) if calls else ChatMessage(said)

    def _chunk(self, choice: ChatChunkChoice, usage: AnyUsage) -> bytes:
        return self._envelope("chat.completion.chunk", [choice], usage)

    def _envelope(
        self,
        kind: str,
        choices: Sequence[Any],
        usage: AnyUsage,
        prompt_logprobs: PromptLogprobs | UnsetType = UNSET,
    ) -> bytes:
        ask, created = self._ask, self._created
        return _encode(Envelope(ask.id, kind, created, ask.model, list(choices), usage, prompt_logprobs))

    def _logprobs(self, updates: Sequence[Update]) -> ChatLogprobs | None:
        shown = shown_tokens(updates)
        if not shown and not always_has_logprobs(self._ask):
            return None
        return ChatLogprobs([token_logprob(token, self._tokenizer) for token in shown])


def token_logprob(shown: ShownToken, tokenizer: Tokenizer) -> ChatTokenLogprob:
    """A token of an answer with its logprobs, spelled in text and in bytes."""
    assert shown.logprobs is not None, "a token of an answer"

    def spelled(token: int, logprob: float) -> ChatLogprob:
        return ChatLogprob(tokenizer.token_text(token), finite(logprob), list(tokenizer.token_bytes(token)))

    top = [spelled(token, logprob) for token, logprob in shown.logprobs.top]
    chosen = spelled(shown.token, shown.logprobs.logprob)
    return ChatTokenLogprob(chosen.token, chosen.logprob, chosen.bytes, top)


def _delta(heard: Heard, number: int, reading: Reading) -> Delta:
    """What was heard, where `number` calls have begun before this one or the one that goes on."""
    match heard:
        case Said(text):
            return Delta(content=text)
        case Called(name):
            return Delta(tool_calls=[CallDelta(number, FunctionDelta(name, ""), call_id(heard, reading), "function")])
        case Argued(text):
            return Delta(tool_calls=[CallDelta(number, FunctionDelta(arguments=text))])
