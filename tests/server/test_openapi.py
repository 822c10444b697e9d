"""The document: complete, valid, and true of what the door answers."""

import json
from typing import Any

import pytest
from desk import Desk, run
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from headway.config import SloClass
from headway.placement.link import Fate
from headway.server.app import PAGE
from headway.server.openapi import document

DOCUMENT = document("1", with_keys=True)
USER = [{"role": "user", "content": "x"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "y"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
ASKED: list[tuple[str, str, Any]] = [  # method, path as documented, body
    ("post", "/v1/completions", {"prompt": ["x", "y"], "n": 2, "logprobs": 2, "echo": True, "prompt_logprobs": 1}),
    ("post", "/v1/completions", {"prompt": "x", "suffix": "y", "best_of": 2, "slo": {"ttft_ms": 0.001}}),
    ("post", "/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 0}),
    (
        "post",
        "/v1/chat/completions",
        {
            "messages": [*USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "parallel_tool_calls": False,
        },
    ),
    ("post", "/v1/completions", {"prompt": "x", "structured_outputs": {"choice": ["ok", "no"]}}),
    ("post", "/v1/completions", {"prompt": "x", "response_format": SCHEMA}),
    ("post", "/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}),
    ("post", "/v1/responses", {"input": "x", "top_logprobs": 1, "metadata": {"a": "b"}, "user": "u"}),
    ("post", "/v1/embeddings", {"input": ["x", "y"], "dimensions": 2, "user": "u"}),
    ("post", "/v1/embeddings", {"input": [5, 6], "encoding_format": "base64", "slo": {"ttft_ms": 0.001}}),
    ("post", "/v1/score", {"text_1": "x", "text_2": ["y", "z"]}),
    ("post", "/score", {"text_1": "x", "text_2": "y", "pooling": "mean"}),
    ("post", "/tokenize", {"prompt": "x y", "return_token_strs": True}),
    ("post", "/detokenize", {"tokens": [5, 6]}),
    ("get", "/tokenizer_info", None),
    ("get", "/v1/models", None),
    ("get", "/v1/models/{name}", None),
    ("get", "/v1/requests/{id}/timeline", None),
    ("get", "/health", None),
    ("get", "/ready", None),
    ("get", "/state", None),
    ("get", "/version", None),
    ("get", "/openapi.json", None),
    ("get", "/metrics", None),
]


def validator(schema: Any) -> Draft202012Validator:
    """Of a part of the document, with the components that it refers to."""
    return Draft202012Validator(schema | {"components": DOCUMENT["components"]})


def check(method: str, path: str, status: int, content_type: str, text: str) -> None:
    """What was answered is documented, and as the document says."""
    answers = DOCUMENT["paths"][path][method]["responses"]
    assert str(status) in answers, f"{method} {path} answers {status}"
    content = answers[str(status)]["content"]
    assert content_type in content
    if content_type == "application/json":
        validator(content[content_type]["schema"]).validate(json.loads(text))


def test_it_is_valid() -> None:
    """By OpenAPI's own schema; as it is sent, numbers and all."""
    for with_keys in (True, False):
        OpenAPIV31SpecValidator(json.loads(json.dumps(document("1", with_keys=with_keys)))).validate()


def test_every_route_is_in_it_and_nothing_else() -> None:
    documented = {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods}
    routes = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in Desk().app.routes
        for method in route.methods - {"HEAD"}
        if route.path not in PAGE
    }
    assert documented == routes


def test_operations_have_names_of_their_own() -> None:
    names = [each["operationId"] for methods in DOCUMENT["paths"].values() for each in methods.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("method", "path", "body"), ASKED)
def test_answers_are_as_it_says(method: str, path: str, body: Any) -> None:
    async def story() -> None:
        desk = await Desk("ok", slo_classes=(SloClass("chat"),)).start()
        await desk.complete(slo={"class": "chat"}, logprobs=0)
        async with desk.client() as client:
            name = (await desk.complete())["id"]
            url = path.format(name="embedded", id=name)
            response = await client.request(method, url, json=body)
        assert response.status_code == 200, response.text
        kind = response.headers["content-type"]
        check(method, path, 200, kind, response.text)

    run(story)


WRONG = dict.fromkeys(("prompt", "messages", "tokens", "input", "text_1"), 5)


@pytest.mark.parametrize("path", [path for path, methods in DOCUMENT["paths"].items() if "post" in methods])
def test_errors_are_as_it_says(path: str) -> None:
    """No JSON, a wrong type, another model, a large body, no key; where it generates, a refusal and an engine that is
    not there."""

    async def story() -> None:
        desk = await Desk("ok", max_body_bytes=5000, api_key=("key",)).start()
        good = next(body for _, asked, body in ASKED if asked == path)
        key = {"authorization": "Bearer key"}
        json_ = {"content-type": "application/json"}
        async with desk.client() as client:
            asked = [
                await client.post(path, content=b"{", headers=key | json_),
                await client.post(path, json=WRONG, headers=key),
                await client.post(path, json=good | {"model": "theirs"}, headers=key),
                await client.post(path, content=b" " * 6000, headers=key | json_),
                await client.post(path, json=good),
            ]
            assert [response.status_code for response in asked] == [400, 400, 404, 413, 401]
            if path.startswith("/v1/"):
                desk.link.fate = Fate("refused", "slo_unattainable", "Not in time.")
                asked.append(await client.post(path, json=good, headers=key))
                desk.link.state = "draining"
                asked.append(await client.post(path, json=good, headers=key))
                assert [response.status_code for response in asked[5:]] == [429, 503]
        for response in asked:
            check("post", path, response.status_code, response.headers["content-type"], response.text)

    run(story)


@pytest.mark.parametrize("with_keys", [True, False])
def test_a_name_that_it_does_not_have_is_as_it_says(with_keys: bool) -> None:
    """By such a name no route answers, but that on which probes ask for its health."""
    described = document("1", with_keys=with_keys)["paths"]

    async def story() -> None:
        desk = await Desk("ok").start()
        async with desk.client(headers={"host": "evil.example"}) as client:
            for path, methods in described.items():
                for method, operation in methods.items():
                    response = await client.request(method, path)
                    if path == "/health":
                        assert response.status_code == 200
                        assert "403" not in operation["responses"]
                        continue
                    assert response.status_code == 403
                    check(method, path, 403, response.headers["content-type"], response.text)
                    assert "403" in operation["responses"]

    run(story)


def test_what_is_not_there_is_as_it_says() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        async with desk.client() as client:
            for method, path in (
                ("get", "/v1/models/{name}"),
                ("get", "/v1/requests/{id}/timeline"),
                ("get", "/v1/responses/{id}"),
                ("delete", "/v1/responses/{id}"),
            ):
                response = await client.request(method, path.format(name="gpt-99", id="none"))
                assert response.status_code == 404
                check(method, path, 404, response.headers["content-type"], response.text)
            desk.link.state = "draining"
            response = await client.get("/ready")
            check("get", "/ready", 503, response.headers["content-type"], response.text)

    run(story)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_streams_are_documented(path: str) -> None:
    assert "text/event-stream" in DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "temperature": 3}),
        ("/v1/completions", {"prompt": "x", "n": 0}),
        ("/v1/completions", {}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": USER, "tool_choice": "always"}),
        ("/v1/chat/completions", {"messages": USER, "tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("/v1/completions", {"prompt": "x", "response_format": {"type": "yaml"}}),
        ("/v1/responses", {"input": []}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_what_it_forbids_is_refused_and_what_it_allows_is_not(path: str, body: Any) -> None:
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert not validator(schema).is_valid(body)

    async def story() -> None:
        desk = await Desk("ok").start()
        assert (await desk.post(path, body)).status_code == 400
        for _, asked, good in ASKED:
            if asked == path:
                assert validator(schema).is_valid(good)

    run(story)


def test_a_key_is_asked_for_where_one_is_needed() -> None:
    assert DOCUMENT["security"] == [{"key": []}]
    assert DOCUMENT["paths"]["/health"]["get"]["security"] == []
    assert "security" not in document("1", with_keys=False)
