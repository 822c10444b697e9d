"""Two servers, or one with two configurations, by the same load in turns: A B B A, so that a drift of the machine falls
on both alike.

Owns the order, the ratios and how sure they are. The interval is a seeded bootstrap of two levels: blocks are drawn
again with replacement, and within each the requests, the same ones for A and for B. Pure but for its seed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from headway.bench.score import Outcome, quantile
from headway.core.request import SLO

ORDER: tuple[Literal["A", "B"], ...] = ("A", "B", "B", "A")
CONFIDENCE = 0.95
NUM_DRAWS = 1000
FEW_BLOCKS = 5  # fewer say little about how the runs of one side differ


class Block(NamedTuple):
    """Runs of one load, request i of each run being the same."""

    a: tuple[Sequence[Outcome], ...]
    b: tuple[Sequence[Outcome], ...]


class Ratio(NamedTuple):
    """B's figure over A's, with its interval. NaN where A's is 0, nobody has one, or it has no interval."""

    name: str
    a: float
    b: float
    ratio: float
    low: float
    high: float


Values = np.typing.NDArray[np.float64]


class _Statistic(NamedTuple):
    """A figure: what each request adds to it (NaN: nothing), and what becomes of all that was added."""

    take: Callable[[Outcome], float | None]
    of: Callable[[Values], float]
    has_interval: bool = True  # of a ratio: not where A's figure is often 0


def _statistics(targets: Mapping[str, SLO], kinds: Sequence[str], ttft_only: bool) -> dict[str, _Statistic]:
    """What is compared."""
    meets = Outcome.meets_ttft if ttft_only else Outcome.meets_all
    judged = f"attained, {'TTFT target' if ttft_only else 'all targets'}"

    def in_time(outcome: Outcome) -> float:
        return float(meets(outcome, targets.get(outcome.kind, SLO())))

    def of_kind(kind: str) -> Callable[[Outcome], float | None]:
        return lambda outcome: in_time(outcome) if outcome.kind == kind else None

    def at(share: float) -> Callable[[Values], float]:
        return lambda values: quantile(values[~np.isnan(values)].tolist(), share)

    return {
        judged: _Statistic(in_time, _mean),
        **{f"{judged}: {kind}": _Statistic(of_kind(kind), _mean) for kind in kinds},
        "TTFT p50, answered (s)": _Statistic(lambda outcome: outcome.ttft_s, at(0.5)),
        "TTFT p90, answered (s)": _Statistic(lambda outcome: outcome.ttft_s, at(0.9)),
        "TTFT p99, answered (s)": _Statistic(lambda outcome: outcome.ttft_s, at(0.99)),
        "TPOT p50 (s)": _Statistic(lambda outcome: outcome.tpot_s, at(0.5)),
        "TPOT p99 (s)": _Statistic(lambda outcome: outcome.tpot_s, at(0.99)),
        "end p50, finished (s)": _Statistic(lambda o: o.end_s if o.ending == "finished" else None, at(0.5)),
        "refused or failed": _Statistic(lambda o: float(o.ending != "finished"), _mean, False),
    }


def compare(
    blocks: Sequence[Block],
    targets: Mapping[str, SLO],
    seed: int,
    num_draws: int = NUM_DRAWS,
    *,
    ttft_only: bool = False,
) -> list[Ratio]:
    """Every figure of all runs of B over that of all runs of A. The first is the share that attained all its targets,
    or with `ttft_only` that for its first token; then the same of each class."""
    if not blocks:
        raise ValueError("There is nothing to compare: measure one block at least.")
    draws = list(_draws([len(block.a[0]) for block in blocks], seed, num_draws))
    ratios = []
    kinds = list(dict.fromkeys(outcome.kind for block in blocks for run in block.a for outcome in run))
    for name, (take, of, has_interval) in _statistics(targets, kinds, ttft_only).items():
        sides_a = [_table(block.a, take) for block in blocks]
        sides_b = [_table(block.b, take) for block in blocks]
        a, b = of(_flat(sides_a)), of(_flat(sides_b))
        again = [
            _over(
                of(_flat([sides_b[n][:, who] for n, who in draw])), of(_flat([sides_a[n][:, who] for n, who in draw]))
            )
            for draw in draws
        ]
        known = [ratio for ratio in again if has_interval and not math.isnan(ratio)]
        low, high = quantile(known, (1 - CONFIDENCE) / 2), quantile(known, (1 + CONFIDENCE) / 2)
        ratios.append(Ratio(name, a, b, _over(b, a), low, high))
    return ratios


Draw = list[tuple[int, np.typing.NDArray[np.int64]]]  # (block, its requests)


def _draws(sizes: Sequence[int], seed: int, num_draws: int) -> Iterator[Draw]:
    rng = np.random.default_rng([seed, 5])
    for _ in range(num_draws):
        numbers = rng.integers(len(sizes), size=len(sizes)).tolist()
        yield [(number, rng.integers(sizes[number], size=sizes[number])) for number in numbers]


def _table(runs: Sequence[Sequence[Outcome]], take: Callable[[Outcome], float | None]) -> Values:
    """A row per run, a column per request."""
    taken = [[take(outcome) for outcome in run] for run in runs]
    return np.array([[math.nan if value is None else value for value in row] for row in taken])


def _flat(tables: Sequence[Values]) -> Values:
    return np.concatenate([table.ravel() for table in tables])


def _mean(values: Values) -> float:
    """Of those that have one."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _over(b: float, a: float) -> float:
    return b / a if a else math.nan
