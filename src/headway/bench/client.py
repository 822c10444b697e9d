"""The generator: asks an OpenAI-compatible server over HTTP, open loop, and notes when what came.

Owns the clock, the connections and the wire. A request is sent at its instant whatever became of those before it, and
its latencies count from that instant, so that neither a slow server nor a late generator can hide a wait. Nothing is
ever tried twice. It shares the machine with the server, so bodies are encoded beforehand and of the events of a
stream only the last is parsed. Knows no rates, targets' origin or judgement.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import msgspec

from headway.bench.score import Outcome, quantile
from headway.bench.traces import Asked
from headway.core.request import SLO

MAX_EVENT = 1 << 20  # bytes without an end of event: more is no stream of tokens
LEAD_S = 0.05  # before the first instant, so that nothing is late already
REFUSED = (429, 503)
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "are", "as", "with", "his", "they")


class ServerError(ValueError):
    """The server cannot be measured, in one sentence."""


class Server(NamedTuple):
    """Whom we ask, and how."""

    url: str  # without /v1
    model: str = ""
    context: int | None = None  # tokens, if the server says so
    as_text: bool = False  # words instead of token ids
    chat: bool = False  # /v1/chat/completions, where a prompt is one user message: words, since it takes no ids
    send_slo: bool = True  # x-slo-* headers
    send_class: bool = False  # x-slo-class
    api_key: str = ""
    timeout_s: float = 600.0


class Replay(NamedTuple):
    """What came of a load. `late_s`: how late the generator sent each request, which is its own fault.

    `complaints` has the server's words for each code that it answered with, as it said them first.
    """

    outcomes: tuple[Outcome, ...]
    late_s: tuple[float, ...]
    complaints: dict[str, str]

    def lateness(self) -> dict[str, float]:
        """In milliseconds."""
        shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        return {name: round(quantile(self.late_s, share) * 1000, 3) for name, share in shares.items()}


async def meet(server: Server) -> Server:
    """Ask who is there: the model's name, unless given, and its context, if it says so. Raises ServerError."""
    try:
        async with _session(server, 10.0) as session, session.get(f"{server.url}/v1/models") as response:
            content = await response.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ServerError(f"Nobody answers at {server.url}: start the server first ({_brief(error)}).") from error
    if response.status == 401:
        raise ServerError(f"{server.url} wants an API key: give --api-key or set HEADWAY_BENCH_API_KEY.")
    try:
        cards = msgspec.json.decode(content)["data"]
        card: dict[str, Any] = next((card for card in cards if not server.model or card["id"] == server.model), {})
        named = server.model or card["id"]
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(
            f"{server.url}/v1/models answers with no list of models (status {response.status})."
        ) from error
    context = card.get("max_model_len")
    return server._replace(model=str(named), context=context if isinstance(context, int) else server.context)


async def replay(
    server: Server,
    requests: Sequence[Asked],
    prompts: Sequence[tuple[int, ...]],
    targets: Mapping[str, SLO],
    done: Callable[[], None] = lambda: None,
) -> Replay:
    """Send each request at its instant, all from one loop. `done` is called at every ending."""
    calls = [_call(server, asked, prompt, targets) for asked, prompt in zip(requests, prompts, strict=True)]
    late_s = [0.0] * len(calls)
    complaints: dict[str, str] = {}

    async with _session(server, server.timeout_s) as session:
        start = time.monotonic() + LEAD_S

        async def one(number: int) -> Outcome:
            scheduled = start + requests[number].at_s
            await asyncio.sleep(max(0.0, scheduled - time.monotonic()))
            late_s[number] = max(0.0, time.monotonic() - scheduled)
            outcome = await _ask(session, server, calls[number], requests[number], scheduled, complaints)
            done()
            return outcome

        outcomes = await asyncio.gather(*(one(number) for number in range(len(calls))))
    return Replay(tuple(outcomes), tuple(late_s), complaints)


def _session(server: Server, timeout_s: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),  # servers close idle ones after 5 s or so
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers={"authorization": f"Bearer {server.api_key}"} if server.api_key else None,
        read_bufsize=1 << 16,
        auto_decompress=False,
    )


class _Call(NamedTuple):
    body: bytes
    headers: dict[str, str]


def _call(server: Server, asked: Asked, prompt: tuple[int, ...], targets: Mapping[str, SLO]) -> _Call:
    body: dict[str, Any] = {
        **_asking(server, prompt),
        "max_tokens": asked.num_output,
        "temperature": 0,
        "ignore_eos": True,  # so that answers are as long as the load says, where a server knows the field
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if server.model:
        body["model"] = server.model
    headers = {"content-type": "application/json"}
    slo = targets.get(asked.kind)
    if server.send_slo and slo is not None:
        named = {"ttft": slo.ttft_s, "tpot": slo.tpot_s, "total": slo.total_s}
        headers |= {f"x-slo-{name}-ms": f"{max(0.001, s * 1000):.3f}" for name, s in named.items() if s is not None}
    if server.send_class:
        headers["x-slo-class"] = asked.kind
    return _Call(msgspec.json.encode(body), headers)


def _asking(server: Server, prompt: tuple[int, ...]) -> dict[str, Any]:
    if not (server.as_text or server.chat):
        return {"prompt": prompt}
    words = " ".join(WORDS[token % len(WORDS)] for token in prompt)
    return {"messages": [{"role": "user", "content": words}]} if server.chat else {"prompt": words}


async def _ask(
    session: aiohttp.ClientSession,
    server: Server,
    call: _Call,
    asked: Asked,
    scheduled: float,
    complaints: dict[str, str],
) -> Outcome:
    heard = _Heard(b"content" if server.chat else b"text")
    reason, refused = "", False
    try:
        url = f"{server.url}/v1/{'chat/' if server.chat else ''}completions"
        async with session.post(url, data=call.body, headers=call.headers) as response:
            if response.status == 200:
                async for chunk in response.content.iter_any():
                    heard.take(chunk, time.monotonic())
                reason = heard.complaint()
            else:
                reason, refused = str(response.status), response.status in REFUSED
                complaints.setdefault(reason, _said(await response.read()))
    except TimeoutError:
        reason = "timeout"
    except aiohttp.ClientConnectorError:
        reason = "no connection"
    except (aiohttp.ClientError, OSError, ValueError, msgspec.MsgspecError) as error:
        reason = "broken stream" if heard.first_at is not None else type(error).__name__
    return heard.outcome(asked, scheduled, time.monotonic(), reason, refused=refused)


def _said(content: bytes) -> str:
    """The sentence in an error's body, in OpenAI's shape or whatever it is."""
    try:
        error = msgspec.json.decode(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (msgspec.DecodeError, KeyError, TypeError):
        return content[:300].decode(errors="replace")


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Last(msgspec.Struct):
    """What we want to know of a stream's last events."""

    usage: _Usage | None = None


class _Heard:
    """A stream of events, as much of it as a measurement needs. `field` is where they have their text."""

    def __init__(self, field: bytes) -> None:
        key = b'"' + field + b'":'
        self._key = key
        self._without_text = tuple(key + nothing for nothing in (b'""', b' ""', b"null", b" null"))
        self.first_at: float | None = None  # the first text, or whatever came if there never was any
        self._last_at: float | None = None
        self._num_texts = 0
        self._num_tokens: int | None = None
        self._gaps_s: list[float] = []
        self._rest = b""
        self._any_at: float | None = None
        self._ended = False
        self._error = ""

    def take(self, chunk: bytes, now: float) -> None:
        """More bytes. What comes together came at the same instant."""
        *events, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > MAX_EVENT:
            raise ValueError("an event without end")
        told = [event for event in events if event.startswith(b"data:")]
        num_texts = sum(self._event(event) for event in told)
        if self._any_at is None and len(told) > self._ended:
            self._any_at = now
        if num_texts:
            if self._last_at is not None:
                self._gaps_s.append(now - self._last_at)
                self._gaps_s += [0.0] * (num_texts - 1)
            self.first_at = self.first_at if self.first_at is not None else now
            self._last_at = now
            self._num_texts += num_texts

    def _event(self, event: bytes) -> bool:
        """Whether it brings text."""
        if event.endswith(b"[DONE]"):
            self._ended = True
            return False
        if b'"usage":{' in event or b'"usage": {' in event:
            usage = msgspec.json.decode(event[5:], type=_Last).usage
            self._num_tokens = usage.completion_tokens if usage is not None else None
        if event.startswith((b'data: {"error"', b'data:{"error"')):
            self._error = "error in stream"
        return self._key in event and not any(nothing in event for nothing in self._without_text)

    def complaint(self) -> str:
        """Why this is no complete answer; empty if it is one."""
        if self._error:
            return self._error
        return "" if self._ended and self._any_at is not None else "broken stream"

    def outcome(self, asked: Asked, scheduled: float, now: float, reason: str, *, refused: bool) -> Outcome:
        first_at = self.first_at if self.first_at is not None or reason else self._any_at
        num_output = self._num_tokens if self._num_tokens is not None else self._num_texts
        tpot_s = None
        if first_at is not None and self._last_at is not None and num_output > 1:
            tpot_s = (self._last_at - first_at) / (num_output - 1)
        return Outcome(
            kind=asked.kind,
            at_s=asked.at_s,
            num_prompt=asked.num_prompt,
            num_output=num_output,
            ending="refused" if refused else "failed" if reason else "finished",
            end_s=now - scheduled,
            ttft_s=None if first_at is None else first_at - scheduled,
            tpot_s=tpot_s,
            gaps_s=tuple(self._gaps_s),
            reason=reason,
            num_asked=asked.num_output if self._num_tokens is not None and not (reason or refused) else 0,
        )


def _brief(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:200]
