"""Time is passed in. The real clock lives in `placement`; the virtual one, for tests and simulation, lives here."""

from typing import Protocol


class Clock(Protocol):
    """Seconds on a monotonic scale whose zero means nothing."""

    def now(self) -> float: ...


class VirtualClock:
    """A clock that moves only when told to, and never backwards."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, f"time cannot go back by {-seconds} s"
        self._now += seconds

    def advance_to(self, instant: float) -> None:
        self._now = max(self._now, instant)
