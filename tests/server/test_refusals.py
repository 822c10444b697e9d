"""Whatever is wrong with a request: one shape of error, the right status, a sentence, and the field's name."""

from typing import Any

import pytest
from desk import Desk, run

from headway.placement.link import Fate

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


async def refused(desk: Desk, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    response = await desk.post(path, body, **headers)
    content = response.json()
    assert set(content) == {"error"}
    error = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) <= 1001
    assert isinstance(error["code"], str)
    return response.status_code, error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("n", 0),
        ("n", 129),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-300),  # which would make a logit infinite, and fail the whole step
        ("seed", 2**63),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stop", ["ok", ""]),
        ("stop", "x" * 257),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"99999999": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {str(k): 1 for k in range(1025)}),
        ("logprobs", 21),
        ("logprobs", -1),
        ("min_tokens", 99),
        ("stream_options", {"include_usage": True}),
        ("priority", 1.5),
        ("cache_salt", ""),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", 5),
        ("prompt", None),
        ("prompt", ["a", 5]),
        ("prompt", [["a"]]),
        ("prompt", [-1]),
        ("prompt", [10**9]),
        ("prompt", [True]),
        ("model", 5),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, COMPLETIONS, {"prompt": "x", "max_tokens": 8} | {field: value})
        assert status == 400
        assert error["type"] == "invalid_request_error"
        assert error["param"].partition("[")[0].partition(".")[0] == field
        assert desk.link.requests == []

    run(story)


@pytest.mark.parametrize("field", ["ttft_ms", "tpot_ms", "total_ms"])
@pytest.mark.parametrize("value", [0, -5, "soon"])
def test_a_target_must_be_a_positive_number(field: str, value: Any) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, COMPLETIONS, {"prompt": "x", "slo": {field: value}})
        assert (status, error["param"]) == (400, f"slo.{field}")

    run(story)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x_slo_ttft_ms", "soon"),
        ("x_slo_ttft_ms", "nan"),
        ("x_slo_ttft_ms", "1_000"),
        ("x_slo_ttft_ms", ""),
        ("x_slo_ttft_ms", "9" * 400),
        ("x_slo_tpot_ms", "-1"),
        ("x_slo_tpot_ms", "inf"),
        ("x_vllm_priority", "high"),
        ("x_vllm_priority", "9" * 40),
        ("x_vllm_priority", "0" * 32 + "7"),
        ("x_vllm_priority", "1_0"),
    ],
)
def test_a_wrong_header_is_refused_not_ignored(header: str, value: str) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, COMPLETIONS, {"prompt": "x"}, **{header: value})
        assert (status, error["param"]) == (400, header.replace("_", "-"))

    run(story)


def test_the_priority_header_goes_before_the_body() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        await desk.post(COMPLETIONS, {"prompt": "x", "priority": 5}, x_vllm_priority="-3")
        assert desk.link.requests[0].priority == -3

    run(story)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].function"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "tool_call_id": "1"}], "messages[0].content"),
        (
            [{"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]}],
            "messages[0].tool_calls",
        ),
    ],
)
def test_messages_are_checked(messages: Any, param: str) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, CHAT, {"messages": messages})
        assert (status, error["param"]) == (400, param)

    run(story)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (CHAT, "suffix", "end"),
        (CHAT, "echo", True),
        (CHAT, "best_of", 3),
        (COMPLETIONS, "use_beam_search", True),
        (CHAT, "functions", [{"name": "f"}]),
        (COMPLETIONS, "tools", [{"type": "function"}]),
        (COMPLETIONS, "tool_choice", "required"),
        (CHAT, "logits_processors", ["x"]),
        (CHAT, "chat_template", "{{ 1 }}"),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "regex", "a*"),
        (CHAT, "add_generation_prompt", False),
        (COMPLETIONS, "return_token_ids", True),
        (COMPLETIONS, "structural_tag", {"begin": "<"}),
        (CHAT, "guided_whitespace_pattern", "[ ]?"),
        (COMPLETIONS, "guided_whitespace_pattern", "[ ]?"),
        (CHAT, "reasoning_effort", "high"),
    ],
)
def test_a_constraint_that_would_be_ignored_is_refused(path: str, field: str, value: Any) -> None:
    """An answer that silently does not follow its constraint is worse than none."""

    async def story() -> None:
        desk = await Desk("ok").start()
        body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], field: value}
        status, error = await refused(desk, path, body)
        assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", field)

    run(story)


@pytest.mark.parametrize("field", ["messages", "tools", "add_generation_prompt", "raise_exception"])
def test_template_arguments_may_not_replace_what_the_door_passes(field: str) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {field: []}}
        status, error = await refused(desk, CHAT, body)
        assert (status, error["param"]) == (400, "chat_template_kwargs")

    run(story)


def test_top_logprobs_need_logprobs() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        body = {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}
        status, error = await refused(desk, CHAT, body)
        assert (status, error["param"]) == (400, "top_logprobs")

    run(story)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_several_answers_that_would_be_the_same_are_refused(path: str) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "temperature": 0}
        status, error = await refused(desk, path, body | {"n": 2})
        assert (status, error["param"]) == (400, "n")
        assert (await desk.post(path, body | {"n": 1})).status_code == 200

    run(story)


def test_too_many_answers_at_once() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, COMPLETIONS, {"prompt": ["x"] * 3, "n": 100})
        assert (status, error["param"]) == (400, "prompt")

    run(story)


def test_another_model_is_not_found() -> None:
    async def story() -> None:
        desk = await Desk("ok", served_model_name=("ours", "alias")).start()
        status, error = await refused(desk, COMPLETIONS, {"prompt": "x", "model": "theirs"})
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert (await desk.complete(model="alias"))["model"] == "alias"
        assert (await desk.complete())["model"] == "ours"

    run(story)


def test_a_prompt_that_leaves_no_room_is_refused_in_vllms_words() -> None:
    """With a context of 32, a prompt of 31 ids may have one token of answer; one of 32 may have none."""

    async def story() -> None:
        desk = await Desk("ok", max_model_len=32).start()
        assert (await desk.complete(prompt=[5] * 31))["choices"][0]["text"]
        status, error = await refused(desk, COMPLETIONS, {"prompt": [5] * 32})
        assert (status, error["code"]) == (400, "context_length_exceeded")
        words = "This model's maximum context length is 32 tokens. However, your prompt contains 32 input tokens"
        assert error["message"].startswith(words)

    run(story)


def test_megabytes_are_refused_without_being_tokenized() -> None:
    async def story() -> None:
        desk = await Desk("ok", max_model_len=32).start()
        status, error = await refused(desk, COMPLETIONS, {"prompt": "word " * 400_000})
        assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
        assert "at least" in error["message"]
        messages = [{"role": "user", "content": "word " * 400_000}]
        status, error = await refused(desk, CHAT, {"messages": messages})
        assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")

    run(story)


def test_a_long_prompt_that_fits_is_tokenized_whole() -> None:
    async def story() -> None:
        desk = await Desk("ok", max_model_len=100_000).start()
        text = "def f(x):\n    return x\n" * 2000
        await desk.complete(prompt=[text, "x"])
        long, short = (request.prompt for request in desk.link.requests)
        assert desk.text.tokenizer.decode(long) == text
        assert short == desk.text.tokenizer.encode("x")

    run(story)


@pytest.mark.parametrize(
    ("fate", "status", "code", "retry_after"),
    [
        (Fate("refused", "queue_full", "Full.", 7.2), 503, "queue_full", "8"),
        (Fate("refused", "deadline_expired", "Too late.", 1.0), 429, "deadline_expired", "1"),
        (Fate("refused", "slo_unattainable", "Not in time.", 0.2), 429, "slo_unattainable", "1"),
        (Fate("refused", "out_of_pages", "Does not fit."), 400, "out_of_pages", None),
        (Fate("failed", "engine_lost", "It died.", num_tokens=2), 503, "engine_lost", "1"),
        (Fate("failed", "step_failed", "secret: /path/to/it", num_tokens=2), 500, "step_failed", None),
        (Fate("cancelled", "cancelled", num_tokens=1), 503, "cancelled", "1"),
    ],
)
def test_an_ending_that_is_no_answer_becomes_an_error(
    fate: Fate, status: int, code: str, retry_after: str | None
) -> None:
    async def story() -> None:
        desk = await Desk("one two three").start()
        desk.link.fate = fate
        response = await desk.post(COMPLETIONS, {"prompt": "x"})
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert response.headers.get("retry-after") == retry_after
        assert "secret" not in response.text
        desk.link.fate = None
        assert (await desk.complete())["choices"][0]["text"] == "one two three", "the next one is answered"

    run(story)


def test_a_gateway_is_told_why_in_its_own_words() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        desk.link.fate = Fate("refused", "queue_full", "Full.", 1.0)
        response = await desk.post(COMPLETIONS, {"prompt": "x"})
        assert response.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"

    run(story)


def test_one_of_several_answers_that_fails_ends_the_call_and_cancels_the_others() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        desk.link.flowing = False
        one_fails = desk.link._answer

        def answer(call: Any) -> Any:
            desk.link.fate = Fate("failed", "step_failed") if call.request.prompt == (6,) else None
            return one_fails(call)

        desk.link._answer = answer  # type: ignore[method-assign]
        response = await desk.post(COMPLETIONS, {"prompt": [[5], [6]], "max_tokens": 50})
        assert response.status_code == 500
        (other,) = [request.id for request in desk.link.requests if request.prompt == (5,)]
        assert other in desk.link.cancelled

    run(story)


def test_before_the_model_is_loaded_and_after_the_engine_is_gone() -> None:
    async def story() -> None:
        desk = Desk("ok")
        status, error = await refused(desk, COMPLETIONS, {"prompt": "x"})
        assert (status, error["code"]) == (503, "starting")
        await desk.start()
        desk.link.state = "down"
        status, error = await refused(desk, COMPLETIONS, {"prompt": "x"})
        assert (status, error["code"]) == (503, "engine_down")

    run(story)
