"""The tools that a conversation may use: what is told to the model, and what its answer may call.

Owns the types of `tools` and `tool_choice` and what follows from them; how a call is written is `grammar/calls`'.
"""

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from headway.grammar import calls
from headway.grammar.calls import Called, Reading
from headway.server.errors import bad_request
from headway.server.formats import Asked, Schema, json_asked

MAX_TOOLS = 128
_LETTERS = string.ascii_letters + string.digits
_NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(msgspec.Struct, omit_defaults=True):
    """`parameters` are the JSON schema of its arguments; without them it has none."""

    name: Annotated[str, Meta(pattern=calls.NAME)]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None  # followed to the letter either way


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: Function


class FunctionName(msgspec.Struct):
    name: str


class NamedChoice(msgspec.Struct):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


def check_tools(tools: list[Tool], choice: ToolChoice | None) -> None:
    """What no single field's type can say. Raises ApiError 400."""
    names = [tool.function.name for tool in tools]
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"`tools` may hold at most {MAX_TOOLS}, not {len(tools)}.", "tools")
    if len(set(names)) < len(names):
        raise bad_request("Two of the `tools` have the same name: give each its own.", "tools")
    if not tools and choice not in (None, "none", "auto"):
        raise bad_request("`tool_choice` asks for a call, but there are no `tools`: give some.", "tool_choice")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise bad_request(
            f"`tool_choice` names {choice.function.name[:64]!r}, which is none of the `tools`.",
            "tool_choice.function.name",
        )
    for index, tool in enumerate(tools):
        if (tool.function.parameters or {}).get("type", "object") != "object":
            param = f"tools[{index}].function.parameters"
            raise bad_request(f"`{param}` must be the schema of an object.", param)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """`told` are the tools as templates expect them. An answer that calls is read as `reading` says, if any may;
    `asked` is what it must look like, `parts` what that was made of."""

    told: list[dict[str, Any]]
    reading: Reading | None
    asked: Asked | None
    parts: list[Asked]


def tool_use(
    tools: list[Tool],
    choice: ToolChoice | None,
    *,
    several: bool,
    template: str,
    tokens: Mapping[str, int],
    answer: Asked | None,
) -> ToolUse:
    """What follows from them for a model with this template, whose vocabulary has these `tokens` besides text and
    special ones; `answer` is what an answer in words must look like.

    Raises ApiError 400.
    """
    if not tools or choice == "none":
        return ToolUse([], None, answer, [])
    told = [{"type": "function", "function": msgspec.to_builtins(tool.function)} for tool in tools]
    dialect = calls.dialect_of(template)
    must_call = choice not in (None, "auto")
    if not must_call and not (dialect.mark or dialect.instead):
        return ToolUse(told, None, answer, [])
    if not must_call and answer is not None and answer.constraint.kind != "json":
        raise bad_request(
            f"With `tools`, an answer in words can only be held to a JSON schema: leave `{answer.param}` or them out.",
            answer.param,
        )
    parts = {
        tool.function.name: json_asked(_arguments(tool.function), param)
        for index, tool in enumerate(tools)
        if not isinstance(choice, NamedChoice) or choice.function.name == tool.function.name
        for param in (f"tools[{index}].function.parameters",)
    }
    schema = None if must_call or answer is None else answer.constraint.text
    constraint = calls.grammar(
        {name: part.constraint.text for name, part in parts.items()},
        dialect,
        several=several and not isinstance(choice, NamedChoice),
        must_call=must_call,
        answer=schema,
        tokens=tokens,
    )
    return ToolUse(
        told,
        Reading.of(dialect, must_call=must_call, beside_answer=schema is not None),
        Asked("tools", constraint),
        [*parts.values(), *([answer] if answer is not None and schema else [])],
    )


def call_id(called: Called, reading: Reading) -> str:
    """As the model wrote it; else a new one, such as its template takes back with the result."""
    if called.id:
        return called.id
    if reading.id_letters:
        return "".join(secrets.choice(_LETTERS) for _ in range(reading.id_letters))
    return f"call_{secrets.token_hex(12)}"


def _arguments(function: Function) -> Schema:
    return _NO_ARGUMENTS if function.parameters is None else function.parameters | {"type": "object"}
