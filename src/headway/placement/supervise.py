"""The door's side of one engine process: start it, talk to it, notice its death, start another.

A request whose engine dies before a single token was delivered gets a second try on the next engine; one that had
begun ends as failed, because a caller must never see a token twice. An engine that falls silent is as good as dead, and
is killed. Conforms to `link.EngineLink`.
"""

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import msgspec

from headway.config import EngineSettings
from headway.core.ledger import Cause, EndKind, Record
from headway.core.request import Request
from headway.placement import wire
from headway.placement.spans import History

log = logging.getLogger("headway.supervise")

MAX_TRIES = 2  # of one request
MAX_DEATHS = 3  # in a row, without a token in between: then the engine is taken for broken
FIRST_PAUSE_S = 0.1  # before a new engine after a death; doubles with each in a row
START_S = 600.0  # an engine may be silent for so long while it loads
SILENCE_S = 10.0  # and for so long afterwards: it beats every second
TICKS = 4  # in which silence is counted
DEATH_S = 5.0  # from hanging up to being gone
LEAVING = "The server is shutting down: send the request to another one."

State = Literal["starting", "ready", "draining", "down"]
Reply = wire.Admitted | wire.Delivered | wire.Ended

_CAUSES: dict[EndKind, Cause] = {"refused": "refused", "cancelled": "cancelled", "failed": "engine_lost"}


class EngineStartError(Exception):
    """The engine cannot start; one sentence that says what to do."""


@dataclass(slots=True, eq=False)
class _Call:
    """A request on its way."""

    request: Request
    hear: Callable[[Reply], None]
    num_tries: int = 0
    delivered: bool = False
    cancelled: bool = False  # by its caller: not worth another try
    due: asyncio.TimerHandle | None = None  # while it waits for an engine

    def stop_waiting(self) -> None:
        if self.due is not None:
            self.due.cancel()
            self.due = None


class Supervisor:
    """Keeps one engine process running and carries requests to it."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.facts: wire.EngineFacts | None = None
        self.beat: wire.Beat | None = None
        self.state: State = "starting"
        self.num_restarts = 0
        self.history = History()
        self._calls: dict[str, _Call] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Line | None = None
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._num_deaths = 0
        self._leaving = False

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
        self._leaving = True
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
        """End every call that is still open, and the engine process."""
        self._become("down")
        for call in list(self._calls.values()):
            self._lose(call, "shutdown", "The server was shut down before the answer was complete.")
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    # Requests

    def submit(self, request: Request, hear: Callable[[Reply], None]) -> None:
        """`hear` is called with Admitted, with tokens as they come, then with exactly one Ended."""
        call = self._calls[request.id] = _Call(request, hear)
        if self.state != "starting":
            self._send(call)
        elif self._leaving:
            self._refuse(call, "draining", LEAVING)
        elif sum(not call.delivered for call in self._calls.values()) > (most := self.settings.max_num_queued_reqs):
            self._refuse(call, "queue_full", f"{most} requests wait for an engine already: try again in a moment.")
        else:
            self._let_wait(call)

    def cancel(self, request_id: str) -> None:
        """The caller went away; its Ended comes soon."""
        if (call := self._calls.get(request_id)) is None:
            return
        call.cancelled = True
        if self.state == "starting":  # no engine has it
            self._end(call, "cancelled", "cancelled")
        else:
            self._say(wire.Cancel(request_id))

    def stop(self, request_id: str) -> None:
        """A stop string was seen: the request ends as finished."""
        self._say(wire.Stop(request_id))

    def _send(self, call: _Call) -> None:
        """Hand it to the engine if there is one; one that is starting gets it when it is ready."""
        if self.state == "ready":
            call.stop_waiting()
            call.num_tries += 1
            self._say(wire.Submit(call.request))
        elif self.state == "draining":
            self._refuse(call, "draining", LEAVING)
        elif self.state == "down":
            self._refuse(call, "engine_down", "The engine is not running: try again later.")

    def _let_wait(self, call: _Call) -> None:
        """For an engine that is starting: as long as the first token can still come in time."""
        call.stop_waiting()
        slo = call.request.slo
        targets = [slo.ttft_s if self.settings.refuse_unattainable else None, slo.total_s]
        if (soonest := min((target for target in targets if target is not None), default=None)) is not None:
            left_s = call.request.arrival + soonest - time.monotonic()
            call.due = asyncio.get_running_loop().call_later(max(0.0, left_s), self._give_up, call)

    def _give_up(self, call: _Call) -> None:
        self._refuse(call, "deadline_expired", "The engine is starting again, and the deadline has passed: try again.")

    def _say(self, message: wire.ToEngine) -> None:
        if self._line is not None:
            self._line.say(message)

    # The engine's process

    async def _keep(self) -> None:
        """One engine after another, until closed or it is plain that none will live."""
        try:
            while True:
                await self._listen(await self._launch())
                if self.state == "draining":
                    return
                self._become("starting")
                self.history.lose(time.monotonic())
                self.beat = None  # what it said of its queue and pages holds no more
                cause = await self._describe_death()
                self._num_deaths += 1
                if self.facts is None or self._num_deaths >= MAX_DEATHS:
                    raise EngineStartError(cause)
                log.error("%s Starting another one.", cause)
                self.num_restarts += 1
                for call in list(self._calls.values()):
                    if call.delivered or call.num_tries >= MAX_TRIES or call.cancelled:
                        self._lose(call, "engine_lost", cause)
                    else:
                        self._let_wait(call)
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (self._num_deaths - 1))
        except EngineStartError as error:
            if self.facts is not None:  # the first engine's sentence is raised by `start`; a later one's is told here
                log.error("No other engine can be started: %s", error)
            raise
        except Exception:
            log.exception("The engine cannot be kept running.")
            raise
        finally:
            self._become("down")
            for call in list(self._calls.values()):
                self._lose(call, "engine_lost", "The engine is not running any more.")

    async def _launch(self) -> "Line":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # -P: a file in the current directory that is named like a module must not become one
        command = [sys.executable, "-P", "-m", "headway.placement", "--socket", str(theirs.fileno())]
        command += ["--settings", msgspec.json.encode(self.settings).decode()]
        try:
            with theirs:
                # a group of its own: what is sent to ours (Ctrl-C, a service manager's SIGTERM) is for the door alone
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0)
        except OSError as error:
            ours.close()
            raise EngineStartError(
                f"The system refuses to start the engine process ({error}): allow this user more processes or memory."
            ) from error
        return await self._connect(ours)

    async def _connect(self, end: socket.socket) -> "Line":
        _, self._line = await asyncio.get_running_loop().create_connection(lambda: Line(self._hear), sock=end)
        return self._line

    async def _listen(self, line: "Line") -> None:
        """Until the engine hangs up, or is killed because it is silent or cannot be understood."""
        try:
            await line.listen(lambda: START_S if self.state == "starting" else SILENCE_S)
        except TimeoutError:
            log.error("The engine has said nothing for too long: it is killed.")
            self._kill()
        except (ConnectionError, ValueError, msgspec.MsgspecError) as error:
            log.error("The engine's socket failed: %s", error)
            self._kill()
        finally:
            line.close()
            self._line = None

    def _kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def _hear(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Delivered):  # before all others: there is one for each token
            self._num_deaths = 0
            if (waiting := self._calls.get(message.commit.request_id)) is not None:
                waiting.delivered = True
                waiting.hear(message)
            return
        match message:
            case wire.Ready(facts):
                self.facts = facts
                self._become("ready")
                for call in list(self._calls.values()):
                    self._send(call)
            case wire.StartFailed(sentence):
                raise EngineStartError(sentence)
            case wire.Admitted(request_id):
                if (admitted := self._calls.get(request_id)) is not None:
                    admitted.hear(message)
            case wire.Ended(record):
                if (served := self._calls.pop(record.request_id, None)) is not None:
                    served.hear(message)
            case wire.Beat():
                self.beat = message
            case wire.Ran(spans, running):
                self.history.add(spans, running)

    async def _describe_death(self) -> str:
        assert self._process is not None
        try:
            code = await asyncio.to_thread(self._process.wait, DEATH_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = await asyncio.to_thread(self._process.wait)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"The engine process {how}."

    def _refuse(self, call: _Call, reason: str, message: str) -> None:
        self._end(call, "refused", reason, message, retry_after_s=1.0)

    def _lose(self, call: _Call, reason: str, message: str) -> None:
        """It cannot be finished: a failure, unless its caller had given it up before."""
        if call.cancelled:
            self._end(call, "cancelled", "cancelled")
        else:
            self._end(call, "failed", reason, message)

    def _end(
        self, call: _Call, kind: EndKind, reason: str, message: str = "", retry_after_s: float | None = None
    ) -> None:
        """An ending that the engine cannot write any more."""
        request = call.request
        record = Record.open(request)
        record.ended = time.monotonic()
        record.kind, record.reason, record.message, record.retry_after_s = kind, reason, message, retry_after_s
        for name in ("ttft", "tpot", "total"):
            if getattr(request.slo, f"{name}_s") is not None:
                record.missed[name] = _CAUSES[kind]
        self._calls.pop(request.id, None)
        call.stop_waiting()
        call.hear(wire.Ended(record))

    def _become(self, state: State) -> None:
        self.state = state
        self._changed.set()

    async def _wait_for_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()


class Line(asyncio.Protocol):
    """The door's end of the socket to one engine. Each message is heard in the moment it comes, without a task or a
    queue in between: a token costs the door little."""

    def __init__(self, hear: Callable[[wire.FromEngine], None]) -> None:
        self._hear = hear
        self._frames = wire.Frames(bytearray())
        self._transport: asyncio.Transport | None = None
        self._num_received = 0  # times that something was
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by descent

    def data_received(self, data: bytes) -> None:
        self._num_received += 1
        if self._over.done():
            return
        try:
            for body in self._frames.feed(data):
                self._hear(wire.from_engine_decoder.decode(body))
        except Exception as error:
            self._over.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        if self._over.done():
            return
        if error is None:
            self._over.set_result(None)
        else:
            self._over.set_exception(error)

    async def listen(self, limit_s: Callable[[], float]) -> None:
        """Until the other end hangs up. Raises what went wrong, TimeoutError if nothing came for so many seconds."""
        silent_s = 0.0
        while not self._over.done():
            before, tick_s = self._num_received, min(limit_s(), SILENCE_S) / TICKS
            await asyncio.wait({self._over}, timeout=tick_s)
            # in ticks: a door that was itself stopped counts one when it goes on, and then reads what waits for it
            silent_s = silent_s + tick_s if self._num_received == before else 0.0
            if silent_s >= limit_s():
                raise TimeoutError
        self._over.result()

    def say(self, message: wire.ToEngine) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.frame(message))

    def close(self) -> None:
        self._over.cancel()
        if self._transport is not None:
            self._transport.close()
