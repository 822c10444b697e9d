"""/v1/responses: what may be asked, the object that comes back, and the events in which it grows."""

import json
from typing import Any

import pytest
from desk import TEXT, Desk, run
from test_refusals import refused

from headway.config import SloClass
from headway.placement.link import Fate

PATH = "/v1/responses"
USER = {"role": "user", "content": "x"}


async def respond(desk: Desk, body: Any, **headers: str) -> Any:
    response = await desk.post(PATH, {"input": "x"} | body, **headers)
    assert response.status_code == 200, response.text
    return response.json()


def named_events(text: str) -> list[tuple[str, Any]]:
    *blocks, nothing = text.split("\n\n")
    assert nothing == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_whole_response() -> None:
    async def story() -> None:
        desk = await Desk("return 1").start()
        answer = await respond(desk, {"metadata": {"run": "7"}, "max_output_tokens": 20, "temperature": 0.5})
        assert answer["id"].startswith("resp_")
        assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", "embedded")
        assert answer["error"] is answer["incomplete_details"] is answer["previous_response_id"] is None
        (message,) = answer["output"]
        assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
        assert message["id"].startswith("msg_")
        assert message["content"] == [{"type": "output_text", "text": "return 1", "annotations": [], "logprobs": []}]
        assert (answer["metadata"], answer["max_output_tokens"], answer["temperature"]) == ({"run": "7"}, 20, 0.5)
        assert (answer["store"], answer["background"], answer["tools"]) == (False, False, [])
        usage = answer["usage"]
        assert usage["output_tokens"] == len(desk.ids) + 1
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["input_tokens_details"]["cached_tokens"] == 0
        assert usage["headway"]["preemptions"] == 0
        assert desk.link.requests[0].max_tokens == 20

    run(story)


def test_an_answer_that_is_cut_is_incomplete() -> None:
    async def story() -> None:
        desk = await Desk().start()
        answer = await respond(desk, {"max_output_tokens": 3})
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert answer["output"][0]["status"] == "incomplete"
        assert answer["completed_at"] is None

    run(story)


@pytest.mark.parametrize(
    ("body", "contents"),
    [
        ({"input": "a"}, ["a"]),
        ({"input": "a", "instructions": "be brief"}, ["be brief", "a"]),
        ({"input": [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]}, ["a", "b"]),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}, ["a"]),
        (
            {
                "input": [
                    {"type": "message", "role": "user", "content": "a"},
                    {
                        "type": "message",
                        "id": "msg_1",
                        "status": "completed",
                        "role": "assistant",
                        "content": [{"type": "output_text", "text": "b", "annotations": []}],
                    },
                    {"role": "user", "content": "c"},
                ]
            },
            ["a", "b", "c"],
        ),
    ],
)
def test_a_conversation_in_any_of_its_forms(body: Any, contents: list[str]) -> None:
    """An earlier answer among them, as it was given out. The embedded model's template joins them with line ends."""

    async def story() -> None:
        desk = await Desk("ok").start()
        await respond(desk, body)
        assert desk.link.requests[0].prompt == TEXT.tokenizer.encode("\n".join(contents), add_special_tokens=False)

    run(story)


def test_a_stream_of_typed_events() -> None:
    """In OpenAI's order, numbered, each under its name; the last one has the whole and its usage."""

    async def story() -> None:
        desk = await Desk("return 1").start()
        response = await desk.post(PATH, {"input": "x", "stream": True, "metadata": {"a": "b"}})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = named_events(response.text)
        names = [name for name, _ in events]
        assert names == [event["type"] for _, event in events]
        assert names[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        deltas = names[4:-4]
        assert set(deltas) == {"response.output_text.delta"}
        assert len(deltas) > 1
        assert names[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
        assert "".join(event["delta"] for name, event in events if name in deltas) == "return 1"
        first, last = events[0][1]["response"], events[-1][1]["response"]
        assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
        assert (last["status"], last["metadata"]) == ("completed", {"a": "b"})
        assert last["output"][0]["content"][0]["text"] == "return 1"
        assert last["usage"]["output_tokens"] == len(desk.ids) + 1
        item_ids = {event["item_id"] for _, event in events if "item_id" in event}
        assert item_ids == {last["output"][0]["id"]}

    run(story)


def test_a_stream_that_is_cut_ends_as_incomplete() -> None:
    async def story() -> None:
        desk = await Desk().start()
        response = await desk.post(PATH, {"input": "x", "stream": True, "max_output_tokens": 2})
        name, event = named_events(response.text)[-1]
        assert name == "response.incomplete"
        assert event["response"]["incomplete_details"] == {"reason": "max_output_tokens"}

    run(story)


def test_an_error_in_the_middle_is_the_last_event() -> None:
    """In both shapes, so that clients which look for either see it; one before the first token is a plain status."""

    async def story() -> None:
        desk = await Desk("return 1").start()
        desk.link.fate = Fate("failed", "engine_lost", "It died.", num_tokens=1)
        response = await desk.post(PATH, {"input": "x", "stream": True})
        events = named_events(response.text)
        name, event = events[-1]
        assert name == event["type"] == "error"
        assert (event["code"], event["message"], event["error"]["code"]) == ("engine_lost", "It died.", "engine_lost")
        assert event["sequence_number"] == len(events) - 1
        desk.link.fate = Fate("refused", "queue_full", "Full.", 1.0)
        status, error = await refused(desk, PATH, {"input": "x", "stream": True})
        assert (status, error["code"]) == (503, "queue_full")

    run(story)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_included_where_asked(stream: bool) -> None:
    async def story() -> None:
        desk = await Desk("return 1").start()
        body = {"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 2, "stream": stream}
        response = await desk.post(PATH, body)
        whole = named_events(response.text)[-1][1]["response"] if stream else response.json()
        logprobs = whole["output"][0]["content"][0]["logprobs"]
        assert [entry["logprob"] for entry in logprobs] == [-token / 1000 for token in desk.ids]
        assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)
        assert whole["top_logprobs"] == 2
        if stream:
            deltas = [event["logprobs"] for name, event in named_events(response.text) if name.endswith("delta")]
            assert [entry for delta in deltas for entry in delta] == logprobs

    run(story)


def test_terms_go_in_and_come_back_as_elsewhere() -> None:
    """Targets in the body, a class in a header; the verdict in usage and headers; the timeline by its id."""

    async def story() -> None:
        desk = await Desk("ok", slo_classes=(SloClass("chat", tpot_ms=9000),)).start()
        response = await desk.post(PATH, {"input": "x", "slo": {"ttft_ms": 60_000}, "seed": 5}, x_slo_class="chat")
        usage = response.json()["usage"]["headway"]
        assert (usage["slo_class"], usage["slo_met"]) == ("chat", True)
        assert response.headers["x-headway-slo-met"] == "true"
        (request,) = desk.link.requests
        assert (request.slo.ttft_s, request.slo.tpot_s, request.sampling.seed) == (60.0, 9.0, 5)
        async with desk.client() as client:
            told = await client.get(f"/v1/requests/{response.json()['id']}/timeline")
        assert told.json()["state"] == "ended"

    run(story)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("conversation", {"id": "conv_1"}),
        ("store", True),
        ("background", True),
        ("prompt", {"id": "pmpt_1"}),
        ("truncation", "auto"),
        ("reasoning", {"effort": "high"}),
        ("include", ["file_search_call.results"]),
        ("tools", [{"type": "web_search"}]),
        ("n", 2),
        ("prompt_logprobs", 1),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_what_would_need_a_memory_or_more_is_refused(field: str, value: Any) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, PATH, {"input": "x", field: value})
        assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", field)
        assert error["message"].endswith(".")
        assert desk.link.requests == []

    run(story)


@pytest.mark.parametrize("verbosity", ["low", "high"])
def test_answers_cannot_be_asked_to_be_short_or_long(verbosity: str) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, PATH, {"input": "x", "text": {"verbosity": verbosity}})
        assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", "text.verbosity")
        assert desk.link.requests == []

    run(story)


def test_what_asks_for_nothing_is_accepted() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        body = {
            "store": False,
            "background": False,
            "previous_response_id": None,
            "reasoning": {"effort": None},
            "truncation": "disabled",
            "tools": [],
            "tool_choice": "auto",
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "parallel_tool_calls": True,
            "service_tier": "auto",
            "include": [],
        }
        assert (await respond(desk, body))["output"][0]["content"][0]["text"] == "ok"

    run(story)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [USER, {"role": "user"}]}, "input[1].content"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "temperature": 3}, "temperature"),
        ({"input": "x", "metadata": {"k": 5}}, "metadata[...]"),
        ({"input": "x", "metadata": {str(k): "v" for k in range(17)}}, "metadata"),
        ({"input": "x", "truncation": "some"}, "truncation"),
        ({"input": "word " * 400}, "input"),
    ],
)
def test_a_wrong_value_is_refused_by_name(body: Any, param: str) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, PATH, body)
        assert (status, error["param"]) == (400, param)

    run(story)


def test_nothing_is_kept() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        name = (await respond(desk, {}))["id"]
        async with desk.client() as client:
            for ask in (client.get, client.delete):
                response = await ask(f"{PATH}/{name}")
                assert (response.status_code, response.json()["error"]["code"]) == (404, "response_not_found")

    run(story)
