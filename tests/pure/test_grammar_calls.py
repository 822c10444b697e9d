"""What a model wrote is read as the calls and the text that it wrote, wherever it is cut into pieces."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headway.grammar.calls import (
    LISTED,
    LLAMA,
    MARKED,
    MISTRAL,
    MISTRAL_11,
    MISTRAL_13,
    NEMO,
    Argued,
    Called,
    Dialect,
    Heard,
    Reader,
    Reading,
    Said,
    dialect_of,
)

NAMES = st.from_regex(r"[a-zA-Z0-9_.-]{1,12}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=4)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=4)
INDENTS = st.sampled_from([None, 2])


def written(calls: list[tuple[str, str]], dialect: Dialect) -> str:
    if dialect.bare:
        ids = [f"[CALL_ID]{number:09}" if dialect.has_id else "" for number in range(len(calls))]
        return "".join(f"[TOOL_CALLS]{name}{id_}[ARGS]{said}" for id_, (name, said) in zip(ids, calls, strict=True))
    bodies = [
        f'{dialect.opening}{{"name": "{name}", "{dialect.arguments}": {said}}}{dialect.closing}' for name, said in calls
    ]
    return dialect.before + dialect.between.join(bodies) + dialect.after


def told(heard: list[Heard]) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls, put together again."""
    text, calls = "", []
    for one in heard:
        match one:
            case Said(more):
                text += more
            case Called(name):
                calls.append((name, ""))
            case Argued(more):
                calls[-1] = (calls[-1][0], calls[-1][1] + more)
    return text, calls


def fed(text: str, cuts: list[int], reading: Reading) -> tuple[str, list[tuple[str, str]]]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    reader = Reader(reading)
    heard = [one for start, end in pairwise(places) for one in reader.feed(text[start:end])]
    return told(heard + reader.end())


@example(" ", [("call", {})], None, [1], False)  # blanks come alone, and nobody knows yet what they stand before
@example("0 ", [("call", {})], None, [1], False)  # … or what they stand behind
@given(st.text(), CALLS, INDENTS, st.lists(st.integers(0, 10_000)), st.booleans())
def test_calls_are_read_as_they_were_written(
    text: str, calls: list[tuple[str, dict[str, object]]], indent: int | None, cuts: list[int], must: bool
) -> None:
    said = [(name, json.dumps(arguments, indent=indent)) for name, arguments in calls]
    if must:
        assert fed(written(said, LISTED), cuts, Reading()) == ("", said)
        assert fed(written(said, MARKED), cuts, Reading()) == ("", said)
    else:
        text = text.replace("<", "")
        expected = text if text.strip() else ""
        assert fed(text + written(said, MARKED), cuts, Reading(MARKED.mark)) == (expected, said)
        text = text.replace("[", "")
        expected = text if text.strip() else ""
        assert fed(text + written(said, MISTRAL), cuts, Reading(MISTRAL.mark)) == (expected, said)
        one, reading = said[:1], Reading.of(LLAMA, must_call=False, beside_answer=False)
        assert fed(written(one, LLAMA), cuts, reading) == ("", one)
        assert fed(LLAMA.tag + written(one, LLAMA), cuts, reading) == ("", one)
        assert fed("." + text, cuts, reading) == ("." + text, [])


@example("", [("ARGS", {"[ARGS]": "f[ARGS]{}"}), ("TOOL_CALLS", {"a": "[TOOL_CALLS]g[ARGS]"})], None, [])
@given(st.text(), CALLS, INDENTS, st.lists(st.integers(0, 10_000)))
def test_a_name_that_stands_before_its_arguments_is_read_wherever_it_is_cut(
    text: str, calls: list[tuple[str, dict[str, object]]], indent: int | None, cuts: list[int]
) -> None:
    """Mistral's newer forms, with an id and without: several in a row, behind a text, forced, or beside an answer."""
    said = [(name, json.dumps(arguments, indent=indent)) for name, arguments in calls]
    text = text.replace("[", "")
    expected = text if text.strip() else ""
    for dialect in (MISTRAL_11, MISTRAL_13):
        may = Reading.of(dialect, must_call=False, beside_answer=False)
        assert fed(text + written(said, dialect), cuts, may) == (expected, said)
        assert fed(written(said, dialect), cuts, Reading.of(dialect, must_call=True, beside_answer=False)) == ("", said)
        beside = Reading.of(dialect, must_call=False, beside_answer=True)
        assert fed(written(said, dialect), cuts, beside) == ("", said)
        answer = json.dumps({"a": written(said, dialect)})
        assert fed(answer, cuts, beside) == (answer, [])


@given(st.lists(st.sampled_from(["a1B2c3D4e", "000000000"]), min_size=1, max_size=4), st.lists(st.integers(0, 10_000)))
def test_ids_are_those_that_the_model_wrote_but_none_comes_twice(ids: list[str], cuts: list[int]) -> None:
    """The second of two with the same id is told without one: whoever tells it gives it another."""
    text = "".join(f"[TOOL_CALLS]f[CALL_ID]{one}[ARGS]{{}}" for one in ids)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    reader = Reader(Reading.of(MISTRAL_11, must_call=True, beside_answer=False))
    heard = [one for start, end in pairwise(places) for one in reader.feed(text[start:end])]
    known = [one.id for one in heard if isinstance(one, Called)]
    assert known == [one if one not in ids[:place] else "" for place, one in enumerate(ids)]


@given(st.text(alphabet="<tol_cal>x\n"), st.lists(st.integers(0, 10_000)))
def test_text_that_only_looks_like_a_mark_is_shown_whole(text: str, cuts: list[int]) -> None:
    text = text.replace(MARKED.mark, "")
    if MARKED.mark not in text:
        assert fed(text, cuts, Reading(MARKED.mark)) == (text, [])


@given(CALLS, st.lists(st.integers(0, 10_000)))
def test_where_the_answer_is_json_a_mark_within_it_is_text(
    calls: list[tuple[str, dict[str, object]]], cuts: list[int]
) -> None:
    said = [(name, json.dumps(arguments)) for name, arguments in calls]
    reading = Reading(MARKED.mark, at_start=True)
    answer = json.dumps({"a": written(said, MARKED)})
    assert fed(answer, cuts, reading) == (answer, [])
    assert fed(written(said, MARKED), cuts, reading) == ("", said)


def test_pieces_come_as_soon_as_they_are_known() -> None:
    reader = Reader(Reading(MARKED.mark))
    pieces = ["I look. <tool", '_call>\n{"name": "f", ', '"arguments": {"a": "}', '"}}\n</tool_', "call>"]
    heard = [reader.feed(piece) for piece in pieces]
    assert heard == [[Said("I look. ")], [], [Called("f"), Argued('{"a": "}')], [Argued('"}')], []]
    assert reader.num_calls == 1


def test_what_is_cut_off_is_told_as_far_as_it_goes() -> None:
    assert fed('<tool_call>\n{"name": "f", "arguments": {"a"', [], Reading(MARKED.mark)) == ("", [("f", '{"a"')])
    assert fed('<tool_call>\n{"name": "f', [], Reading(MARKED.mark)) == ("", [])
    assert fed("a <tool", [], Reading(MARKED.mark)) == ("a <tool", [])


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        ("{{ '<tool_call>' }} … {{ '</tool_call>' }}", MARKED),
        ("{{ messages }}", LISTED),
        ('{{- "[TOOL_CALLS] [" }}', MISTRAL),
        ("{{- '[TOOL_CALLS][' }}", NEMO),
        ('{{- "[TOOL_CALLS]" + name + "[ARGS]" + arguments }}', MISTRAL_13),
        ('{{- "[TOOL_CALLS]" + name }}{{- "[CALL_ID]" + call.id }}{{- "[ARGS]" + arguments }}', MISTRAL_11),
        ('{{- \'{"name": function name, "parameters": dictionary of argument name and its value}.\' }}', LLAMA),
        ("<tool_call>\n<function=f>\n</function>\n</tool_call>", LISTED),
    ],
)
def test_a_template_tells_how_its_model_calls(template: str, dialect: Dialect) -> None:
    assert dialect_of(template) == dialect
