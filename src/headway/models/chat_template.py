"""Renders a conversation into the one string that a model was trained to continue.

Templates come with models, from strangers: they run in a sandbox without access to anything but their arguments, and
with bounds on output and time. Knows no token.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from headway.models.config import ModelError
from headway.models.patience import OutOfTime, at_most
from headway.models.sandbox import MAX_CHARACTERS, Sandbox

MAX_RENDER_S = 5.0
MAX_INDENT = 64
MAX_DATE_FORMAT = 256
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})


class ChatTemplateError(ValueError):
    """The conversation cannot be rendered: the template's own words, or ours."""


class ChatTemplate:
    """A compiled template with the special tokens that it may mention."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._template = _environment().from_string(source)

    @classmethod
    def parse(cls, source: str, special_tokens: Mapping[str, str]) -> "ChatTemplate":
        """From a file's name or the template itself. Raises ModelError if it is neither."""
        looks_like_a_template = "{{" in source or "{%" in source
        if not looks_like_a_template:
            source = _read(source)
        try:
            return cls(source, special_tokens)
        except TemplateSyntaxError as error:
            raise ModelError(f"The chat template is broken in line {error.lineno}: {error.message}.") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt that asks for the assistant's next message. Raises ChatTemplateError."""
        variables = self._special_tokens | dict(arguments or {})
        variables |= {"messages": list(messages), "tools": list(tools) if tools else None}
        variables |= {"documents": None, "add_generation_prompt": True}
        pieces: list[str] = []
        num_characters = 0
        try:
            with at_most(MAX_RENDER_S):
                for piece in self._template.generate(variables):
                    pieces.append(piece)
                    num_characters += len(piece)
                    if num_characters > MAX_CHARACTERS:
                        raise ChatTemplateError(f"The rendered conversation is over {MAX_CHARACTERS} characters.")
        except ChatTemplateError:
            raise
        except OutOfTime as error:
            raise ChatTemplateError(f"Rendering the conversation took over {MAX_RENDER_S:g} s.") from error
        except Exception as error:  # a stranger's program: it may fail in any way
            raise ChatTemplateError(f"The chat template refuses these messages: {str(error)[:300]}") from error
        return "".join(pieces)


def _read(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf8")
    except (OSError, ValueError, RuntimeError) as error:  # the last: a home that is nobody's
        raise ModelError(f"There is no chat template {name[:200]}: give a file, or the template itself.") from error


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote, which matters in training only."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own contract)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Sandbox:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | str | None = None, **more: Any) -> str:
    """Plain JSON: Jinja's own filter would escape for HTML."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > MAX_INDENT:
        raise SecurityError(f"JSON is indented by at most {MAX_INDENT} characters")
    wanted = {name: more[name] for name in ("separators", "sort_keys") if name in more}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **wanted)


def _now(form: str) -> str:
    if len(form) > MAX_DATE_FORMAT:
        raise SecurityError(f"the form of a date has at most {MAX_DATE_FORMAT} characters")
    return datetime.now().strftime(form)


def _raise(message: str) -> None:
    raise TemplateError(message)
