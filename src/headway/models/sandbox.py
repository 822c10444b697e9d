"""Where chat templates run: a sandbox in which no single operation fills the memory.

A template that takes long is interrupted between two operations, but not within one. So what could make much out of
little (repetition, padding, replacing, joining, widths in a format) is measured before it is done; lists only by their
own length.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from string import Formatter
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 16 * 1024 * 1024
MAX_PRECISION = 300  # digits that a number is rounded to
_DIRECTIVE = re.compile(r"%(\([^()]*[()])?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?")
_SEQUENCES = (str, bytes, list, tuple)


class _Compiler(CodeGenerator):
    """Lets the sandbox join what `~` joins."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses whatever would only fill the memory."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Compiler

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name, length in _FILTERS.items():
            self.filters[name] = _measured(FILTERS[name], length)
        self.filters["join"] = _listed(FILTERS["join"])

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """What a block, a macro or `~` has put together."""
        listed = list(pieces)
        _admit(sum(map(len, listed)))
        return "".join(listed)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not available")
        if operator == "%" and isinstance(left, str | bytes):
            _admit(_filled(_text(left), right if isinstance(right, tuple | Mapping) else (right,)))
        elif operator == "+" and isinstance(left, _SEQUENCES) and isinstance(right, _SEQUENCES):
            _admit(len(left) + len(right))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, _SEQUENCES) and isinstance(other, int):
                    _admit(len(one) * other)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, called: Any, *given: Any, **named: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # Jinja wraps `format`
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes):
            if name == "join" and len(given) == 1:
                given = (list(given[0]),)
            _admit(_of_method(owner, name, given, named))
        elif isinstance(owner, int) and name == "to_bytes":
            _admit(_largest([*given, *named.values()]))
        return super().call(context, called, *given, **named)


def _admit(num_characters: int) -> None:
    if num_characters > MAX_CHARACTERS:
        raise SecurityError(f"one operation would make over {MAX_CHARACTERS} characters")


def _measured(done: Callable[..., Any], length: Callable[..., int]) -> Callable[..., Any]:
    """A filter whose result is measured first."""

    @wraps(done)
    def measured(*given: Any, **named: Any) -> Any:
        _admit(length(*given, **named))
        return done(*given, **named)

    return measured


def _listed(join: Callable[..., str]) -> Callable[..., str]:
    """The filter `join`, which would draw its parts only while it joins them."""

    @wraps(join)
    def measured(context: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        parts = list(value)
        _admit(_joined(d, parts))
        return join(context, parts, d, attribute)

    return measured


# How long a result can be at most


def _of_method(owner: str | bytes, name: str, given: Sequence[Any], named: Mapping[str, Any]) -> int:
    """Of a method of text or bytes; 0 for those that cannot make much out of little."""
    values = [*given, *named.values()]
    match name:
        case "ljust" | "rjust" | "center" | "zfill":
            return _largest(values)
        case "expandtabs":
            return _text(owner).count("\t") * _largest(values)
        case "replace":
            return _replaced(owner, *values[:2]) if len(values) >= 2 else 0
        case "translate":
            return len(owner) * _longest(values[0].values()) if values and isinstance(values[0], Mapping) else 0
        case "join":
            return _joined(owner, given[0]) if given else 0
        case "format":
            return _formatted(_text(owner), values)
        case "format_map":
            return _formatted(_text(owner), list(given[0].values()) if given and isinstance(given[0], Mapping) else [])
        case _:
            return 0


def _replaced(text: Any, old: Any, new: Any) -> int:
    if not all(isinstance(one, str | bytes) for one in (text, old, new)):
        return 0
    return len(text) + (text.count(old) if type(text) is type(old) else len(text) + 1) * len(new)


def _joined(between: Any, parts: Sequence[Any]) -> int:
    each = len(between) if isinstance(between, str | bytes) else 0
    return sum(len(part) for part in parts if isinstance(part, str | bytes)) + each * len(parts)


def _formatted(form: str, values: Sequence[Any]) -> int:
    """Of `str.format`."""
    specs = [spec for _, field, spec, _ in Formatter().parse(form) if field is not None]
    if any("{" in spec for spec in specs if spec):
        raise SecurityError("a width that is a field of its own is not available")
    widths = sum(_number(digits) for spec in specs for digits in re.findall(r"\d+", spec or ""))
    return len(form) + widths + len(specs) * _longest(values)


def _filled(form: str, values: Sequence[Any] | Mapping[Any, Any]) -> int:
    """Of `%`."""
    num, widths = 0, 0
    for directive in _DIRECTIVE.finditer(form):
        key, *sizes = directive.groups(default="")
        if key.endswith("(") or "*" in sizes:
            raise SecurityError("such a format is not available")
        num, widths = num + 1, widths + sum(map(_number, filter(None, sizes)))
    return len(form) + widths + num * _longest(values.values() if isinstance(values, Mapping) else values)


def _format_filter(value: Any, *given: Any, **named: Any) -> int:
    return _filled(str(value), named or given)


def _indented(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    text = str(s)
    return len(text) + (len(text.splitlines()) + 1) * (len(width) if isinstance(width, str) else width)


def _rounded(value: Any, precision: int = 0, method: str = "common") -> int:
    return 0 if abs(precision) <= MAX_PRECISION else MAX_CHARACTERS + 1


_FILTERS: dict[str, Callable[..., int]] = {
    "batch": lambda value, linecount, fill_with=None: 0 if fill_with is None else linecount,
    "center": lambda value, width=80: width,
    "format": _format_filter,
    "indent": _indented,
    "replace": lambda context, s, old, new, count=None: _replaced(str(s), str(old), str(new)),
    "round": _rounded,
}


def _largest(values: Iterable[Any]) -> int:
    return max((value for value in values if isinstance(value, int)), default=0)


def _longest(values: Iterable[Any]) -> int:
    return max(_lengths(values), default=0)


def _lengths(values: Iterable[Any]) -> Iterator[int]:
    return (len(value) for value in values if isinstance(value, str | bytes))


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 10 else MAX_CHARACTERS + 1


def _text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("latin1")
