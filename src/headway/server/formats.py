"""What an answer may be asked to look like, in the forms in which clients say it: OpenAI's, vLLM's, and its older one.

Owns the types and what is meant by them; whether it can be followed is for `checks` to find out.
"""

from typing import Annotated, Any, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from headway.core.request import Constraint
from headway.grammar.limits import ConstraintError, check_source
from headway.server.errors import ApiError, bad_request

ANY_OBJECT = Constraint("json", '{"type":"object"}')
Schema = dict[str, Any]


class Text(msgspec.Struct, tag_field="type", tag="text"):
    """Whatever the model writes."""


class JsonObject(msgspec.Struct, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct):
    schema: Schema
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # followed to the letter either way


class JsonSchema(msgspec.Struct, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


ResponseFormat = Text | JsonObject | JsonSchema


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """One of these, and nothing that nobody knows: all of it constrains. A grammar is in Lark's notation."""

    json: Schema | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: str | None = None


class Formatted(Protocol):
    """The fields of a body that say it."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: Schema | str | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None


class Asked(NamedTuple):
    """A constraint, and the field that it was asked in."""

    param: str
    constraint: Constraint


def is_formatted(body: Formatted) -> bool:
    """Whether anything is said at all."""
    said = (body.response_format, body.structured_outputs, body.guided_json, body.guided_regex)
    return any(one is not None for one in (*said, body.guided_choice, body.guided_grammar))


def asked_format(body: Formatted) -> Asked | None:
    """What the answer is to look like; None: as it comes. Raises ApiError 400."""
    found = [*_by_response_format(body), *_by_structured_outputs(body), *_by_guided(body)]
    if len(found) > 1:
        raise bad_request(
            f"`{found[0].param}` and `{found[1].param}` both constrain the answer: give one of them.", found[1].param
        )
    return found[0] if found else None


def _by_response_format(body: Formatted) -> list[Asked]:
    match body.response_format:
        case JsonObject():
            return [Asked("response_format", ANY_OBJECT)]
        case JsonSchema(named):
            param = "response_format.json_schema.schema"
            return [json_asked(named.schema, param)]
        case _:
            return []


def _by_structured_outputs(body: Formatted) -> list[Asked]:
    asked = body.structured_outputs
    if asked is None:
        return []
    for name in ("structural_tag", "whitespace_pattern"):
        if getattr(asked, name):
            raise _unsupported(f"structured_outputs.{name}")
    found = _kinds("structured_outputs.", asked.json, asked.regex, asked.choice, asked.grammar)
    if asked.json_object:
        found.append(Asked("structured_outputs.json_object", ANY_OBJECT))
    if not found:
        raise bad_request(
            "`structured_outputs` must have one of json, regex, choice, grammar and json_object.", "structured_outputs"
        )
    return found


def _by_guided(body: Formatted) -> list[Asked]:
    return _kinds("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)


def _kinds(
    prefix: str, schema: Schema | str | None, regex: str | None, choices: list[str] | None, grammar: str | None
) -> list[Asked]:
    found = []
    if schema is not None:
        found.append(json_asked(schema, f"{prefix}json"))
    if regex is not None:
        found.append(_within_limits(f"{prefix}regex", Constraint("regex", regex)))
    if choices is not None:
        listed = msgspec.json.encode(choices).decode()
        found.append(_within_limits(f"{prefix}choice", Constraint("choice", listed)))
    if grammar is not None:
        found.append(_within_limits(f"{prefix}grammar", Constraint("lark", grammar)))
    return found


def json_asked(schema: Schema | str, param: str) -> Asked:
    """An answer by this schema, given as it is or as its text. Raises ApiError 400."""
    try:
        text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    except RecursionError as error:
        raise invalid(ConstraintError("The JSON schema is nested too deep: make it flatter."), param) from error
    return _within_limits(param, Constraint("json", text))


def _within_limits(param: str, constraint: Constraint) -> Asked:
    try:
        check_source(constraint)
    except ConstraintError as error:
        raise invalid(error, param) from error
    return Asked(param, constraint)


def invalid(error: ConstraintError, param: str) -> ApiError:
    return bad_request(str(error), param, "invalid_constraint")


def _unsupported(param: str) -> ApiError:
    return bad_request(
        f"`{param}` is not supported yet: leave it out, since the answer would not follow it.",
        param,
        "unsupported_parameter",
    )
