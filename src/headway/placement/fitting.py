"""From steps that were timed to the coefficients of `core.cost`: which shapes to run, and how to solve for them.

Owns the choice of shapes, the budget and the least squares; knows no tensor. Whoever calls it says how a step is run,
so that a test can be the machine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from itertools import combinations
from typing import NamedTuple

import numpy as np

from headway.core.cost import CostFit, Share

BUDGET_S = 1.5  # of the device, for all steps together; disturbed ones may take as much again
CREDIBLE = 2.0  # times what was expected beforehand: a step that took longer says nothing about this machine
REPEAT_S = 0.05  # a shorter step is run again, until so much is spent or it was run `MOST_REPEATS` times
MOST_REPEATS = 4
ODD = 0.2  # a step slower than fitted by this share is taken to have been disturbed, and run again
AGAIN_S = 0.5  # of the device for running such steps again
PRIOR_WEIGHT = 0.05  # of each coefficient that was expected beforehand, in units of one step's relative error
NUM_ALWAYS = 4  # shapes that are run whatever the budget: three to fit, one held out
# tokens and context of the longest shape: a CPU has no time for longer ones at its start, on a GPU shorter ones say
# little of prompts that fill it
LONGEST_PROBES = {"cpu": 1056, "cuda": 8192}

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


def shapes(max_model_len: int, longest: int = LONGEST_PROBES["cpu"]) -> tuple[tuple[Shape, bool], ...]:
    """(shape, whether it is held out), the most telling first, none longer than a request may be, or than `longest`."""

    def whole(*lengths: int) -> Shape:
        return tuple(Share(length, 0) for length in lengths)

    def behind(length: int, context: int, count: int = 1) -> Shape:
        return (Share(length, min(context, max_model_len - length)),) * count

    wanted = (
        (whole(1), False),
        (behind(1, 128, 8), False),
        (whole(64), False),
        (behind(1, 64, 3), True),
        (behind(32, 1024), False),
        (whole(16), False),
        (whole(24), True),
        (whole(128), False),
        (behind(24, 384), True),
        (whole(256), False),
        (whole(96), True),
        (behind(1, 256, 16), False),
        (whole(16, 16, 16, 16), False),
        (whole(512), False),
        (whole(192), True),
        (whole(48), False),
        (whole(400), True),
        (whole(1024), False),
        (whole(2048), False),
        (behind(1024, 4096), False),
        (whole(3072), True),
        (behind(1, 4096, 32), False),
        (whole(8192), False),
    )
    fitting: dict[Shape, bool] = {}
    for shape, is_held_out in wanted:
        if all(share.context_tokens >= 0 and sum(share) <= min(max_model_len, longest) for share in shape):
            fitting.setdefault(shape, is_held_out)
    return tuple(fitting.items())


def fit_cost(
    run: Run,
    max_model_len: int,
    expected: CostFit,
    budget_s: float = BUDGET_S,
    longest: int = LONGEST_PROBES["cpu"],
) -> Fitted:
    """Run steps until the budget is spent, and solve. `expected` is what single operators let expect beforehand;
    `longest` the tokens and context of the longest shape.

    A shape that would take the steps over the budget, by the fit so far, is left out; a cheaper one after it may fit.
    A step that took incredibly long is left out of the solving, and mostly not charged; a held-out one still counts as
    an error, so that who reads it sees that the machine was busy.
    """
    order = shapes(max_model_len, longest)
    held_out = {shape for shape, is_held_out in order if is_held_out}
    taken: dict[Shape, float] = {}
    charged_s = spent_s = 0.0
    run(order[0][0])  # a warm-up

    def most_s(shape: Shape) -> float:
        return CREDIBLE * expected.seconds(shape)

    def solved() -> CostFit:
        believed = {shape: seconds for shape, seconds in taken.items() if seconds <= most_s(shape)}
        return solve({shape: seconds for shape, seconds in believed.items() if shape not in held_out}, expected)

    for shape, _ in order:
        if len(taken) >= NUM_ALWAYS:
            next_s = solved().seconds(shape)
            if charged_s + next_s > budget_s or spent_s + next_s > 2 * budget_s:
                continue
        seconds = _some(run, shape)
        charged_s += sum(min(each, most_s(shape)) for each in seconds)
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
        if oddness[oddest] <= 1 + ODD or fit.seconds(oddest) > left_s:
            return
        seen.add(oddest)
        seconds = run(oddest)
        left_s -= seconds
        taken[oddest] = min(taken[oddest], seconds)


def solve(taken: Mapping[Shape, float], expected: CostFit) -> CostFit:
    """The coefficients, none negative, with the least sum of squared relative errors.

    What is expected of each beforehand counts as one more, weak observation: short prompts say little about `pair_s`,
    and few steps little about anything.
    """
    rows = [[unit.seconds(shape) / max(seconds, 1e-9) for unit in _UNITS] for shape, seconds in taken.items()]
    known = astuple(expected)
    rows += [
        [PRIOR_WEIGHT / value if index == at else 0.0 for index in range(4)] for at, value in enumerate(known) if value
    ]
    matrix = np.array(rows)
    wanted = np.array([1.0] * len(taken) + [PRIOR_WEIGHT] * (len(rows) - len(taken)))
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
    """Tokens from which on a step gains little from more: its fixed part is less than a sixteenth of it."""
    return max(16, int(15 * fit.step_s / max(fit.token_s, 1e-9)))
