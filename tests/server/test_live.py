"""GET /live: what the device does is told to whoever may look, without a word about whose work it is."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from desk import Desk, Network, run, until

from headway.config import SloClass
from headway.models.tokenizer import ModelText
from headway.placement.spans import Span
from headway.server import live

SECRET = "the-caller-chose-this-id"


def a_suspension(desk: Desk) -> None:
    """The long prompt's step is interrupted by another and has the device again."""
    now = time.monotonic()
    desk.link.history.add(
        (
            Span(901, now - 3, now - 2, "prefill", 2000, 1, (SECRET,), "suspended"),
            Span(902, now - 2, now - 1.9, "prefill", 12, 3, ("a", "b", "c"), "done"),
        ),
        (Span(901, now - 1.9, now - 1.9, "prefill", 2000, 1, (SECRET,), None, True),),
    )


@asynccontextmanager
async def reading(server: Network, **headers: str) -> AsyncIterator[AsyncIterator[Any]]:
    """The events of one reader, as they come."""
    async with server.client() as client, client.stream("GET", "/live", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = response.aiter_lines()

        async def events() -> AsyncIterator[Any]:
            async for line in lines:
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))
                assert line != "data: [DONE]" or server.desk.link.state == "down"

        yield events()


def test_a_suspension_is_told_with_what_was_there_before_the_reader_came(network: Any) -> None:
    desk = Desk("one two")
    server = network(desk)
    a_suspension(desk)

    async def story() -> None:
        async with reading(server) as events:
            first = await anext(events)
            found = [(s["step"], s["kind"], s["tokens"], s["requests"], s["ending"]) for s in first["stretches"]]
            assert found == [(901, "prefill", 2000, 1, "suspended"), (902, "prefill", 12, 3, "done")]
            running = [(s["step"], s["resumed"], s["ending"], s["lane"]) for s in first["running"]]
            assert running == [(901, True, None, "main")]
            assert first["stretches"][0]["ended"] == first["stretches"][1]["begun"] < first["now"]
            assert (first["state"], first["beat"]["num_parked"]) == ("ready", 0)
            now = time.monotonic()
            desk.link.history.add((Span(901, now - 1.9, now, "prefill", 2000, 1, (SECRET,), "done", True),), ())
            second = await anext(events)
            assert [(s["step"], s["ending"], s["resumed"]) for s in second["stretches"]] == [(901, "done", True)]
            assert second["running"] == []
            third = await anext(events)  # nothing has happened: a sign of life
            assert third["stretches"] == []

    run(story)


def test_requests_are_numbers_to_everybody_and_only_their_tenant_can_tell_which(network: Any) -> None:
    """What a caller of one tenant sent, and even the id it chose, is nowhere in what another reads."""
    desk = Desk("a private answer", slo_classes=(SloClass("chat", ttft_ms=60_000),))
    server = network(desk)

    async def story() -> None:
        headers = {"x-request-id": SECRET, "x-tenant-id": "acme", "x-slo-class": "chat"}
        async with server.client() as client:
            body = {"prompt": "a private question", "max_tokens": 3, "n": 2}
            assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
            mine = await client.get(f"/v1/requests/{SECRET}/timeline", headers={"x-tenant-id": "acme"})
            theirs = await client.get(f"/v1/requests/{SECRET}/timeline", headers={"x-tenant-id": "other"})
        async with reading(server) as events:
            first = await anext(events)
        assert theirs.status_code == 404
        of = [label for stretch in first["stretches"] for label in stretch["of"]]
        assert of, "every step of this call has a label"
        assert {(label["serial"], label["slo_class"]) for label in of} == {(mine.json()["serial"], "chat")}
        assert {stretch["kind"] for stretch in first["stretches"]} == {"prefill", "decode"}
        told = json.dumps(first)
        assert not [word for word in (SECRET, "acme", "private", "cmpl") if word in told]
        assert first["classes"]["chat"]["met"] == 2

    run(story)


def test_it_needs_a_key_like_everything_else(network: Any) -> None:
    server = network(Desk("ok", api_key=("first",)))

    async def story() -> None:
        async with server.client() as client:
            response = await client.get("/live")
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        async with reading(server, authorization="Bearer first") as events:
            assert (await anext(events))["state"] == "ready"

    run(story)


def test_readers_too_many_are_turned_away_and_a_place_becomes_free_when_one_leaves(
    network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_READERS", 2)
    server = network(Desk("ok"))
    readers = server.desk.door._live

    async def story() -> None:
        async with reading(server) as first, reading(server) as second:
            await anext(first)
            await anext(second)
            async with server.client() as client:
                response = await client.get("/live")
                answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
            assert (response.status_code, response.json()["error"]["code"]) == (503, "too_many_readers")
            assert int(response.headers["retry-after"]) >= 1
            assert answer.status_code == 200
        await until(lambda: readers.num_readers == 0)
        async with reading(server) as third:
            assert (await anext(third))["state"] == "ready"

    run(story)


def test_a_thousand_idle_readers_hurt_nobody(network: Any) -> None:
    """They ask and never read. The first have places, the others an answer; a request is served as ever."""
    server = network(Desk("ok"))
    readers = server.desk.door._live
    connections = []
    try:
        for _ in range(1000):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            connection.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            connections.append(connection)

        async def story() -> None:
            await until(lambda: readers.num_readers == live.MAX_READERS)
            async with server.client() as client:
                begun = time.monotonic()
                answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
            assert (answer.status_code, time.monotonic() - begun < 5.0) == (200, True)
            assert readers.num_readers == live.MAX_READERS

        run(story)
    finally:
        for connection in connections:
            connection.close()


class SlowReader:
    """A stream whose events are taken once `reads` is set."""

    def __init__(self) -> None:
        self.put_so_far: list[list[bytes]] = []
        self.reads = asyncio.Event()

    def put(self, events: list[bytes]) -> None:
        self.put_so_far.append(events)

    async def taken(self) -> None:
        await self.reads.wait()


def test_a_reader_that_does_not_read_is_told_less_and_at_last_nothing() -> None:
    """Its socket is full: while it does not take the first event, any number of spans make no second one; when it does,
    it gets the last of them at once; and after its time the place is free."""

    async def story() -> None:
        desk = await Desk("ok").start()
        clock = [0.0]
        looking = live.Live(desk.link, {}, now=lambda: clock[0])
        slow = SlowReader()
        telling = asyncio.create_task(looking._news(slow))  # type: ignore[arg-type]
        await until(lambda: len(slow.put_so_far) == 1)
        for number in range(5000):
            desk.link.history.add((Span(number + 1, 0.0, 1.0, "decode", 1, 1, ("r",), "done"),), ())
        await asyncio.sleep(3 * live.PACE_S)
        assert len(slow.put_so_far) == 1
        slow.reads.set()
        await until(lambda: len(slow.put_so_far) == 2)
        (event,) = slow.put_so_far[1]
        steps = [stretch["step"] for stretch in json.loads(event)["stretches"]]
        assert steps == list(range(5000 - len(steps) + 1, 5001))
        assert len(steps) == 1024
        clock[0] = live.VISIT_S
        await asyncio.wait_for(telling, 20)
        assert looking.num_readers == 0

    run(story)


def test_a_reader_that_takes_nothing_at_all_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "VISIT_S", 0.2)
    monkeypatch.setattr(live, "PATIENCE_S", 0.0)

    async def story() -> None:
        desk = await Desk("ok").start()

        async def send(message: Any) -> None:
            await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        visit = desk.door._live.reader(15.0)
        await visit({"type": "http"}, receive, send)
        assert desk.door._live.num_readers == 0

    run(story)


def test_it_ends_with_the_engine(network: Any) -> None:
    """Or a server that leaves would wait for its readers."""
    server = network(Desk("ok"))

    async def story() -> None:
        async with reading(server) as events:
            await anext(events)
            await asyncio.to_thread(server.do, server.desk.link.close())
            last = [event["state"] async for event in events]
        assert last[-1] == "down"

    run(story)


def test_whether_the_model_fills_in_middles(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fills(text: ModelText) -> bool:
        desk = await Desk("ok", text=text).start()
        async with desk.client() as client:
            found: bool = (await client.get("/state")).json()["fills_in_middle"]
            return found

    async def story() -> None:
        text = Desk().text
        assert await fills(text) is True
        token_id = text.tokenizer.token_id
        monkeypatch.setattr(
            text.tokenizer, "token_id", lambda word: None if word == "<|fim_suffix|>" else token_id(word)
        )
        assert await fills(text) is False

    run(story)


def test_every_file_of_the_page_is_served_and_comes_from_here() -> None:
    """Scripts, styles and their licence are inside the package; the page names no other host and no inline script."""

    async def story() -> None:
        desk = await Desk("ok").start()
        async with desk.client() as client:
            page = (await client.get("/")).text
            names = [part.split('"')[0] for part in page.replace('href="', 'src="').split('src="')[1:]]
            assert {"page.css", "page.js", "vendor/uPlot.js", "vendor/uPlot.css"} <= set(names)
            for name in names:
                if not name.startswith("data:"):
                    response = await client.get(f"/{name}")
                    assert response.status_code == 200, name
                    assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "style=" not in page
            assert "onclick" not in page

    run(story)
