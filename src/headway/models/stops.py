"""Finds stop strings in a text that arrives in pieces, and holds back only what may still become one."""

from collections.abc import Sequence
from typing import NamedTuple


class Passed(NamedTuple):
    """Text that is safe to show, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """The text ends where a stop string is first complete, whatever pieces it came in; of two that are complete at the
    same character the longer one counts."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def feed(self, text: str) -> Passed:
        """Add text; what comes back is shown. After a stop, feed no more."""
        seen = self._held + text
        found = min(
            ((at + len(stop), -len(stop), stop) for stop in self._stops if (at := seen.find(stop)) >= 0), default=None
        )
        if found is not None:
            end, _, stop = found
            self._held = ""
            return Passed(seen[:end] if self._include_stop else seen[: end - len(stop)], stop)
        held = max((_overlap(seen, stop) for stop in self._stops), default=0)
        cut = len(seen) - held
        self._held = seen[cut:]
        return Passed(seen[:cut])

    def rest(self) -> str:
        """What was held back, once it is plain that no stop string will come of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0
