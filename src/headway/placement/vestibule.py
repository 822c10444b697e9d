"""Where a request under a constraint waits until what its answer must follow is built, in a thread of its own.

The driver never builds: when such a request arrives in its mailbox, the compiler has it ready. What comes for a request
that waits, waits with it, and so does the word to drain: a request that was sent before it is not forgotten. No more
wait than may wait in the scheduler's queue, of each tenant no more than it may have open; the scheduler refuses others.
"""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from headway.core import event as ev
from headway.core.admission import most_of_tenant
from headway.core.request import Constraint
from headway.grammar.matcher import Compiler


class Vestibule:
    """In front of a mailbox. `most` may wait."""

    def __init__(self, compiler: Compiler, put: Callable[[ev.Event], None], most: int) -> None:
        self._compiler = compiler
        self._put = put
        self._most = most
        self._waiting: dict[str, tuple[ev.Arrived, list[ev.Event]]] = {}  # by request: it, and what came for it
        self._last: list[ev.Event] = []  # after all that wait
        self._lock = threading.Lock()
        self._to_build: queue.SimpleQueue[tuple[str, Constraint]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="compiler", daemon=True).start()

    def put(self, event: ev.Event) -> None:
        """Into the mailbox, at once or when it is time."""
        with self._lock:
            match event:
                case ev.Arrived(request) if request.sampling.constraint is None:
                    self._put(event)
                case ev.Arrived(request) if (in_front := self._too_many_before(request.tenant)) is not None:
                    self._put(event._replace(num_in_front=in_front[0], num_of_tenant=in_front[1]))
                case ev.Arrived(request):
                    assert request.sampling.constraint is not None
                    self._waiting[request.id] = event, []
                    self._to_build.put((request.id, request.sampling.constraint))
                case ev.Cancelled(request_id) | ev.Stopped(request_id) if request_id in self._waiting:
                    self._waiting[request_id][1].append(event)
                case ev.Draining() if self._waiting:
                    self._last.append(event)
                case _:
                    self._put(event)

    def _too_many_before(self, tenant: str) -> tuple[int, int] | None:
        """How many wait, and of this tenant, if one more may not; whoever is gone waits no more."""
        tenants = [arrived.request.tenant for arrived, later in self._waiting.values() if not later]
        num, num_of_tenant = len(tenants), tenants.count(tenant) if tenant else 0
        too_many = num >= self._most or num_of_tenant >= most_of_tenant(self._most)
        return (num, num_of_tenant) if too_many else None

    def _is_wanted(self, request_id: str) -> bool:
        """Whether somebody still waits for it: the caller is there, and the whole answer is not due yet."""
        with self._lock:
            arrived, later = self._waiting[request_id]
        total_s = arrived.request.slo.total_s
        return not later and (total_s is None or time.monotonic() < arrived.request.arrival + total_s)

    def _run(self) -> None:
        while True:
            request_id, constraint = self._to_build.get()
            if is_wanted := self._is_wanted(request_id):
                with suppress(Exception):  # what is wrong with it is said when the first token is drawn
                    self._compiler.matcher(constraint)
            with self._lock:
                arrived, later = self._waiting.pop(request_id)
                for event in (arrived if is_wanted else _unconstrained(arrived), *later):
                    self._put(event)
                if not self._waiting:
                    for event in self._last:
                        self._put(event)
                    self._last.clear()


def _unconstrained(arrived: ev.Arrived) -> ev.Event:
    """The same letter for whoever is gone or late: it only has to end, and the driver must not build for it."""
    request = arrived.request
    return ev.Arrived(replace(request, sampling=replace(request.sampling, constraint=None)))
