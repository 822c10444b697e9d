"""What POST /v1/responses may ask for, understood as a conversation.

Nothing is kept between two calls, so whatever would need that is refused with the way out. Fields are OpenAI's; those
of the other routes that shape an answer (`seed`, `stop`, `slo`, …) count here as well.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from headway.grammar.calls import NAME
from headway.server.errors import ApiError, bad_request
from headway.server.formats import JsonObject, JsonSchema, NamedSchema, Schema, Text
from headway.server.messages import CalledFunction, Message, Part, ToolCall
from headway.server.schema import MAX_LOGPROBS, Body, ChatBody, StreamOptions
from headway.server.tools import Function, FunctionName, NamedChoice, Tool, ToolChoice, check_tools

LOGPROBS = "message.output_text.logprobs"  # the one thing that can be included
_TEXT_PARTS = ("input_text", "output_text", "text")
MAX_METADATA = 16
CALL, RESULT = "function_call", "function_call_output"  # types of items


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
    """Of the conversation: a message in whichever of OpenAI's forms, a call of a tool, or what came of it."""

    role: str | None = None
    content: str | list[Part] | None = None
    type: str = "message"
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class FlatTool(msgspec.Struct, omit_defaults=True):
    """A function, in this route's form. Other types are not for us to run."""

    type: str
    name: Annotated[str, Meta(pattern=NAME)] | None = None
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class FlatNamed(msgspec.Struct):
    """The one tool that is to be called."""

    type: str
    name: str | None = None


FlatChoice = Literal["none", "auto", "required"] | FlatNamed


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
    tools: list[FlatTool] | None = None
    tool_choice: FlatChoice | None = None
    parallel_tool_calls: bool | None = None
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
        tools, choice = self._tools(), self._choice()
        check_tools(tools, choice)
        return ChatBody(
            **shared,
            messages=self._messages(),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.num_logprobs is not None,
            top_logprobs=self.num_logprobs,
        )

    def _messages(self) -> list[Message]:
        before = [] if self.instructions is None else [Message("system", self.instructions)]
        if isinstance(self.input, str):
            return [*before, Message("user", self.input)]
        messages = before
        for index, item in enumerate(self.input):
            message = _message(item, f"input[{index}]")
            last = messages[-1] if messages else None
            if item.type == CALL and last is not None and last.tool_calls and message.tool_calls:
                last.tool_calls += message.tool_calls  # calls that were made together
            else:
                messages.append(message)
        return messages

    def _tools(self) -> list[Tool]:
        made = []
        for index, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                raise _unsupported(
                    f"`tools[{index}]` is of the type {tool.type[:40]!r}: only functions can be called.", "tools"
                )
            if tool.name is None:
                raise bad_request(f"`tools[{index}].name` is missing.", f"tools[{index}].name", "missing_field")
            made.append(Tool("function", Function(tool.name, tool.description, tool.parameters, tool.strict)))
        return made

    def _choice(self) -> ToolChoice | None:
        if not isinstance(self.tool_choice, FlatNamed):
            return self.tool_choice
        if self.tool_choice.type != "function" or self.tool_choice.name is None:
            raise _unsupported("`tool_choice` can name only a function: give its type and name.", "tool_choice")
        return NamedChoice("function", FunctionName(self.tool_choice.name))

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
            "text.verbosity": (
                self.text is not None and self.text.verbosity not in (None, "medium"),
                "This model's answers are as long as they are: leave `text.verbosity` out.",
            ),
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
    if item.type in (CALL, RESULT) and not item.call_id:
        raise bad_request(f"`{param}.call_id` is missing: say which call it is.", f"{param}.call_id", "missing_field")
    if item.type == CALL:
        if item.name is None:
            raise bad_request(f"`{param}.name` is missing.", f"{param}.name", "missing_field")
        called = CalledFunction(item.name, item.arguments or "")
        return Message("assistant", tool_calls=[ToolCall(item.call_id or "", called)])
    if item.type == RESULT:
        if item.output is None:
            raise bad_request(f"`{param}.output` is missing.", f"{param}.output", "missing_field")
        return Message("tool", _text(item.output, f"{param}.output"), tool_call_id=item.call_id)
    if item.type != "message":
        raise _unsupported(
            f"`{param}` is of the type {item.type[:40]!r}: only messages, calls of functions "
            "and their outputs can be given.",
            f"{param}.type",
        )
    if item.role not in ("user", "assistant", "system", "developer"):
        raise bad_request(f"`{param}.role` must be user, assistant, system or developer.", f"{param}.role")
    if item.content is None:
        raise bad_request(f"`{param}.content` is missing.", f"{param}.content", "missing_field")
    return Message(item.role, _text(item.content, f"{param}.content"))


def _text(content: str | list[Part], param: str) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in _TEXT_PARTS or part.text is None:
            raise _unsupported(f"`{param}` may hold only text, not {part.type[:40]!r}.", param)
    return "\n".join(part.text or "" for part in content)


def _unsupported(sentence: str, param: str) -> ApiError:
    return bad_request(sentence, param, "unsupported_parameter")
