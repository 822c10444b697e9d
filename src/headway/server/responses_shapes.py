"""How an answer of /v1/responses is told: one object, or the events in which it grows. Knows no HTTP and no engine.

Where tools may be called, the text is read as it comes: words are a message, each call is an item of its own.
"""

import time
from collections.abc import Sequence
from copy import copy

import msgspec

from headway.grammar.calls import Argued, Called, Heard, Reader, Said
from headway.models.tokenizer import Tokenizer
from headway.server.chat_shapes import ChatTokenLogprob, token_logprob
from headway.server.errors import ApiError
from headway.server.formats import Text
from headway.server.intake import Ask
from headway.server.responses import ResponsesBody, TextConfig
from headway.server.responses_events import (
    ArgumentsDelta,
    ArgumentsDone,
    FunctionCall,
    Incomplete,
    InputDetails,
    ItemAdded,
    ItemDone,
    Output,
    OutputDetails,
    OutputMessage,
    OutputText,
    PartAdded,
    PartDone,
    ResponseCompleted,
    ResponseCreated,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseObject,
    ResponseUsage,
    Status,
    TextDelta,
    TextDone,
)
from headway.server.shapes import Usage
from headway.server.stream import Finish, Update
from headway.server.tools import call_id

_encode = msgspec.json.Encoder().encode


class ResponsesShape:
    """Of one call, whose one answer is a message, calls of tools, or one and then the others."""

    def __init__(self, ask: Ask, body: ResponsesBody, tokenizer: Tokenizer) -> None:
        self.framing = TypedEvents()
        self._ask = ask
        self._body = body
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._number = self.framing.next_number
        self._begun = False
        self._reader = None if ask.calls is None else Reader(ask.calls)
        self._items: list[Output] = []
        self._finish: Finish | None = None

    def chunks(self, update: Update) -> list[bytes]:
        events: list[msgspec.Struct] = []
        if not self._begun:  # with the first token, as in the other streams
            self._begun = True
            events += [
                ResponseCreated(self._object(), self._number()),
                ResponseInProgress(self._object(), self._number()),
            ]
            if self._reader is None:
                events += self._open_message()
        events += self._grow(update)
        if update.finish is not None:
            events += self._end(update.finish)
        return [_encode(event) for event in events]

    def usage_chunk(self, usage: Usage) -> bytes:
        kind = ResponseCompleted if self._status == "completed" else ResponseIncomplete
        return _encode(kind(self._object(usage), self._number()))

    def whole(self, answers: Sequence[list[Update]], usage: Usage) -> bytes:
        if self._reader is None:
            self._open_message()
        for update in answers[0]:
            self._grow(update)
            if update.finish is not None:
                self._end(update.finish)
        return _encode(self._object(usage))

    def _grow(self, update: Update) -> list[msgspec.Struct]:
        """What an update adds to the items, as events."""
        text = "" if update.piece is None else update.piece.text
        if self._reader is None:
            heard: list[Heard] = [] if update.piece is None else [Said(text)]
        else:
            heard = self._reader.feed(text) + ([] if update.finish is None else self._reader.end())
        logprobs = (
            [] if update.piece is None else [token_logprob(token, self._tokenizer) for token in update.piece.tokens]
        )
        events: list[msgspec.Struct] = []
        for one in heard:
            match one:
                case Said(more):
                    if not (self._items and isinstance(self._items[-1], OutputMessage)):
                        events += self._close() + self._open_message()
                    events.append(self._say(more, logprobs))
                    logprobs = []  # of the first words, if tools are called as well
                case Called():
                    events += self._close() + self._open_call(one)
                case Argued(more):
                    events.append(self._argue(more))
        return events

    def _open_message(self) -> list[msgspec.Struct]:
        message = OutputMessage(self._item_id("msg"), "in_progress", [OutputText("")])
        self._items.append(message)
        added = ItemAdded(OutputMessage(message.id, "in_progress", []), self._number(), self._place)
        return [added, PartAdded(message.id, OutputText(""), self._number(), self._place)]

    def _open_call(self, called: Called) -> list[msgspec.Struct]:
        assert self._ask.calls is not None
        name = call_id(called, self._ask.calls)
        call = FunctionCall(self._item_id("fc"), name, called.name, "", "in_progress")
        self._items.append(call)
        return [ItemAdded(copy(call), self._number(), self._place)]

    def _say(self, text: str, logprobs: list[ChatTokenLogprob]) -> TextDelta:
        message = self._items[-1]
        assert isinstance(message, OutputMessage)
        part = message.content[0]
        part.text += text
        part.logprobs += logprobs
        return TextDelta(message.id, text, logprobs, self._number(), self._place)

    def _argue(self, text: str) -> ArgumentsDelta:
        call = self._items[-1]
        assert isinstance(call, FunctionCall)
        call.arguments += text
        return ArgumentsDelta(call.id, text, self._number(), self._place)

    def _close(self, status: Status = "completed") -> list[msgspec.Struct]:
        """The last item is as it will stay."""
        if not self._items:
            return []
        item = self._items[-1]
        item.status = status
        done: list[msgspec.Struct]
        if isinstance(item, OutputMessage):
            part = item.content[0]
            done = [
                TextDone(item.id, part.text, part.logprobs, self._number(), self._place),
                PartDone(item.id, part, self._number(), self._place),
            ]
        else:
            done = [ArgumentsDone(item.id, item.name, item.arguments, self._number(), self._place)]
        return [*done, ItemDone(item, self._number(), self._place)]

    def _end(self, finish: Finish) -> list[msgspec.Struct]:
        begun = [] if self._items else self._open_message()
        self._finish = finish
        return begun + self._close(self._status)

    @property
    def _place(self) -> int:
        """Of the last item."""
        return len(self._items) - 1

    def _item_id(self, kind: str) -> str:
        own = f"{kind}_{self._ask.id.removeprefix('resp_')}"
        return own if not self._items else f"{own}_{len(self._items)}"

    @property
    def _status(self) -> Status:
        if self._finish is None:
            return "in_progress"
        return "incomplete" if self._finish.reason == "length" else "completed"

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
            output=self._items if has_ended else [],
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_logprobs=body.num_logprobs or 0,
            text=TextConfig(body.text.format) if body.text and body.text.format else TextConfig(Text()),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
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
