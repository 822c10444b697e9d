"""What the decider allows, judged by oracles: jsonschema, re, and the texts themselves. No model: tokens at random."""

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.request import Constraint
from headway.grammar import calls, matcher
from headway.grammar.limits import ConstraintError
from headway.grammar.matcher import Compiler, Matcher
from headway.models.tokenizer import open_model_text

TOKENIZER = open_model_text(None).tokenizer
END = TOKENIZER.eos_ids[0]
COMPILER = Compiler(TOKENIZER.source, TOKENIZER.vocab_size, TOKENIZER.eos_ids)

LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 1000},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 8},
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
        {"enum": ["red", 5, None, "grün"]},
        {"const": {"a": [1]}},
        {"type": "string", "format": "date"},
    ]
)


def objects(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    @st.composite
    def made(draw: Any) -> Any:
        properties = draw(st.dictionaries(st.sampled_from(["a", "b", "ü", 'q"']), parts, max_size=3))
        required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return made()


def arrays(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 3}, parts)


def choices(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(lambda several: {"anyOf": several}, st.lists(parts, min_size=1, max_size=3))


SCHEMAS = st.recursive(LEAVES, lambda part: objects(part) | arrays(part) | choices(part), max_leaves=8)
PATTERNS = ["[0-9]{3}-[a-z]+", "(ja|nein)( doch)?", r"[0-9]+\.[0-9]{2} €", "a|b|cc*", r"[a-zß]{1,5}[^a-z]?😀"]


def random_answer(asked: Matcher, seed: int, most: int = 400) -> str | None:
    """A random walk through what is allowed; None if it is not at its end after `most` tokens."""
    draw = random.Random(seed)
    tokens: list[int] = []
    while not asked.is_complete:
        if len(tokens) == most:
            return None
        token = int(draw.choice(np.flatnonzero(asked.allowed())))
        asked.accept(token)
        if token != END:
            tokens.append(token)
    return TOKENIZER.decode(tokens, skip_special_tokens=False)


@settings(max_examples=150)
@given(SCHEMAS, st.integers(0, 2**32))
def test_json_conforms_to_its_schema(schema: Any, seed: int) -> None:
    answer = random_answer(COMPILER.matcher(Constraint("json", json.dumps(schema))), seed)
    if answer is not None:
        jsonschema.validate(json.loads(answer), schema)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_matches_its_expression(pattern: str) -> None:
    for seed in range(20):
        answer = random_answer(COMPILER.matcher(Constraint("regex", pattern)), seed)
        assert answer is None or re.fullmatch(pattern, answer)


def test_a_choice_is_one_of_them_and_each_can_be_chosen() -> None:
    several = ["yes", 'no "really"', "yes and no", "ü/\\n\n😀"]
    asked = Constraint("choice", json.dumps(several, ensure_ascii=False))
    assert {random_answer(COMPILER.matcher(asked), seed) for seed in range(200)} == set(several)


def test_a_grammar_in_larks_notation() -> None:
    asked = Constraint("lark", 'start: "(" start ")" | /[0-9]/')
    for seed in range(50):
        answer = random_answer(COMPILER.matcher(asked), seed)
        assert answer is None or re.fullmatch(r"(\(*)\d(\)*)", answer)
        assert answer is None or answer.count("(") == answer.count(")")


@settings(max_examples=60)
@given(SCHEMAS, st.integers(0, 2**32), st.data())
def test_taken_back_is_as_if_it_never_was(schema: Any, seed: int, data: st.DataObject) -> None:
    """After any number of tokens is taken back, also from behind the end, the same ones are allowed as at first."""
    asked = COMPILER.matcher(Constraint("json", json.dumps(schema)))
    draw, seen, tokens = random.Random(seed), [], []
    while not asked.is_complete and len(tokens) < 60:
        seen.append(asked.allowed())
        tokens.append(int(draw.choice(np.flatnonzero(seen[-1]))))
        asked.accept(tokens[-1])
    kept = data.draw(st.integers(0, len(tokens) - 1))
    asked.rollback(len(tokens) - kept)
    for place in range(kept, len(tokens)):
        assert not asked.is_complete
        assert np.array_equal(asked.allowed(), seen[place])
        asked.accept(tokens[place])


def test_answers_to_one_constraint_know_nothing_of_each_other() -> None:
    asked = Constraint("regex", "[ab]c")
    one, other = COMPILER.matcher(asked), COMPILER.matcher(asked)
    one.accept(TOKENIZER.encode("a")[0])
    assert np.array_equal(other.allowed(), COMPILER.matcher(asked).allowed())
    assert not np.array_equal(one.allowed(), other.allowed())


def test_an_answer_may_end_where_the_grammar_does_and_nowhere_else() -> None:
    asked = COMPILER.matcher(Constraint("regex", "ab*"))
    assert not asked.allowed()[END]
    asked.accept(TOKENIZER.encode("a")[0])
    assert asked.allowed()[END]
    assert not asked.is_complete
    asked.accept(END)
    assert asked.is_complete


def test_special_tokens_spell_nothing() -> None:
    assert not COMPILER.matcher(Constraint("lark", r"start: /(.|\n)*/")).allowed()[[1, 2, 3, 4]].any()


def test_tokens_mean_what_is_printed() -> None:
    """The decider's bytes of each token are those that the detokenizer hands out, but for a byte no text can hold."""
    from llguidance import LLTokenizer

    theirs = LLTokenizer(TOKENIZER.source)
    differ = [token for token in range(5, 4096) if theirs.decode_bytes([token]) != TOKENIZER.token_bytes(token)]
    assert [TOKENIZER.token_bytes(token) for token in differ] == [b"\xff"]


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint("json", '{"type": "thing"}'), "type: thing"),
        (Constraint("json", '{"if": {}, "then": {}}'), "Unimplemented"),
        (Constraint("json", '{"minimum": 5, "maximum": 3, "type": "integer"}'), "Unsatisfiable"),
        (Constraint("json", '{"$ref": "#"}'), "allows no answer"),
        (Constraint("json", '{"$ref": "#/$defs/none"}'), "followed"),
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("regex", ""), "allows no answer"),
        (Constraint("choice", '[""]'), "allows no answer"),
        (Constraint("lark", "start: other"), "unknown name"),
        (Constraint("lark", "start: start"), "allows no answer"),
        (Constraint("lark", "it is no grammar"), "followed"),
    ],
)
def test_what_cannot_be_followed_is_said_in_a_sentence(constraint: Constraint, words: str) -> None:
    with pytest.raises(ConstraintError, match=words) as refused:
        COMPILER.check(constraint)
    assert len(str(refused.value)) < 400
    assert str(refused.value).endswith(".")


def test_a_constraint_that_grows_too_costly_ends_in_an_error_not_in_a_hang() -> None:
    """The states of this automaton double with each letter."""
    asked = COMPILER.matcher(Constraint("regex", "[ab]*a[ab]{30}c"))
    draw = random.Random(0)
    letters = [TOKENIZER.encode(letter)[0] for letter in "ab"]

    def go_on() -> None:
        for _ in range(100_000):
            assert asked.allowed()[letters].any()
            asked.accept(draw.choice(letters))

    with pytest.raises(ConstraintError, match="followed further"):
        go_on()


def test_few_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "MAX_KEPT", 3)
    compiler = Compiler(TOKENIZER.source, TOKENIZER.vocab_size, TOKENIZER.eos_ids)
    for number in range(10):
        compiler.matcher(Constraint("regex", f"a{{{number + 1}}}"))
    assert len(compiler._kept) == 3
    monkeypatch.setattr(matcher, "MAX_KEPT_CHARACTERS", 50)
    for letter in "abc":
        compiler.matcher(Constraint("regex", letter * 40))
    assert [constraint.text[0] for constraint in compiler._kept] == ["c"]


def test_a_model_without_an_end_token_ends_where_nothing_can_follow() -> None:
    compiler = Compiler(TOKENIZER.source, TOKENIZER.vocab_size, ())
    asked = compiler.matcher(Constraint("regex", "ab"))
    for token in TOKENIZER.encode("ab"):
        assert asked.allowed()[token]
        asked.accept(token)
    assert asked.is_complete


FUNCTIONS = {
    "weather": {"type": "object", "properties": {"city": {"enum": ["Bonn", "Köln"]}}, "required": ["city"]},
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
SOURCES = {name: json.dumps(schema | {"additionalProperties": False}) for name, schema in FUNCTIONS.items()}


DIALECTS = {"marked": calls.MARKED, "listed": calls.LISTED, "mistral": calls.MISTRAL, "llama": calls.LLAMA}
DIALECTS |= {"mistral-11": calls.MISTRAL_11, "mistral-13": calls.MISTRAL_13}


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("several", [True, False])
def test_calls_that_must_come_conform_to_their_functions(dialect: calls.Dialect, several: bool) -> None:
    asked = calls.grammar(SOURCES, dialect, several=several, must_call=True)
    numbers = set()
    for seed in range(30):
        answer = random_answer(COMPILER.matcher(asked), seed)
        if answer is None:  # sixteen calls may be too many for it
            assert several
            continue
        reader = calls.Reader(calls.Reading())
        heard = reader.feed(answer) + reader.end()
        names = [one.name for one in heard if isinstance(one, calls.Called)]
        arguments = [one.text for one in heard if isinstance(one, calls.Argued)]
        for name, argued in zip(names, arguments, strict=True):
            jsonschema.validate(json.loads(argued), FUNCTIONS[name])
        numbers.add(len(names))
    assert (max(numbers) > 1) == (several and not dialect.instead)


MARKED_CASES = [
    ("Hello.", True),
    ("Hello <tool_cal", True),
    ('I look.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', True),
    ('<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>', True),
    ("<tool_call> is a mark", False),
    ('<tool_call>\n{"name": "then"', False),
    ('<tool_call>\n{"name": "weather", "arguments": {"city": "Berlin"', False),
    ('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>And', False),
]


@pytest.mark.parametrize(
    ("dialect", "text", "is_allowed"),
    [
        (calls.MISTRAL, "Hello.", True),
        (
            calls.MISTRAL,
            'I look. [TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]',
            True,
        ),
        (calls.NEMO, '[TOOL_CALLS][{"name": "now", "arguments": {}}]', True),
        (calls.MISTRAL, "[TOOL_CALLS] is a mark", False),
        (calls.MISTRAL, '[TOOL_CALLS] [{"name": "now", "arguments": {}}]And', False),
        (calls.MISTRAL_13, "Hello [TOOL_CALLS", True),
        (calls.MISTRAL_13, 'I look.[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]weather[ARGS]{"city": "Bonn"}', True),
        (calls.MISTRAL_13, "[TOOL_CALLS]then", False),
        (calls.MISTRAL_13, '[TOOL_CALLS] [{"name": "now"', False),
        (calls.MISTRAL_13, "[TOOL_CALLS]now[CALL_ID]", False),
        (calls.MISTRAL_13, '[TOOL_CALLS]weather[ARGS]{"city": "Berlin"', False),
        (calls.MISTRAL_13, "[TOOL_CALLS]now[ARGS]{} And", False),
        (calls.MISTRAL_11, "[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{}[TOOL_CALLS]now[CALL_ID]000000001[ARGS]{}", True),
        (calls.MISTRAL_11, "[TOOL_CALLS]now[ARGS]", False),
        (calls.MISTRAL_11, "[TOOL_CALLS]now[CALL_ID]a1B2[ARGS]", False),
        (calls.MISTRAL_11, "[TOOL_CALLS]now[CALL_ID]a1B2c3D4e5", False),
        (calls.LLAMA, 'Hello. {"name": "then"', True),
        (calls.LLAMA, '{"name": of a city}', True),
        (calls.LLAMA, '{"name": "weather", "parameters": {"city": "Bonn"}}', True),
        (calls.LLAMA, '<|python_tag|>{"name": "now", "parameters": {}}', True),
        (calls.LLAMA, '{"name": "then"', False),
        (calls.LLAMA, "<|python_tag|>print", False),
        (calls.LLAMA, '{"name": "now", "parameters": {}} And', False),
        *((calls.MARKED, *case) for case in MARKED_CASES),
    ],
)
def test_where_text_or_calls_may_come_a_mark_begins_a_call(dialect: calls.Dialect, text: str, is_allowed: bool) -> None:
    asked = COMPILER.matcher(calls.grammar(SOURCES, dialect, several=True, must_call=False))
    allowed = []
    for token in TOKENIZER.encode(text):
        allowed.append(bool(asked.allowed()[token]))
        if not allowed[-1]:
            break
        asked.accept(token)
    assert all(allowed) == is_allowed


def test_a_call_with_another_key_beside_an_answer_by_a_schema() -> None:
    """Both are objects: only after its tag is one a call."""
    schema = json.dumps({"type": "object", "properties": {"name": {"enum": ["now"]}}, "additionalProperties": False})
    asked = calls.grammar(SOURCES, calls.LLAMA, several=False, must_call=False, answer=schema)
    reading = calls.Reading.of(calls.LLAMA, must_call=False, beside_answer=True)
    kinds = set()
    for seed in range(30):
        answer = random_answer(COMPILER.matcher(asked), seed)
        assert answer is not None
        heard = calls.Reader(reading).feed(answer)
        assert isinstance(heard[0], calls.Called) == answer.startswith("<|python_tag|>")
        kinds.add(type(heard[0]))
    assert kinds == {calls.Said, calls.Called}


def with_tokens(*contents: str) -> tuple[str, dict[str, int]]:
    """The tokenizer with these added, as Qwen's vocabularies have them: neither spelled nor special."""
    known = json.loads(TOKENIZER.source)
    tokens = {content: 4096 + number for number, content in enumerate(contents)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    known["added_tokens"] += [{"id": token, "content": content} | flags for content, token in tokens.items()]
    return json.dumps(known), tokens


def test_marks_that_are_tokens_are_written_as_tokens() -> None:
    """And a model's other added tokens may be where text may be."""
    source, tokens = with_tokens("<tool_call>", "</tool_call>", "<think>")
    compiler = Compiler(source, 4099, TOKENIZER.eos_ids)
    body = TOKENIZER.encode('\n{"name": "now", "arguments": {}}\n')
    call = [tokens["<tool_call>"], *body, tokens["</tool_call>"]]
    must = calls.grammar(SOURCES, calls.MARKED, several=False, must_call=True, tokens=tokens)
    may = calls.grammar(SOURCES, calls.MARKED, several=False, must_call=False, tokens=tokens)
    for constraint, before in ((must, []), (may, []), (may, [tokens["<think>"], *TOKENIZER.encode("I look.")])):
        asked = compiler.matcher(constraint)
        for token in [*before, *call]:
            assert asked.allowed()[token]
            asked.accept(token)
        assert asked.is_complete
    spelled = calls.grammar(SOURCES, calls.MARKED, several=False, must_call=False)
    assert not compiler.matcher(spelled).allowed()[list(tokens.values())].any()


@pytest.mark.parametrize("dialect", [calls.MISTRAL_11, calls.MISTRAL_13], ids=["with an id", "without"])
def test_marks_within_a_call_are_tokens_too(dialect: calls.Dialect) -> None:
    """As Mistral's vocabularies have them; several calls stand in a row."""
    source, tokens = with_tokens("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    compiler = Compiler(source, 4099, TOKENIZER.eos_ids)
    id_ = [tokens["[CALL_ID]"], *TOKENIZER.encode("a1B2c3D4e")] if dialect.has_id else []
    call = [tokens["[TOOL_CALLS]"], *TOKENIZER.encode("now"), *id_, tokens["[ARGS]"], *TOKENIZER.encode("{}")]
    for must, before in ((True, []), (False, []), (False, TOKENIZER.encode("I look."))):
        asked = compiler.matcher(calls.grammar(SOURCES, dialect, several=True, must_call=must, tokens=tokens))
        for token in [*before, *call, *call]:
            assert asked.allowed()[token]
            asked.accept(token)
        assert asked.allowed()[list(TOKENIZER.eos_ids)].all()


def test_an_answer_in_words_by_a_schema_or_a_call() -> None:
    schema = json.dumps({"type": "object", "properties": {"x": {"type": "null"}}, "additionalProperties": False})
    asked = calls.grammar(SOURCES, calls.MARKED, several=False, must_call=False, answer=schema)
    answers = [random_answer(COMPILER.matcher(asked), seed) for seed in range(30)]
    assert all(answer is not None and answer[0] in "{<" for answer in answers)
    assert len({answer[0] for answer in answers if answer}) == 2


def test_a_library_that_panics_is_told_of_like_a_grammar_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens an answer under it gets a sentence; nothing else is hurt, and it is tried but once."""

    class Panic(BaseException):
        """As pyo3 raises them."""

    compiler = Compiler(TOKENIZER.source, TOKENIZER.vocab_size, TOKENIZER.eos_ids)
    tried = []

    def build(constraint: Constraint) -> None:
        tried.append(constraint)
        raise Panic("index out of bounds")

    monkeypatch.setattr(compiler, "build", build)
    for _ in range(2):
        with pytest.raises(ConstraintError, match="cannot be built: index out of bounds"):
            compiler.matcher(Constraint("regex", "a*"))
    assert len(tried) == 1
