"""The JSON of /v1/responses: one object, or the typed events in which it grows. Knows no HTTP and no engine."""

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from headway.models.tokenizer import Tokenizer
from headway.server.chat_shapes import ChatTokenLogprob, token_logprob
from headway.server.errors import ApiError
from headway.server.formats import Text
from headway.server.intake import Ask
from headway.server.responses import ResponsesBody, TextConfig
from headway.server.shapes import Timing, Usage
from headway.server.stream import Finish, Piece, Update

Status = Literal["in_progress", "completed", "incomplete"]
_encode = msgspec.json.Encoder().encode


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class InputDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    headway: Timing


class Incomplete(msgspec.Struct):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response. What it was asked with is said again, as it was understood."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    background: bool = False
    store: bool = False
    temperature: float
    top_p: float
    top_logprobs: int
    text: TextConfig
    tool_choice: Literal["auto"] = "auto"
    tools: list[Any] = []
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]


class ResponseEvent(msgspec.Struct, tag_field="type"):
    """An event about the whole response."""

    response: ResponseObject
    sequence_number: int


class ResponseCreated(ResponseEvent, tag="response.created"):
    pass


class ResponseInProgress(ResponseEvent, tag="response.in_progress"):
    pass


class ResponseCompleted(ResponseEvent, tag="response.completed"):
    pass


class ResponseIncomplete(ResponseEvent, tag="response.incomplete"):
    pass


class ItemAdded(msgspec.Struct, tag_field="type", tag="response.output_item.added"):
    item: OutputMessage
    sequence_number: int
    output_index: int = 0


class ItemDone(ItemAdded, tag="response.output_item.done"):
    pass


class PartAdded(msgspec.Struct, tag_field="type", tag="response.content_part.added"):
    item_id: str
    part: OutputText
    sequence_number: int
    output_index: int = 0
    content_index: int = 0


class PartDone(PartAdded, tag="response.content_part.done"):
    pass


class TextDelta(msgspec.Struct, tag_field="type", tag="response.output_text.delta"):
    item_id: str
    delta: str
    logprobs: list[ChatTokenLogprob]
    sequence_number: int
    output_index: int = 0
    content_index: int = 0


class TextDone(msgspec.Struct, tag_field="type", tag="response.output_text.done"):
    item_id: str
    text: str
    logprobs: list[ChatTokenLogprob]
    sequence_number: int
    output_index: int = 0
    content_index: int = 0


class ResponsesShape:
    """Of one call, whose one answer is one message."""

    def __init__(self, ask: Ask, body: ResponsesBody, tokenizer: Tokenizer) -> None:
        self.framing = TypedEvents()
        self._ask = ask
        self._body = body
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._item_id = f"msg_{ask.id.removeprefix('resp_')}"
        self._number = self.framing.next_number
        self._begun = False
        self._text: list[str] = []
        self._logprobs: list[ChatTokenLogprob] = []
        self._finish: Finish | None = None

    def chunks(self, update: Update) -> list[bytes]:
        events: list[msgspec.Struct] = []
        if not self._begun:  # with the first token, as in the other streams
            self._begun = True
            events += self._beginning()
        if update.piece is not None:
            logprobs = self._take(update.piece)
            events.append(TextDelta(self._item_id, update.piece.text, logprobs, self._number()))
        if update.finish is not None:
            self._finish = update.finish
            part = self._part()
            events.append(TextDone(self._item_id, part.text, part.logprobs, self._number()))
            events.append(PartDone(self._item_id, part, self._number()))
            events.append(ItemDone(self._message(), self._number()))
        return [_encode(event) for event in events]

    def usage_chunk(self, usage: Usage) -> bytes:
        kind = ResponseCompleted if self._status == "completed" else ResponseIncomplete
        return _encode(kind(self._object(usage), self._number()))

    def whole(self, answers: Sequence[list[Update]], usage: Usage) -> bytes:
        for update in answers[0]:
            if update.piece is not None:
                self._take(update.piece)
        self._finish = answers[0][-1].finish
        return _encode(self._object(usage))

    def _beginning(self) -> list[msgspec.Struct]:
        empty = OutputMessage(self._item_id, "in_progress", [])
        return [
            ResponseCreated(self._object(), self._number()),
            ResponseInProgress(self._object(), self._number()),
            ItemAdded(empty, self._number()),
            PartAdded(self._item_id, OutputText(""), self._number()),
        ]

    def _take(self, piece: Piece) -> list[ChatTokenLogprob]:
        logprobs = [token_logprob(token, self._tokenizer) for token in piece.tokens]
        self._text.append(piece.text)
        self._logprobs += logprobs
        return logprobs

    @property
    def _status(self) -> Status:
        if self._finish is None:
            return "in_progress"
        return "incomplete" if self._finish.reason == "length" else "completed"

    def _part(self) -> OutputText:
        return OutputText("".join(self._text), logprobs=self._logprobs)

    def _message(self) -> OutputMessage:
        return OutputMessage(self._item_id, self._status, [self._part()])

    def _object(self, usage: Usage | None = None) -> ResponseObject:
        request, body, has_ended = self._ask.requests[0], self._body, self._finish is not None
        return ResponseObject(
            id=self._ask.id,
            created_at=self._created,
            completed_at=int(time.time()) if self._status == "completed" else None,
            status=self._status,
            incomplete_details=Incomplete() if self._status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=request.max_tokens,
            model=self._ask.model,
            output=[self._message()] if has_ended else [],
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_logprobs=body.num_logprobs or 0,
            text=TextConfig(body.text.format) if body.text and body.text.format else TextConfig(Text()),
            usage=None if usage is None else _usage(usage),
            user=body.user,
            metadata=body.metadata or {},
        )


class TypedEvents:
    """Each event under the name that is its JSON's type, and numbered from 0."""

    done = b""  # the last event says that it is the last

    def __init__(self) -> None:
        self._next = 0

    def next_number(self) -> int:
        self._next += 1
        return self._next - 1

    def event(self, content: bytes) -> bytes:
        start = len(b'{"type":"')  # msgspec writes a tag first
        return b"event: %b\ndata: %b\n\n" % (content[start : content.index(b'"', start)], content)

    def error(self, error: ApiError) -> bytes:
        """In OpenAI's two shapes at once, that of an event and that of an error object."""
        shown = {"code": error.code, "message": error.message, "param": error.param}
        number = {"sequence_number": self.next_number()}
        return _encode({"type": "error"} | shown | number | {"error": shown | {"type": error.type}})


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        usage.prompt_tokens,
        InputDetails(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        OutputDetails(),
        usage.total_tokens,
        usage.headway,
    )
