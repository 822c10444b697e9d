"""The whole road, from the official client to an engine in a process of its own: answers are what they were asked to
be, whatever is asked beside them."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from desk import Desk, Network
from pydantic import BaseModel, Field
from test_tools import SPEAKS, USER, WEATHER

from headway.config import EngineSettings
from headway.placement.supervise import Supervisor

CITY = {"type": "object", "properties": {"city": {"enum": ["Bonn", "Köln"]}}, "required": ["city"]}
CLOSED = {"type": "function", "function": {"name": "weather", "parameters": CITY | {"additionalProperties": False}}}


class Real(Desk):
    """The same door in front of a real engine."""

    def __init__(self) -> None:
        super().__init__(text=SPEAKS)
        supervisor = Supervisor(EngineSettings(num_threads=1, dtype="float32"))
        self.link = supervisor  # type: ignore[assignment]
        self.door = type(self.door)(SPEAKS, supervisor, self.settings)
        self.app = self.door.app()

    async def start(self) -> "Real":
        starting = asyncio.create_task(self.link.start())
        starting.add_done_callback(lambda done: done.exception())
        return self


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with Network(Real()) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", timeout=120) as client:
        until = time.monotonic() + 60
        while httpx.get(f"{server.url}/ready").status_code != 200:
            assert time.monotonic() < until, "the engine does not get ready"
            time.sleep(0.05)
        yield client


class Point(BaseModel):
    x: int = Field(ge=-1000, le=1000)
    color: Literal["red", "grün"]
    near: list[bool] = Field(max_length=3)


def test_a_parsed_answer_is_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="embedded", messages=[USER], response_format=Point, n=4, max_tokens=200
    )
    assert all(isinstance(choice.message.parsed, Point) for choice in answer.choices)
    response = client.responses.parse(model="embedded", input="Where?", text_format=Point, max_output_tokens=200)
    assert isinstance(response.output_parsed, Point)
    with client.chat.completions.stream(model="embedded", messages=[USER], response_format=Point) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Point)


@pytest.mark.parametrize(
    ("structured", "is_right"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, lambda text: re.fullmatch("[0-9]{3}-[a-f]{2}", text)),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"grammar": 'start: "<" /[a-z]{2}/ ">"'}, lambda text: re.fullmatch("<[a-z]{2}>", text)),
        (
            {"json": CITY | {"additionalProperties": False}},
            lambda text: not jsonschema.validate(json.loads(text), CITY),
        ),
    ],
)
def test_completions_follow(client: openai.OpenAI, structured: Any, is_right: Any) -> None:
    answer = client.completions.create(
        model="embedded",
        prompt="def f(n):\n",
        n=5,
        max_tokens=60,
        logprobs=2,
        extra_body={"structured_outputs": structured},
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert is_right(choice.text)
        assert len(choice.logprobs.tokens) > 0


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_come_comes(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model="embedded", messages=[USER], tools=[CLOSED], tool_choice=choice, seed=seed, max_tokens=1500
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        for call in answer.choices[0].message.tool_calls:
            assert call.function.name == "weather"
            jsonschema.validate(json.loads(call.function.arguments), CITY)


def test_where_a_call_may_come_text_may(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="embedded", messages=[USER], tools=[WEATHER], temperature=0, max_tokens=30
    )
    (choice,) = answer.choices
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.content
    assert not choice.message.tool_calls


def test_many_at_once_free_and_held(client: openai.OpenAI) -> None:
    """New constraints all the time, so that something is always being built."""

    def ask(number: int) -> None:
        if number % 3 == 0:
            answer = client.completions.create(model="embedded", prompt=f"x{number}", max_tokens=10)
            assert answer.choices[0].finish_reason in ("stop", "length")
            return
        pattern = f"[0-9]{{{1 + number % 5}}}:{number}"
        answer = client.completions.create(
            model="embedded", prompt="x", max_tokens=40, extra_body={"structured_outputs": {"regex": pattern}}
        )
        assert re.fullmatch(pattern, answer.choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(48)))


def test_a_constraint_that_grows_too_costly_is_told_and_the_next_is_answered(client: openai.OpenAI) -> None:
    """It passes the check, since it begins well; then it fails in the engine, or max_tokens comes first."""
    costly = {"structured_outputs": {"regex": "[ab]*a[ab]{30}c"}}
    endings: list[str | None] = []
    for seed in range(3):
        try:
            answer = client.completions.create(
                model="embedded", prompt="x", max_tokens=900, seed=seed, extra_body=costly
            )
            endings.append(answer.choices[0].finish_reason)
        except openai.BadRequestError as error:
            endings.append(error.code)
    assert set(endings) <= {"stop", "length", "constraint_failed"}
    answer = client.completions.create(model="embedded", prompt="x", max_tokens=5)
    assert answer.choices[0].finish_reason in ("stop", "length")
