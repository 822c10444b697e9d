"""What an answer may be asked to look like: understood in every form, checked before it is admitted, or refused."""

import asyncio
import json
import threading
import time
from concurrent.futures import wait
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from desk import TEXT, Desk, run

from headway.core.request import Constraint
from headway.grammar import check
from headway.grammar.check import Checker, CheckerBusy
from headway.grammar.frames import Vocabulary
from headway.grammar.limits import ConstraintError
from headway.server import checks

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASKING = {
    CHAT: {"messages": [{"role": "user", "content": "x"}]},
    COMPLETIONS: {"prompt": "x"},
    RESPONSES: {"input": "x"},
}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
POINT_TEXT = '{"type":"object","properties":{"x":{"type":"integer"}},"required":["x"],"additionalProperties":false}'
OBJECT = Constraint("json", '{"type":"object"}')


def by_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": schema}}}


def constraint_of(desk: Desk) -> Constraint | None:
    return desk.link.requests[-1].sampling.constraint


@pytest.mark.parametrize(
    ("path", "body", "constraint"),
    [
        (CHAT, {"response_format": {"type": "text"}}, None),
        (CHAT, {"response_format": {"type": "json_object"}}, OBJECT),
        (CHAT, by_schema(POINT), Constraint("json", POINT_TEXT)),
        (COMPLETIONS, by_schema(POINT), Constraint("json", POINT_TEXT)),
        (CHAT, {"structured_outputs": {"json": POINT}}, Constraint("json", POINT_TEXT)),
        (COMPLETIONS, {"structured_outputs": {"json": POINT_TEXT}}, Constraint("json", POINT_TEXT)),
        (COMPLETIONS, {"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+")),
        (CHAT, {"structured_outputs": {"choice": ["ja", "né"]}}, Constraint("choice", '["ja","né"]')),
        (CHAT, {"structured_outputs": {"grammar": 'start: "a"'}}, Constraint("lark", 'start: "a"')),
        (CHAT, {"structured_outputs": {"json_object": True}}, OBJECT),
        (COMPLETIONS, {"guided_json": POINT}, Constraint("json", POINT_TEXT)),
        (COMPLETIONS, {"guided_regex": "a+"}, Constraint("regex", "a+")),
        (COMPLETIONS, {"guided_choice": ["a", "b"]}, Constraint("choice", '["a","b"]')),
        (CHAT, {"guided_grammar": 'start: "a"'}, Constraint("lark", 'start: "a"')),
        (RESPONSES, {"text": {"format": {"type": "json_object"}}}, OBJECT),
        (
            RESPONSES,
            {"text": {"format": {"type": "json_schema", "name": "point", "schema": POINT, "strict": True}}},
            Constraint("json", POINT_TEXT),
        ),
    ],
)
def test_every_form_is_understood(path: str, body: Any, constraint: Constraint | None) -> None:
    async def story() -> None:
        desk = await Desk("{}").start()
        response = await desk.post(path, ASKING[path] | body)
        assert response.status_code == 200, response.text
        assert constraint_of(desk) == constraint
        if path == RESPONSES:
            assert response.json()["text"]["format"] == body["text"]["format"] | (
                {} if constraint == OBJECT else {"description": None}
            )

    run(story)


def test_every_answer_of_a_call_is_held_to_it() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        await desk.complete(n=3, prompt=["x", "y"], guided_regex="a+")
        assert {each.sampling.constraint for each in desk.link.requests} == {Constraint("regex", "a+")}
        assert len(desk.link.requests) == 6

    run(story)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


SCHEMA = "response_format.json_schema.schema"
WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"response_format": {"type": "yaml"}}, "response_format.type", "yaml"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, SCHEMA, "missing"),
    (CHAT, by_schema({"type": "thing"}), SCHEMA, "thing"),
    (CHAT, by_schema({"if": {}, "then": {}}), SCHEMA, "Unimplemented"),
    (CHAT, by_schema(deep(70)), SCHEMA, "nested over 64 deep"),
    (CHAT, by_schema(deep(400)), SCHEMA, "deep"),
    (CHAT, by_schema({"enum": ["x" * 30] * 10_000}), SCHEMA, "characters, more than"),
    (CHAT, by_schema({"$ref": "#"}), SCHEMA, "allows no answer"),
    (CHAT, by_schema({"$ref": "http://127.0.0.1:9/x"}), SCHEMA, "nothing is fetched"),
    (COMPLETIONS, {"structured_outputs": {}}, "structured_outputs", "must have one"),
    (COMPLETIONS, {"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed"),
    (COMPLETIONS, {"structured_outputs": {"regex": "a\0"}}, "structured_outputs.regex", "NUL"),
    (COMPLETIONS, {"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
    (COMPLETIONS, {"structured_outputs": {"choice": []}}, "structured_outputs.choice", "length"),
    (COMPLETIONS, {"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar", "grammar"),
    (
        COMPLETIONS,
        {"structured_outputs": {"structural_tag": {"a": 1}}},
        "structured_outputs.structural_tag",
        "not supported",
    ),
    (COMPLETIONS, {"structured_outputs": {"regex": "a", "rejex": "b"}}, "structured_outputs", "unknown field `rejex`"),
    (COMPLETIONS, {"guided_regex": "a", "guided_json": {}}, "guided_regex", "both constrain"),
    (CHAT, by_schema({}) | {"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "both constrain"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "missing"),
    (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "thing"}}}},
        "text.format",
        "thing",
    ),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), WRONG)
def test_what_cannot_be_followed_is_refused_by_name(path: str, body: Any, param: str, words: str) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        response = await desk.post(path, ASKING[path] | body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert words in error["message"]
        assert len(error["message"]) < 600
        assert error["message"].endswith(".")
        assert desk.link.requests == []

    run(story)


BOMBS: dict[str, dict[str, Any]] = {
    "deep": by_schema(deep(300)),
    "recursive": by_schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "enum": by_schema({"enum": [f"value {number}" for number in range(15_000)]}),
    "product": by_schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}": {"const": j}}, "required": [f"p{i}"]} for j in range(5)]}
                for i in range(14)
            ]
        }
    ),
    "properties": by_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}),
    "repeated": {"structured_outputs": {"regex": "(a{1,1000}){1,1000}"}},
    "repeated more": {"structured_outputs": {"regex": "((((a{1,500}){1,500}){1,500}){1,500}){1,500}b"}},
    "pattern": by_schema({"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}),
    "parentheses": {"structured_outputs": {"regex": "(" * 5000 + "a" + ")" * 5000}},
    "a string without end": {"structured_outputs": {"json": '"' + r"\"" * 131_071}},
    "brackets without end": {"structured_outputs": {"regex": "[" * 16384}},
    "closed before opened": {"structured_outputs": {"regex": "}" * 100 + "(" * 160}},
    "doubling": {
        "structured_outputs": {
            "grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "x"'
        }
    },
    "ambiguous": {"structured_outputs": {"grammar": 'start: a\na: a a | "x" | a a a'}},
    "alternatives": {
        "structured_outputs": {
            "grammar": "start: " + " | ".join(f"x{i}" for i in range(2000)) + "\n"
            "" + "\n".join(f'x{i}: "a" x{i} | "a"' for i in range(2000))
        }
    },
}


@pytest.mark.parametrize("name", BOMBS)
def test_after_a_bomb_the_next_request_is_answered(name: str) -> None:
    """Either it is no bomb for us and is admitted, or it is refused in seconds and in a sentence; never an error of
    ours. Another caller's request is answered meanwhile, and afterwards as well."""

    async def story() -> None:
        desk = await Desk("ok").start()
        begun = time.monotonic()
        bomb = asyncio.create_task(desk.post(CHAT, ASKING[CHAT] | BOMBS[name]))
        meanwhile = await desk.complete()
        response = await bomb
        assert time.monotonic() - begun < check.LIMIT_S + check.START_S
        assert meanwhile["choices"][0]["text"] == "ok"
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            error = response.json()["error"]
            assert error["code"] == "invalid_constraint"
            assert error["message"].endswith(".")
        assert (await desk.complete(guided_regex="ok"))["choices"][0]["text"] == "ok"
        assert (await desk.chat())["choices"][0]["message"]["content"] == "ok"

    run(story)


def test_a_reference_to_elsewhere_is_never_fetched() -> None:
    """Not even by a relative reference under an `$id` that names a server."""
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Listener)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    url = f"http://127.0.0.1:{server.server_port}"

    async def story() -> None:
        desk = await Desk("ok").start()
        for schema in (
            {"$ref": f"{url}/a.json"},
            {"$id": f"{url}/root.json", "properties": {"a": {"$ref": "b.json"}}},
            {"$schema": f"{url}/meta.json", "type": "integer"},
            {"$id": f"{url}/root.json", "$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#x"}}},
        ):
            response = await desk.post(CHAT, ASKING[CHAT] | by_schema(schema))
            assert response.status_code in (200, 400)

    try:
        run(story)
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
    assert asked == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, by_schema(POINT)),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}),
        (COMPLETIONS, {"guided_regex": "a"}),
        (RESPONSES, {"text": {"format": {"type": "json_object"}}}),
    ],
)
def test_without_the_extra_it_says_what_to_install(path: str, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "is_available", lambda: False)

    async def story() -> None:
        desk = await Desk("ok").start()
        response = await desk.post(path, ASKING[path] | body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
        assert "install headway[grammar]" in error["message"]
        assert (await desk.complete())["choices"][0]["text"] == "ok"

    run(story)


# The checker by itself


def vocabulary() -> Vocabulary:
    tokenizer = TEXT.tokenizer
    return Vocabulary(tokenizer.source, tokenizer.vocab_size, tokenizer.eos_ids)


@pytest.fixture
def checker() -> Any:
    made = Checker(vocabulary)
    yield made
    made.close()


def test_verdicts_are_remembered(checker: Checker) -> None:
    checker.check(Constraint("regex", "ab")).result(60)
    with pytest.raises(ConstraintError, match="unclosed"):
        checker.check(Constraint("regex", "(")).result(60)
    assert checker.check(Constraint("regex", "ab")).done()
    again = checker.check(Constraint("regex", "("))
    assert again.done()
    with pytest.raises(ConstraintError, match="unclosed"):
        again.result()


def test_a_worker_that_takes_too_long_is_killed_and_replaced(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hardly any time, nothing can be answered in time; with the usual limit everything is again."""
    checker.check(Constraint("regex", "a")).result(60)
    monkeypatch.setattr(check, "LIMIT_S", 1e-6)
    with pytest.raises(ConstraintError, match="to be understood: make it simpler"):
        checker.check(Constraint("json", json.dumps({"enum": [f"v{k}" for k in range(5000)]}))).result(60)
    monkeypatch.undo()
    checker.check(Constraint("regex", "b")).result(60)


def test_a_worker_may_use_so_much_memory_and_no_more() -> None:
    """In the worker's own words: what is beyond its limits ends it, or raises there; the limits are set."""
    import subprocess
    import sys

    program = (
        "import resource; from headway.grammar import worker; worker._limit_memory(); worker._limit_cpu()\n"
        "try:\n    bytearray(worker.MEMORY_BYTES + (64 << 20)); print('has it')\n"
        "except MemoryError:\n    print('refused', flush=True)\n"
        "while True: pass"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "refused\n"
    assert ended.returncode < 0  # by a signal, for the time that it took


def test_too_many_that_wait_are_sent_away(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_WAITING", 2)
    waiting = [checker.check(Constraint("regex", f"a{number}")) for number in range(2)]
    with pytest.raises(CheckerBusy):
        checker.check(Constraint("regex", "b"))
    wait(waiting, 60)
    checker.check(Constraint("regex", "b")).result(60)


def test_what_the_door_starts_goes_with_it() -> None:
    made = Checker(vocabulary)
    made.check(Constraint("regex", "a")).result(60)
    workers = [made._workers.get() for _ in range(check.NUM_WORKERS)]
    processes = [worker._process for worker in workers if worker._process is not None]
    assert processes
    made.close()
    assert all(process.poll() is not None for process in processes)


def test_a_vocabulary_that_cannot_be_held_to_anything_is_told() -> None:
    made = Checker(lambda: Vocabulary("{}", 10, (0,)))
    try:
        with pytest.raises(ConstraintError, match="vocabulary cannot be held"):
            made.check(Constraint("regex", "a")).result(60)
    finally:
        made.close()
