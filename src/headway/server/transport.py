"""HTTP's edges: a body read within limits, an answer streamed as events, and a caller who leaves noticed at once."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from headway.server.errors import ApiError, internal

log = logging.getLogger("headway.door")

BODY_TIMEOUT_S = 60.0
KEEP_ALIVE = b": keep-alive\n\n"

WRITE_NOW = "headway.write_now"  # in a scope's extensions, where the server offers it
WriteNow = Callable[[bytes], bool]  # a part of a body that was begun, written on the spot; False: not now

T = TypeVar("T")


class CallerLeft(Exception):
    """Nobody is there to answer any more."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a JSON call. Raises ApiError before more than `max_bytes` are held."""
    # besides being a kindness, this keeps other sites' pages from calling us: browsers ask before they send JSON
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(400, "invalid_content_type", "Send JSON with the header Content-Type: application/json.")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise CallerLeft
                content += message.get("body", b"")
                if len(content) > max_bytes:
                    raise _too_large(max_bytes)
                if not message.get("more_body", False):
                    return bytes(content)
    except TimeoutError as error:
        raise ApiError(
            408,
            "body_timeout",
            f"The body did not come within {BODY_TIMEOUT_S:.0f} s.",
            headers={"connection": "close"},
        ) from error


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        "body_too_large",
        f"The body is over {max_bytes} bytes: send less, or start the server with a larger --max-body-bytes.",
        headers={"connection": "close"},
    )


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; if the caller leaves first, the work is cancelled and CallerLeft raised."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CallerLeft
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Framing(Protocol):
    """How a stream's events look on the wire, beyond being JSON."""

    done: bytes  # the last word

    def event(self, content: bytes) -> bytes:
        """One event."""

    def error(self, error: ApiError) -> bytes:
        """What went wrong when the status was out already, as JSON."""


class Unnamed:
    """As completions and chats are streamed."""

    done = b"data: [DONE]\n\n"

    def event(self, content: bytes) -> bytes:
        return b"data: %b\n\n" % content

    def error(self, error: ApiError) -> bytes:
        return error.body


UNNAMED: Framing = Unnamed()


class EventStream:
    """Answers with server-sent events, each of one JSON text in its `framing`, as `tell` puts them into it.

    The status line waits for the first event, so that whoever is refused before it gets a true status. After
    `keep_alive_s` seconds of silence a comment is sent (0: never), which settles the status. `headers` is asked at that
    moment what else is known by then.
    """

    def __init__(
        self,
        tell: "Callable[[EventStream], Coroutine[Any, Any, None]]",
        keep_alive_s: float,
        headers: Callable[[], Mapping[str, str]] = dict,
        framing: Framing = UNNAMED,
    ) -> None:
        self._tell = tell
        self._headers = headers
        self._framing = framing
        self._keep_alive_s = keep_alive_s
        self._sent_at = time.monotonic()
        self._begun = False
        self._write: WriteNow | None = None
        self._waiting: list[bytes] = []  # to be sent
        self._sending = False
        self._news = asyncio.Event()
        self._taken = asyncio.Event()

    def put(self, events: Sequence[bytes]) -> None:
        """These are the next. They are with the socket at once if it takes them, and wait together for it if not."""
        if not events:  # an empty part would end the body
            return
        event = self._framing.event
        content = event(events[0]) if len(events) == 1 else b"".join(map(event, events))
        if self._write is not None and not (self._waiting or self._sending) and self._write(content):
            self._sent_at = time.monotonic()
        else:
            self._waiting.append(content)
            self._news.set()

    async def taken(self) -> None:
        """Wait until everything that was put is with the socket."""
        while self._waiting or self._sending:
            self._taken.clear()
            await self._taken.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError only while nothing was sent."""
        filling = asyncio.create_task(self._fill_silence(send)) if self._keep_alive_s > 0 else None
        try:
            await unless_gone(receive, self._send_all(send, scope.get("extensions", {}).get(WRITE_NOW)))
        finally:
            if filling is not None:
                filling.cancel()

    async def _send_all(self, send: Send, write: WriteNow | None) -> None:
        telling = asyncio.create_task(self._tell(self))
        telling.add_done_callback(lambda _: self._news.set())
        try:
            while self._waiting or not telling.done():
                await self._news.wait()
                self._news.clear()
                self._sending = True
                while self._waiting:
                    content = b"".join(self._waiting)
                    self._waiting.clear()
                    await self._send(send, content)
                    self._write = write
                self._sending = False
                self._taken.set()
            telling.result()
        except Exception as error:
            if not self._begun:
                raise
            if not isinstance(error, ApiError):
                log.exception("A stream broke off")
            known = error if isinstance(error, ApiError) else internal()
            await self._send(send, self._framing.event(self._framing.error(known)))
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
        await self._send(send, self._framing.done)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, content: bytes) -> None:
        if not self._begun:
            self._begun = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),  # a proxy in between must not collect events
                *((name.encode(), value.encode()) for name, value in self._headers().items()),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._sent_at = time.monotonic()
        await send({"type": "http.response.body", "body": content, "more_body": True})

    async def _fill_silence(self, send: Send) -> None:
        while True:
            silent_s = time.monotonic() - self._sent_at
            if silent_s >= self._keep_alive_s:
                await self._send(send, KEEP_ALIVE)
            else:
                await asyncio.sleep(self._keep_alive_s - silent_s)
