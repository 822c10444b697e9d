"""The life of a request, for whoever asks: by which id, how long, and to whom it is shown."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
from desk import Desk, Network, run, until

from headway.config import SloClass
from headway.core.ledger import Record
from headway.core.request import SLO, Request
from headway.placement.link import Fate
from headway.server.intake import Ask
from headway.server.life import Call
from headway.server.timeline import Timelines

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TALK = {"messages": [{"role": "user", "content": "x"}]}


async def look(desk: Desk, name: str, **headers: str) -> httpx.Response:
    async with desk.client() as client:
        headers = {key.replace("_", "-"): value for key, value in headers.items()}
        return await client.get(f"/v1/requests/{name}/timeline", headers=headers)


async def seen(desk: Desk, name: str, **headers: str) -> Any:
    response = await look(desk, name, **headers)
    assert response.status_code == 200, response.text
    return response.json()


def words(answer: Any) -> list[str]:
    return [moment["what"] for moment in answer["moments"]]


def test_the_life_of_a_request_by_either_of_its_ids() -> None:
    async def story() -> None:
        desk = await Desk("one two", slo_classes=(SloClass("chat", ttft_ms=0.001, tpot_ms=3_600_000),)).start()
        body = {"prompt": "x", "slo": {"class": "chat"}, "priority": 3}
        answer = (await desk.post(COMPLETIONS, body, x_request_id="trace:1")).json()
        life = await seen(desk, "trace:1")
        assert life == await seen(desk, "cmpl-trace:1")
        assert (life["id"], life["state"], life["slo_class"], life["priority"]) == (answer["id"], "ended", "chat", 3)
        assert life["targets"] == {"ttft_ms": 0.001, "tpot_ms": 3_600_000}
        (choice,) = life["choices"]
        timing = answer["usage"]["headway"]
        for field in ("predicted_ttft_ms", "ttft_ms", "tpot_ms", "queue_ms", "total_ms", "preemptions", "slo"):
            assert choice[field] == timing[field]
        assert (choice["kind"], choice["reason"], choice["slo_met"]) == ("finished", "stop", False)
        assert choice["slo"]["ttft"]["cause"] is not None
        assert words(choice) == ["arrived", "admitted", "first_token", "finished"]
        instants = [moment["at_ms"] for moment in choice["moments"]]
        assert instants[0] == 0
        assert instants == sorted(instants)

    run(story)


def test_every_answer_of_a_call_has_its_life_and_a_chat_has_one_too() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        answer = await desk.chat(n=3)
        life = await seen(desk, answer["id"])
        assert [choice["index"] for choice in life["choices"]] == [0, 1, 2]
        assert {choice["kind"] for choice in life["choices"]} == {"finished"}
        assert life["targets"] == {}

    run(story)


def test_a_refused_request_has_a_timeline_under_its_request_id() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        desk.link.fate = Fate("refused", "slo_unattainable", "Not in time.", 1.0)
        response = await desk.post(COMPLETIONS, {"prompt": "x", "slo": {"ttft_ms": 5}})
        (choice,) = (await seen(desk, response.headers["x-request-id"]))["choices"]
        assert (choice["kind"], choice["reason"], choice["ttft_ms"]) == ("refused", "slo_unattainable", None)
        assert choice["slo"] == {"ttft": {"target_ms": 5, "measured_ms": None, "met": False, "cause": "refused"}}
        assert words(choice) == ["arrived", "refused"]

    run(story)


def test_an_open_request_is_shown_as_far_as_the_door_knows(network: Callable[[Desk], Network]) -> None:
    """With what it has got by now; and when its caller leaves, that it did."""
    desk = Desk(max_model_len=1_000_000)
    server = network(desk)

    async def story() -> None:
        async with server.client() as client:

            async def choice() -> Any:
                life = (await client.get("/v1/requests/r1/timeline")).json()
                return life["state"], life["choices"][0]

            async def read() -> None:
                body = {"prompt": "x", "max_tokens": 900_000, "stream": True, "slo": {"ttft_ms": 1}}
                async with client.stream("POST", COMPLETIONS, json=body, headers={"x-request-id": "r1"}) as response:
                    async for _ in response.aiter_bytes():
                        desk.link.flowing = False
                        await asyncio.Event().wait()

            reading = asyncio.create_task(read())
            await until(lambda: not desk.link.flowing)
            state, open_ = await choice()
            assert (state, open_["kind"], open_["predicted_ttft_ms"]) == ("open", None, 50.0)
            assert open_["completion_tokens"] > 0
            assert open_["ttft_ms"] > 0
            assert open_["slo"] == {}, "judged when it is over"
            assert words(open_) == ["arrived", "admitted", "first_token"]
            reading.cancel()
            await until(lambda: bool(desk.link.cancelled))
            state, left = await choice()
            assert (state, left["kind"], left["reason"]) == ("ended", "cancelled", "abandoned")

    run(story)


def test_a_request_that_waits_is_shown_before_its_first_token(network: Callable[[Desk], Network]) -> None:
    """Before the engine is there, and while it waits in the queue."""
    desk = Desk("ok")
    server = network(desk)
    desk.link.state, desk.link.serving = "starting", False

    async def story() -> None:
        async with server.client() as client:

            async def life() -> Any:
                return (await client.get("/v1/requests/r1/timeline")).json()

            async def told() -> list[str]:
                return words((await life())["choices"][0])

            waiting = asyncio.create_task(
                client.post(COMPLETIONS, json={"prompt": "x"}, headers={"x-request-id": "r1"})
            )
            await until(lambda: len(desk.link.requests) == 1)
            assert await told() == ["arrived"]
            desk.link.state = "ready"
            async with asyncio.timeout(20):
                while await told() == ["arrived"]:
                    await asyncio.sleep(0.002)
            assert await told() == ["arrived", "admitted"]
            assert (await life())["state"] == "open"
            desk.link.serving = True
            assert (await waiting).status_code == 200

    run(story)


def test_a_tenant_sees_its_own_requests_only() -> None:
    """Whoever asks for another's gets the same words as for one that never was, even with the same X-Request-Id."""

    async def story() -> None:
        desk = await Desk("ok").start()
        for tenant, priority in (("a", 1), ("b", 2)):
            body = {"prompt": "x", "priority": priority}
            await desk.post(COMPLETIONS, body, x_request_id="same", x_tenant_id=tenant)
        for header in ("x_tenant_id", "x_gateway_inference_fairness_id"):
            assert (await seen(desk, "same", **{header: "a"}))["priority"] == 1
            assert (await seen(desk, "same", **{header: "b"}))["priority"] == 2
        for headers in ({}, {"x_tenant_id": "c"}):
            response = await look(desk, "same", **headers)
            never = await look(desk, "never", **headers)
            assert response.status_code == never.status_code == 404
            assert response.json()["error"] | {"message": ""} == never.json()["error"] | {"message": ""}
            assert response.json()["error"]["message"].replace("same", "never") == never.json()["error"]["message"]
        await desk.post(COMPLETIONS, {"prompt": "x"}, x_request_id="open to all")
        response = await desk.post(COMPLETIONS, {"prompt": "x"})
        assert (await seen(desk, response.json()["id"], x_tenant_id="a"))["tenant"] is None

    run(story)


def test_what_is_not_remembered_is_a_404_in_the_usual_shape_and_needs_a_key() -> None:
    async def story() -> None:
        desk = await Desk("ok", api_key=("key",)).start()
        assert (await look(desk, "never")).status_code == 401
        response = await look(desk, "never", authorization="Bearer key")
        error = response.json()["error"]
        assert response.status_code == 404
        assert (error["type"], error["code"], error["param"]) == ("not_found_error", "request_not_found", "id")
        response = await look(desk, "never", authorization="Bearer key", x_tenant_id="x" * 129)
        assert response.status_code == 400

    run(story)


# How much is remembered


def call(desk: Desk, name: str, *, num_answers: int = 1, tenant: str = "", arrival: float = 0.0) -> Call:
    requests = tuple(Request(f"{name}/{index}", (1, 2), 4, arrival, tenant=tenant) for index in range(num_answers))
    return Call(Ask(name, "m", requests, 1, (), False, True, False, False), desk.door.metrics)


def test_the_call_that_nobody_asked_for_is_forgotten_first() -> None:
    desk = Desk()
    timelines = Timelines(max_calls=2)
    timelines.keep(call(desk, "cmpl-a"))
    timelines.keep(call(desk, "cmpl-b"))
    assert timelines.find("a", "") is not None
    timelines.keep(call(desk, "cmpl-c"))
    assert timelines.find("b", "") is None
    assert timelines.find("a", "") is not None
    assert timelines.find("c", "") is not None


def test_calls_of_many_answers_count_for_many() -> None:
    """One that is over the bound by itself is still remembered, alone."""
    desk = Desk()
    timelines = Timelines(max_calls=100, max_answers=8)
    for name in "abc":
        timelines.keep(call(desk, f"cmpl-{name}", num_answers=4))
    assert [timelines.find(name, "") is not None for name in "abc"] == [False, True, True]
    timelines.keep(call(desk, "cmpl-d", num_answers=20))
    assert [timelines.find(name, "") is not None for name in "abcd"] == [False, False, False, True]
    timelines.keep(call(desk, "cmpl-d", num_answers=1))
    timelines.keep(call(desk, "cmpl-e", num_answers=7))
    assert [timelines.find(name, "") is not None for name in "de"] == [True, True], "the old d no longer counts"


def test_of_calls_that_share_an_id_the_newest_is_found() -> None:
    desk = Desk()
    timelines = Timelines()
    timelines.keep(call(desk, "chatcmpl-a", arrival=2.0))
    timelines.keep(call(desk, "cmpl-a", arrival=1.0))
    found = timelines.find("a", "")
    assert found is not None
    assert found.id == "chatcmpl-a"
    timelines.keep(call(desk, "cmpl-a", arrival=3.0))
    found = timelines.find("a", "")
    assert found is not None
    assert found.id == "cmpl-a"


def test_an_ending_that_the_engine_could_not_write_keeps_what_the_door_saw() -> None:
    """The engine died: the supervisor's account knows of no moment but the arrival."""
    desk = Desk()
    asked = Request("cmpl-a/0", (1, 2), 4, time.monotonic(), slo=SLO(ttft_s=60.0, total_s=60.0))
    one = Call(Ask("cmpl-a", "m", (asked,), 1, (), False, True, False, False), desk.door.metrics)
    one.admitted(asked, 0.2)
    one.delivered(asked, 1)
    record = Record.open(asked)
    record.kind, record.reason, record.ended = "failed", "engine_lost", time.monotonic()
    record.missed = {"ttft": "engine_lost", "total": "engine_lost"}  # so far as it knows
    one.ended(asked, record)
    (kept,) = one.records
    assert [moment.what for moment in kept.timeline] == ["arrived", "admitted", "first_token", "failed"]
    assert (kept.kind, kept.reason, kept.predicted_ttft_s) == ("failed", "engine_lost", 0.2)
    assert kept.missed == dict.fromkeys(("ttft", "total"), "engine_lost"), "what broke off is no answer"
    assert (kept.ttft_s is not None, kept.num_output_tokens) == (True, 1)
