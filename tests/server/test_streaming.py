"""Streams: the events byte by byte, text that grows, endings, and errors in the middle."""

import asyncio
import json
from collections.abc import Callable

import pytest
from desk import Desk, Network, events, run, until
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.placement.link import Fate

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"prompt": "x", "max_tokens": 64}
TALK = {"messages": [{"role": "user", "content": "x"}]}


def test_a_completion_stream_byte_by_byte() -> None:
    """Each event is `data: ` + JSON + an empty line; the last says [DONE]."""

    async def story() -> None:
        desk = await Desk("ok").start()
        response = await desk.post(COMPLETIONS, PROMPT | {"stream": True}, x_request_id="r1")
        created = events(response.text)[0]["created"]
        head = f'data: {{"id":"cmpl-r1","object":"text_completion","created":{created},"model":"embedded","choices":['
        assert response.text == "".join(
            [
                head + '{"index":0,"text":"ok","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n',
                head + '{"index":0,"text":"","logprobs":null,"finish_reason":"stop","stop_reason":null}]}\n\n',
                "data: [DONE]\n\n",
            ]
        )
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"

    run(story)


def test_a_chat_stream_begins_with_the_role_and_ends_with_a_reason() -> None:
    async def story() -> None:
        desk = await Desk("x = 1").start()
        first, *middle, last = await desk.stream(CHAT, TALK)
        assert first["object"] == "chat.completion.chunk"
        opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        assert first["choices"] == [opening]
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "x = 1"
        assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
        ending = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        assert last["choices"] == [ending]
        assert len({chunk["id"] for chunk in (first, *middle, last)}) == 1

    run(story)


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, PROMPT), (CHAT, TALK)])
def test_usage_comes_last_for_who_asks_and_is_null_before(path: str, body: dict[str, object]) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        chunks = await desk.stream(path, body)
        assert all("usage" not in chunk for chunk in chunks)
        *chunks, last = await desk.stream(path, body | {"stream_options": {"include_usage": True}})
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == len(desk.ids) + 1
        assert last["usage"]["headway"]["slo"] == {}

    run(story)


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, PROMPT), (CHAT, TALK)])
def test_usage_so_far_in_every_chunk(path: str, body: dict[str, object]) -> None:
    """As dashboards like it: the tokens of this choice by now; the last chunk has the whole account."""

    async def story() -> None:
        desk = await Desk("one two three").start()
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, last = await desk.stream(path, body | {"n": 2, "stream_options": options})
        num_answer = len(desk.ids) + 1
        for index in (0, 1):
            usages = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
            counts = [usage["completion_tokens"] for usage in usages]
            assert counts == sorted(counts)
            assert (min(counts), counts[-1]) == (1, num_answer)
            assert all(usage["total_tokens"] - usage["prompt_tokens"] == usage["completion_tokens"] for usage in usages)
        assert last["usage"]["completion_tokens"] == 2 * num_answer
        first = (await desk.stream(path, body | {"stream_options": {"continuous_usage_stats": True}}))[0]
        assert "usage" not in first

    run(story)


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(alphabet="ab \n😀é", min_size=1, max_size=12),
    stop=st.lists(st.text(alphabet="ab \n😀é", min_size=1, max_size=3), max_size=2),
)
def test_a_stream_adds_up_to_the_whole_answer(text: str, stop: list[str]) -> None:
    """Characters over several tokens, stop strings over several chunks: the pieces are the whole, logprobs included."""

    async def story() -> None:
        desk = await Desk(text).start()
        body = {"stop": stop, "logprobs": 1}
        (whole,) = (await desk.complete(**body))["choices"]
        chunks = [chunk["choices"][0] for chunk in await desk.stream(COMPLETIONS, PROMPT | body)]
        assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        assert (chunks[-1]["finish_reason"], chunks[-1]["stop_reason"]) == (
            whole["finish_reason"],
            whole["stop_reason"],
        )
        told = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
        for field, values in whole["logprobs"].items():
            assert [value for piece in told for value in piece[field]] == values

    run(story)


def test_several_answers_share_a_stream() -> None:
    async def story() -> None:
        desk = await Desk("one two").start()
        chunks = await desk.stream(CHAT, TALK | {"n": 3})
        texts, reasons, roles = ["", "", ""], [None] * 3, [0, 0, 0]
        for chunk in chunks:
            (choice,) = chunk["choices"]
            assert reasons[choice["index"]] is None, "nothing follows a finish"
            texts[choice["index"]] += choice["delta"].get("content", "")
            roles[choice["index"]] += "role" in choice["delta"]
            reasons[choice["index"]] = choice["finish_reason"]
        assert (texts, reasons, roles) == (["one two"] * 3, ["stop"] * 3, [1, 1, 1])

    run(story)


def test_who_is_refused_before_the_first_token_gets_a_status_and_no_stream() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        desk.link.fate = Fate("refused", "queue_full", "1024 requests are waiting already.", retry_after_s=2.5)
        response = await desk.post(COMPLETIONS, PROMPT | {"stream": True})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"]["code"] == "queue_full"

    run(story)


def test_an_engine_lost_in_the_middle_is_said_in_the_stream() -> None:
    """The status is out already: the error is an event, then the stream ends as streams do."""

    async def story() -> None:
        desk = await Desk("one two three").start()
        desk.link.fate = Fate("failed", "engine_lost", "The engine process was killed by signal 9.", num_tokens=2)
        response = await desk.post(COMPLETIONS, PROMPT | {"stream": True})
        assert response.status_code == 200
        *chunks, last = events(response.text)
        assert len(chunks) == 2
        expected = {"message": "The engine process was killed by signal 9.", "type": "server_error", "param": None}
        assert last == {"error": expected | {"code": "engine_lost"}}

    run(story)


def test_an_answer_that_was_complete_when_the_engine_died_is_complete() -> None:
    """The stop string was seen; what happens to the engine before it heard of it changes nothing."""

    async def story() -> None:
        desk = await Desk("a = 1\n\nb").start()
        desk.link.stop = lambda request_id: setattr(  # type: ignore[method-assign]
            desk.link, "fate", Fate("failed", "engine_lost")
        )
        (choice,) = (await desk.complete(stop="\n\n"))["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("a = 1", "stop")

    run(story)


def test_silence_is_filled_with_comments(network: Callable[[Desk], Network]) -> None:
    """No token comes for a while: the caller sees a comment, which parsers skip, and later the answer."""
    desk = Desk("ok", sse_keep_alive_interval=0.05)
    desk.link.flowing = False
    server = network(desk)

    async def story() -> None:
        body = json.dumps(PROMPT | {"stream": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        seen = await asyncio.wait_for(reader.readuntil(b": keep-alive\n\n"), 20)
        assert seen.startswith(b"HTTP/1.1 200")
        desk.link.flowing = True
        assert b"data: [DONE]\n\n" in await asyncio.wait_for(reader.read(-1), 20)
        writer.close()
        await writer.wait_closed()

    run(story)


def test_tokens_are_sent_when_they_come_not_when_the_answer_is_over(network: Callable[[Desk], Network]) -> None:
    """The engine pauses after a token; the caller already has it."""
    desk = Desk("one two three")
    server = network(desk)

    async def story() -> None:
        desk.link.flowing = False  # one token passes, then none
        async with (
            server.client() as client,
            client.stream("POST", COMPLETIONS, json=PROMPT | {"stream": True}) as response,
        ):
            lines = response.aiter_lines()
            first = json.loads((await anext(lines)).removeprefix("data: "))
            assert first["choices"][0]["text"] == "one"
            await until(lambda: len(desk.link.requests) == 1)
            desk.link.flowing = True
            rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"

    run(story)


def test_a_slow_reader_gets_every_event_in_order_and_none_twice(network: Callable[[Desk], Network]) -> None:
    """It reads nothing until the sockets are full and events wait at the door, then reads them all."""
    desk = Desk(max_model_len=100_000)
    server = network(desk)
    num_tokens = 30_000

    async def story() -> None:
        body = json.dumps({"prompt": "x", "max_tokens": num_tokens, "stream": True, "ignore_eos": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 12)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: len(desk.link.requests) == 1 and not desk.link._open)  # all of it is drawn
        head, _, coded = (await asyncio.wait_for(reader.read(-1), 60)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        writer.close()
        plain = bytearray()
        while coded:
            size, _, coded = coded.partition(b"\r\n")
            plain += coded[: int(size, 16)]
            coded = coded[int(size, 16) + 2 :]
        told = "".join(chunk["choices"][0]["text"] for chunk in events(plain.decode()))
        (request,) = desk.link.requests
        drawn = [(sum(request.prompt) + k) % desk.link.vocab_size for k in range(num_tokens)]
        assert told == desk.text.tokenizer.detokenizer().feed(drawn)

    run(story)
