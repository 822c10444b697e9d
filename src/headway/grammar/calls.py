"""Calls of tools as a model writes them: the grammar that makes it write them so, and the reader of what it wrote.

The frame around name and arguments is fixed to the letter, so that reading is no guess. A model whose template has
marks of its own for calls keeps them; others write a JSON list.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from headway.core.request import Constraint
from headway.grammar.notation import json_options

NAME = r"^[a-zA-Z0-9_.-]{1,64}$"  # of a function
MAX_CALLS = 16  # of one answer


@dataclass(frozen=True, slots=True)
class Dialect:
    """What stands around calls. `mark` begins one in the midst of a text; without it, an answer has text or calls.

    Where an answer is text or `instead` of it one call, it is known by how it begins, after a `tag` or without it.
    `arguments` is what a call's arguments are called; where a call is no object but `bare`, its name stands before
    them. Its id, which the model writes between the two if it `has_id`, has so many letters and digits (0: any).
    """

    mark: str
    before: str
    opening: str
    closing: str
    between: str
    after: str
    arguments: str = "arguments"
    instead: bool = False
    tag: str = ""
    bare: bool = False
    has_id: bool = False
    id_letters: int = 0


MARKED = Dialect("<tool_call>", "", "<tool_call>\n", "\n</tool_call>", "\n", "")  # Hermes' and Qwen's
LISTED = Dialect("", "[", "", "", ", ", "]")
TOOL_CALLS = "[TOOL_CALLS]"
CALL_ID, ARGS = "[CALL_ID]", "[ARGS]"
MISTRAL = Dialect(TOOL_CALLS, f"{TOOL_CALLS} [", "", "", ", ", "]", id_letters=9)
NEMO = Dialect(TOOL_CALLS, f"{TOOL_CALLS}[", "", "", ", ", "]", id_letters=9)
MISTRAL_11 = Dialect(TOOL_CALLS, "", TOOL_CALLS, "", "", "", bare=True, has_id=True, id_letters=9)
MISTRAL_13 = Dialect(TOOL_CALLS, "", TOOL_CALLS, "", "", "", bare=True, id_letters=9)
PYTHON_TAG = "<|python_tag|>"
LLAMA = Dialect("", "", "", "", "", "", arguments="parameters", instead=True, tag=PYTHON_TAG)
MARKS = ("<tool_call>", "</tool_call>", TOOL_CALLS, CALL_ID, ARGS, PYTHON_TAG)
_MARKS = re.compile(f"({'|'.join(map(re.escape, MARKS))})")
_BEGINS = '{"name": "'  # a call


def dialect_of(template: str) -> Dialect:
    """The one that a chat template speaks of."""
    if "<tool_call>" in template and "</tool_call>" in template:
        return LISTED if "<function=" in template else MARKED
    if TOOL_CALLS in template and ARGS in template:
        return MISTRAL_11 if CALL_ID in template else MISTRAL_13
    if TOOL_CALLS in template:
        return MISTRAL if f"{TOOL_CALLS} [" in template else NEMO
    if re.search(r'\{"name": [^{}]*"parameters": ', template):
        return LLAMA
    return LISTED


def grammar(
    functions: Mapping[str, str],
    dialect: Dialect,
    *,
    several: bool,
    must_call: bool,
    answer: str | None = None,
    tokens: Mapping[str, int] = MappingProxyType({}),
) -> Constraint:
    """Of an answer that calls functions, given as name -> the text of its arguments' JSON schema. Unless it must, it
    may be text instead, or begin with text; `answer` is the text of such a text's JSON schema. `tokens` are
    those of the vocabulary that are no spelled text and yet no special ones: marks among them are written as such, and
    the others may be where text may be."""

    def marked(text: str) -> str:
        """As a rule's body, where marks may be tokens."""
        found = [(part, tokens.get(part)) for part in _MARKS.split(text)]
        return _joined(*(_quoted(part) if token is None else f"<[{token}]>" for part, token in found))

    def call(name: str, schema: str) -> str:
        if dialect.bare:
            id_ = _joined(marked(CALL_ID), "ID") if dialect.has_id else ""
            return _joined(_quoted(name), id_, marked(ARGS), _json(schema))
        return _joined(_quoted(f'{_BEGINS}{name}", "{dialect.arguments}": '), _json(schema), _quoted("}"))

    rules = [f"call_{number}: {call(*function)}" for number, function in enumerate(functions.items())]
    if dialect.has_id:
        rules.append(f"ID: /[a-zA-Z0-9]{{{dialect.id_letters}}}/")
    rules.append("body: " + " | ".join(f"call_{number}" for number in range(len(functions))))
    rules.append(f"call: {_joined(marked(dialect.opening), 'body', marked(dialect.closing))}")
    more = f"({_quoted(dialect.between)} call){{0,{MAX_CALLS - 1}}}" if several and not dialect.instead else ""
    calls = _joined(marked(dialect.before), "call", more, _quoted(dialect.after))
    others = ",".join(str(one) for text, one in tokens.items() if text not in MARKS)
    if must_call:
        rules.append(f"start: {calls}")
    elif answer is not None:
        tag = marked(dialect.tag)  # by which alone two objects can be told apart
        rules.append(f"start: answer | {_joined(tag, calls)}")
        rules.append(f"answer: {_json(answer)}")
    elif dialect.instead:
        rules.append(f"start: ({marked(dialect.tag)})? call | PLAIN {f'(<[{others}]> TEXT)*' if others else ''}")
        begins = "|".join(re.escape(one).replace('"', r"\x22") for one in (dialect.tag, _BEGINS))
        rules.append(rf"PLAIN: /(.|\n)*/ & ~/({begins})(.|\n)*/")
        rules.append(r"TEXT: /(.|\n)*/")
    else:
        assert dialect.mark, "text and calls need a mark between them"
        opening = (dialect.before + dialect.opening).removeprefix(dialect.mark)
        rest = _joined(_quoted(opening), "body", marked(dialect.closing))
        token = tokens.get(dialect.mark)
        before = f"(TEXT <[{others}]>)*" if others else ""
        rules.append(f"start: {before} (TEXT | {_joined('first', more, _quoted(dialect.after))})")
        rules.append(f"first: (spelled{'' if token is None else f' | TEXT <[{token}]>'}) {rest}")
        rules.append(f"spelled[lazy]: TEXT {_quoted(dialect.mark)}")
        rules.append(r"TEXT: /(.|\n)*/")
    return Constraint("lark", "%llguidance {}\n" + "\n".join(rules) + "\n")


def _json(schema: str) -> str:
    return f"%json {json.dumps(json_options(json.loads(schema)))}"


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


def _joined(*parts: str) -> str:
    return " ".join(filter(None, parts))


# What was written


class Said(NamedTuple):
    """Text outside of calls."""

    text: str


class Called(NamedTuple):
    """The next call begins. `id`: as the model wrote it, if it wrote one that none of its other calls has."""

    name: str
    id: str = ""


class Argued(NamedTuple):
    """More of the JSON of its arguments."""

    text: str


Heard = Said | Called | Argued
_BEGINNING = re.compile(
    r'\{"name": "(?P<name>[a-zA-Z0-9_.-]{1,64})", "(?:arguments|parameters)": '
    r"|(?P<bare>[a-zA-Z0-9_.-]{1,64})(?:\[CALL_ID\](?P<id>[a-zA-Z0-9]{1,64}))?\[ARGS\]"
)


@dataclass(frozen=True, slots=True)
class Reading:
    """How to tell calls from text: they begin at `mark`, or only where it stands at the very start. No mark: there is
    nothing but calls. A mark that `belongs` to the call is its own beginning; before it a `tag` may stand. An id that
    a call is given has `id_letters` letters and digits, unless that is 0."""

    mark: str = ""
    at_start: bool = False
    belongs: bool = False
    tag: str = ""
    id_letters: int = 0

    @classmethod
    def of(cls, dialect: Dialect, *, must_call: bool, beside_answer: bool) -> "Reading":
        """How an answer is read that was written in this dialect, where a text must be such an answer or may be any."""
        letters = dialect.id_letters
        if must_call:
            return cls(id_letters=letters)
        if dialect.instead:
            return cls(dialect.tag, True) if beside_answer else cls(_BEGINS, True, True, dialect.tag)
        return cls(dialect.mark, beside_answer, id_letters=letters)


@dataclass(slots=True)
class Reader:
    """Of one answer while it grows."""

    reading: Reading
    num_calls: int = 0
    _ids: set[str] = field(default_factory=set)
    _rest: str = ""
    _is_text: bool = field(init=False)
    _only_text: bool = False
    _has_said: bool = False
    _depth: int = 0
    _in_arguments: bool = False
    _in_string: bool = False
    _escaped: bool = False

    def __post_init__(self) -> None:
        self._is_text = bool(self.reading.mark)

    def feed(self, text: str) -> list[Heard]:
        """What this completes."""
        self._rest += text
        return list(self._read())

    def end(self) -> list[Heard]:
        """What was held back, when nothing follows."""
        rest, self._rest = self._rest, ""
        return [Said(rest)] if rest and self._is_text else []

    def _read(self) -> Iterator[Heard]:
        if self._is_text:
            yield from self._read_text()
        while not self._is_text:
            if self._in_arguments:
                argued = self._take_arguments()
                if argued:
                    yield Argued(argued)
                if self._in_arguments:
                    return
            begun = _BEGINNING.search(self._rest)
            if begun is None:
                return
            self.num_calls += 1
            self._rest = self._rest[begun.end() :]
            self._in_arguments = True
            written = begun["id"] or ""
            yield Called(begun["name"] or begun["bare"], "" if written in self._ids else written)
            self._ids.add(written)

    def _read_text(self) -> Iterator[Heard]:
        mark, tag = self.reading.mark, self.reading.tag
        if tag and self._rest and not self._only_text:
            if len(self._rest) < len(tag) and tag.startswith(self._rest):
                return
            self._rest = self._rest.removeprefix(tag)
        before, found, after = self._rest.partition(mark)
        if self.reading.at_start and not (mark.startswith(self._rest) or self._rest.startswith(mark)):
            self._only_text = True
        if found and not self._only_text:
            self._is_text, self._rest = False, found + after if self.reading.belongs else after
            if before.strip() or (before and self._has_said):
                yield Said(before)
            return
        most = 0 if self._only_text else min(len(mark) - 1, len(self._rest))
        held = next((n for n in range(most, 0, -1) if mark.startswith(self._rest[-n:])), 0)
        shown = self._rest[: len(self._rest) - held]
        if not (shown.strip() or self._only_text or self._has_said):
            return  # blanks before a call are no text: held back until it is known what they stand before
        self._has_said = True
        self._rest = self._rest[len(shown) :]
        if shown:
            yield Said(shown)

    def _take_arguments(self) -> str:
        """As much of a JSON object as there is; ends with it."""
        text = self._rest
        for place, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._in_arguments = False
                    self._rest = text[place + 1 :]
                    return text[: place + 1]
        self._rest = ""
        return text
