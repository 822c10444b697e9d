"""uvicorn, told when to stop by us alone, with bounds that it lacks: on the size of headers and the time they may take.

Everything else about HTTP is uvicorn's.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from headway.server.errors import ApiError
from headway.server.transport import WRITE_NOW

MAX_HEAD_BYTES = 64 * 1024  # request line and headers
HEAD_TIMEOUT_S = 20.0  # from the connection, or a request's first byte, to the end of its headers


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections that send endless or endlessly slow headers."""

    _num_messages = 0  # begun on this connection
    _head_bytes = 0  # received of headers that are not whole
    _field_bytes = 0  # of fields that are
    _head_done = False
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose_patience()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._num_messages
        super().data_received(data)
        if self._num_messages > before:
            return  # what came before the message in this data is not of its head
        if not self._head_done:  # counted here as well: the parser hands over a header only when it is whole
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The headers are too large.")
        elif self._patience is None and self.cycle.response_complete:
            self._be_patient()  # the answer is out, and bytes that begin no request would keep the connection for ever

    def on_message_begin(self) -> None:
        self._num_messages += 1
        self._head_bytes, self._field_bytes, self._head_done = 0, 0, False
        self._be_patient()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_done = True
        self._lose_patience()
        super().on_headers_complete()
        extensions: dict[str, Any] = {WRITE_NOW: partial(self._write_now, self.cycle)}
        self.cycle.scope["extensions"] = extensions

    def _write_now(self, cycle: RequestResponseCycle, content: bytes) -> bool:
        """For streams: what `send` does with a part of a body, without its way through every layer. False: not now."""
        if self.flow.write_paused or cycle.disconnected or not cycle.response_started or not cycle.chunked_encoding:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(content), content))
        return True

    def send_400_response(self, msg: str) -> None:
        if not self._answering():  # else it would be read as part of that answer
            body = ApiError(400, "invalid_http", msg).body
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _answering(self) -> bool:
        """Whether an answer is on its way, to this message or to one before it on the same connection."""
        cycle: RequestResponseCycle | None = self.cycle  # of the last message whose head is whole
        if cycle is None or cycle.response_complete:
            return False
        return cycle.response_started or bool(self.pipeline) or not self._head_done

    def _count(self, num_bytes: int) -> None:
        self._field_bytes += num_bytes
        if self._field_bytes > MAX_HEAD_BYTES:
            raise ValueError("the headers are too large")  # which the parser turns into an answer of 400

    def _be_patient(self) -> None:
        self._lose_patience()
        self._patience = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _lose_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class Http:
    """A running server, until closed."""

    def __init__(self, app: ASGIApp, listener: socket.socket, tls: Mapping[str, Any] | None = None) -> None:
        """`tls`: what `tls.tls_options` found; nothing for plain HTTP."""
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # a stranger's broken request is no news, and there would be a line for each
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=5,
            **(tls or {}),
            timeout_graceful_shutdown=5,  # by then every request has ended: this is for callers who do not read
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve([listener]))

    async def close(self, *, patient: bool) -> None:
        self._server.should_exit = True
        self._server.force_exit = not patient
        await self._task


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are ours
