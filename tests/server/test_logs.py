"""A line for every call, in which nothing that a stranger sent breaks a line or tells a secret."""

import asyncio
import json
import logging

import pytest
from desk import Desk, run

from headway.server.logs import JsonLines, access_log


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger=access_log.name)
    return caplog


def told(lines: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in lines.records if record.name == access_log.name]


def test_a_line_for_every_call(lines: pytest.LogCaptureFixture) -> None:
    """Answered, refused, streamed: method, path, status, bytes and the caller's own id."""

    async def story() -> None:
        desk = await Desk("ok", access_log=True, api_key=("k",)).start()
        key = {"Authorization": "Bearer k"}
        whole = await desk.post("/v1/completions?secret=1", {"prompt": "x"}, **key, x_request_id="mine")
        await desk.post("/v1/completions", {"prompt": ""}, **key)
        await desk.post("/v1/completions", {"prompt": "x"})
        await desk.post("/v1/completions", {"prompt": "x", "stream": True}, **key)
        first, *others = [record.fields for record in told(lines)]  # type: ignore[attr-defined]
        assert first["bytes"] == len(whole.content)
        assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/completions", 200)
        assert first["request_id"] == "mine"
        assert [fields["status"] for fields in others] == [400, 401, 200]
        assert others[-1]["bytes"] > 0
        assert "secret" not in lines.text
        assert "Bearer" not in lines.text

    run(story)


def test_a_path_breaks_no_line(lines: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        desk = await Desk(access_log=True).start()
        async with desk.client() as client:
            await client.get("/a%0Ab%1b[31m" + "x" * 500)
        (record,) = told(lines)
        assert record.getMessage().startswith(r"GET /a\nb\x1b[31mxxx")
        assert len(record.getMessage()) < 300

    run(story)


def test_a_caller_who_left_is_told_as_one(lines: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        desk = await Desk("ok", access_log=True).start()
        desk.link.serving = False
        waiting = asyncio.create_task(desk.post("/v1/completions", {"prompt": "x"}))
        while not desk.link.requests:
            await asyncio.sleep(0.001)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert [record.fields["status"] for record in told(lines)] == [499]  # type: ignore[attr-defined]

    run(story)


def test_silent_by_default(lines: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        await desk.complete()
        assert told(lines) == []

    run(story)


def test_an_object_a_line() -> None:
    """Whatever is in the message, and with a traceback where something broke."""
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord(
            "headway.door", logging.ERROR, "", 0, "%s\n%s", ("a", "b"), (ValueError, error, None)
        )
    record.fields = {"request_id": "r"}
    line = JsonLines().format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["level"], fields["logger"], fields["message"]) == ("error", "headway.door", "a\nb")
    assert fields["request_id"] == "r"
    assert "two\nlines" in fields["traceback"]
    assert fields["time"].endswith("+00:00")
