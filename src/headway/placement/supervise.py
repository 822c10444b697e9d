"""The door's side of one engine process: start it, talk to it, notice its death, start another.

A request whose engine dies before a single token was delivered gets a second try on the next engine; one that had
begun ends as failed, because a caller must never see a token twice. Conforms to `link.EngineLink`.
"""

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from headway.config import EngineSettings
from headway.core.ledger import Record
from headway.core.request import Request
from headway.placement import wire

log = logging.getLogger("headway.supervise")

MAX_TRIES = 2  # of one request
MAX_DEATHS = 3  # in a row, without a token in between: then the engine is taken for broken
FIRST_PAUSE_S = 0.1  # before a new engine after a death; doubles with each in a row

State = Literal["starting", "ready", "draining", "down"]


class EngineStartError(Exception):
    """The engine cannot start; one sentence that says what to do."""


@dataclass(slots=True, eq=False)
class _Call:
    """A request on its way."""

    request: Request
    replies: asyncio.Queue[wire.Delivered | wire.Ended] = field(default_factory=asyncio.Queue)
    num_tries: int = 0
    delivered: bool = False


class Supervisor:
    """Keeps one engine process running and carries requests to it."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.facts: wire.EngineFacts | None = None
        self.beat: wire.Beat | None = None
        self.state: State = "starting"
        self.num_restarts = 0
        self._calls: dict[str, _Call] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._num_deaths = 0

    # Its life

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises EngineStartError with the engine's own sentence."""
        self._keeper = asyncio.create_task(self._keep())
        while self.state == "starting":
            await self._wait_for_change()
        if self.state == "down":
            await self._keeper  # raises what ended it
            raise EngineStartError("The engine stopped before it was ready.")

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more and give open requests `timeout_s` seconds to finish."""
        if self.state == "starting":  # an engine that is on its way answers those who wait for it first
            deadline = time.monotonic() + timeout_s
            while self.state == "starting" and self._calls and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            timeout_s = max(0.0, deadline - time.monotonic())
        if self.state == "ready":
            self._become("draining")
            self._say(wire.Drain())
        deadline = time.monotonic() + timeout_s
        while self._calls and self.state == "draining" and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End the engine process and every call that is still open."""
        self._become("down")
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for call in list(self._calls.values()):
            self._fail(call, "shutdown", "The server was shut down before the answer was complete.")

    # Requests

    async def submit(self, request: Request) -> AsyncIterator[wire.Delivered | wire.Ended]:
        """Tokens as they come, then exactly one Ended. Closing the iterator early cancels the request."""
        call = _Call(request)
        self._calls[request.id] = call
        ended = False
        try:
            self._send(call)
            while not ended:
                reply = await call.replies.get()
                ended = isinstance(reply, wire.Ended)
                yield reply
        finally:
            self._calls.pop(request.id, None)
            if not ended:
                self._say(wire.Cancel(request.id))

    def cancel(self, request_id: str) -> None:
        """The caller went away; its Ended comes soon."""
        self._say(wire.Cancel(request_id))

    def stop(self, request_id: str) -> None:
        """A stop string was seen: the request ends as finished."""
        self._say(wire.Stop(request_id))

    def _send(self, call: _Call) -> None:
        """Hand it to the engine if there is one; one that is starting gets it when it is ready."""
        if self.state == "ready":
            call.num_tries += 1
            self._say(wire.Submit(call.request))
        elif self.state == "draining":
            self._refuse(call, "draining", "The server is shutting down: send the request to another one.")
        elif self.state == "down":
            self._refuse(call, "engine_down", "The engine is not running: try again later.")

    def _say(self, message: wire.ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.frame(message))

    # The engine's process

    async def _keep(self) -> None:
        """One engine after another, until closed or it is plain that none will live."""
        try:
            while True:
                reader = await self._launch()
                await self._listen(reader)
                cause = self._describe_death()
                if self.state == "draining":
                    return
                self._num_deaths += 1
                if self.facts is None or self._num_deaths >= MAX_DEATHS:
                    raise EngineStartError(cause)
                log.error("%s Starting another one.", cause)
                self._become("starting")
                self.num_restarts += 1
                for call in list(self._calls.values()):
                    if call.delivered or call.num_tries >= MAX_TRIES:
                        self._fail(call, "engine_lost", cause)
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (self._num_deaths - 1))
        finally:
            self._become("down")
            for call in list(self._calls.values()):
                self._fail(call, "engine_lost", "The engine is not running any more.")

    async def _launch(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [sys.executable, "-m", "headway.placement.process", "--socket", str(theirs.fileno())]
        command += ["--settings", msgspec.json.encode(self.settings).decode()]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        reader, self._writer = await asyncio.open_connection(sock=ours)
        return reader

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Until the engine hangs up."""
        frames = wire.Frames(bytearray())
        try:
            while data := await reader.read(1 << 18):
                for body in frames.feed(data):
                    self._hear(wire.from_engine_decoder.decode(body))
        except (ConnectionError, ValueError) as error:
            log.error("The engine's socket failed: %s", error)
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _hear(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Ready(facts):
                self.facts = facts
                self._become("ready")
                for call in list(self._calls.values()):
                    self._send(call)
            case wire.StartFailed(sentence):
                raise EngineStartError(sentence)
            case wire.Delivered(commit):
                self._num_deaths = 0
                if (waiting := self._calls.get(commit.request_id)) is not None:
                    waiting.delivered = True
                    waiting.replies.put_nowait(message)
            case wire.Ended(record):
                if (served := self._calls.pop(record.request_id, None)) is not None:
                    served.replies.put_nowait(message)
            case wire.Beat():
                self.beat = message

    def _describe_death(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"The engine process {how}."

    def _refuse(self, call: _Call, reason: str, message: str) -> None:
        self._end(call, "refused", reason, message, retry_after_s=1.0)

    def _fail(self, call: _Call, reason: str, message: str) -> None:
        self._end(call, "failed", reason, message)

    def _end(
        self,
        call: _Call,
        kind: Literal["refused", "failed"],
        reason: str,
        message: str,
        retry_after_s: float | None = None,
    ) -> None:
        """An ending that the engine cannot write any more."""
        request = call.request
        record = Record(request.id, request.arrival, request.slo, len(request.prompt), ended=time.monotonic())
        record.kind, record.reason, record.message, record.retry_after_s = kind, reason, message, retry_after_s
        for name in ("ttft", "tpot", "total"):
            if getattr(request.slo, f"{name}_s") is not None:
                record.missed[name] = "refused" if kind == "refused" else "engine_lost"
        self._calls.pop(request.id, None)
        call.replies.put_nowait(wire.Ended(record))

    def _become(self, state: State) -> None:
        self.state = state
        self._changed.set()

    async def _wait_for_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()
