"""Loads with a name: shaped like published traces, from the trace itself where it is at hand, else drawn to its
quantiles.

`HEADWAY_DATA` names the folder whose `traces/` holds the files of TRACES. Without it, lengths are drawn
independently, log-linearly between the quantiles below, which were counted on the whole published traces; the load's
source says which it was.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headway.bench import traces
from headway.bench.load import QWEN_MIX, Arrivals, Load
from headway.bench.traces import Asked, Trace

AT = (0.05, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)  # the shares at which the quantiles below were counted


class Lengths(NamedTuple):
    """Quantiles of prompts and answers, in tokens, at AT."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]


class Shape(NamedTuple):
    """What a stand-in is drawn to. `reuse`: the share of requests whose prompt goes on from an earlier one's."""

    file: str
    rate: float
    process: Arrivals
    cv: float
    lengths: Mapping[str, Lengths]
    reuse: float = 0.0


TRACES: dict[str, Shape] = {
    "qwen": Shape(
        "qwentrace_A_order000-159.csv.gz",
        2.75,
        "poisson",
        1.0,
        {
            "text": Lengths((71, 130, 746, 874, 1102, 1398, 3260, 4615), (32, 118, 276, 442, 683, 821, 1240, 1982)),
            "image": Lengths((352, 356, 374, 388, 396, 402, 810, 931), (47, 53, 70, 88, 178, 200, 209, 212)),
            "search": Lengths(
                (1210, 3047, 4380, 6483, 8068, 10821, 15129, 16746), (148, 254, 350, 447, 659, 960, 1384, 1488)
            ),
            "file": Lengths((259, 737, 3212, 6361, 7428, 8273, 8949, 9118), (321, 415, 701, 821, 931, 954, 973, 978)),
        },
    ),
    "azure-code": Shape(
        "azure2023_code_min00-30.csv.gz",
        2.57,
        "gamma",
        13.2,
        {"": Lengths((75, 578, 1469, 2744, 5188, 7303, 7436, 7437), (6, 9, 13, 24, 55, 90, 251, 1899))},
    ),
    "azure-conv": Shape(
        "azure2023_conv_min00-30.csv.gz",
        5.53,
        "gamma",
        1.09,
        {"": Lengths((181, 396, 1020, 1189, 2734, 4083, 4142, 14050), (41, 85, 129, 395, 424, 451, 601, 1000))},
    ),
    "mooncake": Shape(
        "mooncake_conversation_min00-30.csv.gz",
        3.40,
        "poisson",
        1.0,
        {"": Lengths((901, 2306, 6909, 15367, 27367, 39550, 85400, 126195), (10, 156, 350, 472, 597, 698, 1119, 2000))},
        reuse=0.39,
    ),
}


def named(name: str, *, num_requests: int, seed: int, window: int = 0) -> Load:
    """One of TRACES at its own rate. Qwen's has kinds but no arrivals, which are drawn; the others have no kinds, and
    are taken from the start of their nth `window` of so many requests."""
    if name not in TRACES:
        raise ValueError(f"There is no load {name!r}: known are {', '.join(TRACES)}, or give the path of a trace.")
    shape = TRACES[name]
    path = _at_hand(shape.file)
    if path is None:
        drawn = stand_in(shape, num_requests, seed)
        load = Load.of(
            name, f"drawn to the quantiles of {name} (seed {seed}), not the trace itself", drawn, num_requests, seed
        )
    else:
        trace = traces.read(path, limit=max((window + 1) * num_requests, 1000), seed=seed)
        load = Load.of(name, f"trace {path.name}", trace, num_requests, seed, window)
    return load if load.timed else load.arriving(shape.process, shape.rate, seed, shape.cv)


def _at_hand(file: str) -> Path | None:
    folder = os.environ.get("HEADWAY_DATA")
    if not folder:
        return None
    path = Path(folder) / "traces" / file
    return path if path.is_file() else None


def stand_in(shape: Shape, num_requests: int, seed: int) -> Trace:
    """Requests without arrivals, drawn to a shape."""
    rng = np.random.default_rng([seed, 4])
    if "" in shape.lengths:
        kinds = [""] * num_requests
    else:
        shares = np.array([QWEN_MIX[kind] for kind in shape.lengths])
        kinds = rng.choice(list(shape.lengths), size=num_requests, p=shares / shares.sum()).tolist()
    requests = [
        Asked(
            0.0, drawn(shape.lengths[kind].prompt, rng.random()), drawn(shape.lengths[kind].output, rng.random()), kind
        )
        for kind in kinds
    ]
    return Trace("stand-in", False, _with_reuse(requests, shape.reuse, rng) if shape.reuse else requests)


def drawn(quantiles: tuple[int, ...], share: float) -> int:
    """The length at this share: log-linear between quantiles, and level below the lowest that is known."""
    return max(1, round(float(np.exp(np.interp(share, AT, np.log(quantiles))))))


def _with_reuse(requests: list[Asked], reuse: float, rng: np.random.Generator) -> list[Asked]:
    """Block 0 begins every prompt, as in Mooncake's trace; some prompts go on from an earlier one's, of eight looked
    at the one whose length is nearest, so that most of the prompt is shared."""
    block_tokens = 512
    given: list[Asked] = []
    next_id = 1
    for asked in requests:
        num_blocks = -(-asked.num_prompt // block_tokens)
        shared: tuple[int, ...] = (0,)
        if given and rng.random() < reuse:
            looked_at = [given[int(rng.integers(len(given)))] for _ in range(8)]
            nearest = min(looked_at, key=lambda one: abs(one.num_prompt - asked.num_prompt))
            shared = nearest.blocks[: nearest.num_prompt // block_tokens] or shared
        own = num_blocks - len(shared[:num_blocks])
        blocks = shared[:num_blocks] + tuple(range(next_id, next_id + own))
        next_id += own
        given.append(Asked(0.0, asked.num_prompt, asked.num_output, "", blocks, block_tokens))
    return given
