"""Tools on /v1/responses: told in its flat form, called as items of their own, whole and as events."""

from typing import Any

import pytest
from desk import Desk, run
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from test_refusals import refused
from test_responses import PATH, named_events, respond
from test_tools import BONN, SPEAKS, TIME

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
NOW = {"type": "function", "name": "now"}
TOOLS = [WEATHER, NOW]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def desk_that_says(text: str) -> Desk:
    return Desk(text, text=SPEAKS, max_model_len=2048)


def test_calls_are_items_of_their_own() -> None:
    """After the words, in order; what was asked is said again."""

    async def story() -> None:
        desk = await desk_that_says("I look.\n" + BONN + "\n" + TIME).start()
        answer = await respond(desk, {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True})
        words, first, second = answer["output"]
        assert (words["type"], words["content"][0]["text"]) == ("message", "I look.\n")
        assert (first["type"], first["name"], first["arguments"]) == ("function_call", "weather", '{"city": "Bonn"}')
        assert (second["name"], second["arguments"], second["status"]) == ("now", "{}", "completed")
        assert len({words["id"], first["id"], second["id"], first["call_id"], second["call_id"]}) == 5
        assert (answer["tools"], answer["tool_choice"]) == (TOOLS, "auto")

    run(story)


@pytest.mark.parametrize(
    ("says", "kinds"),
    [
        (BONN, ["function_call"]),
        ("I look.\n" + BONN + "\n" + TIME, ["message", "function_call", "function_call"]),
        ("It is sunny.", ["message"]),
    ],
)
def test_the_events_say_the_same(says: str, kinds: list[str]) -> None:
    """Numbered from 0; each item is opened, grows by its deltas and is closed before the next; by openai's types."""

    async def story() -> None:
        desk = await desk_that_says(says).start()
        response = await desk.post(PATH, {"input": "x", "tools": TOOLS, "stream": True})
        events = named_events(response.text)
        assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
        assert [name for name, _ in events[:2]] == ["response.created", "response.in_progress"]
        grown: list[dict[str, Any]] = []
        for name, event in events[2:-1]:
            if name == "response.output_item.added":
                grown.append({"kind": event["item"]["type"], "text": "", "done": False})
            assert event["output_index"] == len(grown) - 1
            assert not grown[-1]["done"]
            if name.endswith(".delta"):
                grown[-1]["text"] += event["delta"]
            if name == "response.output_item.done":
                grown[-1]["done"] = True
                item = event["item"]
                whole = item["content"][0]["text"] if item["type"] == "message" else item["arguments"]
                assert (item["status"], whole) == ("completed", grown[-1]["text"])
        assert [each["kind"] for each in grown] == kinds
        name, last = events[-1]
        assert name == "response.completed"
        assert [item["type"] for item in last["response"]["output"]] == kinds
        for _, event in events:
            EVENT.validate_python(event)

    run(story)


def test_calls_and_results_go_back_as_items() -> None:
    async def story() -> None:
        desk = await desk_that_says("ok").start()
        conversation = [
            {"role": "user", "content": "Bonn?"},
            {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "weather", "arguments": '{"city":"Bonn"}'},
            {"type": "function_call", "call_id": "b", "name": "now", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "sunny"},
            {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "noon"}]},
        ]
        await respond(desk, {"input": conversation, "tools": TOOLS})
        prompt = desk.text.tokenizer.decode(desk.link.requests[-1].prompt)
        assert '[assistant]  weather({"city": "Bonn"}) now({})' in prompt
        assert "[tool a] sunny" in prompt
        assert "[tool b] noon" in prompt

    run(story)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice.function.name"),
        ({"input": [{"type": "function_call", "name": "now", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
    ],
)
def test_what_is_wrong_is_refused_by_name(body: Any, param: str) -> None:
    async def story() -> None:
        desk = await desk_that_says("ok").start()
        status, error = await refused(desk, PATH, {"input": "x"} | body)
        assert (status, error["param"]) == (400, param)
        assert error["message"].endswith(".")

    run(story)
