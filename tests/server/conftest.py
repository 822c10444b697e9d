"""Lets the tests of this folder share their cast, `from desk import Desk`, and closes the servers they open."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from desk import Desk, Network


@pytest.fixture
def network() -> Iterator[Callable[[Desk], Network]]:
    """Opens servers that are closed when the test is over."""
    opened: list[Network] = []

    def open_(desk: Desk) -> Network:
        opened.append(Network(desk).__enter__())
        return opened[-1]

    yield open_
    for one in opened:
        one.__exit__()
