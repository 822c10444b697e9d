"""What a share of the device is worth, measured at the start of an engine that may divide it: rates of one core, two, …
and how much two steps that run side by side are in each other's way. A few seconds.

The roofline itself is `core/roofline.py`'s; how a step is run is `calibrate`'s.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from headway.core.cost import Share
from headway.core.roofline import Anatomy, Power, Roofline, Split
from headway.core.settings import MAIN
from headway.core.settings import TOKENS as TOKENS_LANE
from headway.core.sharing import BOUNDS
from headway.placement.calibrate import rates_now, step_s
from headway.placement.multiplex import Cores
from headway.stages.language import LanguageStage
from headway.stages.matrices import Matrix
from headway.stages.tiling import Rates

MOST_COUNTS = 8  # of cores whose rates are measured: with more cores every second, third, … number
PROMPT = (Share(128, 0),)  # what runs side by side to see how much one disturbs the other
TOKENS = (Share(1, 256),) * 8
SIDE_BY_SIDE_S = 0.5  # for each split …
LEAST_STEPS = 8  # … and so many prompts at least
FAR = 1.2  # what a neighbour on the machine does to a share looks like friction: more than this is measured again …
MOST_TRIES = 3  # … so often, and the least counts


def _within(shape: tuple[Share, ...], longest: int) -> tuple[Share, ...]:
    """As much of it as a request may be long."""
    return tuple(Share(min(n, longest), max(0, min(context, longest - n))) for n, context in shape)


class Pair(NamedTuple):
    """Seconds of a step in the lane for prompts and one in the lane for tokens."""

    prompts_s: float
    tokens_s: float


def measure_roofline(stage: LanguageStage, num_threads: int, num_touched_pages: int) -> Roofline:
    """Of this model on `num_threads` cores. Only while nobody else uses the pool or the cores."""
    powers = {}
    try:
        for units in counts(num_threads):
            torch.set_num_threads(units)
            rates = rates_now(stage.model, stage.matrices, stage.pool, num_touched_pages)
            powers[units] = Power(rates.linear_flops, rates.attention_flops, rates.linear_bytes)
    finally:
        torch.set_num_threads(num_threads)
    roofline = Roofline(anatomy(stage), powers)
    longest = len(stage.model.rope)
    prompt, tokens = _within(PROMPT, longest), _within(TOKENS, longest)
    alone = Pair(best_s(stage, prompt), best_s(stage, tokens))
    friction = {}
    for split in roofline.splits:
        paces = roofline.paces(prompt, tokens, split)

        def measured(split: Split = split, paces: tuple[float, float] = paces) -> tuple[float, float]:
            together = side_by_side(stage, prompt, tokens, split, num_threads)
            return together.prompts_s / (alone.prompts_s * paces[0]), together.tokens_s / (alone.tokens_s * paces[1])

        first, second = undisturbed(measured)
        friction[split] = _credible(first), _credible(second)
    return replace(roofline, friction=friction)


def undisturbed(measured: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """The friction of both lanes: measured again where it is far above none, and the least of what was found."""
    found = [measured()]
    while len(found) < MOST_TRIES and max(min(each) for each in zip(*found, strict=True)) > FAR:
        found.append(measured())
    first, second = zip(*found, strict=True)
    return min(first), min(second)


def _credible(factor: float) -> float:
    """A busy neighbour must not decide for the engine's whole life; what is left is corrected as steps are run."""
    return min(max(factor, BOUNDS[0]), BOUNDS[1])


def counts(num_threads: int) -> tuple[int, ...]:
    """Numbers of cores to look at: with each also what it leaves, and all."""
    stride = -(-num_threads // MOST_COUNTS)
    some = range(stride, num_threads, stride)
    return tuple(sorted({*some, *(num_threads - units for units in some), num_threads}))


def slowest(rates: Rates, roofline: Roofline) -> Rates:
    """By which operators are to be cut, so that a tile keeps its bound on the least share too."""
    whole, least = roofline.powers[roofline.units], roofline.powers[min(roofline.powers)]
    flops = min(1.0, least.flops / whole.flops)
    return replace(
        rates,
        linear_flops=rates.linear_flops * flops,
        attention_flops=rates.attention_flops * flops,
        activations=rates.activations * flops,
        elements=rates.elements * flops,
        linear_bytes=rates.linear_bytes * min(1.0, least.bytes / whole.bytes),
        copy_bytes=rates.copy_bytes * min(1.0, least.bytes / whole.bytes),
    )


def anatomy(stage: LanguageStage) -> Anatomy:
    config = stage.model.config
    layers = [matrix for layer in stage.matrices.layers for matrix in layer]
    return Anatomy(
        layer_flops=2.0 * sum(map(_cells, layers)),
        layer_bytes=float(sum(matrix.num_bytes for matrix in layers)),
        head_flops=2.0 * _cells(stage.matrices.head),
        head_bytes=float(stage.matrices.head.num_bytes),
        pair_flops=4.0 * config.num_layers * config.q_size,
        context_bytes=2.0 * config.num_layers * config.kv_size * stage.model.dtype.itemsize,
    )


def _cells(matrix: Matrix) -> int:
    d_in, d_out = matrix.size
    return d_in * d_out


def best_s(stage: LanguageStage, shape: Sequence[Share], runs: int = 3) -> float:
    """Seconds of the step alone, with the calling thread's number of threads; the best of a few."""
    step_s(stage, tuple(shape))
    return min(step_s(stage, tuple(shape)) for _ in range(runs))


def side_by_side(
    stage: LanguageStage, prompts: Sequence[Share], tokens: Sequence[Share], split: Split, num_threads: int
) -> Pair:
    """Both again and again at once, each on its share: the lower quartile of what was not the first or last, since a
    neighbour makes steps slower, never faster."""
    taken: dict[str, list[float]] = {MAIN: [], TOKENS_LANE: []}
    over = threading.Event()
    broken: list[Exception] = []

    def again_and_again(name: str, shape: tuple[Share, ...], units: int) -> None:
        Cores().devote(name, units)
        try:
            with torch.inference_mode():
                while not over.is_set():
                    taken[name].append(step_s(stage, shape, name))
        except Exception as error:  # to be raised where somebody waits for it
            broken.append(error)

    lane = threading.Thread(target=again_and_again, args=(TOKENS_LANE, tuple(tokens), split.tokens))
    cores = Cores()
    begun = time.perf_counter()
    lane.start()
    cores.devote(MAIN, split.prompts)
    try:
        while not broken and (
            time.perf_counter() - begun < SIDE_BY_SIDE_S
            or len(taken[MAIN]) < LEAST_STEPS
            or len(taken[TOKENS_LANE]) < 3
        ):
            taken[MAIN].append(step_s(stage, tuple(prompts), MAIN))
    finally:
        over.set()
        lane.join()
        cores.release(num_threads)
    if broken:
        raise broken[0]
    return Pair(*(_lower_quartile(taken[name][1:-1] or taken[name]) for name in taken))


def _lower_quartile(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 4]
