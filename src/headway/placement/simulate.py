"""The engine on a virtual clock: the same scheduler, the same driver, stages whose tiles only cost time.

Used by the tests of the core today; it takes the same decisions as the engine for the same events and costs, because
it is the same code.
"""

from collections import deque
from collections.abc import Iterable

from headway.core import event as ev
from headway.core.clock import VirtualClock
from headway.core.cost import CostFit, CostModel
from headway.core.ledger import Record
from headway.core.pages import PageTable
from headway.core.scheduler import Scheduler, SchedulerSettings
from headway.placement.driver import Driver
from headway.stages.stage import FakeStage


class Schedule:
    """A mailbox whose letters are known beforehand: each is delivered when the clock has reached its instant."""

    def __init__(self, clock: VirtualClock, letters: Iterable[tuple[float, ev.Event]]) -> None:
        self.clock = clock
        self._letters = deque(sorted(letters, key=lambda letter: letter[0]))

    def has_mail(self) -> bool:
        return bool(self._letters) and self._letters[0][0] <= self.clock.now()

    def take(self) -> list[ev.Event]:
        taken = []
        while self.has_mail():
            taken.append(self._letters.popleft()[1])
        return taken

    def wait(self, until: float | None) -> None:
        instants = [self._letters[0][0]] if self._letters else []
        if until is not None:
            instants.append(until)
        if instants:
            self.clock.advance_to(min(instants))

    def pause(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @property
    def is_empty(self) -> bool:
        return not self._letters


class Simulation:
    """One simulated engine. `token_s` is the price of a token, `tile_s` what a tile costs at least."""

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
    ) -> None:
        self.clock = VirtualClock()
        self.mailbox = Schedule(self.clock, letters)
        num_tiles = num_layers * tiles_per_layer
        fit = CostFit(step_s=tile_s * num_tiles, token_s=token_s)
        self.scheduler = Scheduler(settings, CostModel(fit), PageTable(num_pages, page_tokens))
        self.stage = FakeStage(
            page_tokens,
            num_layers,
            tiles_per_layer,
            spend=lambda num_tokens: self.clock.advance(max(tile_s, num_tokens * token_s / num_tiles)),
        )
        self.delivered: dict[str, list[int]] = {}
        self.ended: dict[str, list[Record]] = {}
        self.driver = Driver(self.scheduler, {"language": self.stage}, self.clock, self.mailbox, self._tell)

    def run(self) -> None:
        """Until every letter is delivered and every request has ended."""
        while self.step():
            pass

    def step(self) -> bool:
        """One turn of the driver, or a sleep. False when there is nothing left to happen."""
        if self.driver.turn():
            return True
        if self.mailbox.is_empty and self.scheduler.num_open == 0:
            return False
        before = self.clock.now()
        self.driver.wait()
        moved = self.clock.now() > before or self.mailbox.has_mail()
        assert moved, f"nothing can happen any more, yet {self.scheduler.num_open} requests are open"
        return True

    def _tell(self, effect: ev.Admit | ev.Deliver | ev.End) -> None:
        if isinstance(effect, ev.Deliver):
            self.delivered.setdefault(effect.commit.request_id, []).extend(effect.commit.tokens)
        elif isinstance(effect, ev.End):
            self.ended.setdefault(effect.record.request_id, []).append(effect.record)
