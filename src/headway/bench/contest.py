"""Which of several schedulers keeps its promises at the highest rate: bisections in lockstep, one run of each in turn.

Interleaved, so that whatever the machine does meanwhile happens to all of them. Knows neither engine nor simulator: it
takes an `attain(name, rate)` that makes one run.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from headway.bench.score import GOOD_SHARE, Marks, Outcome, Score

FAR = 0.75  # a share below this: the goodput is not near
NEAR = 0.03  # above the line: with less than that, a single run does not decide; nor does one below it that is not far
LOWEST = 1e-3  # requests per second: who does not pass there passes nowhere


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
    outcomes: tuple[Outcome, ...] = ()
    num_repartitions: int = 0
    met: tuple[bool, ...] = ()  # every target, request by request as they came
    draw: int = 0  # of the load, where there are several

    @property
    def worst(self) -> float:
        """What the worst-served class attained of its TTFT targets."""
        return min(self.score.shares(ttft_only=True).values())

    @property
    def overall(self) -> float:
        return self.score.overall.ttft_only


@dataclass(frozen=True)
class Judge:
    """What a run is judged by: the share that its worst class attained."""

    share: Callable[[Marks], float]

    def __call__(self, run: Run) -> float:
        return min(map(self.share, run.score.by_kind.values()))

    def is_close(self, run: Run) -> bool:
        """Whether this run alone decides nothing: near the line, or one more request of each class would reach it. Who
        fails is out, and who passes is asked again at the next rate: so below the line more counts as near."""
        judged = self(run)
        by_one = all(self.share(marks) + 1 / marks.num >= GOOD_SHARE for marks in run.score.by_kind.values())
        return FAR <= judged < GOOD_SHARE + NEAR or (judged < GOOD_SHARE and by_one)


TTFT = Judge(lambda marks: marks.ttft_only)
JOINT = Judge(lambda marks: marks.joint)


@dataclass
class Contender:
    """How far one scheduler has got. While it is looked for, `good` is the highest rate that passed and `bad` the
    lowest that failed; then `good` is where all that was attained crosses the line (`settle`)."""

    name: str
    start: float
    good: float = 0.0
    bad: float = math.inf
    runs: list[Run] = field(default_factory=list)
    last_share: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether nothing failed: its goodput may be higher than any rate that was tried."""
        return self.bad == math.inf

    def next_rate(self, growth: float) -> float:
        if not self.runs:
            return self.start
        if not self.good:  # far from passing: a longer step down
            return self.bad / (growth if self.last_share > FAR else growth**2)
        if self.bad == math.inf:
            return self.good * growth
        return math.sqrt(self.good * self.bad)

    def take(self, runs: Sequence[Run], judge: Judge) -> None:
        """Runs at one rate, judged by the median of those that were not disturbed, if there are any."""
        self.runs += runs
        self.last_share = told((judge(run), run.disturbed) for run in runs)
        if self.last_share >= GOOD_SHARE:
            self.good = max(self.good, runs[0].rate)
        else:
            self.bad = min(self.bad, runs[0].rate)

    def is_settled(self, tolerance: float) -> bool:
        return self.bad <= max(LOWEST, self.good * (1 + tolerance))

    def settle(self, judge: Judge) -> None:
        """From here on its goodput is what all its runs say together: one run alone may have been lucky, or not."""
        self.good = crossing(self.attained(judge))

    def attained(self, judge: Judge) -> list[tuple[float, float]]:
        """(rate, share) for each rate at which it was run."""
        rates = dict.fromkeys(run.rate for run in self.runs)
        return [(rate, told((judge(run), run.disturbed) for run in self.runs if run.rate == rate)) for rate in rates]


def told(runs: Iterable[tuple[float, bool]]) -> float:
    """What runs at one rate say together, from what each attained and whether it was disturbed."""
    known = list(runs)
    return statistics.median([share for share, disturbed in known if not disturbed] or [share for share, _ in known])


def contest(
    starts: Mapping[str, float],
    attain: Callable[[str, float], Run],
    judge: Judge,
    *,
    tolerance: float = 0.06,
    growth: float = 1.3,
    most_rates: int = 10,
    repeats: int = 1,
) -> dict[str, Contender]:
    """Goodput of each, looked for to within `tolerance` from where it is expected. A run whose result is close to the
    line is made `repeats` times in all, and the median counts: a neighbour on the machine must not decide."""
    contenders = {name: Contender(name, start) for name, start in starts.items()}
    for _ in range(most_rates):
        open_ones = [c for c in contenders.values() if not c.is_settled(tolerance)]
        rates = {contender.name: contender.next_rate(growth) for contender in open_ones}
        runs = {name: [attain(name, rate)] for name, rate in rates.items()}
        for _ in range(repeats - 1):  # of all that are close, in turn
            for name, rate in rates.items():
                if judge.is_close(runs[name][0]):
                    runs[name].append(attain(name, rate))
        for contender in open_ones:
            contender.take(runs[contender.name], judge)
    for contender in contenders.values():
        contender.settle(judge)
    return contenders


def sweep(
    names: Sequence[str], attain: Callable[[str, float], Run], judge: Judge, rates: Sequence[float]
) -> dict[str, Contender]:
    """Goodput of each, from runs of all at each of these rates, one of each in turn: between them, where what is
    attained crosses the line. 0: below it at the lowest already."""
    contenders = {name: Contender(name, rates[0]) for name in names}
    for rate in rates:
        for contender in contenders.values():
            contender.take([attain(contender.name, rate)], judge)
    for contender in contenders.values():
        contender.settle(judge)
    return contenders


def crossing(points: Sequence[tuple[float, float]], line: float = GOOD_SHARE) -> float:
    """Up to which rate the line is kept, given (rate, share) at some of them: along straight lines between shares that
    never rise with the rate, neighbours that do being replaced by their mean. 0 if the first is below; the last rate
    if all are above."""
    pools: list[tuple[list[float], float]] = []  # rates and the mean of what they have attained
    for rate, share in sorted(points):
        rates, mean = [rate], share
        while pools and pools[-1][1] < mean:
            before, other = pools.pop()
            mean = (other * len(before) + mean * len(rates)) / (len(before) + len(rates))
            rates = before + rates
        pools.append((rates, mean))
    level = [(rate, mean) for rates, mean in pools for rate in rates]
    if level[0][1] < line:
        return 0.0
    for (low, above), (high, below) in pairwise(level):
        if below < line:
            return low + (high - low) * (above - line) / (above - below)
    return level[-1][0]


def outlast(
    names: Sequence[str],
    attain: Callable[[str, float], Run],
    judge: Judge,
    rate: float,
    *,
    growth: float = 1.12,
    most_rates: int = 40,
    repeats: int = 1,
    descend: bool = True,
) -> dict[str, Contender]:
    """All of them at this rate; who passes goes on to a higher one, until nobody does. If nobody passes the first one,
    all begin lower, or with `descend` off, because another is known to pass there, it ends. Finds the best of many
    without finding out how bad the others are: a `good` of 0 says that another passed where this one did not. Close
    results are repeated, as above."""
    contenders = {name: Contender(name, rate) for name in names}
    left = list(contenders.values())
    for _ in range(most_rates):
        for contender in left:
            runs = [attain(contender.name, rate)]
            if judge.is_close(runs[0]):
                runs += [attain(contender.name, rate) for _ in range(repeats - 1)]
            contender.take(runs, judge)
        passed = [contender for contender in left if contender.last_share >= GOOD_SHARE]
        if not passed and (not descend or any(contender.good for contender in left)):
            break
        left, rate = (passed, rate * growth) if passed else (left, rate / growth**2)
        if rate < LOWEST:
            break
    for contender in contenders.values():
        contender.settle(judge)
    return contenders
