"""/v1/embeddings and /v1/score: OpenAI's and vLLM's shapes, the terms of a request, and what is refused."""

import base64
import math
import struct
from typing import Any

import openai
import pytest
from desk import TEXT, Desk, Network, run
from test_refusals import refused

from headway.placement.link import FakeLink, Fate


def angle(text: str) -> float:
    return math.radians(sum(TEXT.tokenizer.encode(text)))


def test_a_vector_for_each_text_in_order() -> None:
    """Texts one by one, as text or ids, and what it took."""

    async def story() -> None:
        desk = await Desk().start()
        ids = list(TEXT.tokenizer.encode("b c"))
        for given in ("a", ["a", "b c"], [TEXT.tokenizer.encode("a"), ids], ids):
            answer = (await desk.post("/v1/embeddings", {"input": given, "model": "embedded"})).json()
            expected = [FakeLink.vector(request) for request in desk.link.requests]
            assert [each["embedding"] for each in answer["data"]] == [pytest.approx(vector) for vector in expected]
            assert [each["index"] for each in answer["data"]] == list(range(len(expected)))
            assert {each["object"] for each in answer["data"]} == {"embedding"}
            num_tokens = sum(len(request.prompt) for request in desk.link.requests)
            assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == num_tokens
            assert answer["usage"]["completion_tokens"] == 0
            assert (answer["object"], answer["model"]) == ("list", "embedded")
            assert all((r.max_tokens, r.pooling) == (0, "last") for r in desk.link.requests)
            desk.link.requests.clear()

    run(story)


def test_fewer_dimensions_and_bytes() -> None:
    """Shortened to length one again; base64 holds the same numbers as float32."""

    async def story() -> None:
        desk = await Desk().start()
        body = {"input": "a", "dimensions": 1, "encoding_format": "base64"}
        told = (await desk.post("/v1/embeddings", body)).json()["data"][0]["embedding"]
        (value,) = struct.unpack("<f", base64.b64decode(told))
        assert value == math.copysign(1.0, math.cos(angle("a")))
        plain = (await desk.post("/v1/embeddings", {"input": "a"})).json()["data"][0]["embedding"]
        exact = (await desk.post("/v1/embeddings", {"input": "a", "encoding_format": "base64"})).json()
        packed = struct.unpack("<4f", base64.b64decode(exact["data"][0]["embedding"]))
        assert packed == pytest.approx(plain, abs=1e-7)

    run(story)


def test_pooling_is_the_callers_or_the_servers() -> None:
    async def story() -> None:
        desk = await Desk(pooling="mean").start()
        await desk.post("/v1/embeddings", {"input": "a"})
        await desk.post("/v1/embeddings", {"input": "a", "pooling": "last"})
        assert [request.pooling for request in desk.link.requests] == ["mean", "last"]

    run(story)


def test_its_vector_is_its_first_token() -> None:
    """Targets, priority, tenant and salt are those of any request, and the verdict is told."""

    async def story() -> None:
        desk = await Desk().start()
        body = {"input": "a", "slo": {"ttft_ms": 60_000}, "priority": -3, "cache_salt": "s"}
        response = await desk.post("/v1/embeddings", body, x_tenant_id="t")
        (request,) = desk.link.requests
        assert (request.slo.ttft_s, request.priority, request.cache_salt) == (60.0, -3, "s")
        assert response.headers["x-headway-slo-met"] == "true"
        assert response.json()["usage"]["headway"]["slo"]["ttft"]["met"] is True
        name = response.headers["x-request-id"]
        async with desk.client() as client:
            life = (await client.get(f"/v1/requests/{name}/timeline", headers={"x-tenant-id": "t"})).json()
        assert life["id"] == f"embd-{name}"

    run(story)


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ("a", "b", [("a", "b")]),
        ("a", ["b", "c d"], [("a", "b"), ("a", "c d")]),
        (["a", "b"], ["c d", "e"], [("a", "c d"), ("b", "e")]),
        (["a"], ["b", "e"], [("a", "b"), ("a", "e")]),
    ],
)
def test_a_score_is_the_cosine(first: Any, second: Any, pairs: list[tuple[str, str]]) -> None:
    async def story() -> None:
        desk = await Desk().start()
        for path in ("/score", "/v1/score"):
            answer = (await desk.post(path, {"text_1": first, "text_2": second})).json()
            assert [each["score"] for each in answer["data"]] == [
                pytest.approx(math.cos(angle(a) - angle(b))) for a, b in pairs
            ]
            assert answer["object"] == "list"

    run(story)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input"),
        ("/v1/embeddings", {"input": ["a"] * 257}, "input"),
        ("/v1/embeddings", {"input": "x " * 400}, "input"),
        ("/v1/embeddings", {"input": [2**30]}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 5}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "pooling": "cls"}, "pooling"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": [], "text_2": "b"}, "text_1"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ["c"] * 257}, "text_1"),
    ],
)
def test_what_cannot_be_condensed_is_refused(path: str, body: dict[str, Any], param: str) -> None:
    """One sentence that names the field; the next call is answered."""

    async def story() -> None:
        desk = await Desk().start()
        status, error = await refused(desk, path, body)
        assert (status, error["param"]) == (400, param)
        assert (await desk.post("/v1/embeddings", {"input": "a"})).status_code == 200

    run(story)


def test_a_refusal_and_a_failure_are_told() -> None:
    async def story() -> None:
        desk = await Desk().start()
        desk.link.fate = Fate("refused", "slo_unattainable", "Too late.", 2.0)
        status, error = await refused(desk, "/v1/embeddings", {"input": ["a", "b"]})
        assert (status, error["code"]) == (429, "slo_unattainable")
        desk.link.fate = Fate("failed", "not_finite", "No numbers.")
        status, error = await refused(desk, "/v1/score", {"text_1": "a", "text_2": "b"})
        assert (status, error["code"]) == (500, "not_finite")
        desk.link.fate = None
        assert (await desk.post("/v1/embeddings", {"input": "a"})).status_code == 200

    run(story)


def test_the_official_client() -> None:
    """It asks for base64 by itself, and gives back numbers."""
    desk = Desk()
    with Network(desk) as network, openai.OpenAI(base_url=f"{network.url}/v1", api_key="none") as client:
        found = client.embeddings.create(model="embedded", input=["a", "b c"])
        floats = client.embeddings.create(model="embedded", input="a", encoding_format="float")
    assert found.data[0].embedding == pytest.approx(floats.data[0].embedding, abs=1e-6)
    assert len(found.data) == 2
    assert found.usage.prompt_tokens == 3
