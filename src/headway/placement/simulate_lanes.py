"""Two lanes of one simulated device in one thread: the lane that is furthest behind runs its next tile.

Each lane has a clock of its own; the driver sees that of the lane that is resumed. So events are handled in the order
of their instants, as close as tiles are long, and what a lane does to the other's pace takes effect at its next tile.
"""

from collections.abc import Generator

from headway.core.clock import VirtualClock
from headway.core.cost import shares_of
from headway.core.roofline import Roofline
from headway.core.work import Work
from headway.placement.driver import Driver


class LaneClock(VirtualClock):
    """The clock of whichever lane is resumed."""

    def turn_to(self, instant: float) -> None:
        """That of another lane, which may be behind."""
        self._now = instant


class SideBySide:
    """Turns both lanes of a driver whose clock is a `LaneClock`."""

    def __init__(self, driver: Driver, clock: LaneClock) -> None:
        self.driver = driver
        self.clock = clock
        self._at = {lane.name: clock.now() for lane in (driver.main, driver.add_lane())}
        self._turning: dict[str, Generator[None]] = {}
        self._ran: set[str] = set()  # lanes that have run something since they last looked, and look again

    def step(self) -> bool:
        """One tile of the lane that is furthest behind, or one look. False if neither lane has anything to run: the
        clock then shows the later of both."""
        driver = self.driver
        assert driver.beside is not None
        lanes = (driver.main, driver.beside)
        if not self._turning:  # time may have passed in sleep
            self._at = dict.fromkeys(self._at, max(self.clock.now(), *self._at.values()))
        ready = [lane for lane in lanes if lane.name in self._turning or lane.name in self._ran or lane.awake.is_set()]
        if not ready:
            ready = [driver.main]
        # of two at the same instant the one that only looks: what it begins changes the other's pace
        lane = min(ready, key=lambda each: (self._at[each.name], each.name in self._turning))
        self.clock.turn_to(self._at[lane.name])
        if lane.name not in self._turning:
            self._turning[lane.name] = driver.turning(lane)
            self._ran.discard(lane.name)
        if next(self._turning[lane.name], self) is self:  # over, or there was nothing
            del self._turning[lane.name]
        else:
            self._ran.add(lane.name)
        lane.resting.set()  # as far as the other lane is concerned: it may be told to stop here
        self._at[lane.name] = now = self.clock.now()
        for other in lanes:
            if other.name not in self._turning:  # idle: it is where time is
                self._at[other.name] = max(self._at[other.name], now)
        if self._turning or self._ran or any(each.awake.is_set() for each in lanes):
            return True
        self.clock.turn_to(max(self._at.values()))
        return False


class TruePaces:
    """How many times as long as alone each lane of a simulated device takes, whatever its scheduler believes."""

    def __init__(self, driver: Driver, roofline: Roofline) -> None:
        self._driver = driver
        self._roofline = roofline
        self._known: tuple[tuple[int, int], tuple[float, float]] | None = None  # of these two Works

    @property
    def are_both_busy(self) -> bool:
        beside = self._driver.beside
        return beside is not None and beside.current is not None and self._driver.main.current is not None

    def of(self, work: Work) -> float:
        """Of this step, now."""
        main, beside = self._driver.main.current, None if self._driver.beside is None else self._driver.beside.current
        shares = self._driver.scheduler.sharing.shares
        if main is None or beside is None or shares is None:
            return 1.0
        if self._known is None or self._known[0] != (main.id, beside.id):
            paces = self._roofline.paces(shares_of(main.segments), shares_of(beside.segments), shares)
            self._known = (main.id, beside.id), paces
        prompts, tokens = self._known[1]
        return prompts if work is main else tokens
