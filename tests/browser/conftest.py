"""A server with the embedded model, and a Chromium that can reach nothing else. `make test-browser` runs these.

The server runs in the interpreter HEADWAY_PYTHON, the tests in one that has Playwright and need not have torch.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from served import Server, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("cache"))
    try:
        one.wait()
        yield one
    finally:
        one.close()


@pytest.fixture
def lenient(tmp_path: Path) -> Iterator[Server]:
    """Another one, that serves late what cannot be in time. Tests name it before `visit`: it must outlive the page."""
    one = Server(tmp_path, "--no-refuse-unattainable")
    try:
        one.wait()
        yield one
    finally:
        one.close()


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """With a new profile of its own."""
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "Install Chromium (on Debian: apt-get install chromium), or set CHROMIUM to its path."
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield one
        one.close()


@pytest.fixture
def visit(server: Server, browser: "Browser") -> Iterator[Callable[..., "Page"]]:
    """Opens the page. When the test is over, nothing may have gone wrong in it, and no other host been asked."""
    opened: list[Any] = []
    wrong: list[str] = []
    asked: list[str] = []
    homes = {server.url + "/"}

    def open_(width: int = 1280, height: int = 900, path: str = "/", at: Server = server, **options: Any) -> "Page":
        homes.add(at.url + "/")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        opened.append(context)
        context.set_default_timeout(30_000)
        page: Page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(at.url + path)
        until(page, "document.getElementById('s-state').textContent === 'ready'")
        page.wrong = wrong  # type: ignore[attr-defined]  # a test that provokes an error takes it out
        return page

    yield open_
    for context in opened:
        context.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith((*homes, "data:"))] == []
