"""The judges of generated source, on texts whose verdict is plain to see."""

import pytest

from headway.train.judge import function_parses, functions_begun, repeated_share


def test_functions_are_found_at_any_depth() -> None:
    """A module with a function and a method: each position is where a body would begin."""
    text = "import os\ndef f(a):\n    return a\nclass C:\n    def g(self):\n        pass\n"
    assert [text[:end].splitlines()[-1].strip() for end in functions_begun(text)] == ["def f(a):", "def g(self):"]
    assert functions_begun("x = 'undefined'\ndef half(\n") == []


@pytest.mark.parametrize(
    ("continuation", "verdict"),
    [
        ("    return a + 1\n", True),
        ("    if a:\n        return 1\n    return 2\ndef next(:\n", True),  # what follows the function is not judged
        ("    return a +\n    return\n    b = 1\n    c = 2\n    d = 3\n    e = 4\n", False),
        ("    return (a\ndef g(): pass\n", False),  # closed, so nothing is forgiven
        ("    x = a\n    y = (x,", True),  # stopped by the length: the unfinished line is forgiven
        ("    x = a\n    if x:\n", True),
        ("", False),
        ("return a\n", False),
        ("    x = '\0'\n", False),
    ],
)
def test_a_functions_verdict(continuation: str, verdict: bool) -> None:
    """Whole, cut off, broken, empty and unindented bodies of one function."""
    assert function_parses("import os\ndef f(a):\n", continuation) is verdict


def test_a_methods_body_is_judged_at_its_depth() -> None:
    """The body of a method ends where the class goes on."""
    assert function_parses("class C:\n    def f(self):\n", "        return 1\n    def broken(:\n")


def test_a_loop_is_told_from_a_text() -> None:
    """One line ten times over against three different ones."""
    assert repeated_share(["x = 1\n" * 10]) == 0.9
    assert repeated_share(["a\nb\n\n\nc\n", "a\n"]) == 0.0
    assert repeated_share([]) == 0.0
