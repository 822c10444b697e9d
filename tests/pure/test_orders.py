"""The other orders and the other ways to give way: what they are compared as must be what they are.

First come first served, plain earliest deadline, shortest first with ageing; steps that are never suspended, or only
between two layers; prompts that are never read together.
"""

import random
from typing import Literal, get_args

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from headway.bench.storm import SETTINGS, storm
from headway.core.cost import CostFit
from headway.core.policy import AGEING, Order
from headway.core.request import SLO, Request
from headway.core.settings import Lanes, Preempt, SchedulerSettings
from headway.core.work import Boundary, Tile, Work
from headway.placement.simulate import Device, FakeSimulation, fleet, priced
from headway.stages.stage import Running

TOKEN_S = 0.001
DEVICE = Device(fit=CostFit(token_s=TOKEN_S), tile_s=0.005)


def plain(order: Order, **changes: object) -> SchedulerSettings:
    """One prompt after another, none refused and none suspended unless told otherwise."""
    chosen = {"preempt": "none", "pack": False, "refuse_unattainable": False, "prefix_caching": False} | changes
    return SchedulerSettings(max_model_len=2000, order=order, **chosen)  # type: ignore[arg-type]


def crowd(seed: int, num_requests: int = 40) -> list[Request]:
    """All come while the first one is read, so that the order alone decides."""
    rng = random.Random(seed)
    sent = [Request("first", (0,) * 1000, 1, 0.0)]
    for number in range(num_requests):
        slo = SLO(ttft_s=rng.choice((None, 0.5, 2.0, 30.0)))
        arrival = 0.01 + 0.9 * number / num_requests
        sent.append(Request(f"r{number}", (0,) * rng.randrange(10, 300), 1, arrival, slo))
    return sent


def served(sent: list[Request], settings: SchedulerSettings) -> list[Request]:
    """In the order in which their first tokens came."""
    records = fleet(sent, [priced(settings, DEVICE, gather_s=0.0)]).records
    return sorted(sent, key=lambda request: records[request.id].first_token or 0.0)


def test_first_come_first_served_is_that_and_nothing_else() -> None:
    """Whatever they asked for and however long they are."""
    sent = crowd(1)
    assert served(sent, plain("fcfs")) == sorted(sent, key=lambda request: request.arrival)


def test_first_come_first_served_never_preempts() -> None:
    """Even where steps could be suspended: whoever came first has begun first, so nobody goes before it."""
    engine = priced(plain("fcfs", preempt="operator"), DEVICE)
    fleet(crowd(2), [engine])
    assert engine.scheduler.counters["preemptions"] == 0


def test_plain_earliest_deadline() -> None:
    """By the deadline alone, whether it can still be met or not; who has none is given one."""
    sent = [request for request in crowd(3) if request.slo.ttft_s is not None or request.id == "first"]

    def deadline(request: Request) -> float:
        return -1.0 if request.id == "first" else request.arrival + (request.slo.ttft_s or 0.0)

    assert served(sent, plain("deadline")) == sorted(sent, key=deadline)


def test_shortest_first() -> None:
    """The shorter prompt first; a second of waiting is worth AGEING seconds of work."""
    sent = crowd(4)

    def size(request: Request) -> float:
        return -1.0 if request.id == "first" else len(request.prompt) * TOKEN_S + AGEING * request.arrival

    assert served(sent, plain("shortest")) == sorted(sent, key=size)


def test_shortest_first_lets_nobody_starve() -> None:
    """A prompt of one second, and prompts of 0.11 s without end, more than the device can read: it is passed by those
    that come in the first (1 - 0.11) / AGEING seconds, and by nobody who comes later."""
    bound_s = (1.0 - 0.11) / AGEING
    sent = [Request("long", (0,) * 1000, 1, 0.05)]
    sent += [Request(f"r{number}", (0,) * 110, 1, 0.1 * number) for number in range(400)]
    sent.sort(key=lambda request: request.arrival)
    order = [request.id for request in served(sent, plain("shortest"))]
    passed_by = [request for request in sent if order.index(request.id) < order.index("long")]
    assert 0.9 * bound_s < max(request.arrival for request in passed_by) <= bound_s + 0.2


def test_shortest_first_suspends_a_long_step_for_a_short_one() -> None:
    """What remains of the running step counts, not its whole length."""
    long = Request("long", (0,) * 1000, 1, 0.0)
    for arrival, goes_first in ((0.2, True), (0.95, False)):
        settings = plain("shortest", preempt="operator")
        order = served([long, Request("short", (0,) * 100, 1, arrival)], settings)
        assert [request.id for request in order] == (["short", "long"] if goes_first else ["long", "short"])


class Told(FakeSimulation):
    """A simulated engine that writes down its Works, and after which kind of tile each of them was left."""

    def __init__(self, seed: int, settings: SchedulerSettings, num_requests: int = 300) -> None:
        letters, _ = storm(seed, num_requests)
        super().__init__(letters, settings, num_pages=48, page_tokens=4)
        self.works: list[Work] = []
        self.left_after: list[Boundary] = []  # what had ended when another Work took the device
        self._last: tuple[int, Boundary] | None = None
        self._run = self.stage.run
        self.stage.run = self._noted  # type: ignore[method-assign]

    def _noted(self, work: Work) -> Running:
        self.works.append(work)
        running = self._run(work)
        while True:
            if self._last is not None and self._last[0] != work.id:
                self.left_after.append(self._last[1])
                self._last = None
            try:
                tile: Tile = next(running)
            except StopIteration as stop:
                self._last = None
                return stop.value  # type: ignore[no-any-return]
            self._last = work.id, tile.boundary
            yield tile
            if self._last is not None and self._last[0] != work.id:  # it goes on after another
                self.left_after.append(self._last[1])


def storm_settings(**changes: object) -> SchedulerSettings:
    return SchedulerSettings(
        max_model_len=SETTINGS.max_model_len,
        max_num_seqs=12,
        max_num_queued=60,
        tile_s=0.002,
        **({"pack_tokens": 40} | changes),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("preempt", ["none", "chunk"])
def test_what_is_not_to_be_suspended_never_is(preempt: Literal["none", "chunk"], order: Order) -> None:
    """A storm of urgent and patient prompts: every step runs to its end."""
    simulation = Told(1, storm_settings(preempt=preempt, order=order))
    simulation.run()
    assert simulation.scheduler.counters["preemptions"] == 0
    assert all(record.parked_s == 0 for records in simulation.ended.values() for record in records)
    assert simulation.left_after == [] or preempt == "chunk"


@pytest.mark.parametrize("seed", range(3))
def test_between_layers_only(seed: int) -> None:
    """A step that gives way does so where a layer ends; with "operator" also elsewhere."""
    boundaries = {}
    choices: tuple[Preempt, ...] = ("layer", "operator")
    for preempt in choices:
        simulation = Told(seed, storm_settings(preempt=preempt))
        simulation.run()
        assert simulation.scheduler.counters["preemptions"] > 5
        boundaries[preempt] = set(simulation.left_after)
    assert boundaries == {"layer": {Boundary.LAYER}, "operator": {Boundary.LAYER, Boundary.OPERATOR}}


@pytest.mark.parametrize("lanes", ["turns", "mixed"])
@pytest.mark.parametrize("preempt", get_args(Preempt))
def test_without_packs_a_step_reads_one_prompt(preempt: Preempt, lanes: Lanes) -> None:
    """However many short ones wait, and whether tokens ride along; with them the same storm has packs."""
    most = []
    for pack in (False, True):
        simulation = Told(2, storm_settings(preempt=preempt, pack=pack, lanes=lanes))
        simulation.run()
        known: set[str] = (
            set()
        )  # a request whose prompt was read to its end, and who is not read again for lack of pages
        counts = []
        for work in simulation.works:
            prompts = [s for s in work.segments if len(s.tokens) > 1 or s.request_id not in known]
            counts.append(len(prompts))
            known |= {s.request_id for s in work.segments if s.logits_at}
        most.append(max(counts))
    assert most[0] == 1
    assert most[1] > 1


@given(
    st.lists(st.tuples(st.integers(1, 200), st.floats(0.0, 0.3)), min_size=1, max_size=8),
    st.sampled_from(get_args(Order)),
)
@tries(max_examples=40, deadline=None)
def test_an_idle_device_never_waits_under_any_order(prompts: list[tuple[int, float]], order: Order) -> None:
    """Without suspending, all orders are done with the same work at the same instant."""
    now, sent = 0.0, []
    for number, (num_tokens, gap_s) in enumerate(prompts):
        now += gap_s
        sent.append(Request(f"r{number}", (0,) * num_tokens, 1, now))
    free_at = 0.0
    for request in sent:
        free_at = max(free_at, request.arrival) + len(request.prompt) * TOKEN_S
    records = fleet(sent, [priced(plain(order), DEVICE, gather_s=0.0)]).records
    assert max(record.ended or 0.0 for record in records.values()) == pytest.approx(free_at)
