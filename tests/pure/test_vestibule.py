"""Whoever waits for what its answer must follow holds up nobody else, and is not forgotten."""

import threading
import time
from dataclasses import replace
from typing import Any

from story import Story

from headway.core import event as ev
from headway.core.request import SLO, Constraint, Request, Sampling
from headway.grammar.limits import ConstraintError
from headway.placement.vestibule import Vestibule


class Slow:
    """A compiler that is done when it is told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.built: list[Constraint] = []

    def matcher(self, constraint: Constraint) -> Any:
        self.begun.set()
        self.gate.wait(20)
        self.built.append(constraint)
        if constraint.text == "(":
            raise ConstraintError("It is broken.")
        if constraint.text == "?":
            raise RecursionError("nobody thought of this")


def request(name: str, pattern: str | None = None, tenant: str = "") -> Request:
    constraint = None if pattern is None else Constraint("regex", pattern)
    return Request(name, (1,), 5, 0.0, sampling=Sampling(constraint=constraint), tenant=tenant)


def soon(letters: list[ev.Event], number: int) -> list[ev.Event]:
    until = time.monotonic() + 20
    while len(letters) < number and time.monotonic() < until:
        time.sleep(0.001)
    return list(letters)


def test_others_go_past_and_what_concerns_the_waiting_waits_with_it() -> None:
    """Everything arrives once and in order; a constraint that cannot be built does as well, to be told of later."""
    letters: list[ev.Event] = []
    compiler = Slow()
    vestibule = Vestibule(compiler, letters.append, 10)  # type: ignore[arg-type]
    slow, broken, plain = request("slow", "a*"), request("broken", "("), request("plain")
    odd = request("odd", "?")
    vestibule.put(ev.Arrived(slow))
    assert compiler.begun.wait(20)
    for event in (ev.Arrived(odd), ev.Arrived(broken), ev.Arrived(plain), ev.Cancelled("slow"), ev.Draining()):
        vestibule.put(event)
    vestibule.put(ev.Cancelled("plain"))
    assert letters == [ev.Arrived(plain), ev.Cancelled("plain")]
    compiler.gate.set()
    later = [ev.Arrived(slow), ev.Cancelled("slow"), ev.Arrived(odd), ev.Arrived(broken), ev.Draining()]
    assert soon(letters, 7)[2:] == later
    assert compiler.built == [each.sampling.constraint for each in (slow, odd, broken)]
    vestibule.put(ev.Draining())
    vestibule.put(ev.Stopped("slow"))
    assert letters[-2:] == [ev.Draining(), ev.Stopped("slow")]


def test_nothing_is_built_for_whoever_is_gone_or_late() -> None:
    """Both only have to end; the driver must not build in the thread's stead."""
    letters: list[ev.Event] = []
    compiler = Slow()
    vestibule = Vestibule(compiler, letters.append, 10)  # type: ignore[arg-type]
    first, gone = request("first", "a*"), request("gone", "b*")
    late = replace(request("late", "c*"), arrival=time.monotonic() - 2.0, slo=SLO(total_s=1.0))
    vestibule.put(ev.Arrived(first))
    assert compiler.begun.wait(20)
    for event in (ev.Arrived(gone), ev.Arrived(late), ev.Cancelled("gone")):
        vestibule.put(event)
    compiler.gate.set()
    plain = [ev.Arrived(replace(one, sampling=Sampling())) for one in (gone, late)]
    assert soon(letters, 4) == [ev.Arrived(first), plain[0], ev.Cancelled("gone"), plain[1]]
    assert compiler.built == [first.sampling.constraint]


def test_whoever_finds_too_many_waiting_is_refused() -> None:
    """One waits, and no more may: the next goes past it to the scheduler, which has an empty queue, counts the one in
    front, and refuses it before anything is built for it; who needs no building, or comes later, is let in."""
    letters: list[ev.Event] = []
    compiler = Slow()
    vestibule = Vestibule(compiler, letters.append, 1)  # type: ignore[arg-type]
    first, second, plain = request("first", "a*"), request("second", "b*"), request("plain")
    vestibule.put(ev.Arrived(first))
    assert compiler.begun.wait(20)
    vestibule.put(ev.Arrived(second))
    vestibule.put(ev.Arrived(plain))
    assert letters == [ev.Arrived(second, num_in_front=1), ev.Arrived(plain)]
    compiler.gate.set()
    assert soon(letters, 3)[2:] == [ev.Arrived(first)]
    assert compiler.built == [first.sampling.constraint]
    story = Story(max_num_queued=1)
    (refused,) = story.scheduler.handle(letters[0], story.now)
    assert isinstance(refused, ev.End)
    assert (refused.record.reason, refused.record.message[:24]) == ("queue_full", "1 requests wait already:")
    (admitted,) = story.scheduler.handle(letters[1], story.now)
    assert isinstance(admitted, ev.Admit)


def test_a_tenant_leaves_room_for_others() -> None:
    """Of four places one tenant takes two; its next one is refused as over its share, another's waits, and a place is
    free again as soon as somebody has left."""
    letters: list[ev.Event] = []
    compiler = Slow()
    vestibule = Vestibule(compiler, letters.append, 4)  # type: ignore[arg-type]
    many = [request(f"a{number}", "a*", "a") for number in range(4)]
    vestibule.put(ev.Arrived(many[0]))
    assert compiler.begun.wait(20)
    for one in many[1:3]:
        vestibule.put(ev.Arrived(one))
    vestibule.put(ev.Arrived(request("b0", "a*", "b")))
    assert letters == [ev.Arrived(many[2], 2, 2)]
    (refused,) = Story(max_num_queued=4).scheduler.handle(letters[0], 0.0)
    assert isinstance(refused, ev.End)
    assert refused.record.reason == "tenant_over_share"
    vestibule.put(ev.Cancelled("a1"))
    vestibule.put(ev.Arrived(many[3]))
    assert len(letters) == 1
    compiler.gate.set()
    ends = [ev.Arrived(many[0]), ev.Arrived(request("a1", None, "a")), ev.Cancelled("a1")]
    assert soon(letters, 6)[1:4] == ends
