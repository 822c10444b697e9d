"""A server with the embedded model in float32, for clients that others wrote. `make test-clients` runs these.

The server runs in the interpreter HEADWAY_PYTHON, the clients in one that need not have torch.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "browser"))

from served import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # a short context: what a fuzzer asks for without a limit is soon at its end
    one = Server(tmp_path_factory.mktemp("cache"), "--dtype", "float32", "--max-model-len", "512")
    try:
        one.wait()
        yield one
    finally:
        one.close()


@pytest.fixture(autouse=True)
def _the_next_one_is_served(server: Server) -> Iterator[None]:
    """Whatever a client has sent, the next ordinary request is answered."""
    yield
    answer = server.post("/v1/completions", {"prompt": "def add(a, b):", "max_tokens": 4, "temperature": 0})
    assert answer["usage"]["completion_tokens"] == 4
