"""Whether the machine was left alone: a fixed piece of arithmetic, timed before and after each measurement.

These machines are shared, and their clocks drift. The rule, fixed beforehand: a measurement counts only if the probe
just before it and the one just after it were within a factor of `TOLERANCE` of the median of the last `NUM_PROBES`,
slower or faster; else it is thrown away and made again.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable

import torch

TOLERANCE = 1.25
NUM_PROBES = 15
MAX_TRIES = 4


class Calm:
    """Makes measurements and throws away the disturbed ones."""

    def __init__(self) -> None:
        self._matrix = torch.randn(768, 768)
        self.num_discarded = 0
        self.num_kept_disturbed = 0
        self._probes = deque((self._probe() for _ in range(NUM_PROBES)), maxlen=NUM_PROBES)

    def measure(self, operation: Callable[[], float]) -> float:
        """The operation's own figure, from an undisturbed run if one of `MAX_TRIES` was; counts what was not."""
        figure = 0.0
        for attempt in range(MAX_TRIES):
            before = self._probe()
            figure = operation()
            after = self._probe()
            self._probes.extend((before, after))
            usual = statistics.median(self._probes)
            if usual / TOLERANCE <= min(before, after) and max(before, after) <= usual * TOLERANCE:
                return figure
            if attempt < MAX_TRIES - 1:
                self.num_discarded += 1
        self.num_kept_disturbed += 1
        return figure

    def verdict(self) -> str:
        return f"{self.num_discarded} disturbed measurements were thrown away and made again" + (
            f"; {self.num_kept_disturbed} stayed disturbed after {MAX_TRIES} tries and are included."
            if self.num_kept_disturbed
            else "."
        )

    def _probe(self) -> float:
        """The best of three: a few milliseconds each."""
        best = float("inf")
        for _ in range(3):
            begun = time.perf_counter()
            self._matrix @ self._matrix
            best = min(best, time.perf_counter() - begun)
        return best
