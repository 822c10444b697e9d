"""Judges of generated Python source that need no reference: does a function parse, does a text repeat itself?

Nothing is ever run: the source is only parsed.
"""

import ast
import textwrap
from collections.abc import Sequence


def functions_begun(text: str) -> list[int]:
    """The positions right after each `def …:` line that starts a function, at any depth."""
    ends, position = [], 0
    for line in text.splitlines(keepends=True):
        position += len(line)
        if line.lstrip().startswith("def ") and line.rstrip().endswith(":"):
            ends.append(position)
    return ends


def function_parses(before: str, continuation: str) -> bool:
    """Whether the function whose `def` line ends `before` is valid with the body that `continuation` gives it.

    The body ends where the indentation does. When the text stops first, its last, unfinished statement is forgiven:
    lines are taken off the end until the rest parses, up to three.
    """
    head = before.splitlines()[-1]
    depth = _indentation(head)
    body, closed = [], False
    for line in continuation.splitlines():
        if line.strip() and _indentation(line) <= depth:
            closed = True
            break
        body.append(line)
    forgiven = 0 if closed else min(3, len(body) - 1)
    return any(_parses([head, *body[: len(body) - off]]) for off in range(forgiven + 1))


def repeated_share(texts: Sequence[str]) -> float:
    """Of all lines that say something, the share that stood before in the same text: near 1 for a loop."""
    lines = repeated = 0
    for text in texts:
        said: set[str] = set()
        for line in filter(None, map(str.strip, text.splitlines())):
            lines += 1
            repeated += line in said
            said.add(line)
    return repeated / max(lines, 1)


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _parses(lines: list[str]) -> bool:
    try:
        ast.parse(textwrap.dedent("\n".join(lines)))
    except (SyntaxError, ValueError):  # ValueError: a null byte
        return False
    return True
