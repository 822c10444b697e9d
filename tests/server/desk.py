"""The door in front of an engine whose answers are known: `FakeLink` with a script."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx

from headway.config import DoorSettings
from headway.core.request import Request
from headway.models.tokenizer import ModelText, open_model_text
from headway.placement.link import FakeLink
from headway.server.app import Door
from headway.server.http import Http
from headway.server.run import address, listen

TEXT = open_model_text(None)


class Desk:
    """One door with its fake engine. `says` is the text that every answer begins with; then comes the end token."""

    def __init__(self, says: str = "", *, text: ModelText = TEXT, max_model_len: int = 256, **settings: Any) -> None:
        self.text = text
        self.says = says
        self.link = FakeLink(
            self._script, vocab_size=text.tokenizer.num_known, max_model_len=max_model_len, model_name="fake"
        )
        self.settings = DoorSettings(**settings)
        self.door = Door(text, self.link, self.settings)
        self.app = self.door.app()

    @property
    def ids(self) -> tuple[int, ...]:
        return self.text.tokenizer.encode(self.says)

    def _script(self, request: Request) -> tuple[int, ...]:
        return (*self.ids, self.text.tokenizer.eos_ids[0]) if self.says else ()

    async def start(self) -> "Desk":
        await self.link.start()
        return self

    def client(self, **options: Any) -> httpx.AsyncClient:
        """Calls the application without a network."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://desk", **options)

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        async with self.client() as client:
            return await client.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})

    async def complete(self, **body: Any) -> Any:
        response = await self.post("/v1/completions", {"prompt": "x", "max_tokens": 64} | body)
        assert response.status_code == 200, response.text
        return response.json()

    async def chat(self, **body: Any) -> Any:
        response = await self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]} | body)
        assert response.status_code == 200, response.text
        return response.json()

    async def stream(self, path: str, body: Any) -> list[Any]:
        """The JSON of every event of a stream that ends as it should."""
        response = await self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return events(response.text)


def events(text: str) -> list[Any]:
    *parts, last, nothing = text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    assert all(part.startswith("data: ") for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def run(story: Callable[[], Awaitable[None]]) -> None:
    """Tell an asynchronous story."""
    asyncio.run(story())


class Network:
    """A real server on a free port, in a thread of its own."""

    def __init__(self, desk: Desk, tls: Mapping[str, Any] | None = None) -> None:
        self.desk = desk
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> "Network":
        listener = listen("127.0.0.1", 0)
        self.url = address(listener, "https" if self._tls else "http")
        self.port = listener.getsockname()[1]
        self._thread.start()

        async def begin() -> Http:
            await self.desk.start()
            return Http(self.desk.app, listener, self._tls)

        self._http = self.do(begin())
        return self

    def __exit__(self, *error: object) -> None:
        self.do(self.desk.link.close())
        self.do(self._http.close(patient=False))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def client(self, **options: Any) -> httpx.AsyncClient:
        """Calls it over the network."""
        return httpx.AsyncClient(base_url=self.url, timeout=20, **options)

    def do(self, work: Any) -> Any:
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=20)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come soon."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)
