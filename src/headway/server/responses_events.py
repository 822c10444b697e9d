"""What /v1/responses answers with: the response, its items, and the typed events in which it grows. Types only."""

from typing import Any, Literal

import msgspec

from headway.server.chat_shapes import ChatTokenLogprob
from headway.server.responses import FlatChoice, FlatTool, TextConfig
from headway.server.shapes import Timing

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class FunctionCall(msgspec.Struct, tag_field="type", tag="function_call"):
    """A call of one of the tools; `arguments` are JSON."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


Output = OutputMessage | FunctionCall


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
    output: list[Output]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    background: bool = False
    store: bool = False
    temperature: float
    top_p: float
    top_logprobs: int
    text: TextConfig
    tool_choice: FlatChoice = "auto"
    tools: list[FlatTool] = []
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
    item: Output
    sequence_number: int
    output_index: int


class ItemDone(ItemAdded, tag="response.output_item.done"):
    pass


class PartAdded(msgspec.Struct, tag_field="type", tag="response.content_part.added"):
    item_id: str
    part: OutputText
    sequence_number: int
    output_index: int
    content_index: int = 0


class PartDone(PartAdded, tag="response.content_part.done"):
    pass


class TextDelta(msgspec.Struct, tag_field="type", tag="response.output_text.delta"):
    item_id: str
    delta: str
    logprobs: list[ChatTokenLogprob]
    sequence_number: int
    output_index: int
    content_index: int = 0


class TextDone(msgspec.Struct, tag_field="type", tag="response.output_text.done"):
    item_id: str
    text: str
    logprobs: list[ChatTokenLogprob]
    sequence_number: int
    output_index: int
    content_index: int = 0


class ArgumentsDelta(msgspec.Struct, tag_field="type", tag="response.function_call_arguments.delta"):
    item_id: str
    delta: str
    sequence_number: int
    output_index: int


class ArgumentsDone(msgspec.Struct, tag_field="type", tag="response.function_call_arguments.done"):
    item_id: str
    name: str
    arguments: str
    sequence_number: int
    output_index: int
