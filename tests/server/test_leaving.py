"""Callers who go away, and a server that does."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable

import httpx
import pytest
from desk import TEXT, Desk, Network, run, until
from starlette.types import Message

from headway.config import ConfigError, DoorSettings
from headway.models.config import ModelError
from headway.placement.link import FakeLink
from headway.server.run import address, listen, serve
from headway.server.transport import CallerLeft, EventStream

PROMPT = {"prompt": "x", "max_tokens": 64}


async def call(port: int, body: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    writer.write(b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
    await writer.drain()
    return reader, writer


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "body",
    [PROMPT, PROMPT | {"stream": True}, PROMPT | {"n": 3}, PROMPT | {"n": 3, "stream": True}],
    ids=["whole", "streamed", "three whole", "three streamed"],
)
def test_a_caller_who_leaves_is_cancelled_at_once(body: dict[str, object], network: Callable[[Desk], Network]) -> None:
    """Whether they wait for a whole answer or read a stream; and the server answers the next one."""
    desk = Desk("one two three")
    desk.link.flowing = False
    server = network(desk)

    async def story() -> None:
        _, writer = await call(server.port, body)
        await until(lambda: len(desk.link.requests) == body.get("n", 1))
        await hang_up(writer)
        await until(lambda: desk.link.cancelled == {request.id for request in desk.link.requests})
        desk.link.flowing = True
        async with server.client() as client:
            response = await client.post("/v1/completions", json=PROMPT)
        assert response.json()["choices"][0]["text"] == "one two three"

    run(story)


def test_a_caller_who_leaves_during_a_stream_of_tokens(network: Callable[[Desk], Network]) -> None:
    desk = Desk(max_model_len=1_000_000)
    server = network(desk)

    async def story() -> None:
        body = {"prompt": "x", "max_tokens": 900_000, "stream": True}
        reader, writer = await call(server.port, body)
        await reader.readuntil(b"data: ")
        await hang_up(writer)
        await until(lambda: bool(desk.link.cancelled))
        assert desk.link.cancelled == {desk.link.requests[0].id}

    run(story)


def test_a_caller_who_leaves_without_having_read_a_word() -> None:
    """The stream is stuck in the middle of a send then: what makes its events is told at once, not when collected."""
    over = False

    async def tell(stream: EventStream) -> None:
        nonlocal over
        try:
            stream.put([b"1"])
            await stream.taken()
        finally:
            over = True

    async def story() -> None:
        sending = asyncio.Event()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                sending.set()
                await asyncio.Event().wait()  # nobody reads

        async def receive() -> Message:
            await sending.wait()
            return {"type": "http.disconnect"}

        stream = EventStream(tell, 0)
        with pytest.raises(CallerLeft):
            await stream({}, receive, send)
        assert over

    run(story)


def test_a_caller_who_leaves_in_the_middle_of_the_body(network: Callable[[Desk], Network]) -> None:
    desk = Desk("ok")
    server = network(desk)

    async def story() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b'Content-Length: 500\r\n\r\n{"prompt": ')
        await hang_up(writer)
        async with server.client() as client:
            assert (await client.post("/v1/completions", json=PROMPT)).status_code == 200
        assert len(desk.link.requests) == 1

    run(story)


def test_a_draining_door_refuses_and_says_so_to_the_balancer() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        async with desk.client() as client:
            assert (await client.get("/ready")).status_code == 200
            await desk.link.drain(0.0)
            ready, health = await client.get("/ready"), await client.get("/health")
        assert (ready.status_code, ready.json()["status"], ready.headers["retry-after"]) == (503, "draining", "1")
        assert health.status_code == 200
        response = await desk.post("/v1/completions", PROMPT)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        assert int(response.headers["retry-after"]) >= 1

    run(story)


# The life of a server


def server_story(story, link: FakeLink | None = None, **settings: object) -> int:
    """Run a whole server around a story, which is told once it is ready; returns its exit code."""
    link = link or Desk("one two").link
    code = None

    async def life() -> None:
        nonlocal code
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        ready = asyncio.Event()
        door = DoorSettings(**settings)
        serving = asyncio.create_task(serve(None, door, link, listener, lambda facts, model: ready.set()))
        await asyncio.wait_for(ready.wait(), 20)
        await story(link, port)
        code = await asyncio.wait_for(serving, 20)

    asyncio.run(life())
    assert code is not None
    return code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_leave_it_finishes_what_is_open(number: signal.Signals) -> None:
    """A stream is open when the signal comes: it gets its end, newcomers are refused, and the exit code is 0."""

    async def story(link: FakeLink, port: int) -> None:
        link.flowing = False
        reader, writer = await call(port, PROMPT | {"stream": True})
        await reader.readuntil(b"data: ")
        os.kill(os.getpid(), number)
        await until(lambda: link.state == "draining")
        late, late_writer = await call(port, PROMPT)
        assert (await late.read(-1)).startswith(b"HTTP/1.1 503")
        link.flowing = True
        rest = await reader.read(-1)
        assert b'"finish_reason":"stop"' in rest
        assert b"data: [DONE]" in rest
        await hang_up(writer)
        await hang_up(late_writer)

    assert server_story(story) == 0


def test_what_does_not_finish_in_time_is_told_so() -> None:
    async def story(link: FakeLink, port: int) -> None:
        link.flowing = False
        reader, writer = await call(port, PROMPT | {"stream": True})
        await reader.readuntil(b"data: ")
        os.kill(os.getpid(), signal.SIGTERM)
        assert b'"code":"shutdown"' in await reader.read(-1)
        await hang_up(writer)

    assert server_story(story, shutdown_timeout=0.05) == 0


def test_told_twice_it_leaves_at_once() -> None:
    async def story(link: FakeLink, port: int) -> None:
        link.flowing = False
        reader, writer = await call(port, PROMPT)
        await until(lambda: bool(link.requests))
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: link.state == "draining")
        os.kill(os.getpid(), signal.SIGINT)
        await reader.read(-1)
        await hang_up(writer)

    assert server_story(story) == 130


def test_an_engine_that_is_gone_for_good_ends_the_server() -> None:
    async def story(link: FakeLink, port: int) -> None:
        link.state = "down"

    assert server_story(story) == 1


def test_while_the_model_loads_the_port_answers_already() -> None:
    """Live, not ready, and a caller is told to come back; told to leave now, it leaves."""
    link = Desk("ok").link
    loading = asyncio.Event

    async def life() -> int:
        loaded = loading()
        link.start = loaded.wait  # type: ignore[method-assign, assignment]
        listener = listen("127.0.0.1", 0)
        url = address(listener)
        serving = asyncio.create_task(serve(None, DoorSettings(), link, listener, lambda facts, model: None))
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            assert (await client.get("/health")).status_code == 200
            ready = await client.get("/ready")
            assert (ready.status_code, ready.json()) == (503, {"status": "starting"})
            refused = await client.post("/v1/completions", json=PROMPT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "starting")
            models = (await client.get("/v1/models")).json()["data"]
            assert (models[0]["id"], models[0]["max_model_len"]) == (TEXT.name, None)
        os.kill(os.getpid(), signal.SIGINT)
        return await asyncio.wait_for(serving, 20)

    assert asyncio.run(life()) == 0


def test_what_is_written_is_sent_at_once() -> None:
    """On accepted connections too: else a token waits for the acknowledgement of the one before it."""
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_model_that_cannot_be_read_ends_the_start() -> None:
    async def life() -> None:
        listener = listen("127.0.0.1", 0)
        link = FakeLink()
        with pytest.raises(ModelError, match="There is no model 'nowhere'"):
            await serve("nowhere", DoorSettings(), link, listener, lambda facts, model: None)
        assert link.state == "down"

    asyncio.run(life())


def test_a_port_in_use_is_told_with_its_number() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*choose another with --port"):
            listen("127.0.0.1", port)
    for host in ("no such host", "a..b"):
        with pytest.raises(ConfigError, match=f"--host {host} is not an address"):
            listen(host, 0)
