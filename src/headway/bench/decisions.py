"""What a decision costs, however many wait: `python -m headway.bench.decisions`. No model is needed.

A scheduler with so many requests in its queue, from the Qwen-shaped load with its targets and answers, is told of
arrivals, of steps that have ended, of callers that leave and of timers, at the instants at which they happen on a
device of known prices, and plans after each. Times are those of `handle` and `plan` together, and of `plan` alone: the
account of a step's tokens is `handle`'s. The collector of garbage is steered as in the engine. Beside it: how many
simulated requests of that load a minute of wall time holds.
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

from headway.bench import report
from headway.bench.load import p90_prompt, prompts, targets
from headway.bench.named import named
from headway.bench.policies import EXAMPLE_FIT, requests_of, simulate
from headway.bench.score import quantile
from headway.core import event as ev
from headway.core.cost import CostModel, Share, shares_of
from headway.core.pages import PageTable
from headway.core.request import Request
from headway.core.scheduler import Scheduler
from headway.core.settings import Lane, SchedulerSettings
from headway.core.work import Commit, Outcome, Work
from headway.placement import collector
from headway.placement.fitting import saturation
from headway.placement.simulate import Device

COMMAND = "python -m headway.bench.decisions"
SETTINGS = SchedulerSettings(  # as served by default, but that nobody is refused
    max_model_len=4096,
    max_num_queued=1 << 20,
    pack_tokens=saturation(EXAMPLE_FIT),
    refuse_unattainable=False,
    max_parked_tokens=16_000,
    lanes="mixed",
)
NUM_PAGES = 40_000
WANTED_S = 300e-6  # p99 with WANTED_QUEUED in the queue
WANTED_QUEUED = 1000
WANTED_PER_MINUTE = 100_000
QUEUES = (0, 10, 100, WANTED_QUEUED, 5000)
TENANTS = (1, 8, 64)
LETTERS = 20.0  # a second, from outside
LEAVING = 0.1  # of the letters that would be arrivals, were the queue not full already
SPREAD = 0.1  # of the logarithm of what a step takes against its price
DIVISOR = 16  # of the lengths: what half a billion parameters on two cores can serve
SLO_K = 2.0
KINDS = {ev.Arrived: "arrival", ev.StepDone: "step done", ev.Cancelled: "caller left", ev.Due: "timer"}


class Decision(NamedTuple):
    """One drained batch of one event, handled and planned for."""

    kind: str
    seconds: float
    plan_s: float  # of it, to choose what to run


def stream(num_tenants: int, seed: int) -> Iterator[Request]:
    """Requests of the Qwen-shaped load without end."""
    load = named("qwen", num_requests=2000, seed=seed).scaled(1 / DIVISOR)
    slos = targets(load, EXAMPLE_FIT.seconds((Share(p90_prompt(load, "text"), 0),)), SLO_K)
    pool = requests_of(load, prompts(load, 32_000, seed), slos)
    rng = random.Random(seed)
    number = 0
    while True:
        request = pool[number % len(pool)]
        tenant = f"t{rng.randrange(num_tenants)}" if num_tenants > 1 else ""
        yield replace(request, id=str(number), tenant=tenant)
        number += 1


class Course:
    """A scheduler, a device that is prices only, and letters at random instants that keep the queue at its length."""

    def __init__(self, num_queued: int, num_tenants: int, seed: int) -> None:
        self.scheduler = Scheduler(SETTINGS, CostModel(EXAMPLE_FIT), PageTable(NUM_PAGES, 16))
        self.num_queued = num_queued
        self.now = 0.0
        self._coming, self._rng = stream(num_tenants, seed), random.Random(seed)
        self._letter_at = 0.0
        self._work: Work | None = None
        self._whole_s: dict[int, float] = {}  # of each step that has begun
        self._left_s: dict[int, float] = {}
        self._admitted: list[str] = []
        self._open: set[str] = set()

    @property
    def is_full(self) -> bool:
        """One more is let in to an empty queue, or nothing would ever arrive."""
        return self.scheduler.loads()[1] >= max(1, self.num_queued)

    def decide(self) -> Decision:
        """Go to the next event, and time what the scheduler makes of it."""
        while (event := self._next_event()) is None:
            pass
        work = self._work
        progress = 0.0 if work is None else 1 - max(0.0, self._left_s[work.id]) / self._whole_s[work.id]
        begun = time.perf_counter()
        effects = self.scheduler.handle(event, self.now)
        handled = time.perf_counter()
        work = self.scheduler.plan(self.now, Lane(progress=progress))
        ended = time.perf_counter()
        self._note(effects, work)
        return Decision(KINDS[type(event)], ended - begun, ended - handled)

    def _next_event(self) -> ev.Event | None:
        """What happens first: the step ends, a timer rings, or a letter may come."""
        work, due = self._work, self.scheduler.next_due()
        ends_at = inf if work is None else self.now + self._left_s[work.id]
        instant = max(self.now, min(ends_at, inf if due is None else due, self._letter_at))
        if work is not None:
            self._left_s[work.id] -= instant - self.now
        self.now = instant
        if work is not None and ends_at <= instant:
            drawn = tuple(Commit(segment.request_id, (0,)) for segment in work.segments if segment.logits_at)
            return ev.StepDone(work.id, Outcome(drawn), self._whole_s[work.id])
        if due is not None and due <= instant:
            return ev.Due()
        self._letter_at = instant + self._rng.expovariate(LETTERS)
        return self._letter()

    def _letter(self) -> ev.Event | None:
        if not self.is_full:
            return ev.Arrived(replace(next(self._coming), arrival=self.now))
        if self._rng.random() >= LEAVING:
            return None
        while True:
            place = self._rng.randrange(len(self._admitted))
            self._admitted[place], self._admitted[-1] = self._admitted[-1], self._admitted[place]
            if (request_id := self._admitted.pop()) in self._open:
                return ev.Cancelled(request_id)

    def _note(self, effects: Sequence[ev.Effect], work: Work | None) -> None:
        for effect in effects:
            if isinstance(effect, ev.Admit):
                self._admitted.append(effect.request.id)
                self._open.add(effect.request.id)
            elif isinstance(effect, ev.End):
                self._open.discard(effect.record.request_id)
        if work is not None and work.id not in self._whole_s:
            seconds = EXAMPLE_FIT.seconds(shares_of(work.segments)) * self._rng.lognormvariate(0.0, SPREAD)
            self._whole_s[work.id] = self._left_s[work.id] = seconds
        self._work = work


@contextmanager
def collecting_as_the_engine_does() -> Iterator[None]:
    """Automatic, seldom, and without what is there already; afterwards as before."""
    thresholds = gc.get_threshold()
    gc.collect()
    collector.calm()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def decisions(num_queued: int, num_tenants: int, num_decisions: int, seed: int = 1) -> list[Decision]:
    """Those that are taken once the queue is as long as it is to be."""
    course = Course(num_queued, num_tenants, seed)
    while not course.is_full and num_queued:
        course.decide()
    with collecting_as_the_engine_does():
        return [course.decide() for _ in range(num_decisions)]


class Row(NamedTuple):
    """One case: the decisions of each round, which were the same in all of them."""

    num_queued: int
    num_tenants: int
    rounds: list[list[Decision]]

    def us(self, share: float, kind: str = "") -> float:
        """A quantile in µs, the median over rounds; NaN if nothing of the kind happened."""
        return self._us(share, [[d.seconds for d in decisions if kind in ("", d.kind)] for decisions in self.rounds])

    def plan_us(self, share: float) -> float:
        """The same of choosing what to run."""
        return self._us(share, [[d.plan_s for d in decisions] for decisions in self.rounds])

    @staticmethod
    def _us(share: float, rounds: list[list[float]]) -> float:
        return 1e6 * statistics.median(quantile(seconds, share) for seconds in rounds)

    def cells(self) -> list[str]:
        counted = [str(self.num_queued), str(self.num_tenants), *(f"{self.us(share):.0f}" for share in (0.5, 0.99, 1))]
        counted.append(f"{self.plan_us(0.5):.0f} / {self.plan_us(0.99):.0f}")
        return [*counted, *(f"{self.us(0.5, kind):.0f} / {self.us(0.99, kind):.0f}" for kind in KINDS.values())]


class Speed(NamedTuple):
    """How fast requests were simulated: making their prompts and judging them is not counted, deciding is."""

    num_requests: int
    rate: float
    wall_s: float

    @property
    def per_minute(self) -> float:
        return 60 * self.num_requests / self.wall_s


def simulation_speed(num_requests: int) -> Speed:
    """The Qwen-shaped load with one token each, at nine tenths of the rate at which prompts alone would fill time."""
    load = named("qwen", num_requests=num_requests, seed=1).scaled(1 / DIVISOR).answering(1)
    mean_s = statistics.mean(EXAMPLE_FIT.seconds((Share(asked.num_prompt, 0),)) for asked in load.requests)
    load = load.at_rate(0.9 / mean_s)
    slos = targets(load, EXAMPLE_FIT.seconds((Share(p90_prompt(load, "text"), 0),)), SLO_K)
    texts = prompts(load, 32_000, 1)
    settings = replace(SETTINGS, refuse_unattainable=True)
    begun = time.perf_counter()
    simulate(load, texts, slos, settings, Device(fit=EXAMPLE_FIT, tile_s=0.006, num_pages=NUM_PAGES))
    return Speed(num_requests, load.rate, time.perf_counter() - begun)


def reading(rows: Sequence[Row], speed: Speed) -> str:
    """What was wanted, and whether it was reached."""
    said = []
    for row in rows:
        if row.num_queued == WANTED_QUEUED:
            p99 = row.us(0.99)
            slowest = max(KINDS.values(), key=lambda kind: row.us(0.99, kind))
            found = (
                f"reached: {p99:.0f} µs" if p99 <= 1e6 * WANTED_S else f"not reached: {p99:.0f} µs, most for {slowest}"
            )
            planned = f"p99 of the plan alone {row.plan_us(0.99):.0f} µs"
            said.append(f"with {row.num_tenants} tenant{'s' * (row.num_tenants > 1)} {found}, {planned}")
    wanted = (
        f"p99 of at most {1e6 * WANTED_S:.0f} µs with {WANTED_QUEUED} in the queue: {'; '.join(said)}. " if said else ""
    )
    reached = "reached" if speed.per_minute >= WANTED_PER_MINUTE else "not reached"
    return (
        f"{wanted}{speed.num_requests} requests at {speed.rate:.2f} a second were simulated in {speed.wall_s:.1f} s: "
        f"{speed.per_minute:,.0f} a minute of wall time, against {WANTED_PER_MINUTE:,}: {reached}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="is not needed: prices are those of half a billion parameters on two cores")
    parser.add_argument("--decisions", type=int, default=2000, help="of each case and round")
    parser.add_argument("--rounds", type=int, default=3, help="of all cases, which are the same each time")
    parser.add_argument("--num-simulated", type=int, default=100_000, help="requests")
    parser.add_argument("--quick", action="store_true", help="short queues, 200 decisions, 1,000 simulated requests")
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    num_decisions, num_rounds, num_simulated = options.decisions, options.rounds, options.num_simulated
    queues: Sequence[int] = QUEUES
    if options.quick:
        num_decisions, num_rounds, num_simulated, queues = 200, 1, 1000, QUEUES[:3]
    cases = [(num_queued, num_tenants) for num_queued in queues for num_tenants in TENANTS]
    rows = {case: Row(*case, []) for case in cases}
    turns = [case for number in range(num_rounds) for case in cases[:: 1 if number % 2 == 0 else -1]]
    for case in track(turns, description="decisions"):
        rows[case].rounds.append(decisions(*case, num_decisions))
    speed = simulation_speed(num_simulated)
    kinds = [f"{kind}, p50 / p99" for kind in KINDS.values()]
    header = ["queued", "tenants", "p50 µs", "p99 µs", "longest µs", "plan alone, p50 / p99", *kinds]
    body = (
        f"{num_decisions} decisions of each case in each of {num_rounds} rounds, medians over rounds. The Qwen-shaped "
        f"load with lengths / {DIVISOR} and targets k = {SLO_K:g}; nobody is refused, or the queue would not get that "
        f"long.\n\n{report.table(header, [row.cells() for row in rows.values()])}\n\n"
        f"{reading(list(rows.values()), speed)}"
    )
    report.write("decisions", "What a decision costs", report.command(COMMAND, arguments), body, options.folder)


if __name__ == "__main__":
    main()
