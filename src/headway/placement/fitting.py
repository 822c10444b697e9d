"""From steps that were timed to the coefficients of `core.cost`: which shapes to run, and how to solve for them.

Owns the choice of shapes, the budget and the least squares; knows no tensor. Whoever calls it says how a step is run,
so that a test can be the machine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from headway.core.cost import CostFit, Share

BUDGET_S = 1.5  # of the device, for all steps together
REPEAT_S = 0.05  # a shorter step is run again, until so much is spent or it was run `MOST_REPEATS` times
MOST_REPEATS = 4
ODD = 0.2  # a step slower than fitted by this share is taken to have been disturbed, and run again
AGAIN_S = 0.5  # of the device, as fitted, for running such steps again
PRIOR_WEIGHT = 0.1  # of what is known of `pair_s` beforehand, in units of one step's relative error
NUM_ALWAYS = 4  # shapes that are run whatever the budget: three to fit, one held out
LONGEST_PROBE = 1056  # tokens and context of the longest shape

Shape = tuple[Share, ...]
Run = Callable[[Shape], float]  # one step of this shape, seconds

_UNITS = (
    CostFit(step_s=1.0, token_s=0.0),
    CostFit(token_s=1.0),
    CostFit(token_s=0.0, segment_s=1.0),
    CostFit(token_s=0.0, pair_s=1.0),
)
_TOKEN = 1  # index of token_s, the one coefficient that is never left out


class Fitted(NamedTuple):
    """The coefficients, their mean absolute relative error on shapes that were held out, and what was run."""

    fit: CostFit
    error: float
    fitted_on: tuple[Shape, ...]
    held_out: tuple[Shape, ...]


def shapes(max_model_len: int) -> tuple[tuple[Shape, bool], ...]:
    """(shape, whether it is held out), the most telling first, none longer than a request may be."""

    def whole(*lengths: int) -> Shape:
        return tuple(Share(length, 0) for length in lengths)

    def chunk(length: int, context: int) -> Shape:
        return (Share(length, min(context, max_model_len - length)),)

    wanted = (
        (whole(1), False),
        (whole(*[1] * 8), False),
        (whole(64), False),
        (whole(1, 1, 1), True),
        (chunk(32, 1024), False),
        (whole(16), False),
        (whole(24), True),
        (whole(128), False),
        (chunk(24, 384), True),
        (whole(256), False),
        (whole(96), True),
        (whole(16, 16, 16, 16), False),
        (whole(512), False),
        (whole(192), True),
        (whole(48), False),
        (whole(400), True),
        (whole(1024), False),
    )
    fitting: dict[Shape, bool] = {}
    for shape, is_held_out in wanted:
        if all(share.context_tokens >= 0 and sum(share) <= max_model_len for share in shape):
            fitting.setdefault(shape, is_held_out)
    return tuple(fitting.items())


def fit_cost(run: Run, max_model_len: int, pair_s: float, budget_s: float = BUDGET_S) -> Fitted:
    """Run steps until the budget is spent, and solve. `pair_s` is what is known of that coefficient beforehand.

    A shape that would take the steps over the budget, by the fit so far, is left out; a cheaper one after it may fit.
    """
    order = shapes(max_model_len)
    held_out = {shape for shape, is_held_out in order if is_held_out}
    taken: dict[Shape, float] = {}
    spent_s = 0.0
    run(order[0][0])  # a warm-up

    def solved() -> CostFit:
        return solve({shape: seconds for shape, seconds in taken.items() if shape not in held_out}, pair_s)

    for shape, _ in order:
        if len(taken) < NUM_ALWAYS or spent_s + solved().seconds(shape) <= budget_s:
            seconds = _some(run, shape)
            spent_s += sum(seconds)
            taken[shape] = min(seconds)
    _run_the_odd_again(run, taken, solved)
    fit = solved()
    judges = tuple(shape for shape in taken if shape in held_out)
    errors = [abs(fit.seconds(shape) / taken[shape] - 1) for shape in judges]
    return Fitted(fit, sum(errors) / len(errors), tuple(shape for shape in taken if shape not in held_out), judges)


def _some(run: Run, shape: Shape) -> list[float]:
    """Seconds of one run, or of a few if they are short."""
    seconds = [run(shape)]
    while sum(seconds) < REPEAT_S and len(seconds) < MOST_REPEATS:
        seconds.append(run(shape))
    return seconds


def _run_the_odd_again(run: Run, taken: dict[Shape, float], solved: Callable[[], CostFit]) -> None:
    """Each step that was much slower than the others let expect, once more; the faster run counts.

    A neighbour makes a step slower, never faster. The oddest goes first, since it may have made others look odd.
    """
    left_s, seen = AGAIN_S, set[Shape]()
    while len(seen) < len(taken):
        fit = solved()
        oddness = {shape: taken[shape] / max(fit.seconds(shape), 1e-9) for shape in taken if shape not in seen}
        oddest = max(oddness, key=oddness.__getitem__)
        left_s -= fit.seconds(oddest)
        if oddness[oddest] <= 1 + ODD or left_s < 0:
            return
        seen.add(oddest)
        taken[oddest] = min(taken[oddest], run(oddest))


def solve(taken: Mapping[Shape, float], pair_s: float) -> CostFit:
    """The coefficients, none negative, with the least sum of squared relative errors.

    Short prompts say little about `pair_s`: the one known beforehand counts as one more, weak observation.
    """
    rows = [[unit.seconds(shape) / max(seconds, 1e-9) for unit in _UNITS] for shape, seconds in taken.items()]
    rows.append([0.0, 0.0, 0.0, PRIOR_WEIGHT / max(pair_s, 1e-15)])
    matrix = np.array(rows)
    wanted = np.array([1.0] * len(taken) + [PRIOR_WEIGHT])
    best, least = np.zeros(4), math.inf
    for columns in _subsets():
        part = matrix[:, columns]
        scale = np.linalg.norm(part, axis=0)
        scale[scale == 0] = 1.0
        values = np.linalg.lstsq(part / scale, wanted, rcond=None)[0] / scale
        residual = float(np.sum((part @ values - wanted) ** 2))
        if values.min() >= 0 and residual < least - 1e-12:
            best, least = np.zeros(4), residual
            best[list(columns)] = values
    return CostFit(*map(float, best))


def _subsets() -> list[Sequence[int]]:
    """The coefficients that may be above zero together; trying all eight sets is exact, and quick enough."""
    others = [index for index in range(len(_UNITS)) if index != _TOKEN]
    return [(_TOKEN, *chosen) for size in range(len(others) + 1) for chosen in combinations(others, size)]


def saturation(fit: CostFit) -> int:
    """Tokens from which on a step gains little from more: its fixed part is less than an eighth of it."""
    return max(16, int(7 * fit.step_s / max(fit.token_s, 1e-9)))
