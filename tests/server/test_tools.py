"""Tools: told to the model by its template, called in its own marks, read back as calls, whole and in a stream."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from desk import Desk, Network, run
from pydantic import BaseModel

from headway.core.request import Constraint
from headway.models.tokenizer import ModelText, open_model_text

TEMPLATE = """{%- if tools %}You may call:{% for tool in tools %} {{ tool | tojson }}{% endfor %}
Write <tool_call>{"name": …, "arguments": …}</tool_call>.
{% endif %}{%- for message in messages %}
[{{ message.role }}{% if message.tool_call_id %} {{ message.tool_call_id }}{% endif %}] {{ message.content }}
{%- for call in message.tool_calls or [] %} {{ call.function.name }}({{ call.function.arguments | tojson }})
{%- endfor %}{% endfor %}"""
SPEAKS: ModelText = open_model_text(None, TEMPLATE)
TURNS = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
MISTRAL: ModelText = open_model_text(None, TURNS + '{# it writes #}{% if false %}{{ "[TOOL_CALLS] [" }}{% endif %}')
WRITES = """{%- for message in messages %}[{{ message.role }}]
{%- if message.tool_call_id %}{{ message.tool_call_id }}{% endif %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception("An id has nine letters and digits.") }}{% endif %}
{{- '[TOOL_CALLS]' + call.function.name }}IDENTIFIED{{ '[ARGS]' + call.function.arguments | tojson }}
{%- endfor %}{% endfor %}"""
MISTRAL_11: ModelText = open_model_text(None, WRITES.replace("IDENTIFIED", "{{ '[CALL_ID]' + call.id }}"))
MISTRAL_13: ModelText = open_model_text(None, WRITES.replace("IDENTIFIED", ""))
LLAMA_SAYS = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
LLAMA: ModelText = open_model_text(None, LLAMA_SAYS + TURNS)
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Bonn?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
BONN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LIST = '[{"name": "weather", "arguments": {"city": "Bonn"}}, {"name": "now", "arguments": {}}]'
BOTH = [("weather", '{"city": "Bonn"}'), ("now", "{}")]
ROW = '[TOOL_CALLS]weather[ARGS]{"city": "Bonn"}[TOOL_CALLS]now[ARGS]{}'
ROW_OF_IDS = '[TOOL_CALLS]weather[CALL_ID]aB3dE6gH9[ARGS]{"city": "Bonn"}[TOOL_CALLS]now[CALL_ID]aB3dE6gH9[ARGS]{}'
NAMED = {"type": "function", "function": {"name": "now"}}
FLAT = {"type": "function", **WEATHER["function"]}


def asking(**body: Any) -> dict[str, Any]:
    return {"messages": [USER], "tools": [WEATHER, NOW]} | body


def calls_of(message: Any) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]


@pytest.mark.parametrize(
    ("text", "body", "says", "content", "calls"),
    [
        (SPEAKS, {}, BONN, None, BOTH[:1]),
        (SPEAKS, {}, "I look.\n" + BONN + "\n" + TIME, "I look.\n", BOTH),
        (SPEAKS, {}, "It is <b>sunny</b>.", "It is <b>sunny</b>.", []),
        (SPEAKS, {"tool_choice": "required"}, BONN + "\n" + TIME, None, BOTH),
        (SPEAKS, {"tool_choice": NAMED}, TIME, None, BOTH[1:]),
        (SPEAKS, {"tool_choice": "none"}, BONN, BONN, []),
        (MISTRAL, {}, "[TOOL_CALLS] " + LIST, None, BOTH),
        (MISTRAL, {}, "I look. [TOOL_CALLS] " + LIST, "I look. ", BOTH),
        (MISTRAL, {}, "A [TOOL] of [TOOL_CALLS", "A [TOOL] of [TOOL_CALLS", []),
        (MISTRAL, {"tool_choice": "required"}, "[TOOL_CALLS] " + LIST, None, BOTH),
        (MISTRAL_13, {}, "I look." + ROW, "I look.", BOTH),
        (MISTRAL_13, {"tool_choice": "required"}, ROW, None, BOTH),
        (MISTRAL_13, {"tool_choice": NAMED}, "[TOOL_CALLS]now[ARGS]{}", None, BOTH[1:]),
        (MISTRAL_11, {}, "I look." + ROW_OF_IDS, "I look.", BOTH),
        (MISTRAL_11, {"tool_choice": "required"}, ROW_OF_IDS, None, BOTH),
        (LLAMA, {}, '{"name": "weather", "parameters": {"city": "Bonn"}}', None, BOTH[:1]),
        (LLAMA, {}, '<|python_tag|>{"name": "now", "parameters": {}}', None, BOTH[1:]),
        (LLAMA, {}, '{"name": of a city}', '{"name": of a city}', []),
        (LLAMA, {}, '<|python> {"name": "x"}', '<|python> {"name": "x"}', []),
        (LLAMA, {"tool_choice": NAMED}, '{"name": "now", "parameters": {}}', None, BOTH[1:]),
        (None, {"tool_choice": "required"}, LIST, None, BOTH),
        (None, {"tool_choice": "auto"}, BONN, BONN, []),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_told_as_calls(
    text: ModelText | None, body: Any, says: str, content: str | None, calls: list[tuple[str, str]], stream: bool
) -> None:
    async def story() -> None:
        desk = await Desk(says, **({"text": text} if text else {}), max_model_len=2048).start()
        if stream:
            events = await desk.stream(CHAT, asking(**body))
            message, reason = gathered(events)
        else:
            choice = (await desk.chat(**asking(**body)))["choices"][0]
            message, reason = choice["message"], choice["finish_reason"]
        assert reason == ("tool_calls" if calls else "stop")
        assert message["content"] == content
        assert ("tool_calls" in message) == bool(calls)
        if calls:
            assert calls_of(message) == calls
            ids = [call["id"] for call in message["tool_calls"]]
            assert len(set(ids)) == len(ids)
            assert {call["type"] for call in message["tool_calls"]} == {"function"}

    run(story)


def gathered(events: list[Any]) -> tuple[dict[str, Any], str]:
    """A stream's deltas put together, each as it must be."""
    content, calls, reason = "", [], None
    for number, event in enumerate(events):
        (choice,) = event["choices"]
        delta = choice["delta"]
        assert ("role" in delta) == (number == 0)
        content += delta.get("content") or ""
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls)
                calls.append({"id": piece["id"], "type": piece["type"], "function": {"name": "", "arguments": ""}})
                calls[-1]["function"]["name"] = piece["function"]["name"]
            assert piece["index"] == len(calls) - 1
            calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
        assert reason is None
        reason = choice["finish_reason"]
    assert reason is not None
    message: dict[str, Any] = {"content": content or None}
    return (message | {"tool_calls": calls} if calls else message), reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "says", "known"),
    [
        (MISTRAL, "[TOOL_CALLS] " + LIST, None),
        (MISTRAL_13, ROW, None),
        (MISTRAL_11, ROW_OF_IDS, "aB3dE6gH9"),
        (MISTRAL_11, ROW_OF_IDS.replace("aB3dE6gH9", "000000001", 1), "000000001"),
    ],
)
def test_ids_are_such_as_mistrals_templates_take_back(
    text: ModelText, says: str, known: str | None, stream: bool
) -> None:
    """Nine letters and digits, the model's own where it wrote one, none twice; with the results they go back."""

    async def story() -> None:
        desk = await Desk(says, text=text, max_model_len=2048).start()
        if stream:
            message, _ = gathered(await desk.stream(CHAT, asking()))
        else:
            message = (await desk.chat(**asking()))["choices"][0]["message"]
        ids = [call["id"] for call in message["tool_calls"]]
        assert len(set(ids)) == 2
        assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids)
        assert known in (None, ids[0])
        results = [{"role": "tool", "tool_call_id": one, "content": "7"} for one in ids]
        await desk.chat(**asking(messages=[USER, {"role": "assistant", **message}, *results]))
        response = (await desk.post("/v1/responses", {"input": "Bonn?", "tools": [FLAT]})).json()
        (first, *_) = [item for item in response["output"] if item["type"] == "function_call"]
        assert len(first["call_id"]) == 9

    run(story)


def test_what_is_cut_off_is_told_as_far_as_it_goes() -> None:
    async def story() -> None:
        desk = await Desk(BONN, text=SPEAKS, max_model_len=2048).start()
        choice = (await desk.chat(**asking(max_tokens=len(desk.ids) - 12)))["choices"][0]
        assert choice["finish_reason"] == "length"
        assert calls_of(choice["message"])[0][0] == "weather"
        assert not calls_of(choice["message"])[0][1].endswith("}")

    run(story)


def test_the_template_is_told_of_tools_calls_and_results() -> None:
    async def story() -> None:
        desk = await Desk("ok", text=SPEAKS, max_model_len=2048).start()
        called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
        broken = {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": "{"}}
        messages = [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [called, broken]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ]
        await desk.chat(**asking(messages=messages))
        prompt = desk.text.tokenizer.decode(desk.link.requests[-1].prompt)
        assert prompt.startswith("You may call: " + json.dumps(WEATHER))
        assert '[assistant]  weather({"city": "Bonn"}) now("{")' in prompt
        assert "[tool call_1] sunny" in prompt
        await desk.chat(**asking(tool_choice="none"))
        assert "You may call" not in desk.text.tokenizer.decode(desk.link.requests[-1].prompt)

    run(story)


@pytest.mark.parametrize(
    ("text", "body", "has_text", "several"),
    [
        (SPEAKS, {}, True, True),
        (SPEAKS, {"parallel_tool_calls": False}, True, False),
        (SPEAKS, {"tool_choice": "required"}, False, True),
        (SPEAKS, {"tool_choice": NAMED}, False, False),
        (None, {"tool_choice": "required", "parallel_tool_calls": False}, False, False),
        (None, {}, None, None),
        (SPEAKS, {"tool_choice": "none"}, None, None),
    ],
)
def test_what_an_answer_may_be(text: ModelText | None, body: Any, has_text: bool | None, several: bool | None) -> None:
    async def story() -> None:
        desk = await Desk("ok", **({"text": text} if text else {}), max_model_len=2048).start()
        await desk.chat(**asking(**body))
        constraint = desk.link.requests[-1].sampling.constraint
        if has_text is None:
            assert constraint is None
            return
        assert isinstance(constraint, Constraint)
        assert ("TEXT" in constraint.text) == has_text
        assert ("{0,15}" in constraint.text) == several
        assert ("call_1" in constraint.text) == (body.get("tool_choice") != NAMED)

    run(story)


TOOL = "tools[0].function.parameters"


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [tool({}, "no spaces")]}, "tools[0].function.name"),
        ({"tools": [tool({}, "x" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool({}), tool({})]}, "tools"),
        ({"tools": [tool({}, f"f{number}") for number in range(129)]}, "tools"),
        ({"tools": [tool({"type": "string"})]}, TOOL),
        ({"tools": [NOW, tool({"properties": {"a": {"type": "thing"}}})]}, "tools[1].function.parameters"),
        ({"tools": [tool({"$ref": "http://x/y"})]}, TOOL),
        ({"tools": []}, "tools"),
        ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": None, "tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice.function.name"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
    ],
)
def test_what_is_wrong_is_refused_by_name(body: Any, param: str) -> None:
    async def story() -> None:
        desk = await Desk("ok", text=SPEAKS, max_model_len=2048).start()
        response = await desk.post(CHAT, asking(**body))
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
        assert response.json()["error"]["message"].endswith(".")

    run(story)


def test_an_answer_in_words_by_a_schema_or_a_call() -> None:
    """A mark in a string of that answer is no call."""

    async def story() -> None:
        schema = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
        format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        says = json.dumps({"x": BONN})
        desk = await Desk(says, text=SPEAKS, max_model_len=2048).start()
        choice = (await desk.chat(**asking(response_format=format_)))["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (says, "stop")
        desk.says = BONN
        choice = (await desk.chat(**asking(response_format=format_)))["choices"][0]
        assert calls_of(choice["message"]) == BOTH[:1]

    run(story)


def test_logprobs_are_of_everything_that_was_drawn() -> None:
    async def story() -> None:
        desk = await Desk("I look.\n" + BONN, text=SPEAKS, max_model_len=2048).start()
        whole = (await desk.chat(**asking(logprobs=True)))["choices"][0]["logprobs"]["content"]
        events = await desk.stream(CHAT, asking(logprobs=True))
        streamed = [
            entry for event in events for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        assert streamed == whole
        assert len(whole) == len(desk.ids)

    run(story)


# openai-python


class City(BaseModel):
    city: str


def test_the_official_client_runs_with_tools(network: Callable[[Desk], Network]) -> None:
    desk = Desk("I look.\n" + BONN + "\n" + TIME, text=SPEAKS, max_model_len=2048)
    server = network(desk)
    tools: Any = [openai.pydantic_function_tool(City, name="weather"), WEATHER | {"function": NOW["function"]}]
    tools[1]["function"] = {"name": "now", "strict": True, "parameters": {"type": "object", "properties": {}}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0, timeout=20) as client:
        answer = client.chat.completions.create(model="embedded", messages=[USER], tools=tools)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content == "I look.\n"
        parsed = client.chat.completions.parse(model="embedded", messages=[USER], tools=tools)
        assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == City(city="Bonn")
        with client.chat.completions.stream(model="embedded", messages=[USER], tools=tools) as stream:
            done = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
            final = stream.get_final_completion().choices[0]
        assert done == ["weather", "now"]
        assert final.finish_reason == "tool_calls"
        assert [call.function.arguments for call in final.message.tool_calls] == ['{"city": "Bonn"}', "{}"]
        conversation = [
            USER,
            final.message,
            {"role": "tool", "tool_call_id": final.message.tool_calls[0].id, "content": "x"},
        ]
        desk.says = "Sunny."
        answer = client.chat.completions.create(model="embedded", messages=conversation, tools=tools)
        assert answer.choices[0].message.content == "Sunny."
