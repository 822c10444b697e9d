"""The loop that drives an engine, on a virtual clock: what it promises to the scheduler, the stages and the callers."""

from collections import deque
from collections.abc import Callable, Generator
from itertools import pairwise

import pytest

from headway.core import event as ev
from headway.core.clock import VirtualClock
from headway.core.cost import CostFit, CostModel
from headway.core.ledger import Record
from headway.core.pages import PageTable
from headway.core.request import SLO, Request
from headway.core.scheduler import Scheduler
from headway.core.settings import MAIN, TOKENS, Lane, SchedulerSettings
from headway.core.work import Outcome, Tile, Work
from headway.placement.driver import Driver
from headway.placement.simulate import Schedule
from headway.stages.stage import FakeStage

TILE_S = 0.001


class TellingStage:
    """A fake stage whose every tile takes a millisecond, and which writes down what is done with it."""

    def __init__(self, clock: VirtualClock, fails: Callable[[Work, int], bool] = lambda work, tile: False) -> None:
        self.inner = FakeStage(page_tokens=4, spend=lambda num_tokens: clock.advance(TILE_S))
        self.clock = clock
        self.fails = fails
        self.tiles: list[tuple[float, int]] = []  # (when it ended, Work id)
        self.closed: list[tuple[int, bool]] = []  # (Work id, whether it ran to its end)

    def open(self, request: Request) -> None:
        self.inner.open(request)

    def close(self, request_id: str) -> None:
        self.inner.close(request_id)

    def drop(self, work_id: int, request_id: str) -> None:
        self.inner.drop(work_id, request_id)

    def run(self, work: Work) -> Generator[Tile, None, Outcome]:
        whole = False
        try:
            running = self.inner.run(work)
            while True:
                try:
                    tile = next(running)
                except StopIteration as stop:
                    whole = True
                    outcome: Outcome = stop.value
                    return outcome
                self.tiles.append((self.clock.now(), work.id))
                if self.fails(work, tile.number):
                    raise RuntimeError("out of luck")
                yield tile
        finally:
            self.closed.append((work.id, whole))


class House:
    """A driver with everything around it, and all that it told the callers."""

    def __init__(
        self,
        letters: list[tuple[float, ev.Event]],
        fails: Callable[[Work, int], bool] = lambda work, tile: False,
        pack_tokens: int = 512,
    ) -> None:
        self.clock = VirtualClock()
        self.mailbox = Schedule(self.clock, letters)
        settings = SchedulerSettings(
            max_model_len=200, tile_s=TILE_S, pack_tokens=pack_tokens, refuse_unattainable=False
        )
        cost = CostModel(CostFit(step_s=12 * TILE_S, token_s=1e-6))
        self.scheduler = Scheduler(settings, cost, PageTable(100, 4))
        self.stage = TellingStage(self.clock, fails)
        self.told: list[ev.Admit | ev.Deliver | ev.End] = []
        self.driver = Driver(
            self.scheduler, {"language": self.stage}, self.clock, self.mailbox, self.told.append, gather_s=0.0
        )

    def run(self) -> None:
        while self.scheduler.num_open or not self.mailbox.is_empty:
            if not self.driver.turn():
                self.driver.wait()
        self.driver.turn()

    @property
    def records(self) -> dict[str, Record]:
        return {effect.record.request_id: effect.record for effect in self.told if isinstance(effect, ev.End)}


def arrives(
    now: float, request_id: str, num_tokens: int, max_tokens: int = 1, **wishes: object
) -> tuple[float, ev.Event]:
    prompt = tuple(range(num_tokens))
    return now, ev.Arrived(Request(request_id, prompt, max_tokens, now, **wishes))  # type: ignore[arg-type]


def test_a_request_is_driven_to_its_end() -> None:
    """One prompt, two tokens: both are told in order, then the ending, and nothing stays open."""
    house = House([arrives(0.0, "a", 5, max_tokens=2)])
    house.run()
    first = FakeStage.next_token((0, 1, 2, 3, 4))
    second = FakeStage.next_token((0, 1, 2, 3, 4, first))
    assert [type(effect) for effect in house.told] == [ev.Admit, ev.Deliver, ev.Deliver, ev.End]
    assert [effect.commit.tokens for effect in house.told if isinstance(effect, ev.Deliver)] == [(first,), (second,)]
    assert house.stage.closed == [(1, True), (2, True)]
    assert house.driver.num_open_steps == 0
    assert house.stage.inner.open_requests == set()


def test_a_stage_that_raises_fails_its_members_and_nobody_else() -> None:
    """The step of a and b breaks in its fifth tile. Both callers hear of it; c, who waited, and d, who comes later, are
    served by the same loop."""
    letters = [arrives(0.0, "a", 6), arrives(0.0, "b", 6), arrives(0.0, "c", 6), arrives(1.0, "d", 6)]
    house = House(letters, fails=lambda work, tile: work.id == 1 and tile == 4, pack_tokens=12)
    house.run()
    assert {name: (record.kind, record.message) for name, record in house.records.items()} == {
        "a": ("failed", "RuntimeError: out of luck"),
        "b": ("failed", "RuntimeError: out of luck"),
        "c": ("finished", ""),
        "d": ("finished", ""),
    }
    assert house.driver.num_open_steps == 0
    assert house.scheduler.pages.num_available == 100


def test_due_wakes_the_driver_from_its_sleep() -> None:
    """Nothing can run and nobody writes: the one instant that the scheduler has named is when the driver wakes."""
    house = House([arrives(0.0, "a", 6, slo=SLO(total_s=0.5))])
    house.scheduler.plan = lambda now, lane: None  # type: ignore[method-assign]  # a device that is out of order
    house.scheduler.next_due = lambda: 0.5 if house.scheduler.num_open else None  # type: ignore[method-assign]
    assert not house.driver.turn()
    house.driver.wait()
    assert house.clock.now() == 0.5
    assert not house.driver.turn()
    assert house.records["a"].reason == "deadline_expired"


def test_due_interrupts_a_step_at_its_next_tile() -> None:
    """A long prompt with tiles of 5 ms is read when the next token of a chat becomes due, at 49 ms: the tile that ends
    at 52 ms is the last one before the token's step, and afterwards the prompt goes on."""
    house = House([arrives(0.0, "chat", 4, max_tokens=3, slo=SLO(tpot_s=0.05)), arrives(0.001, "long", 150)])
    house.stage.inner.spend = lambda num_tokens: house.clock.advance(0.005 if num_tokens > 100 else TILE_S)
    dues: list[float] = []
    handle = house.scheduler.handle

    def noted_handle(event: ev.Event, now: float) -> list[ev.Effect]:
        if isinstance(event, ev.Due):
            dues.append(now)
        return handle(event, now)

    house.scheduler.handle = noted_handle  # type: ignore[method-assign]
    house.run()
    assert dues == [pytest.approx(0.052)]
    order = [work_id for _, work_id in house.stage.tiles]
    assert order == [1] * 12 + [2] * 8 + [3] * 12 + [2] * 4 + [4] * 12
    assert house.records["chat"].longest_gap_s <= 0.05 + 0.005


def test_after_mail_at_most_one_tile_runs_before_it_is_read() -> None:
    """Letters come at odd instants, in the middle of tiles. Each is handled before a second tile has begun."""
    instants = [0.0, 0.0034, 0.0101, 0.0217, 0.0333]
    house = House([arrives(instant, f"r{number}", 8) for number, instant in enumerate(instants)])
    handled: list[float] = []
    handle = house.scheduler.handle

    def noted_handle(event: ev.Event, now: float) -> list[ev.Effect]:
        if isinstance(event, ev.Arrived):
            handled.append(now)
        return handle(event, now)

    house.scheduler.handle = noted_handle  # type: ignore[method-assign]
    house.run()
    assert len(handled) == len(instants)
    for arrived, read in zip(instants, handled, strict=True):
        assert read - arrived <= TILE_S


def test_an_interrupt_ends_its_step_and_leaves_the_loop_whole() -> None:
    """Ctrl-C in the fifth tile: it goes through to whoever called, and who calls again gets the account of it, and
    serves the next one."""

    def interrupt(work: Work, tile: int) -> bool:
        if (work.id, tile) == (1, 4):
            raise KeyboardInterrupt
        return False

    house = House([arrives(0.0, "a", 6), arrives(1.0, "b", 6)], fails=interrupt)
    with pytest.raises(KeyboardInterrupt):
        house.run()
    assert house.driver.num_open_steps == 0
    house.run()
    assert {name: (record.kind, record.message) for name, record in house.records.items()} == {
        "a": ("failed", "KeyboardInterrupt"),
        "b": ("finished", ""),
    }
    house.scheduler.check_integrity()
    assert house.scheduler.pages.counts()["held"] == 0


def test_an_interrupt_between_two_letters_loses_neither() -> None:
    """It comes while the first one's admission is carried out: the second letter is read at the next turn."""
    house = House([arrives(0.0, "a", 6), arrives(0.0, "b", 6)])
    opened = house.stage.inner.open

    def interrupt_once(request: Request) -> None:
        house.stage.inner.open = opened  # type: ignore[method-assign]
        opened(request)
        raise KeyboardInterrupt

    house.stage.inner.open = interrupt_once  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        house.run()
    house.run()
    assert {name: record.kind for name, record in house.records.items()} == {"a": "finished", "b": "finished"}


def test_every_event_is_handled_once_and_a_batch_of_them_planned_once() -> None:
    """Five letters lie in the box at once, others come alone: as many calls of `handle` as there were events, at most
    one `plan` after each drained batch, and none for a tile."""
    letters = [arrives(0.0, f"early{number}", 8, max_tokens=3) for number in range(5)]
    letters += [arrives(0.0205, "late", 8, max_tokens=3), (0.0305, ev.Cancelled("early3"))]
    house = House(letters)
    calls: list[str] = []
    handle, plan = house.scheduler.handle, house.scheduler.plan

    def noted_handle(event: ev.Event, now: float) -> list[ev.Effect]:
        calls.append(type(event).__name__)
        return handle(event, now)

    def noted_plan(now: float, lane: Lane) -> Work | None:
        calls.append("plan")
        return plan(now, lane)

    house.scheduler.handle = noted_handle  # type: ignore[method-assign]
    house.scheduler.plan = noted_plan  # type: ignore[method-assign]
    house.run()
    assert calls[:6] == ["Arrived"] * 5 + ["plan"]
    assert calls.count("Arrived") == 6
    assert calls.count("Cancelled") == 1
    assert calls.count("StepDone") == len(house.stage.closed)
    assert ("plan", "plan") not in set(pairwise(calls))
    assert calls.count("plan") < len(house.stage.tiles) / 4


def test_a_step_that_is_suspended_is_not_begun_again() -> None:
    """The generator of a parked step is kept and goes on where it was: every tile of it runs exactly once."""
    house = House([arrives(0.0, "long", 150, priority=1), arrives(0.0045, "urgent", 4, slo=SLO(ttft_s=0.0125))])
    house.run()
    order = [work_id for _, work_id in house.stage.tiles]
    assert order == [1] * 5 + [2] * 12 + [1] * 7
    assert house.stage.closed == [(2, True), (1, True)]


def test_a_caller_that_goes_away_stops_its_step_within_a_tile() -> None:
    """It was alone in the step: the generator is closed, not run to its end."""
    house = House([arrives(0.0, "a", 100), (0.0045, ev.Cancelled("a"))])
    house.run()
    assert len(house.stage.tiles) == 5
    assert house.stage.closed == [(1, False)]
    assert house.records["a"].kind == "cancelled"


def test_a_member_of_a_pack_that_goes_away_is_told_at_the_next_layer() -> None:
    """Layers have three tiles. The caller goes during the second layer: at the first tile of the third it has left, its
    ending is told, and the other one's token is its own."""
    house = House([arrives(0.0, "a", 8), arrives(0.0, "b", 6), (0.0045, ev.Cancelled("a"))])
    house.run()
    record = house.records["a"]
    assert record.kind == "cancelled"
    assert record.ended == pytest.approx(0.007)
    assert len(house.stage.tiles) == 12
    (deliver,) = [effect for effect in house.told if isinstance(effect, ev.Deliver)]
    assert deliver.commit.request_id == "b"
    assert deliver.commit.tokens == (FakeStage.next_token(tuple(range(6))),)


def test_a_lost_engine_leaves_no_generator_behind() -> None:
    """One step is parked and one runs when everything is lost: both are closed, and the loop serves the next one."""
    letters = [arrives(0.0, "long", 150, priority=1), arrives(0.0045, "urgent", 4, slo=SLO(ttft_s=0.0125))]
    letters += [(0.0075, ev.EngineLost("The test pulled the plug.")), arrives(1.0, "next", 4)]
    house = House(letters)
    house.run()
    assert house.stage.closed == [(1, False), (2, False), (3, True)]
    assert {name: record.kind for name, record in house.records.items()} == {
        "long": "failed",
        "urgent": "failed",
        "next": "finished",
    }


def test_closing_gives_up_what_is_open() -> None:
    """The engine is told to stop in the middle of a step."""
    house = House([arrives(0.0, "a", 100), arrives(0.0015, "b", 100)])
    house.driver.turn()
    assert house.driver.num_open_steps == 1
    house.driver.close()
    assert house.driver.num_open_steps == 0
    assert house.stage.closed == [(1, False)]


def test_the_main_lane_is_planned_first_whoever_decides() -> None:
    """A token that is due comes beside a prompt only if that has begun: planned before it, the token would wait."""
    driver = House([arrives(0.0, "prompt", 10)]).driver
    beside = driver.add_lane()
    planned: list[str] = []
    plan = driver.scheduler.plan

    def noted(now: float, lane: Lane) -> Work | None:
        planned.append(lane.name)
        return plan(now, lane)

    driver.scheduler.plan = noted  # type: ignore[method-assign]
    driver._decide(beside)
    assert planned == [MAIN, TOKENS]
    assert driver.main.current is not None


def test_what_another_lane_adds_meanwhile_is_handled_with_a_plan_or_not_yet() -> None:
    """A lane's step ends just after the other has found nothing: whoever handles that says that there was something."""

    class Growing(deque[ev.Event]):
        def __bool__(self) -> bool:
            found = len(self) > 0
            if not found and not handled:
                self.append(ev.Draining())
            return found

    handled: list[ev.Event] = []
    driver = House([]).driver
    driver.scheduler.handle = lambda event, now: handled.append(event) or []  # type: ignore[assignment, func-returns-value, method-assign]
    driver._happened = Growing()
    assert driver._account(driver.main) == bool(handled)
    assert driver._account(driver.main) == bool(handled)
    assert handled == [ev.Draining()]
