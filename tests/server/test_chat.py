"""/v1/chat/completions, whole: the template's way to a prompt, and the chat shapes."""

import dataclasses

import pytest
from desk import Desk, run

from headway.models.tokenizer import open_model_text

LOUD = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.name %}({{ m.name }}){% endif %}{% endfor %}{{ tone }}"
)


def test_a_whole_chat_answer_has_openais_shape() -> None:
    async def story() -> None:
        desk = await Desk("Hello.").start()
        answer = await desk.chat()
        assert answer["object"] == "chat.completion"
        assert answer["id"].startswith("chatcmpl-")
        assert answer["choices"] == [
            {
                "index": 0,
                "message": {"content": "Hello.", "role": "assistant", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ]

    run(story)


def test_the_template_makes_the_prompt_and_no_special_token_is_added_to_it() -> None:
    async def story() -> None:
        desk = await Desk("ok", text=open_model_text(None, LOUD)).start()
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        await desk.chat(
            messages=[
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": parts, "name": "ada"},
                {"role": "assistant", "content": None},
            ],
            chat_template_kwargs={"tone": "!"},
        )
        expected = "<system>Be kind.<user>one\ntwo(ada)<assistant>!"
        assert desk.link.requests[0].prompt == desk.text.tokenizer.encode(expected, add_special_tokens=False)

    run(story)


def test_max_tokens_defaults_to_the_rest_of_the_context() -> None:
    async def story() -> None:
        desk = await Desk("ok", max_model_len=100).start()
        await desk.chat(messages=[{"role": "user", "content": "x"}])
        await desk.chat(max_tokens=7)
        await desk.chat(max_tokens=7, max_completion_tokens=5)
        first, second, third = desk.link.requests
        assert first.max_tokens == 100 - len(first.prompt)
        assert (second.max_tokens, third.max_tokens) == (7, 5)

    run(story)


def test_chat_logprobs_carry_bytes() -> None:
    async def story() -> None:
        desk = await Desk("x😀").start()
        (choice,) = (await desk.chat(logprobs=True, top_logprobs=2))["choices"]
        content = choice["logprobs"]["content"]
        assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "x😀"
        assert [entry["logprob"] for entry in content] == [-token / 1000 for token in desk.ids]
        assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(desk.ids)
        assert content[0]["top_logprobs"][0] == {"token": "x", "logprob": -desk.ids[0] / 1000, "bytes": [120]}

    run(story)


def test_several_answers_at_once() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        answer = await desk.chat(n=2)
        assert [(c["index"], c["message"]["content"]) for c in answer["choices"]] == [(0, "ok"), (1, "ok")]

    run(story)


@pytest.mark.parametrize(
    ("template", "words", "code"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate.", "chat_template_error"),
        ("{{ messages[7].content + 1 }}", "The chat template refuses", "chat_template_error"),
        ("{# silence #}{% if false %}{% endif %}", "The prompt is empty", "empty_prompt"),
    ],
)
def test_a_template_that_refuses_is_the_callers_error(template: str, words: str, code: str) -> None:
    async def story() -> None:
        desk = await Desk("ok", text=open_model_text(None, template)).start()
        response = await desk.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
        assert response.status_code == 400
        error = response.json()["error"]
        assert words in error["message"]
        assert (error["code"], error["param"]) == (code, "messages")
        assert desk.link.requests == []

    run(story)


def test_a_model_without_a_template_says_what_to_do() -> None:
    async def story() -> None:
        text = dataclasses.replace(open_model_text(None), chat_template=None)
        desk = await Desk("ok", text=text).start()
        response = await desk.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
        assert response.status_code == 400
        assert "--chat-template" in response.json()["error"]["message"]

    run(story)
