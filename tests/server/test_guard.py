"""Before every route: keys, ids, sizes, and bodies that are no JSON."""

import base64
import json
import socket
from collections.abc import Callable

import pytest
from desk import Desk, Network, run

from headway.server import http

PATHS = ["/", "/page.js", "/page.css", "/v1/models", "/v1/models/embedded", "/ready", "/metrics", "/state", "/version"]


@pytest.mark.parametrize("path", [*PATHS, "/v1/completions", "/nowhere"])
def test_with_keys_every_route_but_health_wants_one(path: str) -> None:
    async def story() -> None:
        desk = await Desk("ok", api_key=("first", "second")).start()
        async with desk.client() as client:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first"}):
                response = await client.get(path, headers=headers)
                assert response.status_code == 401
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            response = await client.get(path, headers={"authorization": "Bearer second"})
            assert response.status_code != 401
            assert (await client.get("/health")).status_code == 200

    run(story)


def test_a_browser_may_ask_its_person_for_the_key() -> None:
    """The page answers 401 with a challenge; what the browser then sends is the key as a password."""

    async def story() -> None:
        desk = await Desk("ok", api_key=("first",)).start()
        async with desk.client() as client:
            response = await client.get("/")
            assert response.headers["www-authenticate"].startswith("Basic ")
            response = await client.get("/v1/models")
            assert response.headers["www-authenticate"] == "Bearer"
            for user, password, status in (("", "first", 200), ("me", "first", 200), ("first", "", 401)):
                credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
                response = await client.get("/", headers={"authorization": f"Basic {credentials}"})
                assert response.status_code == status
            response = await client.get("/", headers={"authorization": "Basic not-base64"})
            assert response.status_code == 401

    run(story)


def test_without_keys_everybody_may_enter() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        async with desk.client() as client:
            for path in PATHS:
                assert (await client.get(path)).status_code == 200

    run(story)


def test_the_callers_request_id_comes_back_and_a_strange_one_does_not() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        response = await desk.post("/v1/completions", {"prompt": "x"}, x_request_id="trace-1:a.b")
        assert response.headers["x-request-id"] == "trace-1:a.b"
        assert response.json()["id"] == "cmpl-trace-1:a.b"
        for strange in ("with space", "x" * 129, ""):
            response = await desk.post("/v1/completions", {"prompt": "x"}, x_request_id=strange)
            assert response.headers["x-request-id"] not in ("", strange)
        response = await desk.post("/v1/completions", {"prompt": 5}, x_request_id="bad")
        assert response.headers["x-request-id"] == "bad"

    run(story)


def test_two_calls_with_the_same_id_are_two_requests() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        for _ in range(2):
            response = await desk.post("/v1/completions", {"prompt": "x"}, x_request_id="same")
            assert response.status_code == 200
        first, second = desk.link.requests
        assert first.id != second.id

    run(story)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"prompt": "x"',
        b'{"prompt": NaN}',
        b"[1, 2]",
        b'"text"',
        b"null",
        b"[" * 100_000,
        b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "temperature": 1e999}',
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(content: bytes) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        async with desk.client() as client:
            response = await client.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 400
            assert len(response.content) < 2000
            assert response.json()["error"]["code"] in ("invalid_json", "invalid_value")
        assert (await desk.complete())["choices"][0]["text"] == "ok"

    run(story)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_taken_which_keeps_other_sites_out(kind: str) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        async with desk.client() as client:
            headers = {"content-type": kind} if kind else {}
            response = await client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
        assert response.status_code == 400
        assert "Content-Type: application/json" in response.json()["error"]["message"]

    run(story)


def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    """Whether its length is said or not."""

    async def story() -> None:
        desk = await Desk("ok", max_body_bytes=2000).start()

        async def drops():
            for _ in range(1000):
                yield b" " * 1000

        headers = {"content-type": "application/json"}
        async with desk.client() as client:
            for content in (b" " * 3000, drops()):
                response = await client.post("/v1/completions", content=content, headers=headers)
                assert response.status_code == 413
                assert response.json()["error"]["code"] == "body_too_large"

    run(story)


def test_paths_and_methods_that_do_not_exist_have_the_same_shape() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        async with desk.client() as client:
            missing = await client.get("/v1/nothing")
            wrong = await client.get("/v1/completions")
            # with a slash too many: told so, not sent to whatever host the caller's Host header names
            slash = await client.get("/health/", headers={"host": "elsewhere"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"
        assert wrong.json()["error"]["message"] == "There is no GET /v1/completions here: use POST."
        assert (slash.status_code, slash.json()["error"]["code"]) == (404, "not_found")

    run(story)


def test_our_own_mistake_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("a secret")

        desk.door._intake._ask = broken  # type: ignore[method-assign, assignment]
        response = await desk.post("/v1/completions", {"prompt": "x"})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text

    run(story)
    assert "a secret" in caplog.text


def test_the_page_loads_nothing_from_elsewhere() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        async with desk.client() as client:
            response = await client.get("/")
            assert response.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in response.headers["content-security-policy"]
            for name in ("", "page.js", "page.css"):
                text = (await client.get(f"/{name}")).text
                assert "http://" not in text
                assert "https://" not in text

    run(story)


# Over a real connection


def ask(server: Network, raw: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_endless_headers_are_cut_off(network: Callable[[Desk], Network]) -> None:
    """One long header, many short ones, or one that never ends: a 400 in our shape, and the server goes on."""
    server = network(Desk("ok"))
    start = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    for bomb in (b"A: " + b"x" * 200_000, b"A: x\r\n" * 30_000 + b"\r\n", b"A: " + b"x" * 70_000 + b"\r\n\r\n"):
        try:
            answer = ask(server, start + bomb)
        except OSError:  # closed while we were still sending
            continue
        assert answer.startswith(b"HTTP/1.1 400")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert ask(server, start + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_noise_is_a_400(network: Callable[[Desk], Network]) -> None:
    server = network(Desk("ok"))
    answer = ask(server, b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_slow_headers_are_not_waited_for(network: Callable[[Desk], Network], monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who connects and says nothing, or half a request, is let go of."""
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.05)
    server = network(Desk("ok"))
    for half in (b"", b"GET /health HTTP/1.1\r\nHo"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(half)
            assert connection.recv(100) == b""


def completion(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


def test_a_large_body_does_not_count_as_headers_of_the_request_behind_it(network: Callable[[Desk], Network]) -> None:
    """Two requests in one breath: the first has a long body, the second has half of its headers still to come."""
    server = network(Desk("ok"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(completion({"prompt": "x", "user": "u" * 300_000}) + b"GET /health HTTP/1.1\r\nHost: x\r\n")
        answer = b""
        while b"}}" not in answer:
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(b"Connection: close\r\n\r\n")
        while part := connection.recv(65536):
            answer += part
        assert answer.endswith(b'{"status":"live"}')


def test_noise_behind_a_request_is_never_mixed_into_its_answer(network: Callable[[Desk], Network]) -> None:
    """While a stream is open, its connection brings what is no HTTP: it is closed, and no 400 poses as an event."""
    desk = Desk("one two")
    desk.link.flowing = False
    server = network(desk)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(completion({"prompt": "x", "stream": True}))
        answer = b""
        while b"data: " not in answer:
            answer += connection.recv(65536)
        connection.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        while part := connection.recv(65536):
            answer += part
    assert answer.count(b"HTTP/1.1") == 1
    assert b"invalid_http" not in answer
    desk.link.flowing = True
    assert ask(server, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_body_in_broken_chunks_is_a_400(network: Callable[[Desk], Network]) -> None:
    server = network(Desk("ok"))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = ask(server, head + b"Transfer-Encoding: chunked\r\n\r\nno length\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_connection_is_not_kept_by_bytes_that_begin_no_request(
    network: Callable[[Desk], Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty line between two requests is allowed; one that nothing follows is not waited on for ever."""
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.05)
    server = network(Desk("ok"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"live"}'):
            answer += connection.recv(1000)
        connection.sendall(b"\r\n")
        assert connection.recv(100) == b""
