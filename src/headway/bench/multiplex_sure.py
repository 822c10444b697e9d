"""How sure the goodputs of several ways are: their requests are drawn again and again, the same ones for all of them.

They are drawn in blocks of some that follow each other, since who comes close together shares a queue; of each part of
a load, and of each draw of it, one block less than it has, since as many would scatter less than new ones do. What a
machine did to one run and not to another is in the blocks as well, as far as it differs from block to block; what it
did to a whole run is not. Pure but for its seed.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np

from headway.bench.contest import Contender, Run, crossing

BLOCK, FEWEST = 20, 4  # requests of a block, about; blocks of a part, at least
TIMES = 1000
CONFIDENCE = 0.9

Values = np.typing.NDArray[np.float64]
# Of each drawing the least and the most that a goodput may have been: 0 where it is below the lowest rate that was
# tried, and without an end where it is above the highest.
Drawings = tuple[tuple[float, float], ...]


class Blocks(NamedTuple):
    """Of one draw of a load: where its blocks begin and end, and how often each is drawn, (TIMES, blocks)."""

    edges: tuple[int, ...]
    times: Values


def pooled_goodput(contender: Contender) -> float:
    """Up to which rate the line is kept, by what its runs at each rate attained, each draw counting alike; 0 if at
    none."""
    runs = contender.runs
    return crossing([(rate, float(_pooled(_at(runs, rate), _share))) for rate in _rates(runs)])


def drawn_again(found: Mapping[str, Contender], num_parts: int = 1, seed: int = 0) -> dict[str, Drawings]:
    """The goodput of each way in each of `TIMES` drawings. `num_parts`: the load changes so often, less one; each part
    keeps its share of the requests."""
    rng = np.random.default_rng([seed, 11])
    sizes = {run.draw: len(run.met) for contender in found.values() for run in contender.runs}
    blocks = {draw: _choose(rng, size, num_parts) for draw, size in sorted(sizes.items())}
    return {name: _goodputs(contender.runs, blocks) for name, contender in found.items()}


def interval(again: Drawings) -> tuple[float, float] | None:
    """Between which `CONFIDENCE` of them lie; None if there are none."""
    if not again:
        return None
    lows, highs = sorted(low for low, _ in again), sorted(high for _, high in again)
    outside = round((1 - CONFIDENCE) / 2 * len(again))
    return lows[outside], highs[-1 - outside]


def _choose(rng: np.random.Generator, num_requests: int, num_parts: int) -> Blocks:
    edges, times = [0], list[Values]()
    for start, end in pairwise(num_requests * part // num_parts for part in range(num_parts + 1)):
        num_blocks = min(end - start, max(FEWEST, round((end - start) / BLOCK)))
        edges += [start + (end - start) * block // num_blocks for block in range(1, num_blocks + 1)]
        drawn = rng.multinomial(max(1, num_blocks - 1), np.full(num_blocks, 1 / num_blocks), size=TIMES)
        times.append(drawn.astype(float))
    return Blocks(tuple(edges), np.concatenate(times, axis=1))


def _goodputs(runs: Sequence[Run], blocks: Mapping[int, Blocks]) -> Drawings:
    rates = _rates(runs)
    by_rate = [_pooled(_at(runs, rate), lambda run: _shares(run, blocks[run.draw])) for rate in rates]
    again = (crossing(list(zip(rates, map(float, shares), strict=True))) for shares in zip(*by_rate, strict=True))
    return tuple((goodput, inf if goodput == rates[-1] else goodput or rates[0]) for goodput in again)


def _rates(runs: Sequence[Run]) -> list[float]:
    return sorted({run.rate for run in runs})


def _at(runs: Sequence[Run], rate: float) -> list[Run]:
    return [run for run in runs if run.rate == rate]


def _pooled(runs: Sequence[Run], share: Callable[[Run], Values]) -> Values:
    """The mean over draws of the mean over the runs of each."""
    by_draw = [[share(run) for run in runs if run.draw == draw] for draw in sorted({run.draw for run in runs})]
    pooled: Values = np.mean([np.mean(shares, axis=0) for shares in by_draw], axis=0)
    return pooled


def _share(run: Run) -> Values:
    return np.array(sum(run.met) / len(run.met))


def _shares(run: Run, blocks: Blocks) -> Values:
    """What it attained of the requests in each drawing, (TIMES,)."""
    num_met = np.array([sum(run.met[start:end]) for start, end in pairwise(blocks.edges)], float)
    shares: Values = (blocks.times @ num_met) / (blocks.times @ np.diff(blocks.edges))
    return shares
