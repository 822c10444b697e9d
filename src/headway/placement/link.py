"""The door's view of one engine, and the fake that ships beside the real one (`supervise.Supervisor`).

A link carries requests out and replies back. It knows no HTTP and no text, and whoever holds it knows no process and
no socket.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from headway.core.ledger import EndKind, Record, settle
from headway.core.lifecycle import State
from headway.core.request import Request
from headway.core.work import Commit, TokenLogprobs
from headway.placement.spans import History, Kind, Span
from headway.placement.wire import Admitted, Beat, Delivered, Ended, EngineFacts

LinkState = Literal["starting", "ready", "draining", "down"]
Reply = Admitted | Delivered | Ended


class EngineLink(Protocol):
    """One engine, as far as the door is concerned. Not thread-safe: it belongs to the door's event loop."""

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine resolved at its first start; None until then."""

    @property
    def beat(self) -> Beat | None:
        """The last sign of life."""

    @property
    def state(self) -> LinkState:
        """Only a ready link admits at once; one that is starting (again) keeps requests waiting."""

    @property
    def history(self) -> History:
        """What the device did of late."""

    @property
    def num_restarts(self) -> int:
        """How many times the engine died and another one was started."""

    async def start(self) -> None:
        """Return when the engine is ready; raise with one sentence if it never will be."""

    def submit(self, request: Request, hear: Callable[[Reply], None]) -> None:
        """`hear` is called from the event loop: with an Admitted if the engine took it in, with tokens as they come,
        then with exactly one Ended, always the last. It raises nothing."""

    def cancel(self, request_id: str) -> None:
        """Nobody waits for the answer any more; its Ended still comes."""

    def stop(self, request_id: str) -> None:
        """A stop string was seen: end it as finished, with reason "stop"."""

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more and return when everything open has ended, or the time is over."""

    async def close(self) -> None:
        """End everything that is still open, and the engine."""


class Fate(NamedTuple):
    """How a FakeLink ends requests of its own accord, after so many tokens."""

    kind: EndKind
    reason: str
    message: str = ""
    retry_after_s: float | None = None
    num_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Call:
    request: Request
    record: Record
    ending: Fate | None = None


class FakeLink:
    """An engine whose answers can be worked out by hand.

    Token k of an answer is `script(request)[k]` as long as the script goes, and (sum of the prompt + k) modulo
    `vocab_size` from there on. Token t has the logprob -t/1000, and the candidates beside it are t, t+1, t+2, … Stop
    ids, min_tokens and max_tokens count as in a real engine, and a prompt's tokens have such logprobs as well. A
    prompt's vector is `vector`. While `serving` is False nobody gets a first token, while `flowing` is False nobody
    gets another one. In its `history` each token is a step of its own.
    """

    def __init__(
        self,
        script: Callable[[Request], Sequence[int]] = lambda request: (),
        *,
        vocab_size: int = 1009,
        max_model_len: int = 2048,
        model_name: str = "fake",
    ) -> None:
        self.script = script
        self.vocab_size = vocab_size
        self.facts: EngineFacts | None = None
        self.beat: Beat | None = None
        self.state: LinkState = "starting"
        self.num_restarts = 0
        self.history = History()
        self.fate: Fate | None = None
        self.predicted_ttft_s = 0.05
        self.serving = True
        self.flowing = True
        self.requests: list[Request] = []  # everything that was ever submitted
        self.cancelled: set[str] = set()
        self.stopped: set[str] = set()
        self._open: dict[str, _Call] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._facts = EngineFacts(
            model_name=model_name,
            device="cpu",
            dtype="float32",
            dtype_reason="arithmetic needs no more",
            num_parameters=0,
            max_model_len=max_model_len,
            max_num_seqs=64,
            page_tokens=16,
            num_pages=1000,
            pool_bytes=0,
            num_threads=1,
            max_tile_ms=10.0,
            load_s=0.0,
            hidden_size=4,
        )

    async def start(self) -> None:
        self.facts = self._facts
        self.state = "ready"
        self._note()

    async def drain(self, timeout_s: float) -> None:
        self.state = "draining"
        deadline = time.monotonic() + timeout_s
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        self.state = "down"
        for call in self._open.values():
            call.ending = Fate("failed", "shutdown", "The server was shut down before the answer was complete.")

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)
        self.end_soon(request_id, Fate("cancelled", "cancelled"))

    def stop(self, request_id: str) -> None:
        self.stopped.add(request_id)
        self.end_soon(request_id, Fate("finished", "stop"))

    def submit(self, request: Request, hear: Callable[[Reply], None]) -> None:
        self.requests.append(request)
        call = self._open[request.id] = _Call(request, Record.open(request))
        task = asyncio.get_running_loop().create_task(self._serve(call, hear))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, call: _Call, hear: Callable[[Reply], None]) -> None:
        try:
            while self.state == "starting" and call.ending is None:
                await asyncio.sleep(0.001)
            if self.state == "draining":
                call.ending = Fate("refused", "draining", "The server is shutting down.", 1.0)
            elif self.state == "down" and call.ending is None:
                call.ending = Fate("refused", "engine_down", "The engine is not running.", 1.0)
            async for reply in self._answer(call):
                hear(reply)
        finally:
            self._open.pop(call.request.id, None)
            self._note()

    async def _answer(self, call: _Call) -> AsyncIterator[Reply]:
        request, record = call.request, call.record
        script = self.script(request)
        scores = self._scores(request)
        begun = time.monotonic()
        record.predicted_ttft_s = self.predicted_ttft_s
        self._note()
        if not self._refuses(call):
            record.first_scheduled = time.monotonic()
            record.note(record.first_scheduled, "admitted")
            yield Admitted(request.id, self.predicted_ttft_s)
        while not self.serving and call.ending is None:
            await asyncio.sleep(0.001)
        while call.ending is None:
            k = record.num_output_tokens
            if self.fate is not None and k >= self.fate.num_tokens:
                call.ending = self.fate
                break
            if k == 0 and scores:  # the prompt is read in two pieces
                yield Delivered(Commit(request.id, (), prompt_logprobs=scores[: len(scores) // 2]))
                scores = scores[len(scores) // 2 :]
            if request.max_tokens == 0:
                yield Delivered(Commit(request.id, (), prompt_logprobs=scores, vector=self.vector(request)))
                record.first_token = time.monotonic()
                call.ending = Fate("finished", "length")
                break
            token = script[k] if k < len(script) else (sum(request.prompt) + k) % self.vocab_size
            yield Delivered(self._commit(request, token, scores if k == 0 else ()))
            record.last_token = time.monotonic()
            self._ran(request, "decode" if k else "prefill", begun, record.last_token)
            begun = record.last_token
            if record.first_token is None:
                record.first_token = record.last_token
                record.note(record.first_token, "first_token")
            record.num_output_tokens = k + 1
            if token in request.stop_ids and k + 1 > request.min_tokens:
                record.stop_id = token
                call.ending = Fate("finished", "stop")
            elif k + 1 >= request.max_tokens:
                call.ending = Fate("finished", "length")
            await asyncio.sleep(0)
            while not self.flowing and call.ending is None:
                await asyncio.sleep(0.001)
        fate = call.ending
        record.message, record.retry_after_s = fate.message, fate.retry_after_s
        settle(record, State(fate.kind), fate.reason, time.monotonic())
        yield Ended(record)

    @staticmethod
    def vector(request: Request) -> tuple[float, ...]:
        """The angle of as many degrees as the prompt has in all, to be worked out by hand."""
        if not request.pooling:
            return ()
        angle = math.radians(sum(request.prompt))
        return math.cos(angle), math.sin(angle), 0.0, 0.0

    def _refuses(self, call: _Call) -> bool:
        """At the gate: what expires in the queue was let in."""
        fate = call.ending or self.fate
        return fate is not None and fate.kind == "refused" and fate.reason != "deadline_expired"

    def _commit(self, request: Request, token: int, scores: tuple[TokenLogprobs, ...]) -> Commit:
        num_top = request.sampling.num_logprobs
        if num_top is None:
            return Commit(request.id, (token,), prompt_logprobs=scores)
        return Commit(request.id, (token,), (self._logprobs(token, num_top),), prompt_logprobs=scores)

    def _scores(self, request: Request) -> tuple[TokenLogprobs, ...]:
        num_top = request.sampling.num_prompt_logprobs
        return () if num_top is None else tuple(self._logprobs(token, num_top) for token in request.prompt[1:])

    def _logprobs(self, token: int, num_top: int) -> TokenLogprobs:
        others = [(token + k) % self.vocab_size for k in range(num_top)]
        return TokenLogprobs(-token / 1000, tuple((other, -other / 1000) for other in others))

    def end_soon(self, request_id: str, fate: Fate) -> None:
        """This one, whatever befalls the others."""
        call = self._open.get(request_id)
        if call is not None and call.ending is None:
            call.ending = fate

    def _ran(self, request: Request, kind: Kind, begun: float, ended: float) -> None:
        num_tokens = len(request.prompt) if kind == "prefill" else 1
        work_id = self.history.num_heard + 1
        self.history.add((Span(work_id, begun, ended, kind, num_tokens, 1, (request.id,), "done"),), ())

    def _note(self) -> None:
        num_open = len(self._open)
        pages = {"free": self._facts.num_pages - num_open, "held": num_open, "parked": 0, "cached": 0}
        self.beat = Beat(time.monotonic(), num_open, 0, 0, pages, {"events": float(len(self.requests))})
