"""How sure the goodputs of several ways are: their requests are drawn again and again, the same ones for all of them.

They are drawn in blocks of some that follow each other, since who comes close together shares a queue; of each draw of
the load as many blocks as it has. What a machine did to one run and not to another is in the blocks as well, as far as
it differs from block to block. Pure but for its seed.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from headway.bench.contest import Contender, Run, crossing

BLOCK = 20  # requests
TIMES = 1000
CONFIDENCE = 0.9

Values = np.typing.NDArray[np.float64]


def pooled_goodput(contender: Contender) -> float:
    """Up to which rate the line is kept, by what all its runs at each rate attained together; 0 if at none."""
    rates = {run.rate: [one for one in contender.runs if one.rate == run.rate] for run in contender.runs}
    return crossing([(rate, float(np.mean([np.mean(run.met) for run in runs]))) for rate, runs in rates.items()])


def drawn_again(found: Mapping[str, Contender], seed: int = 0) -> dict[str, tuple[float, ...]]:
    """The goodput of each way in each of `TIMES` drawings; the lowest rate where the line is kept at none."""
    rng = np.random.default_rng([seed, 11])
    sizes = {run.draw: len(run.met) for contender in found.values() for run in contender.runs}
    chosen = {draw: _choose(rng, size) for draw, size in sorted(sizes.items())}
    return {name: _goodputs(contender.runs, chosen) for name, contender in found.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which `CONFIDENCE` of them lie."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _choose(rng: np.random.Generator, num_requests: int) -> Values:
    """How often each block is drawn, (TIMES, blocks)."""
    num_blocks = -(-num_requests // BLOCK)
    return rng.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=TIMES).astype(float)


def _goodputs(runs: Sequence[Run], chosen: Mapping[int, Values]) -> tuple[float, ...]:
    rates = sorted({run.rate for run in runs})
    by_rate = [np.mean([_shares(run, chosen[run.draw]) for run in runs if run.rate == rate], axis=0) for rate in rates]
    again = [crossing(list(zip(rates, map(float, shares), strict=True))) for shares in zip(*by_rate, strict=True)]
    return tuple(max(rates[0], goodput) for goodput in again)


def _shares(run: Run, times: Values) -> Values:
    """What it attained of the requests in each drawing, (TIMES,)."""
    starts = range(0, len(run.met), BLOCK)
    num_met = np.array([sum(run.met[start : start + BLOCK]) for start in starts], float)
    sizes = np.array([len(run.met[start : start + BLOCK]) for start in starts], float)
    shares: Values = (times @ num_met) / (times @ sizes)
    return shares
