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
    """What stands around calls. `mark` begins one in the midst of a text; without it, an answer has text or calls."""

    mark: str
    before: str
    opening: str
    closing: str
    between: str
    after: str


MARKED = Dialect("<tool_call>", "", "<tool_call>\n", "\n</tool_call>", "\n", "")  # Hermes' and Qwen's
LISTED = Dialect("", "[", "", "", ", ", "]")
MARKS = ("<tool_call>", "</tool_call>")
_MARKS = re.compile(f"({'|'.join(MARKS)})")


def dialect_of(template: str) -> Dialect:
    """The one that a chat template speaks of."""
    speaks = "<tool_call>" in template and "</tool_call>" in template
    return MARKED if speaks and "<function=" not in template else LISTED


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

    rules = [f"call_{number}: {_call(*function)}" for number, function in enumerate(functions.items())]
    rules.append("body: " + " | ".join(f"call_{number}" for number in range(len(functions))))
    rules.append(f"call: {_joined(marked(dialect.opening), 'body', marked(dialect.closing))}")
    more = f"({_quoted(dialect.between)} call){{0,{MAX_CALLS - 1}}}" if several else ""
    calls = _joined(_quoted(dialect.before), "call", more, _quoted(dialect.after))
    if must_call:
        rules.append(f"start: {calls}")
    elif answer is not None:
        rules.append(f"start: answer | {calls}")
        rules.append(f"answer: {_json(answer)}")
    else:
        assert dialect.mark, "text and calls need a mark between them"
        rest = _joined(_quoted(dialect.opening.removeprefix(dialect.mark)), "body", marked(dialect.closing))
        token = tokens.get(dialect.mark)
        others = ",".join(str(one) for text, one in tokens.items() if text not in MARKS)
        before = f"(TEXT <[{others}]>)*" if others else ""
        rules.append(f"start: {before} (TEXT | first {more})")
        rules.append(f"first: (spelled{'' if token is None else f' | TEXT <[{token}]>'}) {rest}")
        rules.append(f"spelled[lazy]: TEXT {_quoted(dialect.mark)}")
        rules.append(r"TEXT: /(.|\n)*/")
    return Constraint("lark", "%llguidance {}\n" + "\n".join(rules) + "\n")


def _call(name: str, schema: str) -> str:
    return _joined(_quoted(f'{{"name": "{name}", "arguments": '), _json(schema), _quoted("}"))


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
    """The next call begins."""

    name: str


class Argued(NamedTuple):
    """More of the JSON of its arguments."""

    text: str


Heard = Said | Called | Argued
_BEGINNING = re.compile(r'\{"name": "([a-zA-Z0-9_.-]{1,64})", "arguments": ')


@dataclass(frozen=True, slots=True)
class Reading:
    """How to tell calls from text: they begin at `mark`, or only where it stands at the very start. No mark: there is
    nothing but calls."""

    mark: str = ""
    at_start: bool = False


@dataclass(slots=True)
class Reader:
    """Of one answer while it grows."""

    reading: Reading
    num_calls: int = 0
    _rest: str = ""
    _is_text: bool = field(init=False)
    _only_text: bool = False
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
            yield Called(begun.group(1))

    def _read_text(self) -> Iterator[Heard]:
        mark = self.reading.mark
        before, found, after = self._rest.partition(mark)
        if self.reading.at_start and not (mark.startswith(self._rest) or self._rest.startswith(mark)):
            self._only_text = True
        if found and not self._only_text:
            self._is_text, self._rest = False, after
            if before.strip():
                yield Said(before)
            return
        most = 0 if self._only_text else min(len(mark) - 1, len(self._rest))
        held = next((n for n in range(most, 0, -1) if mark.startswith(self._rest[-n:])), 0)
        shown = self._rest[: len(self._rest) - held]
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
