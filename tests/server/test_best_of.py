"""`best_of`: more answers are drawn than shown, and the likeliest per token are."""

from typing import Any

import pytest
from desk import TEXT, Desk, run
from test_refusals import refused

from headway.core.request import Request

PATH = "/v1/completions"
SAID = ("a a a", "b", "c c", "d")


def desk_of_four() -> Desk:
    """Sample k says SAID[k]. A token's logprob is its id, negative, over a thousand: the mean decides."""
    desk = Desk()

    def script(request: Request) -> tuple[int, ...]:
        sample = int(request.id.rpartition(".")[2]) % 4
        return (*TEXT.tokenizer.encode(SAID[sample]), TEXT.tokenizer.eos_ids[0])

    desk.link.script = script
    return desk


def mean(text: str) -> float:
    ids = (*TEXT.tokenizer.encode(text), TEXT.tokenizer.eos_ids[0])
    return -sum(ids) / len(ids)


def test_the_likeliest_per_token_are_shown_best_first() -> None:
    async def story() -> None:
        desk = await desk_of_four().start()
        answer = await desk.complete(n=2, best_of=4)
        ranked = sorted(SAID, key=mean, reverse=True)
        assert [choice["text"] for choice in answer["choices"]] == ranked[:2]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert all(choice["logprobs"] is None for choice in answer["choices"]), "asked by us, not by the caller"
        assert len(desk.link.requests) == 4
        drawn = sum(len(TEXT.tokenizer.encode(text)) + 1 for text in SAID)
        assert answer["usage"]["completion_tokens"] == drawn
        assert answer["usage"]["prompt_tokens"] == len(TEXT.tokenizer.encode("x"))

    run(story)


def test_each_prompt_has_its_own_best_and_its_own_logprobs() -> None:
    async def story() -> None:
        desk = await desk_of_four().start()
        answer = await desk.complete(prompt=["x", "y"], best_of=4, logprobs=1, echo=True)
        best = max(SAID, key=mean)
        assert [choice["text"] for choice in answer["choices"]] == ["x" + best, "y" + best]
        for choice in answer["choices"]:
            assert "".join(choice["logprobs"]["tokens"]).startswith(choice["text"])

    run(story)


def test_as_many_as_are_shown_leaves_nothing_to_choose() -> None:
    """In their order, and a stream is possible."""

    async def story() -> None:
        desk = await desk_of_four().start()
        answer = await desk.complete(n=4, best_of=4)
        assert [choice["text"] for choice in answer["choices"]] == list(SAID)
        assert desk.link.requests[0].sampling.num_logprobs is None
        chunks = await desk.stream(PATH, {"prompt": "x", "n": 2, "best_of": 2})
        assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1}

    run(story)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 3, "temperature": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 128, "prompt": ["x"] * 3}, "prompt"),
    ],
)
def test_what_cannot_be_chosen_is_refused(body: Any, param: str) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        status, error = await refused(desk, PATH, {"prompt": "x"} | body)
        assert (status, error["param"]) == (400, param)
        assert desk.link.requests == []

    run(story)
