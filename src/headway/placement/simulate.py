"""The engine on a virtual clock: the same scheduler, the same driver, stages whose tiles only cost time.

It takes the same decisions as the engine for the same events and costs, because it is the same code. `Simulation` is
one engine with letters known beforehand; `fleet` sends a stream of requests to several, as a door would.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import exp, inf
from typing import NamedTuple

from headway.core import event as ev
from headway.core.clock import VirtualClock
from headway.core.cost import CostFit, CostModel, shares_of
from headway.core.ledger import Record
from headway.core.pages import PageTable
from headway.core.request import Request
from headway.core.roofline import Roofline
from headway.core.scheduler import Scheduler
from headway.core.settings import SchedulerSettings
from headway.core.work import Work
from headway.placement.driver import GATHER_S, Driver
from headway.placement.priced import PricedStage
from headway.placement.simulate_lanes import LaneClock, SideBySide, TruePaces
from headway.stages.stage import FakeStage, Stage


class Schedule:
    """A mailbox whose letters are known beforehand: each is delivered when the clock has reached its instant.

    They are known up to `known_until`; there it says that it has mail, so that whoever drives comes back for more.
    """

    def __init__(self, clock: VirtualClock, letters: Iterable[tuple[float, ev.Event]] = ()) -> None:
        self.clock = clock
        self.known_until = inf
        self._letters = deque(sorted(letters, key=lambda letter: letter[0]))

    def put(self, at: float, letter: ev.Event) -> None:
        """One more, not before any that is there."""
        assert not self._letters or at >= self._letters[-1][0]
        self._letters.append((at, letter))

    @property
    def next_at(self) -> float:
        """When there will be mail, as far as is known."""
        return min(self._letters[0][0], self.known_until) if self._letters else self.known_until

    def has_mail(self) -> bool:
        return self.next_at <= self.clock.now()

    def take(self) -> list[ev.Event]:
        now = self.clock.now()
        taken = []
        while self._letters and self._letters[0][0] <= now:
            taken.append(self._letters.popleft()[1])
        return taken

    def arrivals(self) -> list[Request]:
        """Who has been sent and not taken in."""
        return [letter.request for _, letter in self._letters if isinstance(letter, ev.Arrived)]

    def wait(self, until: float | None) -> None:
        instant = min(self.next_at, inf if until is None else until)
        if instant < inf:
            self.clock.advance_to(instant)

    def pause(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @property
    def is_empty(self) -> bool:
        return not self._letters


class Simulation:
    """One simulated engine. `tell` gets what an engine would tell the door; by default it is kept."""

    def __init__(
        self, clock: VirtualClock, mailbox: Schedule, scheduler: Scheduler, stage: Stage, gather_s: float = GATHER_S
    ) -> None:
        self.clock = clock
        self.mailbox = mailbox
        self.scheduler = scheduler
        self.delivered: dict[str, list[int]] = {}
        self.ended: dict[str, list[Record]] = {}
        self.driver = Driver(scheduler, {"language": stage}, clock, mailbox, self._tell, gather_s)
        self._lanes: SideBySide | None = None
        if scheduler.sharing.divider.may_divide:
            assert isinstance(clock, LaneClock)
            self._lanes = SideBySide(self.driver, clock)

    def run(self) -> None:
        """Until every letter is delivered and every request has ended."""
        while self.step():
            pass

    def run_until(self, instant: float) -> None:
        """Until the clock shows `instant`, or the end of the tile that is under way then; if there is nothing to do,
        until what comes with the letter of that instant has come."""
        self.mailbox.known_until = instant
        while self.clock.now() < instant:
            if not self._turn():
                self.driver.wait()

    def step(self) -> bool:
        """One turn of the driver, or a sleep. False when there is nothing left to happen."""
        if self._turn():
            return True
        if self.mailbox.is_empty and self.scheduler.num_open == 0:
            return False
        before = self.clock.now()
        self.driver.wait()
        moved = self.clock.now() > before or self.mailbox.has_mail()
        assert moved, f"nothing can happen any more, yet {self.scheduler.num_open} requests are open"
        return True

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of prefill that wait, have begun, or lie in the mailbox."""
        cost = self.scheduler.cost
        return self.scheduler.backlog_s + sum(cost.prefill(len(request.prompt)) for request in self.mailbox.arrivals())

    def _turn(self) -> bool:
        return self.driver.turn() if self._lanes is None else self._lanes.step()

    def _tell(self, effect: ev.Admit | ev.Deliver | ev.End) -> None:
        if isinstance(effect, ev.Deliver):
            self.delivered.setdefault(effect.commit.request_id, []).extend(effect.commit.tokens)
        elif isinstance(effect, ev.End):
            self.ended.setdefault(effect.record.request_id, []).append(effect.record)


class FakeSimulation(Simulation):
    """A simulated engine whose pages hold tokens. `token_s` is the price of a token, `tile_s` what a tile costs at
    least."""

    def __init__(
        self,
        letters: Iterable[tuple[float, ev.Event]],
        settings: SchedulerSettings,
        *,
        num_pages: int = 64,
        page_tokens: int = 4,
        token_s: float = 1e-3,
        tile_s: float = 1e-4,
        num_layers: int = 4,
        tiles_per_layer: int = 3,
        roofline: Roofline | None = None,
    ) -> None:
        clock = LaneClock()
        num_tiles = num_layers * tiles_per_layer
        cost = CostModel(CostFit(step_s=tile_s * num_tiles, token_s=token_s))
        self.stage = FakeStage(
            page_tokens,
            num_layers,
            tiles_per_layer,
            spend=lambda num_tokens: clock.advance(max(tile_s, num_tokens * token_s / num_tiles)),
        )
        scheduler = Scheduler(settings, cost, PageTable(num_pages, page_tokens), roofline)
        super().__init__(clock, Schedule(clock, letters), scheduler, self.stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a simulated device is like. `believed` are the prices that its scheduler starts from, if not the true ones.

    `spread` is the standard deviation of the logarithm of what a step takes against its price; `tile_s` is how long a
    tile really is, which the bound B only limits.
    """

    fit: CostFit
    tile_s: float
    num_layers: int = 24
    num_pages: int = 4096
    page_tokens: int = 16
    spread: float = 0.0
    believed: CostFit | None = None
    roofline: Roofline | None = None  # of a device that can be divided; `believed_roofline` is its scheduler's
    believed_roofline: Roofline | None = None


def priced(settings: SchedulerSettings, device: Device, seed: int = 0, gather_s: float = GATHER_S) -> Simulation:
    """One engine on one device, with an empty mailbox."""
    clock = LaneClock()
    mailbox = Schedule(clock)
    cost = CostModel(device.believed or device.fit)
    roofline = device.believed_roofline or device.roofline
    scheduler = Scheduler(settings, cost, PageTable(device.num_pages, device.page_tokens), roofline)
    rng = random.Random(seed)

    def price(work: Work) -> float:
        noise = exp(rng.gauss(0.0, device.spread)) if device.spread else 1.0
        return device.fit.seconds(shares_of(work.segments)) * noise

    def horizon() -> float:
        due = scheduler.next_due()
        return min(mailbox.next_at, inf if due is None else due)

    stage = PricedStage(clock, price, horizon, device.tile_s, device.num_layers)
    simulation = Simulation(clock, mailbox, scheduler, stage, gather_s)
    if device.roofline is not None:
        paces = TruePaces(simulation.driver, device.roofline)
        stage.pace = paces.of
        # side by side a tile at a time: what the one does may change the other's pace
        stage.horizon = lambda: clock.now() if paces.are_both_busy else horizon()
    return simulation


class Fleet(NamedTuple):
    """What became of a stream of requests: the record of each, by id, and the engines that served them."""

    records: dict[str, Record]
    engines: list[Simulation]


def fleet(
    requests: Iterable[Request],
    engines: list[Simulation],
    note: Callable[[Request], None] = lambda request: None,
) -> Fleet:
    """Send each request, in order of arrival, to the engine with the least work; run until all have ended."""
    if len(engines) == 1:
        for request in requests:
            engines[0].mailbox.put(request.arrival, ev.Arrived(request))
            note(request)
    else:
        for request in requests:
            for engine in engines:
                engine.run_until(request.arrival)
            least = min(engines, key=lambda engine: engine.backlog_s)
            least.mailbox.put(request.arrival, ev.Arrived(request))
            note(request)
    records: dict[str, Record] = {}
    for engine in engines:
        engine.mailbox.known_until = inf
        engine.run()
        records |= {request_id: ended[0] for request_id, ended in engine.ended.items()}
    return Fleet(records, engines)
