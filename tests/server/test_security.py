"""What a hostile caller, body or model may try. After each attempt the next ordinary request is answered as ever.

Other files hold what belongs to their subject: bodies that are no JSON, endless headers and keys (`test_guard.py`),
pickles (`test_weights.py`), templates that loop (`test_tokenizer_chat.py`), frames between door and engine
(`test_wire.py`), and that no module can run what it reads (`test_nothing_evaluated.py`).
"""

import gzip
import hmac
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from desk import Desk, Network, run

from headway.models.locate import locate
from headway.server import transport

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
JSON = {"content-type": "application/json"}
MEGABYTE = "m" * 2**20
MANY = 10**9
USUAL_FILES = 1024  # that a process may have open, unless it asks for more


def assert_served(url: str, within_s: float = 10.0) -> None:
    """An ordinary request on a new connection gets the answer that it should, and soon."""
    begun = time.monotonic()
    response = httpx.post(f"{url}{COMPLETIONS}", json={"prompt": "x", "max_tokens": 64}, timeout=20)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == "ok"
    assert time.monotonic() - begun < within_s


def refusal(response: httpx.Response) -> dict[str, Any]:
    """The error of a 400 that is small, whatever was sent."""
    assert response.status_code == 400, response.text[:300]
    assert len(response.content) < 2500
    assert sum(len(name) + len(value) for name, value in response.headers.items()) < 1000
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.fixture
def server(network: Callable[[Desk], Network]) -> Network:
    return network(Desk("ok"))


# Bodies


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (gzip.compress(b'{"prompt": "' + b"x" * (64 << 20) + b'"}'), {"content-encoding": "gzip"}),
        (b'{"prompt": "x", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}),
        (b'{"prompt": "x", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", {}),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 1_000_000 + b"}", {}),
        (b'{"prompt": "x", "n": 1, "n": 1000000}', {}),
        (b'{"prompt": "x", ' + b'"n": 1, ' * 200_000 + b'"n": 1000000}', {}),
        (b'{"prompt": "x", "tools": [], "tools": [1]}', {}),
    ],
    ids=["compressed", "deep lists", "deep objects", "digits", "twice", "many times", "refused the second time"],
)
def test_a_body_that_would_grow_is_a_400(server: Network, content: bytes, headers: dict[str, str]) -> None:
    """Nothing is unpacked; depth and digits have bounds; of a name that comes twice, what is checked is what counts."""
    refusal(httpx.post(f"{server.url}{COMPLETIONS}", content=content, headers=JSON | headers, timeout=20))
    assert server.desk.link.requests == []
    assert_served(server.url)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"n": MANY}, "n"),
        (COMPLETIONS, {"best_of": MANY}, "best_of"),
        (COMPLETIONS, {"prompt": ["x"] * 300}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 100, "n": 100}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 100, "best_of": 100}, "prompt"),
        (COMPLETIONS, {"prompt": [[5]] * 100_000}, "prompt"),
        (COMPLETIONS, {"logprobs": MANY}, "logprobs"),
        (COMPLETIONS, {"prompt_logprobs": MANY}, "prompt_logprobs"),
        (COMPLETIONS, {"max_tokens": 2**40}, "max_tokens"),
        (COMPLETIONS, {"stop": ["x"] * 100_000}, "stop"),
        (COMPLETIONS, {"stop": MEGABYTE}, "stop"),
        (COMPLETIONS, {"stop_token_ids": list(range(100_000))}, "stop_token_ids"),
        (COMPLETIONS, {"logit_bias": {str(token): 1 for token in range(100_000)}}, "logit_bias"),
        (COMPLETIONS, {"bad_words": ["x"] * 100_000}, "bad_words"),
        (COMPLETIONS, {"cache_salt": MEGABYTE}, "cache_salt"),
        (COMPLETIONS, {"prompt_embeds": MEGABYTE}, "prompt_embeds"),
        (CHAT, {"top_logprobs": MANY, "logprobs": True}, "top_logprobs"),
        (CHAT, {"n": MANY}, "n"),
        (CHAT, {"chat_template": "{% for a in range(10**9) %}{% endfor %}"}, "chat_template"),
        (RESPONSES, {"metadata": {str(key): "x" for key in range(100_000)}}, "metadata"),
        ("/v1/embeddings", {"input": ["x"] * 300}, "input"),
        ("/v1/embeddings", {"input": "x", "dimensions": MANY}, "dimensions"),
        ("/tokenize", {"prompt": MEGABYTE + "m"}, "prompt"),
        ("/detokenize", {"tokens": [5] * 300_000}, "tokens"),
    ],
)
def test_no_number_is_without_bound(server: Network, path: str, body: dict[str, Any], param: str) -> None:
    """Refused by name, before anything is made of it."""
    beside = {
        COMPLETIONS: {"prompt": "x"},
        CHAT: {"messages": [{"role": "user", "content": "x"}]},
        RESPONSES: {"input": "x"},
    }
    error = refusal(httpx.post(server.url + path, json=beside.get(path, {}) | body, timeout=20))
    assert str(error["param"]).partition("[")[0].partition(".")[0] == param
    assert server.desk.link.requests == []
    assert_served(server.url)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "x", "logit_bias": {MEGABYTE: 1}}),
        (COMPLETIONS, {"prompt": "x", "slo": {"class": MEGABYTE}}),
        (COMPLETIONS, {"prompt": "x", "temperature": MEGABYTE}),
        (COMPLETIONS, {"prompt": [["x", MEGABYTE]] * 5}),
        (CHAT, {"messages": [{"role": MEGABYTE, "content": "x"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": MEGABYTE}]}]}),
        (CHAT, {"messages": [{"role": MEGABYTE[:100], "content": 5}] * 10_000}),
        (RESPONSES, {"input": [{"type": MEGABYTE, "role": "user", "content": "x"}]}),
    ],
)
def test_what_is_wrong_is_said_in_few_words(server: Network, path: str, body: dict[str, Any]) -> None:
    """A big request never makes a big error."""
    refusal(httpx.post(server.url + path, json=body, timeout=20))
    assert_served(server.url)


def test_a_model_with_a_long_name_is_not_found_in_few_words(server: Network) -> None:
    response = httpx.post(server.url + COMPLETIONS, json={"prompt": "x", "model": MEGABYTE}, timeout=20)
    assert response.status_code == 404
    assert len(response.content) < 2500
    assert_served(server.url)


# Addresses inside of messages


def test_nothing_is_fetched_for_a_caller(server: Network, tmp_path: Path) -> None:
    """Images and files by address are refused; nobody is connected to, and no file is told of."""
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    with socket.create_server(("127.0.0.1", 0)) as inside:
        inside.setblocking(False)
        here = f"127.0.0.1:{inside.getsockname()[1]}"
        urls = [f"http://{here}/x.png", f"http://example.com\\@{here}/", secret.as_uri(), "data:image/png;base64,AAAA"]
        for url in urls:
            attempts: list[tuple[str, Any]] = [
                (CHAT, {"messages": [{"role": "user", "content": [part]}]})
                for part in (
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "video_url", "video_url": {"url": url}},
                    {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
                    {"type": "file", "file": {"file_id": url}},
                )
            ]
            part = {"type": "input_image", "image_url": url}
            attempts.append((RESPONSES, {"input": [{"role": "user", "content": [part]}]}))
            for path, body in attempts:
                response = httpx.post(server.url + path, json=body, timeout=20)
                refusal(response)
                assert "the secret" not in response.text
        with pytest.raises(BlockingIOError):
            inside.accept()
    assert server.desk.link.requests == []
    assert_served(server.url)


def test_an_address_in_a_text_is_a_text(server: Network) -> None:
    """A picture in Markdown, which another server once fetched."""
    with socket.create_server(("127.0.0.1", 0)) as inside:
        inside.setblocking(False)
        picture = f"![x](http://127.0.0.1:{inside.getsockname()[1]}/x.png)"
        body = {"messages": [{"role": "user", "content": picture}]}
        assert httpx.post(server.url + CHAT, json=body, timeout=20).status_code == 200
        with pytest.raises(BlockingIOError):
            inside.accept()
    assert_served(server.url)


# Headers and keys


@pytest.mark.parametrize(
    "line",
    [
        b"X-Request-Id: a\rEvil: 1",
        b"X-Request-Id: a\r\n Evil: 1",
        b"X-Request-Id: a\nEvil: 1",
        b"X-Request-Id: a%0d%0aEvil: 1",
        b"X-Request-Id: a\x00Evil: 1",
        b"X-Request-Id: \xe5\x98\x8a\xe5\x98\x8dEvil: 1",
        b"X-Tenant-Id: a\r\n Evil: 1",
        b"X-Slo-Class: a%0d%0aEvil: 1",
    ],
)
def test_no_header_can_be_put_into_an_answer(server: Network, line: bytes) -> None:
    """Whatever an id or a name holds: the answer's own headers are all that there are."""
    content = b'{"prompt": "x"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head + line + b"\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    told = answer.partition(b"\r\n\r\n")[0]
    assert told.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))
    assert b"evil" not in told.lower()
    assert_served(server.url)


def test_no_header_can_be_put_into_an_answer_by_way_of_the_path(server: Network) -> None:
    response = httpx.get(f"{server.url}/v1/models/a%0d%0aEvil:%201")
    assert response.status_code == 404
    assert "evil" not in response.headers
    assert_served(server.url)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("EVIL.example.", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("localhost:8000", 200),
        ("box", 200),
        ("my.box.example", 200),
        ("MY.box.example.:443", 200),
    ],
)
def test_a_strangers_name_for_this_machine_opens_no_door(host: str, status: int) -> None:
    """A page of evil.example, whose name was made to mean 127.0.0.1, is of the same origin to a browser (DNS
    rebinding). Who asks for a key, or listens to others on purpose, is called as they like."""

    async def story() -> None:
        desk = await Desk("ok", allowed_hosts=("My.Box.example",)).start()
        async with desk.client() as client:
            for path in ("/state", "/", "/v1/models"):
                response = await client.get(path, headers={"host": host})
                assert response.status_code == status
            assert status == 200 or response.json()["error"]["code"] == "unknown_host"
            body = {"prompt": "x"}
            assert (await client.post("/v1/completions", json=body, headers={"host": host})).status_code == status
            assert len(desk.link.requests) == (status == 200)
            assert (await client.get("/health", headers={"host": host})).status_code == 200
        for desk in (await Desk("ok", api_key=("key",)).start(), await Desk("ok", host="0.0.0.0").start()):
            async with desk.client(headers={"host": host, "authorization": "Bearer key"}) as client:
                assert (await client.get("/state")).status_code == 200

    run(story)


def test_every_route_there_is_wants_a_key() -> None:
    """A route that is added tomorrow as well, by any method, before its body is read. Health alone is open."""

    async def story() -> None:
        desk = await Desk("ok", api_key=("key",)).start()
        paths = {route.path for route in desk.app.routes}  # type: ignore[attr-defined]
        assert len(paths) > 15
        async with desk.client() as client:
            for path in paths - {"/health"}:
                for method in ("GET", "POST", "DELETE", "OPTIONS"):
                    response = await client.request(method, path, json={"prompt": "x"})
                    assert response.status_code == 401, (method, path)
            assert (await client.get("/health")).status_code == 200
        assert desk.link.requests == []

    run(story)


@pytest.mark.parametrize("given", ["Bearer first", "Bearer third", "Bearer f", "Bearer " + "x" * 5000, "Bearer", ""])
def test_how_long_a_key_is_looked_at_says_nothing(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right or wrong, early or late in the list: as many comparisons, of as many bytes, none of them of the key."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    async def story() -> None:
        desk = await Desk("ok", api_key=("first", "second", "third")).start()
        monkeypatch.setattr(hmac, "compare_digest", compare)
        async with desk.client() as client:
            response = await client.get("/v1/models", headers={"authorization": given} if given else {})
        assert response.status_code == (200 if given in ("Bearer first", "Bearer third") else 401)

    run(story)
    assert len(compared) == 3
    assert {len(digest) for pair in compared for digest in pair} == {32}


# Connections


def test_a_body_that_does_not_come_is_not_waited_for(server: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beginning came, then a byte now and then: the whole has its time, not each byte."""
    monkeypatch.setattr(transport, "BODY_TIMEOUT_S", 0.3)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head)
        connection.settimeout(0.05)
        answer, begun = b"", time.monotonic()
        while not answer:
            assert time.monotonic() - begun < 10, "it is still waited for"
            connection.sendall(b" ")
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408")
    assert server.desk.link.requests == []
    monkeypatch.undo()
    assert_served(server.url)


# A whole server, with a model that brings code of its own


class Served(NamedTuple):
    url: str
    port: int
    pid: int
    marker: Path  # what the model's code would leave behind


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, cache = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("cache")
    marker = cache / "it-ran"
    for path in locate(None).iterdir():
        shutil.copy(path, folder / path.name)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", None]}),
    ):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(fields | {"auto_map": auto_map, "trust_remote_code": True}))
    for name in ("evil.py", "__init__.py", "torch.py", "sitecustomize.py", "tokenizers.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "headway", "serve", str(folder), "--port", str(port), "--num-threads", "1"]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = subprocess.Popen(
        command,
        env=os.environ | {"HEADWAY_CACHE_DIR": str(cache)},
        cwd=cache,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (min(USUAL_FILES, hard), hard)),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while not is_ready(url):
            assert process.poll() is None, "the server has left; its words are above"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield Served(url, port, process.pid, marker)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def complete(served: Served, prompt: str, *, salt: str = "", **headers: str) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0} | ({"cache_salt": salt} if salt else {})
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    response = httpx.post(served.url + COMPLETIONS, json=body, headers=told, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_code_that_lies_beside_a_model_is_not_run(served: Served) -> None:
    """Whatever its configuration says about code to be trusted; its weights are served all the same."""
    assert complete(served, "def f(x):\n")["usage"]["completion_tokens"] > 0
    assert not served.marker.exists()


def test_a_thousand_connections_that_say_nothing_keep_nobody_waiting(served: Served) -> None:
    """A third silent, a third in the middle of their headers, a third in the middle of their bodies. They are more than
    the files that the server's process might have open when it began."""
    crowd_size = USUAL_FILES + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * crowd_size:
        pytest.skip("this system allows no process so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * crowd_size), hard))
    halves = (
        b"",
        b"GET /health HTTP/1.1\r\nHost: x\r\nA: ",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{",
    )
    try:
        with ExitStack() as crowd:
            for number in range(crowd_size):
                connection = crowd.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=20))
                connection.sendall(halves[number % 3])
            for _ in range(3):
                begun = time.monotonic()
                assert complete(served, "x")["usage"]["completion_tokens"] > 0
                assert time.monotonic() - begun < 5
        assert complete(served, "x")["usage"]["completion_tokens"] > 0  # all of them have just hung up
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_only_the_port_that_was_asked_for_is_open(served: Served) -> None:
    """Door and engine listen nowhere else, and what they speak over has no name that others could open."""
    door = psutil.Process(served.pid)
    tree = [door, *door.children(recursive=True)]
    assert len(tree) >= 2, "door and engine"
    sockets = [(process.pid, connection) for process in tree for connection in process.net_connections(kind="all")]
    bound = {
        (pid, connection.laddr.ip, connection.laddr.port)
        for pid, connection in sockets
        if connection.family != socket.AF_UNIX
        and (connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM)
    }
    assert {(ip, port) for _, ip, port in bound} == {("127.0.0.1", served.port)}
    assert {pid for pid, _, _ in bound} == {served.pid}, "the engine has no hold on the port"
    unix = [connection for _, connection in sockets if connection.family == socket.AF_UNIX]
    assert unix, "which door and engine speak over"
    assert {connection.laddr for connection in unix} == {""}
    assert complete(served, "after")["usage"]["completion_tokens"] > 0


def test_the_cache_tells_no_tenant_what_another_one_asked(served: Served) -> None:
    """The same words again: read from the cache for the tenant and salt that they were asked with, for nobody else."""
    secret = "the password of the administrator is not to be told to anybody " * 8

    def cached(**terms: str) -> int:
        usage = complete(served, secret, **terms)["usage"]
        tokens = int(usage["prompt_tokens_details"]["cached_tokens"])
        assert usage["headway"]["cached_tokens"] == tokens
        return tokens

    assert cached(x_tenant_id="a") == 0
    assert cached(x_tenant_id="a") > 16
    others: list[dict[str, str]] = [{"x_tenant_id": "b"}, {}, {"salt": "a"}, {"x_tenant_id": "a", "salt": "a"}]
    for terms in others:
        assert cached(**terms) == 0, terms
        assert cached(**terms) > 16, terms
