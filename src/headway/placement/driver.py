"""Receive, plan, run to the next yield, look whether something happened: the loop that drives an engine.

The only place where events, decisions and time meet. Between events nothing is decided: after a tile the driver reads
one flag and one clock, and goes on. Everything else it is given: the scheduler, the stages, a clock, a mailbox.
Driven by a virtual clock and a fake stage it is the simulator; by the real ones, the engine.

A device has one lane, or two that run at once, each turned by a thread of its own (`multiplex`). Events, plans and
effects belong to whoever holds the lock; tiles are run without it. Who runs listens: a lane that has nothing to do
sleeps while the other is busy.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from headway.core import event as ev
from headway.core.clock import Clock
from headway.core.scheduler import Scheduler
from headway.core.settings import MAIN, TOKENS, Lane, Preempt
from headway.core.work import Boundary, Outcome, Tile, Work
from headway.placement.spans import Ending, Spans
from headway.stages.stage import Running, Stage

GATHER_S = 0.001  # arrivals on an idle device within so long of the first are decided about together
LOOKS_UP_S = 0.5  # while the other lane is busy: whoever drives has other things to see to
_LOOKS_AT: Final[dict[Preempt, float]] = {  # after which tiles the driver looks whether something has happened
    "operator": Boundary.OPERATOR,
    "layer": Boundary.LAYER,
    "chunk": float("inf"),
    "none": float("inf"),
}


class Mailbox(Protocol):
    """Where events from outside arrive."""

    def has_mail(self) -> bool:
        """Asked after every tile: must cost no more than reading a flag."""

    def take(self) -> list[ev.Event]:
        """Everything that has arrived, in order."""

    def wait(self, until: float | None) -> None:
        """Sleep until there is mail or the clock shows `until`."""

    def pause(self, seconds: float) -> None:
        """Sleep for so long, whatever comes."""


@dataclass(slots=True)
class _Open:
    """A step whose generator has been made and has not ended."""

    running: Running
    stage: Stage
    busy_s: float = 0.0
    tile: Tile = field(default_factory=lambda: Tile(-1, 1, ""))

    @property
    def progress(self) -> float:
        return min(1.0, (self.tile.number + 1) / max(self.tile.of, 1))


class DeviceLane:
    """What the driver knows of one lane: its Work, its units of the device, and two flags that other threads read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.current: Work | None = None
        self.units = 0
        self.num_tiles = 0
        self.is_to_plan = False  # something has happened since its last plan
        self.is_called = False  # it is to stop at the next tile and look
        self.awake = threading.Event()
        self.resting = threading.Event()  # no tile of its runs
        self.resting.set()

    def call(self) -> None:
        self.is_called = True
        self.awake.set()


class Driver:
    """Runs one engine. `tell` gets every Admit, Deliver and End, in order; `decided` how many seconds each drained
    batch of events took to be handled and planned for; `spans` notes who had the device. `devote(lane, units)` gives
    the thread that calls it so many units of the device from then on."""

    def __init__(
        self,
        scheduler: Scheduler,
        stages: Mapping[str, Stage],
        clock: Clock,
        mailbox: Mailbox,
        tell: Callable[[ev.Admit | ev.Deliver | ev.End], None],
        gather_s: float = GATHER_S,
        decided: Callable[[float], None] = lambda seconds: None,
        devote: Callable[[str, int], None] = lambda lane, units: None,
    ) -> None:
        self.scheduler = scheduler
        self.stages = stages
        self.clock = clock
        self.mailbox = mailbox
        self.tell = tell
        self.gather_s = gather_s
        self.spans = Spans()
        self.decided = decided
        self.decisions_s = 0.0  # all of them together
        self._looks_at = _LOOKS_AT[scheduler.settings.preempt]
        self._open: dict[int, _Open] = {}
        self._devote = devote
        self._happened: deque[ev.Event] = deque()  # on the device, since the last plan
        self._given_up: set[int] = set()  # Works of which something may still be said that nobody wants to hear
        self.still = threading.Lock()  # held: no lane decides, and what the scheduler knows does not change
        self.main = DeviceLane(MAIN)
        self.beside: DeviceLane | None = None
        self.broken: BaseException | None = None  # what a lane's thread died of

    @property
    def num_tiles(self) -> int:
        """Finished, ever."""
        return sum(lane.num_tiles for lane in self._lanes())

    def add_lane(self) -> DeviceLane:
        """A second lane, for tokens; another thread is to `turn` it."""
        self.beside = DeviceLane(TOKENS)
        return self.beside

    def turn(self, lane: DeviceLane | None = None) -> bool:
        """Handle what happened, plan once, run until something happens. False if there is nothing to run."""
        ran = False
        turning = self.turning(lane or self.main)
        try:
            for _ in turning:
                ran = True
        finally:
            turning.close()
        return ran

    def turning(self, lane: DeviceLane) -> Generator[None]:
        """A turn of the lane, tile by tile: yields when it is decided what to run, and after each tile; never if there
        is nothing to run. Closed, it leaves the step where it is."""
        if self.broken is not None:
            raise self.broken
        with self.still:
            lane.is_called = False
            lane.awake.clear()
            self._decide(lane)
            work, units = lane.current, lane.units
            if work is None:
                return
            lane.resting.clear()
        try:
            yield
            if units:  # known where there are two lanes
                self._devote(lane.name, units)
            yield from self._run(work, lane)
        finally:
            lane.resting.set()

    def other_listens(self) -> bool:
        """Whether the lane for tokens has something to run, or has been called and has yet to look: what it finds may
        end everything that is open."""
        if self.beside is None:
            return False
        with self.still:
            return self.beside.current is not None or self.beside.awake.is_set()

    def wait(self) -> None:
        """Sleep until something may have changed; then a moment longer: what comes together is decided together."""
        if self.other_listens():
            self.main.awake.wait(LOOKS_UP_S)
            return
        self.mailbox.wait(self.scheduler.next_due())
        if self.gather_s and self.mailbox.has_mail():
            self.mailbox.pause(self.gather_s)

    @property
    def num_open_steps(self) -> int:
        """Steps begun and not ended: the one on the device and the parked ones."""
        return len(self._open)

    def close(self) -> None:
        """Give up every open step."""
        for work_id, step in self._open.items():
            self.spans.end(work_id, "left", self.clock.now())
            step.running.close()
        self._open.clear()
        for lane in self._lanes():
            lane.current = None

    def _lanes(self) -> tuple[DeviceLane, ...]:
        return (self.main,) if self.beside is None else (self.main, self.beside)

    def _decide(self, lane: DeviceLane) -> None:
        """What the lane is to run, looked at anew if something has happened since it was last asked."""
        begun = self.clock.now()
        if self._account(lane):
            for each in self._lanes():
                each.is_to_plan = True
        if not lane.is_to_plan:
            return
        # what one that sleeps is to begin takes its share of the device from now on; the main one first, since a token
        # that is due comes beside what that has begun
        for each in self._lanes():
            if each is lane:
                self._plan(lane)
            elif each.is_to_plan and each.current is None and self._plan(each):
                each.call()
        taken_s = self.clock.now() - begun
        self.decisions_s += taken_s
        self.decided(taken_s)
        if self.beside is not None:
            self._call_the_other(lane)

    def _plan(self, lane: DeviceLane) -> bool:
        """Whether the lane has something to run."""
        lane.is_to_plan = False
        begun = None if lane.current is None else self._open.get(lane.current.id)
        progress = 0.0 if begun is None else begun.progress
        lane.current = self.scheduler.plan(self.clock.now(), Lane(lane.name, progress))
        return lane.current is not None

    def _call_the_other(self, lane: DeviceLane) -> None:
        """If it has to plan, or its share of the device is another now."""
        for each in self._lanes():
            units = self.scheduler.sharing.units(each.name)
            has_work = each.current is not None or each is self.main or self.scheduler.sharing.is_divided
            if each is not lane and (each.units != units or (each.is_to_plan and has_work)):
                each.call()
            each.units = units

    def _account(self, lane: DeviceLane) -> bool:
        """Feed every event to the scheduler once, carry out what it asks for. Whether there was any."""
        self._happened += self.mailbox.take()
        now = self.clock.now()
        due = self.scheduler.next_due()
        if due is not None and now >= due:
            self._happened.append(ev.Due())
        any_events = False
        while self._happened:  # one by one: what an exception leaves unhandled is still there at the next turn
            any_events = True  # a lane may add to them at any time
            event = self._happened.popleft()
            if isinstance(event, ev.StepDone | ev.StepFailed | ev.Left) and event.work_id in self._given_up:
                continue
            if isinstance(event, ev.StepDone | ev.StepFailed):
                self._let_go(event.work_id)
            for effect in self.scheduler.handle(event, now):
                self._carry_out(effect, lane)
        self._given_up.clear()
        return any_events

    def _carry_out(self, effect: ev.Effect, lane: DeviceLane) -> None:
        match effect:
            case ev.Admit(request):
                self.spans.open(request)
                for stage in self.stages.values():
                    stage.open(request)
                self.tell(effect)
            case ev.Deliver():
                self.tell(effect)
            case ev.Drop(work_id, request_id):
                step = self._open.get(work_id)  # the other lane may end it meanwhile
                if step is not None:
                    step.stage.drop(work_id, request_id)
            case ev.Abandon(work_id):
                self._give_up(work_id, lane)
            case ev.End(record):
                self.spans.close(record.request_id)
                for stage in self.stages.values():
                    stage.close(record.request_id)
                self.tell(effect)

    def _give_up(self, work_id: int, lane: DeviceLane) -> None:
        """Another lane may be running it: then that one stops first. It may even have just ended it."""
        for other in self._lanes():
            if other is not lane and other.current is not None and other.current.id == work_id:
                other.call()
                other.resting.wait()
                self._given_up.add(work_id)
        self._end_step(work_id, "left")
        self._let_go(work_id)

    def _let_go(self, work_id: int) -> None:
        for lane in self._lanes():
            if lane.current is not None and lane.current.id == work_id:
                lane.current = None

    def _run(self, work: Work, lane: DeviceLane) -> Generator[None]:
        step = self._open.get(work.id)
        if step is None:
            stage = self.stages[work.stage]
            step = self._open[work.id] = _Open(stage.run(work), stage)
        due = self.scheduler.next_due()
        now, has_mail, running, looks_at = self.clock.now, self.mailbox.has_mail, step.running, self._looks_at
        happened = self._happened
        begun = now()
        self.spans.begin(work, begun, lane.name)
        try:
            while True:
                tile = next(running)
                lane.num_tiles += 1
                if tile.left:
                    happened.append(ev.Left(work.id, tile.left))
                yield
                if tile.boundary >= looks_at and (
                    happened or lane.is_called or has_mail() or (due is not None and now() >= due)
                ):
                    break
            self._pause(step, tile, begun)
        except GeneratorExit:
            self._pause(step, tile, begun)
            raise
        except StopIteration as stop:
            outcome: Outcome = stop.value
            self._happened.append(ev.StepDone(work.id, outcome, step.busy_s + now() - begun))
            self._end_step(work.id, "done")
        except Exception as error:
            self._happened.append(ev.StepFailed(work.id, f"{type(error).__name__}: {error}"))
            self._end_step(work.id, "failed")
        except BaseException as error:  # an interrupt: its generator has ended, so the step cannot go on either
            self._happened.append(ev.StepFailed(work.id, type(error).__name__))
            self._end_step(work.id, "failed")
            raise

    def _pause(self, step: _Open, tile: Tile, begun: float) -> None:
        step.tile = tile
        step.busy_s += self.clock.now() - begun

    def _end_step(self, work_id: int, ending: Ending) -> None:
        step = self._open.pop(work_id, None)
        if step is not None:
            self.spans.end(work_id, ending, self.clock.now())
            step.running.close()
