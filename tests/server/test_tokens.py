"""Text to ids and back, as vLLM's clients and lm-eval's remote tokenizer ask for it."""

from typing import Any

import pytest
from desk import TEXT, Desk, run
from test_refusals import refused

from headway.server import schema

SENTENCE = "def größe(x):\n    return '😀'"


def test_there_and_back() -> None:
    async def story() -> None:
        desk = await Desk().start()
        there = (await desk.post("/tokenize", {"prompt": SENTENCE})).json()
        ids = list(TEXT.tokenizer.encode(SENTENCE))
        assert there == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
        back = (await desk.post("/detokenize", {"tokens": ids})).json()
        assert back == {"prompt": SENTENCE}
        assert (await desk.post("/tokenize", {"prompt": ""})).json()["tokens"] == []
        assert (await desk.post("/detokenize", {"tokens": []})).json() == {"prompt": ""}

    run(story)


def test_pieces_are_spelled_as_in_the_vocabulary() -> None:
    async def story() -> None:
        desk = await Desk().start()
        there = (await desk.post("/tokenize", {"prompt": " return x", "return_token_strs": True})).json()
        assert there["token_strs"] == ["Ġreturn", "Ġx"]
        assert len(there["tokens"]) == there["count"] == 2

    run(story)


def test_a_special_token_is_one_id_and_comes_back() -> None:
    """By which lm-eval finds the id of the end."""

    async def story() -> None:
        desk = await Desk().start()
        body = {"prompt": "<|endoftext|>", "add_special_tokens": False}
        assert (await desk.post("/tokenize", body)).json()["tokens"] == [TEXT.tokenizer.eos_ids[0]]
        back = (await desk.post("/detokenize", {"tokens": [TEXT.tokenizer.eos_ids[0]]})).json()
        assert back == {"prompt": "<|endoftext|>"}

    run(story)


def test_a_conversation_is_tokenized_as_a_chat_would_be() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        messages = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
        there = (await desk.post("/tokenize", {"messages": messages})).json()
        await desk.chat(messages=messages)
        assert tuple(there["tokens"]) == desk.link.requests[0].prompt

    run(story)


def test_what_a_remote_tokenizer_asks() -> None:
    async def story() -> None:
        desk = await Desk().start()
        async with desk.client() as client:
            told = (await client.get("/tokenizer_info")).json()
        assert told["eos_token"] == "<|endoftext|>"
        assert told["pad_token"] == "<|fim_pad|>"
        assert told["bos_token"] is None
        assert told["vocab_size"] == TEXT.tokenizer.vocab_size
        assert "message['content']" in told["chat_template"]

    run(story)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ],
)
def test_a_wrong_question_is_refused_by_name(path: str, body: Any, param: str) -> None:
    async def story() -> None:
        desk = await Desk().start()
        status, error = await refused(desk, path, body)
        assert (status, error["param"]) == (400, param)

    run(story)


def test_another_model_is_not_found() -> None:
    async def story() -> None:
        desk = await Desk().start()
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
            status, error = await refused(desk, path, body | {"model": "theirs"})
            assert (status, error["code"]) == (404, "model_not_found")

    run(story)


def test_length_is_limited_both_ways() -> None:
    async def story() -> None:
        desk = await Desk().start()
        status, error = await refused(desk, "/tokenize", {"prompt": "x" * (schema.MAX_TOKENIZED + 1)})
        assert (status, error["param"]) == (400, "prompt")
        messages = [{"role": "user", "content": "x" * schema.MAX_TOKENIZED}] * 2
        status, error = await refused(desk, "/tokenize", {"messages": messages})
        assert (status, error["param"]) == (400, "messages")
        status, error = await refused(desk, "/detokenize", {"tokens": [5] * (schema.MAX_DETOKENIZED + 1)})
        assert (status, error["param"]) == (400, "tokens")
        long = "x " * 20_000
        there = (await desk.post("/tokenize", {"prompt": long, "return_token_strs": True})).json()
        assert len(there["token_strs"]) == there["count"] > 8192
        assert (await desk.post("/detokenize", {"tokens": there["tokens"]})).json() == {"prompt": long}

    run(story)


def test_before_the_model_is_loaded() -> None:
    """How long a prompt may be is not known yet; spelling needs no engine."""

    async def story() -> None:
        desk = Desk()
        status, error = await refused(desk, "/tokenize", {"prompt": "x"})
        assert (status, error["code"]) == (503, "starting")
        assert (await desk.post("/detokenize", {"tokens": [5]})).status_code == 200

    run(story)
