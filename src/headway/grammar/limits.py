"""What a constraint's source may be at all, known before anything tries to understand it. Pure.

What it would mean is for `matcher` to find out, in a process that can be killed (`check`).
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from headway.core.request import Constraint, ConstraintKind

MAX_CHARACTERS: dict[ConstraintKind, int] = {"json": 2**18, "regex": 2**14, "choice": 2**18, "lark": 2**18}
MAX_DEPTH = 64
NAMES: dict[ConstraintKind, str] = {
    "json": "JSON schema",
    "regex": "regular expression",
    "choice": "list of choices",
    "lark": "grammar",
}
_STRING = re.compile(r'"(?:[^"\\]|\\.?)*+"?', re.DOTALL)
_OPAQUE: dict[ConstraintKind, re.Pattern[str]] = {  # where a bracket is none; what is never closed goes on to the end,
    "json": _STRING,  # and nothing is looked at twice: the time taken grows as the text does
    "regex": re.compile(r"\\.|\[\^?\]?(?:[^\]\\]|\\.?)*+\]?", re.DOTALL),
    "choice": _STRING,
    "lark": re.compile(r'\\.|"(?:[^"\\\n]|\\.)*+"|//[^\n]*'),
}
_LITERALS = frozenset({"const", "enum", "default", "examples"})  # of a schema: what is below is no schema


class ConstraintError(ValueError):
    """Nothing can be made of it: one sentence that says why."""


def check_source(constraint: Constraint) -> None:
    """Raises ConstraintError for what is too large, too deep, or refers to what is elsewhere."""
    name, text = NAMES[constraint.kind], constraint.text
    most = MAX_CHARACTERS[constraint.kind]
    if len(text) > most:
        raise ConstraintError(f"The {name} has {len(text)} characters, more than {most}: make it smaller.")
    if "\0" in text:
        raise ConstraintError(f"The {name} has a NUL character in it: leave it out.")
    if depth(constraint) > MAX_DEPTH:
        raise ConstraintError(f"The {name} is nested over {MAX_DEPTH} deep: make it flatter.")
    if constraint.kind == "json":
        _check_references(_parsed(text))


def depth(constraint: Constraint) -> int:
    """How deep brackets are nested, without reading what is in them."""
    now = deepest = 0
    for bracket in re.findall(r"[\[({})\]]", _OPAQUE[constraint.kind].sub("", constraint.text)):
        now = now + 1 if bracket in "[({" else max(0, now - 1)  # closing what was never opened earns nothing
        deepest = max(deepest, now)
    return deepest


def _parsed(text: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConstraintError(f"The JSON schema is not JSON: {str(error)[:200]}.") from error
    if not isinstance(schema, dict):
        raise ConstraintError("The JSON schema must be a JSON object.")
    return schema


def _check_references(schema: Any) -> None:
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise ConstraintError(
                f"The JSON schema refers to {reference[:100]!r}, and nothing is fetched: put it into its own $defs, "
                'and refer to it as "#/$defs/…".'
            )


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        for key, value in part.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            elif key not in _LITERALS:
                yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)
