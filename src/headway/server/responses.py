"""What POST /v1/responses may ask for, understood as a conversation.

Nothing is kept between two calls, so whatever would need that is refused with the way out. Fields are OpenAI's; those
of the other routes that shape an answer (`seed`, `stop`, `slo`, …) count here as well.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from headway.server.errors import ApiError, bad_request
from headway.server.formats import JsonObject, JsonSchema, NamedSchema, Schema, Text
from headway.server.messages import Message, Part
from headway.server.schema import MAX_LOGPROBS, Body, ChatBody, StreamOptions

LOGPROBS = "message.output_text.logprobs"  # the one thing that can be included
_TEXT_PARTS = ("input_text", "output_text", "text")
MAX_METADATA = 16


class FlatSchema(msgspec.Struct, tag_field="type", tag="json_schema"):
    """A schema for the answer, in this route's form."""

    name: str
    schema: Schema
    description: str | None = None
    strict: bool | None = None

    def nested(self) -> JsonSchema:
        """As a chat says it."""
        return JsonSchema(NamedSchema(self.schema, self.name, self.description, self.strict))


class TextConfig(msgspec.Struct):
    format: Text | JsonObject | FlatSchema | None = None
    verbosity: str | None = None


class Item(msgspec.Struct):
    """A message of the conversation, in whichever of OpenAI's forms."""

    role: str | None = None
    content: str | list[Part] | None = None
    type: str = "message"


class ResponsesBody(Body, kw_only=True):
    """POST /v1/responses"""

    input: str | Annotated[list[Item], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=MAX_METADATA),
        ]
        | None
    ) = None
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    store: bool | None = None
    background: bool | None = None
    prompt: Any = None
    reasoning: Any = None

    @property
    def num_logprobs(self) -> int | None:
        asked = self.top_logprobs or LOGPROBS in (self.include or ())
        return (self.top_logprobs or 0) if asked else None

    def as_chat(self) -> ChatBody:
        """The same as a chat. Raises ApiError 400 for what cannot be done here."""
        self._refuse()
        shared = {name: getattr(self, name) for name in Body.__struct_fields__}
        shared["stream_options"] = StreamOptions(include_usage=True) if self.stream else None
        if self.text is not None and self.text.format is not None:
            asked = self.text.format
            shared["response_format"] = asked.nested() if isinstance(asked, FlatSchema) else asked
        return ChatBody(
            **shared,
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.num_logprobs is not None,
            top_logprobs=self.num_logprobs,
        )

    def _messages(self) -> list[Message]:
        before = [] if self.instructions is None else [Message("system", self.instructions)]
        if isinstance(self.input, str):
            return [*before, Message("user", self.input)]
        return before + [_message(item, f"input[{index}]") for index, item in enumerate(self.input)]

    def _refuse(self) -> None:
        whole = "send the whole conversation as `input`"
        asked = {
            "previous_response_id": (self.previous_response_id, f"No response is kept here: {whole}."),
            "conversation": (self.conversation, f"No conversation is kept here: {whole}."),
            "store": (self.store, "No response is kept here: leave `store` out, or false."),
            "background": (
                self.background,
                "Nothing is done in the background here: wait for the answer, or stream it.",
            ),
            "prompt": (self.prompt, "No prompts are kept here: send its text as `instructions` and `input`."),
            "reasoning": (_said(self.reasoning), "This model has no reasoning to be set: leave `reasoning` out."),
            "truncation": (self.truncation == "auto", "Nothing is left out of a long `input` here: shorten it."),
            "include": (set(self.include or ()) - {LOGPROBS}, f"Only {LOGPROBS} can be included."),
            "n": ((self.n or 1) > 1, "A response has one answer: leave `n` out, or use /v1/chat/completions."),
            "prompt_logprobs": (self.prompt_logprobs is not None, "A response has no place for `prompt_logprobs`."),
            "response_format": (self.response_format, "Here it is said in `text.format`: leave `response_format` out."),
        }
        for param, (is_asked, sentence) in asked.items():
            if is_asked:
                raise _unsupported(sentence, param)


def _said(setting: Any) -> bool:
    """Whether there is anything in it."""
    return any(value is not None for value in setting.values()) if isinstance(setting, dict) else bool(setting)


def _message(item: Item, param: str) -> Message:
    if item.type != "message":
        raise _unsupported(f"`{param}` is of the type {item.type[:40]!r}: only messages can be given.", f"{param}.type")
    if item.role not in ("user", "assistant", "system", "developer"):
        raise bad_request(f"`{param}.role` must be user, assistant, system or developer.", f"{param}.role")
    if item.content is None:
        raise bad_request(f"`{param}.content` is missing.", f"{param}.content", "missing_field")
    if isinstance(item.content, str):
        return Message(item.role, item.content)
    for part in item.content:
        if part.type not in _TEXT_PARTS or part.text is None:
            raise _unsupported(f"`{param}.content` may hold only text, not {part.type[:40]!r}.", f"{param}.content")
    return Message(item.role, "\n".join(part.text or "" for part in item.content))


def _unsupported(sentence: str, param: str) -> ApiError:
    return bad_request(sentence, param, "unsupported_parameter")
