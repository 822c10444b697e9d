"""Which of several schedulers keeps its promises at the highest rate: bisections in lockstep, one run of each in turn.

Interleaved, so that whatever the machine does meanwhile happens to all of them. Knows neither engine nor simulator: it
takes an `attain(name, rate)` that makes one run.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from headway.bench.score import GOOD_SHARE, Score

FAR = 0.75  # a share below this: the goodput is not near


@dataclass(frozen=True)
class Run:
    """One load at one rate under one scheduler."""

    rate: float
    score: Score
    num_preemptions: int = 0
    most_parked_tokens: int = 0
    decision_p50_s: float = 0.0
    decision_p99_s: float = 0.0
    disturbed: bool = False

    @property
    def worst(self) -> float:
        """What the worst-served class attained of its TTFT targets."""
        return min(self.score.shares(ttft_only=True).values())

    @property
    def worst_joint(self) -> float:
        return min(self.score.shares().values())

    @property
    def overall(self) -> float:
        return self.score.overall.ttft_only


Judge = Callable[[Run], float]


@dataclass
class Contender:
    """How far one scheduler has got: the highest rate that passed, the lowest that failed, and all runs."""

    name: str
    start: float
    good: float = 0.0
    bad: float = math.inf
    runs: list[Run] = field(default_factory=list)
    last_share: float = 0.0

    def next_rate(self, growth: float) -> float:
        if not self.runs:
            return self.start
        if not self.good:  # far from passing: a longer step down
            return self.bad / (growth if self.last_share > FAR else growth**2)
        if self.bad == math.inf:
            return self.good * growth
        return math.sqrt(self.good * self.bad)

    def take(self, run: Run, share: float) -> None:
        """`share` is what the judge saw in the run."""
        self.runs.append(run)
        self.last_share = share
        if share >= GOOD_SHARE:
            self.good = max(self.good, run.rate)
        else:
            self.bad = min(self.bad, run.rate)

    def is_settled(self, tolerance: float) -> bool:
        return self.good > 0 and self.bad <= self.good * (1 + tolerance)


def contest(
    starts: Mapping[str, float],
    attain: Callable[[str, float], Run],
    judge: Judge,
    *,
    tolerance: float = 0.06,
    growth: float = 1.3,
    most_runs: int = 10,
) -> dict[str, Contender]:
    """Goodput of each, to within `tolerance`, from where it is expected."""
    contenders = {name: Contender(name, start) for name, start in starts.items()}
    for _ in range(most_runs):
        open_ones = [c for c in contenders.values() if not c.is_settled(tolerance)]
        for contender in open_ones:
            run = attain(contender.name, contender.next_rate(growth))
            contender.take(run, judge(run))
    return contenders
