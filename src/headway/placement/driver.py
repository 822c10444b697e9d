"""Receive, plan, run to the next yield, look whether something happened: the loop that drives an engine.

The only place where events, decisions and time meet. Between events nothing is decided: after a tile the driver reads
one flag and one clock, and goes on. Everything else it is given: the scheduler, the stages, a clock, a mailbox.
Driven by a virtual clock and a fake stage it is the simulator; by the real ones, the engine.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from headway.core import event as ev
from headway.core.clock import Clock
from headway.core.scheduler import Scheduler
from headway.core.settings import Lane, Preempt
from headway.core.work import Boundary, Outcome, Tile, Work
from headway.placement.spans import Ending, Spans
from headway.stages.stage import Running, Stage

GATHER_S = 0.001  # arrivals on an idle device within so long of the first are decided about together
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


class Driver:
    """Runs one lane of one engine. `tell` gets every Admit, Deliver and End, in order; `decided` how
    many seconds each drained batch of events took to be handled and planned for; `spans` notes who had the device."""

    def __init__(
        self,
        scheduler: Scheduler,
        stages: Mapping[str, Stage],
        clock: Clock,
        mailbox: Mailbox,
        tell: Callable[[ev.Admit | ev.Deliver | ev.End], None],
        gather_s: float = GATHER_S,
        decided: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.scheduler = scheduler
        self.stages = stages
        self.clock = clock
        self.mailbox = mailbox
        self.tell = tell
        self.gather_s = gather_s
        self.num_tiles = 0
        self.spans = Spans()
        self.decided = decided
        self.decisions_s = 0.0  # all of them together
        self._looks_at = _LOOKS_AT[scheduler.settings.preempt]
        self._open: dict[int, _Open] = {}
        self._happened: deque[ev.Event] = deque()  # on the device, since the last plan
        self._current: Work | None = None

    def turn(self) -> bool:
        """Handle what happened, plan once, run until something happens. False if there is nothing to run."""
        begun = self.clock.now()
        if self._account():
            progress = self._open[self._current.id].progress if self._current else 0.0
            self._current = self.scheduler.plan(self.clock.now(), Lane(progress=progress))
            taken_s = self.clock.now() - begun
            self.decisions_s += taken_s
            self.decided(taken_s)
        if self._current is None:
            return False
        self._run(self._current)
        return True

    def wait(self) -> None:
        """Sleep until something may have changed; then a moment longer: what comes together is decided together."""
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
        self._current = None

    def _account(self) -> bool:
        """Feed every event to the scheduler once, carry out what it asks for. Whether there was any."""
        self._happened += self.mailbox.take()
        now = self.clock.now()
        due = self.scheduler.next_due()
        if due is not None and now >= due:
            self._happened.append(ev.Due())
        any_events = bool(self._happened)
        while self._happened:  # one by one: what an exception leaves unhandled is still there at the next turn
            for effect in self.scheduler.handle(self._happened.popleft(), now):
                self._carry_out(effect)
        return any_events

    def _carry_out(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Admit(request):
                self.spans.open(request)
                for stage in self.stages.values():
                    stage.open(request)
                self.tell(effect)
            case ev.Deliver():
                self.tell(effect)
            case ev.Drop(work_id, request_id):
                if work_id in self._open:
                    self._open[work_id].stage.drop(work_id, request_id)
            case ev.Abandon(work_id):
                self._end_step(work_id, "left")
            case ev.End(record):
                self.spans.close(record.request_id)
                for stage in self.stages.values():
                    stage.close(record.request_id)
                self.tell(effect)

    def _run(self, work: Work) -> None:
        step = self._open.get(work.id)
        if step is None:
            stage = self.stages[work.stage]
            step = self._open[work.id] = _Open(stage.run(work), stage)
        due = self.scheduler.next_due()
        now, has_mail, running, looks_at = self.clock.now, self.mailbox.has_mail, step.running, self._looks_at
        happened = self._happened
        begun = now()
        self.spans.begin(work, begun)
        try:
            while True:
                tile = next(running)
                self.num_tiles += 1
                if tile.left:
                    happened.append(ev.Left(work.id, tile.left))
                if tile.boundary >= looks_at and (happened or has_mail() or (due is not None and now() >= due)):
                    break
            step.tile = tile
            step.busy_s += now() - begun
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

    def _end_step(self, work_id: int, ending: Ending) -> None:
        step = self._open.pop(work_id, None)
        if step is not None:
            self.spans.end(work_id, ending, self.clock.now())
            step.running.close()
        if self._current is not None and self._current.id == work_id:
            self._current = None
