"""What is refused before anything tries to understand it."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.request import Constraint
from headway.grammar.limits import MAX_CHARACTERS, MAX_DEPTH, ConstraintError, check_source, depth

JSON = st.recursive(
    st.none() | st.integers() | st.text(), lambda part: st.lists(part) | st.dictionaries(st.text(), part), max_leaves=20
)


def levels(value: object) -> int:
    """The same by looking at the value instead of its text."""
    if isinstance(value, dict):
        return 1 + max(map(levels, value.values()), default=0)
    return 1 + max(map(levels, value), default=0) if isinstance(value, list) else 0


@given(JSON)
def test_the_depth_of_json_is_that_of_its_value(value: object) -> None:
    assert depth(Constraint("json", json.dumps(value, ensure_ascii=False))) == levels(value)


@pytest.mark.parametrize(
    ("text", "deep"),
    [("((a))", 2), (r"\(\(a", 0), ("[(((]", 0), ("[]((]x", 0), ("[^])((]", 0), (r"[\](((]()", 1), ("(a{2})", 2)]
    + [("([((", 1), ("([((\\", 1), ("(((\\", 3), ("}})((", 2)],
)
def test_a_bracket_that_is_a_character_counts_for_nothing_in_an_expression(text: str, deep: int) -> None:
    assert depth(Constraint("regex", text)) == deep


@pytest.mark.parametrize(("text", "deep"), [('start: ("((" | "b")', 1), ("start: a // ((((", 0), ("a: ((b)) c", 2)])
def test_nor_in_a_grammar(text: str, deep: int) -> None:
    assert depth(Constraint("lark", text)) == deep


def nested(levels: int) -> str:
    return '{"items":' * levels + "{}" + "}" * levels


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint("json", nested(MAX_DEPTH)), "nested over 64 deep"),
        (Constraint("json", nested(100_000)), "characters, more than"),
        (Constraint("json", " " * MAX_CHARACTERS["json"] + "{}"), "characters, more than"),
        (Constraint("json", "{"), "is not JSON"),
        (Constraint("json", '"' + r"\"" * 131_071), "is not JSON"),
        (Constraint("json", '"' + "\\" * 200_001), "is not JSON"),
        (Constraint("json", "[]"), "must be a JSON object"),
        (Constraint("json", '{"const": ' + "1" * 5000 + "}"), "is not JSON"),
        (Constraint("json", '{"properties": {"a": {"$ref": "http://127.0.0.1/x.json"}}}'), "nothing is fetched"),
        (Constraint("json", '{"anyOf": [{"$ref": "other.json#/a"}]}'), "nothing is fetched"),
        (Constraint("regex", "(" * 30_000 + "a" + ")" * 30_000), "characters, more than"),
        (Constraint("regex", "(" * 65 + "a" + ")" * 65), "nested over 64 deep"),
        (Constraint("regex", "}" * 100 + "(" * 160), "nested over 64 deep"),
        (Constraint("regex", "a\0b"), "NUL"),
        (Constraint("lark", "start: " + "(" * 65 + '"a"' + ")" * 65), "nested over 64 deep"),
    ],
)
def test_what_is_too_much_is_refused_at_once_with_a_sentence(constraint: Constraint, words: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ConstraintError, match=words) as refused:
        check_source(constraint)
    assert str(refused.value).endswith(".")
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "[" * MAX_CHARACTERS["regex"]),
        Constraint("regex", "[" + "\\" * (MAX_CHARACTERS["regex"] - 2)),
        Constraint("choice", '"' + r"\"" * 131_071),
        Constraint("lark", '"' + r"\"" * 131_071),
        Constraint("lark", ('"' + r"\"" * 300 + "\n") * 400),
    ],
)
def test_what_is_never_closed_is_read_once(constraint: Constraint) -> None:
    begun = time.monotonic()
    assert depth(constraint) <= MAX_DEPTH
    check_source(constraint)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    "schema",
    [
        json.loads(nested(MAX_DEPTH - 1)),
        {"$ref": "#/$defs/a", "$defs": {"a": {}}},
        {"const": {"$ref": "http://x"}},
        {"properties": {"$ref": {"type": "string"}}},
    ],
)
def test_what_is_allowed(schema: object) -> None:
    check_source(Constraint("json", json.dumps(schema)))
