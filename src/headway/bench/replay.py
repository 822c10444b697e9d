"""Runs a load through a real engine in this process, request by request at the instants at which the load asks for it.

One engine, one set of weights, one pool: what is compared are schedulers, and each run gets a new one. The letters are
known beforehand and a request counts as arrived when its instant has come, whatever the device is doing then; so there
is no generator beside the engine to take its time, and nothing arrives late. While the engine has nothing to do until
the next arrival, the clock is put forward instead of waiting: a run takes as long as the work in it.
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf

import torch

from headway.bench.score import Outcome, outcome_of
from headway.core import event as ev
from headway.core.cost import CostModel
from headway.core.ledger import Record
from headway.core.pages import PageTable
from headway.core.request import Request
from headway.core.scheduler import Scheduler
from headway.core.settings import SchedulerSettings
from headway.placement.driver import Driver
from headway.placement.engine import Engine
from headway.placement.multiplex import Cores, lanes_of
from headway.stages.stage import Stage

START_S = 0.005  # before the first instant of a load


class SkippingClock:
    """Seconds on the host's clock, without those that were skipped."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def now(self) -> float:
        return time.monotonic() + self._ahead_s

    def skip_to(self, instant: float) -> None:
        self._ahead_s += max(0.0, instant - self.now())


class Appointments:
    """A mailbox of requests that arrive at known instants; nobody waits for them while there is nothing to do."""

    def __init__(self, clock: SkippingClock, requests: Iterable[Request]) -> None:
        self._clock = clock
        self._requests = deque(sorted(requests, key=lambda request: request.arrival))
        self._next_at = self._requests[0].arrival if self._requests else inf

    def has_mail(self) -> bool:
        return self._clock.now() >= self._next_at

    def take(self) -> list[ev.Event]:
        now = self._clock.now()
        taken: list[ev.Event] = []
        while self._next_at <= now:
            taken.append(ev.Arrived(self._requests.popleft()))
            self._next_at = self._requests[0].arrival if self._requests else inf
        return taken

    def wait(self, until: float | None) -> None:
        instant = min(self._next_at, inf if until is None else until)
        if instant < inf:
            self._clock.skip_to(instant)

    def pause(self, seconds: float) -> None:
        self._clock.skip_to(self._clock.now() + seconds)

    @property
    def is_empty(self) -> bool:
        return not self._requests


@dataclass(slots=True)
class Replay:
    """What a run did. `tokens` are the first tokens that were drawn, by request: equal work has equal ones."""

    records: dict[str, Record] = field(default_factory=dict)
    instants: dict[str, list[float]] = field(default_factory=dict)  # of all tokens, by request
    tokens: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    decisions_s: list[float] = field(default_factory=list)
    begun: float = 0.0
    ended: float = 0.0
    num_tiles: int = 0
    mean_error: float = 0.0  # of the cost model, at the end

    @property
    def duration_s(self) -> float:
        return self.ended - self.begun

    def outcomes(self) -> list[Outcome]:
        """As the score takes them: seconds from the instant at which the load asked."""
        return [
            replace(outcome_of(record, self.begun), gaps_s=_gaps(self.instants.get(request_id, [])))
            for request_id, record in self.records.items()
        ]


def _gaps(instants: Sequence[float]) -> tuple[float, ...]:
    return tuple(after - before for before, after in pairwise(instants))


def replay(
    engine: Engine,
    requests: Sequence[Request],
    settings: SchedulerSettings,
    watch: Callable[[Stage, SkippingClock], Stage] = lambda stage, clock: stage,
) -> Replay:
    """Run them all; `arrival` of each counts from the start. The engine's pool is used from page 0 on, its content is
    not kept. `watch` may put a stage of its own before the engine's."""
    shape = engine.pool.shape
    cost = CostModel(engine.scheduler.cost.fit)
    pages = PageTable(shape.num_pages, shape.page_tokens)
    scheduler = Scheduler(settings, cost, pages, engine.scheduler.sharing.roofline)
    clock = SkippingClock()
    stage = watch(engine.stage, clock)
    gc.collect()
    gc.freeze()
    run = Replay(begun=clock.now() + START_S)
    mailbox = Appointments(clock, (replace(request, arrival=run.begun + request.arrival) for request in requests))

    def tell(effect: ev.Admit | ev.Deliver | ev.End) -> None:
        if isinstance(effect, ev.Deliver):
            run.tokens.setdefault(effect.commit.request_id, effect.commit.tokens[0])
            run.instants.setdefault(effect.commit.request_id, []).append(clock.now())
        elif isinstance(effect, ev.End):
            run.records[effect.record.request_id] = effect.record

    driver = Driver(
        scheduler, {"language": stage}, clock, mailbox, tell, decided=run.decisions_s.append, devote=Cores().devote
    )
    gc.disable()
    try:
        with torch.inference_mode(), lanes_of(driver):
            while scheduler.num_open or not mailbox.is_empty:
                if not driver.turn():
                    driver.wait()
    finally:
        gc.enable()
        gc.unfreeze()
        driver.close()
    run.ended = clock.now()
    run.counters = dict(scheduler.counters)
    run.num_tiles, run.mean_error = driver.num_tiles, cost.mean_error
    return run
