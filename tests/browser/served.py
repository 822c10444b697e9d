"""`headway serve` as a process of its own, with the embedded model."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
START_S = 180.0


class Server:
    """`headway serve` on a free port."""

    def __init__(self, cache: Path, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        python = os.environ.get("HEADWAY_PYTHON", sys.executable)
        command = [python, "-m", "headway", "serve", "--port", str(self.port), "--num-threads", "1"]
        command += ["--served-model-name", "embedded", "--slo-classes", "chat=ttft:400,tpot:100", "report=total:8000"]
        command += flags
        self._process = subprocess.Popen(command, env=os.environ | {"HEADWAY_CACHE_DIR": str(cache)}, cwd=cache)

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=5):
                    return
            except OSError:
                assert self._process.poll() is None, "the server has left; its words are above"
                assert time.monotonic() < deadline, f"the server is not ready after {START_S:.0f} s"
                time.sleep(0.1)

    def post(self, path: str, body: Any, **headers: str) -> Any:
        """The JSON of the answer, whatever its status."""
        told = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), told)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def until(page: "Page", condition: str, seconds: float = 30.0) -> None:
    """Wait for a condition in JavaScript. (The browser's own waiting needs eval, which the page's policy forbids.)"""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"it did not come to that: {condition}"
        page.wait_for_timeout(50)


def answer_is_there(page: "Page", box: str) -> str:
    """The new text in a box, when its stream is over."""
    page.wait_for_selector(f"{box} .new:not(.growing):not(:empty)")
    return page.locator(f"{box} .new").inner_text()
