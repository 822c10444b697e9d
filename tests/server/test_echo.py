"""The prompt told back, with how likely its tokens were: what evaluations are made of."""

import dataclasses
import json
from typing import Any

import pytest
import tokenizers
from desk import TEXT, Desk, run
from test_refusals import refused
from tokenizers import processors

from headway.models.tokenizer import Tokenizer
from headway.placement.link import Fate
from headway.server import intake

PATH = "/v1/completions"
PROMPT = "def f(x):\n    return x"
spell = TEXT.tokenizer.token_text


def test_an_evaluations_question_is_answered_token_by_token() -> None:
    """As lm-eval asks: ids, one token, the best candidate. The first token has nothing; then a score for each, and one
    for the drawn token; what it does with the answer is done here as well."""

    async def story() -> None:
        desk = await Desk("ok").start()
        context, rest = TEXT.tokenizer.encode("def f(x):"), TEXT.tokenizer.encode("\n    return x")
        ids = [*context, *rest]
        answer = await desk.complete(prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234)
        (choice,) = answer["choices"]
        logprobs = choice["logprobs"]
        drawn = desk.ids[0]
        assert choice["text"] == PROMPT + spell(drawn)
        assert logprobs["tokens"] == [spell(token) for token in (*ids, drawn)]
        assert logprobs["token_logprobs"] == [None, *(-token / 1000 for token in (*ids[1:], drawn))]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["top_logprobs"][1:] == [{spell(token): -token / 1000} for token in (*ids[1:], drawn)]
        assert "".join(logprobs["tokens"]) == choice["text"]
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert choice["text"][offset:].startswith(token)
        assert sum(logprobs["token_logprobs"][len(context) : -1]) == pytest.approx(-sum(rest) / 1000)
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (len(ids), 1)
        (request,) = desk.link.requests
        assert (request.sampling.num_prompt_logprobs, request.sampling.num_logprobs) == (1, 1)

    run(story)


def test_the_drawn_token_is_counted_even_if_it_is_the_end() -> None:
    """Evaluations leave out the last entry: if the end were not listed, that would be the prompt's own last token."""

    async def story() -> None:
        desk = await Desk().start()
        end = TEXT.tokenizer.eos_ids[0]
        desk.link.script = lambda request: (end,)
        (choice,) = (await desk.complete(prompt=[5, 6, 7], max_tokens=1, logprobs=1, echo=True))["choices"]
        assert choice["logprobs"]["token_logprobs"] == [None, -0.006, -0.007, -end / 1000]
        assert (choice["text"], choice["finish_reason"]) == (TEXT.tokenizer.decode([5, 6, 7]), "stop")
        (choice,) = (await desk.complete(prompt=[5, 6, 7], max_tokens=1, logprobs=1))["choices"]
        assert choice["logprobs"]["tokens"] == []

    run(story)


@pytest.mark.parametrize("logprobs", [None, 0])
def test_without_an_answer_only_the_prompt_comes_back(logprobs: int | None) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        answer = await desk.complete(prompt=PROMPT, max_tokens=0, echo=True, logprobs=logprobs)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
        ids = TEXT.tokenizer.encode(PROMPT)
        assert answer["usage"]["completion_tokens"] == 0
        assert desk.link.requests[0].max_tokens == 0
        if logprobs is None:
            assert choice["logprobs"] is None
            assert desk.link.requests[0].sampling.num_prompt_logprobs is None
        else:
            assert choice["logprobs"]["token_logprobs"] == [None, *(-token / 1000 for token in ids[1:])]

    run(story)


def test_in_a_stream_the_prompt_comes_with_the_first_token() -> None:
    """Not before it, so that what clients measure as the time to the first token is that."""

    async def story() -> None:
        desk = await Desk("return 1").start()
        asked = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 20}
        first, *rest = await desk.stream(PATH, asked)
        assert first["choices"][0]["text"] == PROMPT + spell(desk.ids[0])
        assert first["choices"][0]["logprobs"]["token_logprobs"][:2] == [None, -TEXT.tokenizer.encode(PROMPT)[1] / 1000]
        text = "".join(chunk["choices"][0]["text"] for chunk in (first, *rest))
        assert text == PROMPT + "return 1"
        lists = [chunk["choices"][0]["logprobs"] for chunk in (first, *rest)]
        offsets = [offset for found in lists if found is not None for offset in found["text_offset"]]
        assert offsets == sorted(offsets)
        (whole,) = (await desk.complete(**asked))["choices"]
        assert offsets == whole["logprobs"]["text_offset"]

    run(story)


def test_several_prompts_and_samples_each_have_their_own() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        answer = await desk.complete(prompt=["x", "y z"], n=2, echo=True)
        assert [choice["text"] for choice in answer["choices"]] == ["xok", "xok", "y zok", "y zok"]

    run(story)


def test_a_stop_string_in_the_prompt_stops_nothing() -> None:
    async def story() -> None:
        desk = await Desk("one two").start()
        (choice,) = (await desk.complete(prompt="a two b", echo=True, stop=" two"))["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("a two bone", "stop")

    run(story)


def test_a_character_spread_over_tokens_and_a_mark_in_front() -> None:
    """The mark that this model wants before a prompt is listed, at the place where the text begins."""
    tokenizer = TEXT.tokenizer
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    end = tokenizer.eos_ids[0]
    mark = tokenizer.token_text(end)
    backend.post_processor = processors.TemplateProcessing(single=f"{mark} $A", special_tokens=[(mark, end)])
    decoder = json.loads(backend.to_str())["decoder"]
    text = dataclasses.replace(TEXT, tokenizer=Tokenizer(backend, decoder, eos_ids=tokenizer.eos_ids))

    async def story() -> None:
        desk = await Desk("ok", text=text).start()
        desk.link.script = lambda request: (*TEXT.tokenizer.encode("ok"), end)
        (choice,) = (await desk.complete(prompt="x😀y", echo=True, logprobs=0))["choices"]
        assert choice["text"] == "x😀yok"
        tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        assert (tokens[0], tokens[1]) == (mark, "x")
        num_emoji = len(tokenizer.encode("😀"))
        assert offsets[: num_emoji + 3] == [0, 0, *[1] * num_emoji, 2]
        assert offsets[num_emoji + 3] == 3

    run(story)


def test_prompt_logprobs_in_vllms_shape() -> None:
    """By ids, with ranks: the fake engine's best candidate is the token itself."""

    async def story() -> None:
        desk = await Desk("ok").start()
        (choice,) = (await desk.complete(prompt=[5, 6, 7], prompt_logprobs=2))["choices"]
        assert choice["text"] == "ok"
        first, second, _ = choice["prompt_logprobs"]
        assert first is None
        assert second == {
            "6": {"logprob": -0.006, "rank": 1, "decoded_token": spell(6)},
            "7": {"logprob": -0.007, "rank": 2, "decoded_token": spell(7)},
        }
        (choice,) = (await desk.complete(prompt=[5, 6], prompt_logprobs=0))["choices"]
        assert choice["prompt_logprobs"][1] == {"6": {"logprob": -0.006, "rank": None, "decoded_token": spell(6)}}
        (choice,) = (await desk.complete(prompt=[5, 6]))["choices"]
        assert "prompt_logprobs" not in choice
        answer = await desk.chat(prompt_logprobs=1)
        assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]

    run(story)


def test_each_asks_for_as_many_candidates_as_it_said() -> None:
    """Both at once, with different numbers: scored once with the larger, told with its own each."""

    async def story() -> None:
        desk = await Desk("ok").start()
        body = {"prompt": [5, 6], "echo": True, "logprobs": 1, "prompt_logprobs": 3, "max_tokens": 1}
        (choice,) = (await desk.complete(**body))["choices"]
        assert desk.link.requests[0].sampling.num_prompt_logprobs == 3
        assert len(choice["prompt_logprobs"][1]) == 3
        assert list(choice["logprobs"]["top_logprobs"][1]) == [spell(6)]

    run(story)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"echo": True, "suffix": "x"}, "echo"),
    ],
)
def test_what_makes_no_sense_is_refused(body: Any, param: str) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, PATH, {"prompt": "x"} | body)
        assert (status, error["param"]) == (400, param)
        assert desk.link.requests == []

    run(story)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "n": 2}, "prompt_logprobs"),
    ],
)
def test_scores_are_limited_before_they_are_made(body: Any, param: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty tokens, two numbers each: more than 39."""
    monkeypatch.setattr(intake, "MAX_SCORES", 39)

    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, PATH, {"prompt": [[5] * 10, [6] * 10]} | body)
        assert (status, error["param"]) == (400, param)
        assert "more than 39" in error["message"]
        assert (await desk.complete(prompt=[5] * 10, echo=True, logprobs=1))["choices"][0]["logprobs"]

    run(story)


def test_an_engine_that_fails_behind_the_prompt() -> None:
    """The scores have come when it is lost: an error, and no half of an answer."""

    async def story() -> None:
        desk = await Desk("ok").start()
        desk.link.fate = Fate("failed", "engine_lost", "It died.", num_tokens=1)
        response = await desk.post(PATH, {"prompt": "x y z", "echo": True, "logprobs": 1})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_lost")
        desk.link.fate = None
        assert (await desk.complete(prompt="x", echo=True))["choices"][0]["text"] == "xok"

    run(story)
