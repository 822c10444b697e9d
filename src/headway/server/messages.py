"""The messages of a conversation: as clients send them, checked, and as templates expect them."""

from typing import Any, Literal

import msgspec

from headway.server.errors import bad_request

ROLES = ("system", "developer", "user", "assistant", "tool")


class Part(msgspec.Struct):
    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct):
    """`arguments` are JSON, as the model wrote them."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


def check_messages(messages: list[Message]) -> None:
    """What no single field's type can say. Raises ApiError 400."""
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        if message.role not in ROLES:
            raise bad_request(
                f"`{param}.role` must be {', '.join(ROLES[:-1])} or {ROLES[-1]}, not {message.role[:40]!r}.",
                f"{param}.role",
            )
        if message.tool_calls and message.role != "assistant":
            raise bad_request(f"Only an assistant calls tools: leave `{param}.tool_calls` out.", f"{param}.tool_calls")
        if message.role == "tool" and not message.tool_call_id:
            raise bad_request(
                f"`{param}.tool_call_id` is missing: say which call this is the result of.", f"{param}.tool_call_id"
            )
        if isinstance(message.content, list):
            for part in message.content:
                if part.type != "text" or part.text is None:
                    raise bad_request(
                        f"`{param}.content` may hold only text, not {part.type[:40]!r}.",
                        f"{param}.content",
                        "unsupported_parameter",
                    )
        elif message.content is None and message.role != "assistant":
            raise bad_request(f"`{param}.content` is missing.", f"{param}.content")


def plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it. They know the developer by an older name, and arguments as what they say."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text or "" for part in content)
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    if message.name is not None:
        found["name"] = message.name
    if message.tool_calls:
        found["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


def _plain_call(call: ToolCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    try:
        said = msgspec.json.decode(arguments)
    except (msgspec.MsgspecError, RecursionError):  # a model's own words need not be JSON
        said = None
    function = {"name": call.function.name, "arguments": said if isinstance(said, dict) else arguments}
    return {"id": call.id, "type": "function", "function": function}
