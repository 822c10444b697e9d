"""Those who ask a server for a soak: ordinary calls of several kinds, and nonsense, each accounted for when it ends."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from headway.grammar import notation

PATIENCE_S = 60.0  # a call that has not ended by then hangs
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "home", "before", "rain")
COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
ASKED = {"texts": 55, "chats": 35, "vectors": 5}  # of a hundred ordinary calls, or nearly
if notation.is_available():
    ASKED["objects of JSON"] = 5
REFUSALS = ('"slo_unattainable"', '"deadline_expired"')
NONSENSE: tuple[tuple[str, bytes], ...] = (
    (COMPLETIONS, b"{"),
    (COMPLETIONS, b'{"prompt": 7}'),
    (COMPLETIONS, b'{"prompt": "a", "max_tokens": -1}'),
    (COMPLETIONS, b'{"prompt": "a", "n": 100000}'),
    (COMPLETIONS, b'{"prompt": [99999999]}'),
    (COMPLETIONS, b'{"prompt": "a", "model": "nobody"}'),
    (COMPLETIONS, b'{"prompt": "' + b"word " * 20000 + b'"}'),
    (CHAT, b'{"messages": [{"role": "user"}]}'),
    (CHAT, b'{"messages": "hello"}'),
    (EMBEDDINGS, b'{"input": {}}'),
    ("/nowhere", b"{}"),
)


@dataclass(slots=True)
class Account:
    """How calls ended, in words, and what they asked for; what did not end as it may; and seconds that whole answers
    took."""

    endings: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_begun: int = 0
    whole_s: list[float] = field(default_factory=list)


class Caller:
    """Asks again and again, in one of several ways, and accounts for each ending."""

    def __init__(self, session: aiohttp.ClientSession, url: str, account: Account, seed: int) -> None:
        self._session, self._url, self._account = session, url, account
        self._rng = random.Random(seed)

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            self._account.num_begun += 1
            begun = time.monotonic()
            try:
                ending = await asyncio.wait_for(self._call(), PATIENCE_S)
            except TimeoutError:
                ending = "hung"
                self._account.faults.append(f"a call did not end within {PATIENCE_S:g} s")
            except aiohttp.ClientError as error:
                ending = f"connection: {type(error).__name__}"
                self._account.faults.append(f"the connection broke: {error!r}")
            self._account.endings[ending] += 1
            if ending == "answered":
                self._account.whole_s.append(time.monotonic() - begun)
            elif ending != "left":
                await asyncio.sleep(0.05 * self._rng.random())

    async def _call(self) -> str:
        rng = self._rng
        kind = rng.choices(("stream", "whole", "leave", "nonsense"), (60, 10, 20, 10))[0]
        if kind == "nonsense":
            return await self._nonsense(*rng.choice(NONSENSE))
        path, body = self._ordinary()
        if path != EMBEDDINGS:
            body["stream"] = kind != "whole"
        headers = {}
        if rng.random() < 0.5:
            headers["x-slo-ttft-ms"] = str(rng.choice((200, 2000, 20000)))
        async with self._session.post(f"{self._url}{path}", json=body, headers=headers) as response:
            if response.status in (429, 503):
                if "retry-after" not in response.headers and response.headers.get("x-should-retry") != "false":
                    self._account.faults.append(f"{response.status} that does not say when to come back, if at all")
                return f"refused with {response.status}"
            if response.status == 500:
                return self._lost((await response.read()).decode(errors="replace"))
            if response.status != 200:
                self._account.faults.append(
                    f"{response.status} to an ordinary request: {(await response.text())[:200]}"
                )
                return f"status {response.status}"
            if not body.get("stream"):
                return self._whole(path, body, await response.json())
            return await self._listen(response, rng.randrange(6) if kind == "leave" else None)

    def _ordinary(self) -> tuple[str, dict[str, Any]]:
        """Where to ask, and what."""
        rng = self._rng
        what = rng.choices(tuple(ASKED), tuple(ASKED.values()))[0]
        self._account.asked[what] += 1
        text = " ".join(rng.choices(WORDS, k=rng.choice((3, 10, 40, 150))))
        if what == "vectors":
            return EMBEDDINGS, {"input": [text, *rng.sample(WORDS, rng.choice((0, 2)))]}
        drawn = {"max_tokens": rng.choice((1, 4, 16, 40)), "seed": rng.randrange(1000)}
        if what == "texts":
            return COMPLETIONS, drawn | {"prompt": text}
        held = {"response_format": {"type": "json_object"}} if what == "objects of JSON" else {}
        return CHAT, drawn | held | {"messages": [{"role": "user", "content": text}]}

    def _whole(self, path: str, body: dict[str, Any], answer: Any) -> str:
        """An answer that came at once has what was asked for: as many vectors, or an object if it came to its end."""
        if path == EMBEDDINGS:
            if len(answer["data"]) != len(body["input"]):
                self._account.faults.append(f"{len(answer['data'])} vectors for {len(body['input'])} texts")
            return "answered"
        if not answer["choices"]:
            return "empty"
        choice = answer["choices"][0]
        if "response_format" in body and choice["finish_reason"] == "stop":
            content = choice["message"]["content"] or ""
            with contextlib.suppress(msgspec.DecodeError):
                if isinstance(msgspec.json.decode(content), dict):
                    return "answered"
            self._account.faults.append(f"no object of JSON: {content[:60]!r}")
        return "answered"

    async def _listen(self, response: aiohttp.ClientResponse, leave_after: int | None) -> str:
        """To the end of a stream; there must be one end, and nothing behind it."""
        num_events, ended, error = 0, False, ""
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            if ended:
                self._account.faults.append("an event after the end of a stream")
            num_events += 1
            ended = line.strip() == b"data: [DONE]"
            if line.startswith((b'data: {"error"', b'data:{"error"')):
                error = line.decode()
            if leave_after is not None and num_events > leave_after:
                response.close()
                return "left"
        if error:
            return self._lost(error)
        if not ended:
            self._account.faults.append("a stream ended without its end")
        return "answered" if ended else "cut off"

    def _lost(self, text: str) -> str:
        """A failure that may be: the engine was killed under it, or the next one refuses what had waited for it so long
        that a keep-alive had settled the status."""
        if any(code in text for code in REFUSALS):
            return "refused in a stream that had begun"
        if "engine" not in text:
            self._account.faults.append(f"failed: {text[:200]}")
        return "failed with the engine"

    async def _nonsense(self, path: str, body: bytes) -> str:
        headers = {"content-type": "application/json"}
        async with self._session.post(f"{self._url}{path}", data=body, headers=headers) as response:
            content = await response.read()
            if response.status not in (400, 404, 413):
                self._account.faults.append(f"{response.status} to {body[:60]!r}")
            try:
                msgspec.json.decode(content)["error"]["message"]
            except (msgspec.DecodeError, KeyError, TypeError):
                self._account.faults.append(f"no error object to {body[:60]!r}")
        return "nonsense was refused"
