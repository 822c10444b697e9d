"""Goodput: the highest rate at which every class is still served well, by bisection.

Takes any `attain(rate) -> Score`, so it knows neither a server nor a simulator. Attainment is noisy near the knee, so a
rate whose result is close to the line, or one request of each class from it, is tried again and judged by the mean.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from headway.bench.score import GOOD_SHARE, Score

NEAR = 0.05  # of the line: closer than this, a single run does not decide


S = TypeVar("S")


@dataclass
class Point(Generic[S]):
    """One rate that was tried, with all its runs. `shares`: per class, the mean over them."""

    rate: float
    runs: list[S] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    passed: bool = False


@dataclass(frozen=True)
class Found(Generic[S]):
    """The highest rate that passed (0 if none did), what failed above it (infinite if nothing did), and all points in
    the order of rates."""

    rate: float
    failed_at: float
    points: tuple[Point[S], ...]


@dataclass(frozen=True)
class Search(Generic[S]):
    """How to look. `judge` tells each class's share of a run."""

    attain: Callable[[float], S]
    judge: Callable[[S], Mapping[str, float]]
    grain: Callable[[S], Mapping[str, float]] = lambda _: {}  # what one request is of each class
    share: float = GOOD_SHARE
    tolerance: float = 0.1  # stop when the bracket's ends are this close, relatively
    growth: float = 2.0  # while there is no bracket yet
    repeats: int = 2  # runs of a rate near the knee, at most
    max_points: int = 16
    lowest: float = 1e-3
    highest: float = 1e4

    def run(self, start: float) -> Found[S]:
        """Grow a bracket from `start` by a factor, then halve it geometrically."""
        if not self.lowest <= start <= self.highest:
            raise ValueError(
                f"Start the search between {self.lowest:g} and {self.highest:g} requests/s, not {start:g}."
            )
        points: dict[float, Point[S]] = {}
        good, bad = 0.0, math.inf
        rate = start
        while len(points) < self.max_points:
            point = self.visit(rate)
            points[rate] = point
            if point.passed:
                good = rate
            else:
                bad = rate
            if good and bad <= good * (1 + self.tolerance):
                break
            following = self._next(good, bad)
            if following in points:
                break
            rate = following
        return Found(good, bad, tuple(points[rate] for rate in sorted(points)))

    def _next(self, good: float, bad: float) -> float:
        if not good:
            return max(self.lowest, bad / self.growth)
        if bad == math.inf:
            return min(self.highest, good * self.growth)
        return math.sqrt(good * bad)

    def visit(self, rate: float) -> Point[S]:
        """Try one rate, again if it is too close to call."""
        point: Point[S] = Point(rate)
        for _ in range(max(1, self.repeats)):
            point.runs.append(self.attain(rate))
            judged = [self.judge(run) for run in point.runs]
            # a class that did not occur in one of the runs is judged by the others
            kinds = dict.fromkeys(kind for shares in judged for kind in shares)
            point.shares = {kind: _mean([shares[kind] for shares in judged if kind in shares]) for kind in kinds}
            worst = min(point.shares.values(), default=0.0)
            point.passed = worst >= self.share
            grain = self.grain(point.runs[-1])
            by_one = all(share + grain.get(kind, 0.0) >= self.share for kind, share in point.shares.items())
            if abs(worst - self.share) > NEAR and (point.passed or not by_one):
                break
        return point


def every_class(score: Score) -> Mapping[str, float]:
    """Each class must attain its share of all its targets."""
    return score.shares()


def every_class_ttft(score: Score) -> Mapping[str, float]:
    """Each class must attain its share of its TTFT targets."""
    return score.shares(ttft_only=True)


def everybody(score: Score) -> Mapping[str, float]:
    """All requests together must attain the share, whatever it means for one class."""
    return {"overall": score.overall.joint}


def goodput(attain: Callable[[float], Score], start: float, *, share: float = GOOD_SHARE) -> Found[Score]:
    """The plain case: joint attainment of every class."""
    return Search(attain, every_class, share=share).run(start)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
