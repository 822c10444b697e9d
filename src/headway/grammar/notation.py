"""A constraint in llguidance's notation, and whether llguidance is there to read it."""

import json
from importlib.util import find_spec
from typing import Any

from headway.core.request import Constraint

MISSING = "This server cannot constrain answers: install headway[grammar] where it runs."
WHITESPACE = r"[ ]?|\n[ \t]{0,32}"  # in JSON: one space, or a new line with its indentation, never without end


def is_available() -> bool:
    """Whether the extra is installed."""
    return find_spec("llguidance") is not None


def json_options(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with our own options for llguidance in it, instead of a caller's."""
    return schema | {"x-guidance": {"whitespace_pattern": WHITESPACE}}


def notation(constraint: Constraint) -> str:
    """Raises ValueError for what is no JSON where it should be."""
    from llguidance import LLMatcher

    match constraint.kind:
        case "json":
            return LLMatcher.grammar_from_json_schema(json_options(json.loads(constraint.text)))
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "choice":
            choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(constraint.text))
            return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
        case "lark":
            return LLMatcher.grammar_from_lark(constraint.text)
