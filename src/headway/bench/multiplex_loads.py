"""The loads and the ways of sharing a device that `bench.multiplex` and `bench.multiplex_simulated` compare."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from headway.bench.load import Load
from headway.bench.policies import policies
from headway.bench.traces import Asked
from headway.core.settings import SchedulerSettings

CHUNKS = (32, 64, 128, 256)
TURNS, MIXED, SPLIT, AUTO = "turns", "turns, riding along", "fixed split", "auto"
K_TTFT, K_TPOT = 3.0, 3.0  # targets, in what a lone prompt and a lone answer take


class Mix(NamedTuple):
    """Medians of the lengths of prompts and answers, drawn with a log-normal spread."""

    num_prompt: int
    num_output: int


BALANCED = Mix(128, 32)
LOADS: dict[str, tuple[Mix, ...]] = {  # one after another, each for an equal part of the requests
    "decode-heavy": (Mix(24, 64),),
    "prefill-heavy": (Mix(320, 6),),
    "balanced": (BALANCED,),
    "shifting": (Mix(24, 64), Mix(320, 6), Mix(24, 64)),
}
SPREAD = 0.5


def load_of(name: str, num_requests: int, seed: int) -> Load:
    """Poisson arrivals; at which rate is set run by run."""
    rng = np.random.default_rng([seed, 7])
    mixes = LOADS[name]
    asked = []
    for number in range(num_requests):
        mix = mixes[number * len(mixes) // num_requests]
        lengths = [max(2, round(median * float(np.exp(SPREAD * rng.standard_normal())))) for median in mix]
        asked.append(Asked(float(number), lengths[0], lengths[1], "text"))
    source = " then ".join(f"prompts of about {mix.num_prompt} and answers of {mix.num_output}" for mix in mixes)
    return Load(name, f"{source} tokens", tuple(asked)).arriving("poisson", 1.0, seed)


def compared(base: SchedulerSettings) -> dict[str, SchedulerSettings]:
    """Name -> settings. The orders behind a comma are for the ablation."""
    chunked = policies(replace(base, lanes="turns"), CHUNKS)
    ours: dict[str, SchedulerSettings] = {
        TURNS: replace(base, lanes="turns"),
        MIXED: replace(base, lanes="mixed"),
        SPLIT: replace(base, lanes="split"),
        AUTO: replace(base, lanes="auto"),
    }
    shortest = {f"{name}, shortest": replace(settings, order="shortest") for name, settings in ours.items()}
    return {f"chunk {size}": chunked[f"chunk {size}"] for size in CHUNKS} | ours | shortest
