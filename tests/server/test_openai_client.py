"""The official client, unchanged, against a real server: what users will run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from desk import Desk, Network

from headway.config import SloClass
from headway.placement.link import Fate

Connect = Callable[..., tuple[Desk, openai.OpenAI]]
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def connect(network: Callable[[Desk], Network]) -> Connect:
    def connect_(says: str, **settings: object) -> tuple[Desk, openai.OpenAI]:
        desk = Desk(says, **settings)
        server = network(desk)
        return desk, openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0, timeout=20)

    return connect_


def test_the_five_lines_of_the_readme(network: Callable[[Desk], Network], capsys: pytest.CaptureFixture[str]) -> None:
    """They stand under the picture, run as they are but for the address, and their deadlines arrive."""
    before, _, after = README.read_text(encoding="utf8").partition(
        "<!-- tests/server/test_openai_client.py runs this -->\n"
    )
    lines = re.match(r"```python\n(.*?)```\n", after, flags=re.DOTALL).group(1)
    assert len([line for line in lines.splitlines() if line]) == 5
    assert before.partition("</picture>")[2].count("\n") <= 4, "a line of introduction stands between, and no more"
    desk = Desk("return n")
    server = network(desk)
    moved = lines.replace("http://127.0.0.1:8000/v1", f"{server.url}/v1")
    assert moved != lines
    names: dict[str, Any] = {}
    exec(compile(moved, str(README), "exec"), names)
    names["client"].close()
    (request,) = desk.link.requests
    assert (request.slo.ttft_s, request.slo.tpot_s) == (0.2, 0.05)
    assert request.prompt == desk.text.tokenizer.encode("def fibonacci(n):")
    text, _, told = capsys.readouterr().out.partition(" {")
    assert text == "return n"
    assert "'slo_met'" in told


def test_completions(connect: Connect) -> None:
    desk, client = connect("return n")
    with client:
        answer = client.completions.create(model="embedded", prompt="def f(n):", max_tokens=20, logprobs=1)
        assert answer.choices[0].text == "return n"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].logprobs.tokens == [desk.text.tokenizer.token_text(token) for token in desk.ids]
        assert answer.usage.completion_tokens == len(desk.ids) + 1
        stream = client.completions.create(
            model="embedded", prompt="x", max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "return n"
        assert chunks[-1].usage.model_extra["headway"]["preemptions"] == 0


def test_chat(connect: Connect) -> None:
    _, client = connect("Grüße 😀")
    messages = [{"role": "user", "content": "Hallo"}]
    with client:
        answer = client.chat.completions.create(model="embedded", messages=messages, logprobs=True, top_logprobs=1)
        assert answer.choices[0].message.content == "Grüße 😀"
        assert answer.choices[0].message.role == "assistant"
        assert bytes(b for entry in answer.choices[0].logprobs.content for b in entry.bytes).decode() == "Grüße 😀"
        with client.chat.completions.stream(model="embedded", messages=messages) as stream:
            assert "".join(event.delta for event in stream if event.type == "content.delta") == "Grüße 😀"
            assert stream.get_final_completion().choices[0].finish_reason == "stop"


def test_responses(connect: Connect) -> None:
    desk, client = connect("Grüße 😀")
    with client:
        answer = client.responses.create(model="embedded", input="Hallo", instructions="Grüß zurück.", store=False)
        assert answer.output_text == "Grüße 😀"
        assert (answer.status, answer.error) == ("completed", None)
        assert answer.usage.output_tokens == len(desk.ids) + 1
        conversation = [{"role": "user", "content": "Hallo"}, *answer.output, {"role": "user", "content": "Und?"}]
        assert client.responses.create(model="embedded", input=conversation).output_text == "Grüße 😀"
        events = list(client.responses.create(model="embedded", input="Hallo", stream=True))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Grüße 😀"
        with client.responses.stream(model="embedded", input="Hallo") as stream:
            texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
            assert texts[-1] == "Grüße 😀"
            final = stream.get_final_response()
        assert final.output_text == "Grüße 😀"
        assert final.usage.model_extra["headway"]["preemptions"] == 0
        with pytest.raises(openai.BadRequestError, match="No response is kept") as kept:
            client.responses.create(model="embedded", input="x", previous_response_id=answer.id)
        assert kept.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError, match="No response is kept"):
            client.responses.retrieve(answer.id)
        desk.link.fate = Fate("failed", "engine_lost", "It died.", num_tokens=1)
        with pytest.raises(openai.APIError, match="It died"):
            list(client.responses.create(model="embedded", input="x", stream=True))


def test_echo_suffix_and_best_of(connect: Connect) -> None:
    desk, client = connect("a + b")
    with client:
        answer = client.completions.create(model="embedded", prompt="x", echo=True, logprobs=1, max_tokens=9)
        assert answer.choices[0].text == "xa + b"
        assert answer.choices[0].logprobs.token_logprobs[0] is None
        answer = client.completions.create(model="embedded", prompt="def f(a, b):", suffix="\n\nprint(f(1, 2))")
        assert answer.choices[0].text == "a + b"
        assert desk.text.tokenizer.token_id("<|fim_middle|>") == desk.link.requests[-1].prompt[-1]
        answer = client.completions.create(model="embedded", prompt="x", best_of=3, max_tokens=9)
        assert answer.usage.completion_tokens == 3 * (len(desk.ids) + 1)


def test_targets_go_in_by_extra_body_and_come_back_in_usage(connect: Connect) -> None:
    desk, client = connect("ok")
    with client:
        answer = client.completions.create(
            model="embedded",
            prompt="x",
            extra_body={"slo": {"ttft_ms": 60_000}},
            extra_headers={"x-slo-tpot-ms": "9000"},
        )
        assert answer.usage.model_extra["headway"]["slo_met"] is True
        assert desk.link.requests[0].slo.tpot_s == 9.0


def test_a_class_goes_in_and_the_headers_come_back(connect: Connect) -> None:
    desk, client = connect("ok", slo_classes=(SloClass("chat", ttft_ms=3_600_000),))
    with client:
        raw = client.completions.with_raw_response.create(
            model="embedded", prompt="x", extra_body={"slo": {"class": "chat"}}, extra_headers={"x-tenant-id": "acme"}
        )
        assert raw.headers["x-headway-slo-class"] == "chat"
        assert raw.headers["x-headway-slo-met"] == "true"
        assert raw.parse().usage.model_extra["headway"]["tenant"] == "acme"
        assert desk.link.requests[0].tenant == "acme"
        with pytest.raises(openai.BadRequestError, match="choose from chat") as unknown:
            client.completions.create(model="embedded", prompt="x", extra_headers={"x-slo-class": "chatt"})
        assert unknown.value.code == "unknown_slo_class"


def test_a_client_that_is_refused_for_its_target_knows_why_and_when_to_come_back(connect: Connect) -> None:
    desk, client = connect("ok")
    desk.link.fate = Fate("refused", "slo_unattainable", "Not in time.", 2.5)
    with client, pytest.raises(openai.RateLimitError, match="Not in time") as refused:
        client.completions.create(model="embedded", prompt="x", extra_body={"slo": {"ttft_ms": 40}})
    assert (refused.value.code, refused.value.type) == ("slo_unattainable", "rate_limit_error")
    headers = refused.value.response.headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2500")
    assert (headers["x-slo-ttft-ms"], headers["x-headway-predicted-ttft-ms"]) == ("40", "50")


def test_a_client_that_can_never_be_served_in_time_does_not_come_back(connect: Connect) -> None:
    """A 429 is tried again by OpenAI's clients, unless they are told that it is no use."""
    desk, client = connect("ok")
    desk.link.fate = Fate("refused", "slo_unattainable", "Never in time.")
    with client, pytest.raises(openai.RateLimitError):
        client.with_options(max_retries=3).completions.create(model="embedded", prompt="x")
    assert len(desk.link.requests) == 1


def test_models(connect: Connect) -> None:
    _, client = connect("ok")
    with client:
        assert [model.id for model in client.models.list()] == ["embedded"]
        assert client.models.retrieve("embedded").model_extra["max_model_len"] == 256


def test_every_error_is_of_the_clients_own_class(connect: Connect) -> None:
    desk, client = connect("ok", api_key=("key",))
    with client:
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(model="embedded", prompt="x", temperature=9)
        assert wrong.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="gpt-99", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        desk.link.fate = Fate("refused", "slo_unattainable", "Not in time.", 1.0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="embedded", prompt="x")
        desk.link.fate = Fate("failed", "engine_lost", "It died.", num_tokens=1)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="embedded", prompt="x")
        with pytest.raises(openai.APIError, match="It died"):
            list(client.completions.create(model="embedded", prompt="x", stream=True))


def test_a_refused_client_comes_back_by_itself(connect: Connect) -> None:
    """It retries after Retry-After, by which time there is room."""
    desk, client = connect("ok")
    desk.link.fate = Fate("refused", "queue_full", "Full.", 0.01)
    submit = desk.link.submit

    def submit_and_clear(request, hear):
        if desk.link.requests:
            desk.link.fate = None
        submit(request, hear)

    desk.link.submit = submit_and_clear  # type: ignore[method-assign]
    with client:
        answer = client.with_options(max_retries=2).completions.create(model="embedded", prompt="x")
    assert answer.choices[0].text == "ok"
    assert len(desk.link.requests) == 2
