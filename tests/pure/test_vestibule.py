"""Whoever waits for what its answer must follow holds up nobody else, and is not forgotten."""

import threading
import time
from typing import Any

from headway.core import event as ev
from headway.core.request import Constraint, Request, Sampling
from headway.grammar.limits import ConstraintError
from headway.placement.vestibule import Vestibule


class Slow:
    """A compiler that is done when it is told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.built: list[Constraint] = []

    def matcher(self, constraint: Constraint) -> Any:
        self.gate.wait(20)
        self.built.append(constraint)
        if constraint.text == "(":
            raise ConstraintError("It is broken.")


def request(name: str, pattern: str | None = None) -> Request:
    constraint = None if pattern is None else Constraint("regex", pattern)
    return Request(name, (1,), 5, 0.0, sampling=Sampling(constraint=constraint))


def soon(letters: list[ev.Event], number: int) -> list[ev.Event]:
    until = time.monotonic() + 20
    while len(letters) < number and time.monotonic() < until:
        time.sleep(0.001)
    return list(letters)


def test_others_go_past_and_what_concerns_the_waiting_waits_with_it() -> None:
    """Everything arrives once and in order; a constraint that cannot be built does as well, to be told of later."""
    letters: list[ev.Event] = []
    compiler = Slow()
    vestibule = Vestibule(compiler, letters.append)  # type: ignore[arg-type]
    slow, broken, plain = request("slow", "a*"), request("broken", "("), request("plain")
    for event in (ev.Arrived(slow), ev.Arrived(broken), ev.Arrived(plain), ev.Cancelled("slow"), ev.Draining()):
        vestibule.put(event)
    vestibule.put(ev.Cancelled("plain"))
    assert letters == [ev.Arrived(plain), ev.Cancelled("plain")]
    compiler.gate.set()
    later = [ev.Arrived(slow), ev.Cancelled("slow"), ev.Arrived(broken), ev.Draining()]
    assert soon(letters, 6)[2:] == later
    assert compiler.built == [slow.sampling.constraint, broken.sampling.constraint]
    vestibule.put(ev.Draining())
    vestibule.put(ev.Stopped("slow"))
    assert letters[-2:] == [ev.Draining(), ev.Stopped("slow")]
