"""The schedulers that are compared, each a few switches away from the one that is served, and a load for them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from headway.bench.load import Load
from headway.bench.score import Score, outcome_of, score
from headway.core.cost import CostFit
from headway.core.request import SLO, Request, Sampling
from headway.core.settings import SchedulerSettings
from headway.placement.simulate import Device, Simulation, fleet, priced

# half a billion parameters in bfloat16 on two cores, as an engine measured it at its start
EXAMPLE_FIT = CostFit(step_s=0.070, token_s=1.93e-3, segment_s=1e-3, pair_s=6.7e-7)
CHUNKS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def policies(base: SchedulerSettings, chunks: Sequence[int] = CHUNKS) -> dict[str, SchedulerSettings]:
    """Name -> settings. Whatever is not named in a line below is as in `base`, which is ours: "operator"."""
    chunked = replace(base, preempt="chunk")
    return {
        "operator": base,
        "layer": replace(base, preempt="layer"),  # suspended between layers only
        "none": replace(base, preempt="none"),  # our order and refusals, but what runs runs to its end
        "deadline, none": replace(base, order="deadline", preempt="none"),  # plain EDF, never suspended
        "fcfs": replace(base, order="fcfs", preempt="none", pack=False, refuse_unattainable=False),  # one by one
        "fcfs, packed": replace(base, order="fcfs", preempt="none", refuse_unattainable=False),
        # our order and refusals, in steps of so many tokens
        **{f"chunk {size}": replace(chunked, chunk_tokens=size) for size in chunks},
        # in order of arrival, as servers do by default
        **{
            f"chunk {size}, fcfs": replace(chunked, chunk_tokens=size, order="fcfs", refuse_unattainable=False)
            for size in chunks
        },
    }


def requests_of(load: Load, prompts: Sequence[tuple[int, ...]], slos: Mapping[str, SLO]) -> list[Request]:
    """The load's requests, arriving from 0 on, greedy, each counted under its class."""
    return [
        Request(
            id=str(index),
            prompt=prompt,
            max_tokens=asked.num_output,
            arrival=asked.at_s,
            slo=slos.get(asked.kind, SLO()),
            sampling=Sampling(temperature=0.0),
            slo_class=asked.kind,
        )
        for index, (asked, prompt) in enumerate(zip(load.requests, prompts, strict=True))
    ]


class Simulated(NamedTuple):
    """What became of a load on simulated devices; `counters` are summed over them, but for the largest of a `most_`."""

    score: Score
    counters: dict[str, int]


def simulate(
    load: Load,
    prompts: Sequence[tuple[int, ...]],
    slos: Mapping[str, SLO],
    settings: SchedulerSettings,
    device: Device,
    num_devices: int = 1,
    seed: int = 0,
    watch: Callable[[list[Simulation]], None] = lambda engines: None,
) -> Simulated:
    """The same core and driver on the virtual clock. `watch` gets the engines before anything is sent to them."""
    engines = [priced(settings, device, seed + number) for number in range(num_devices)]
    watch(engines)
    records = fleet(requests_of(load, prompts, slos), engines).records
    counters: dict[str, int] = {}
    for engine in engines:
        for name, count in engine.scheduler.counters.items():
            before = counters.get(name, 0)
            counters[name] = max(before, count) if name.startswith("most_") else before + count
    return Simulated(score([outcome_of(record, 0.0) for record in records.values()], slos), counters)
