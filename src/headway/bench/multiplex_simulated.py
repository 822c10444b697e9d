"""The contest of `bench.multiplex` on the virtual clock: `python -m headway.bench.multiplex_simulated`. Needs no model.

The same core and driver as in the engine, on devices that are prices: two machines as they were once measured, and one
on which a share is worth more, since half of its cores draw nearly all of what memory gives. It says what the ways of
sharing make of a load when nothing disturbs them, with more requests and draws than there is time to measure.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from headway.bench import report
from headway.bench.contest import JOINT, Contender, Run, contest
from headway.bench.load import Load, p90_prompt, prompts, targets
from headway.bench.multiplex_loads import BALANCED, K_TPOT, K_TTFT, LOADS, compared, load_of
from headway.bench.multiplex_verdict import Kept, verdict
from headway.bench.policies import simulate
from headway.bench.score import Score
from headway.core.cost import CostFit, Share
from headway.core.request import SLO
from headway.core.roofline import Anatomy, Power, Roofline, Split
from headway.core.settings import SchedulerSettings
from headway.placement.fitting import saturation
from headway.placement.simulate import Device

COMMAND = "python -m headway.bench.multiplex_simulated"
MAX_MODEL_LEN = 2048
VOCAB_SIZE = 32_000
SPREAD = 0.08  # of the logarithm of what a step takes against its price
# smollm2-135m in bfloat16: 106 million weights in its layers, 28 in its head
ANATOMY = Anatomy(2.12e8, 2.12e8, 5.66e7, 5.66e7, 6.91e4, 2.3e4)
HALVES = Split(1, 1)


class Machine(NamedTuple):
    """`device` is what it is, `means` how it is told of."""

    means: str
    device: Device


def machine(means: str, fit: CostFit, powers: Mapping[int, Power], friction: tuple[float, float]) -> Machine:
    roofline = Roofline(ANATOMY, powers, {HALVES: friction})
    return Machine(means, Device(fit=fit, tile_s=0.006, num_layers=30, spread=SPREAD, roofline=roofline))


MACHINES = {
    "page": machine(
        "two cores of a Zen 4, as once measured: half of them have half of the arithmetic and two thirds of the memory",
        CostFit(step_s=11.5e-3, token_s=0.6e-3, segment_s=0.6e-3, pair_s=0.5e-6),
        {1: Power(226e9, 66e9, 27.3e9), 2: Power(428e9, 117e9, 39.8e9)},
        (1.0, 0.95),
    ),
    "even": machine(
        "two cores of a Zen 5, as once measured: one has half of the arithmetic and three quarters of the memory",
        CostFit(step_s=7.0e-3, token_s=0.217e-3, segment_s=0.2e-3, pair_s=0.126e-6),
        {1: Power(478e9, 327e9, 35.0e9), 2: Power(918e9, 543e9, 46.6e9)},
        (1.0, 1.0),
    ),
    "memory": machine(
        "two cores with matrix tiles, of which each alone draws nine tenths of what memory gives both",
        CostFit(step_s=14.1e-3, token_s=0.17e-3, segment_s=0.7e-3, pair_s=0.28e-6),
        {1: Power(1000e9, 300e9, 17.9e9), 2: Power(1900e9, 570e9, 19.9e9)},
        (1.0, 1.0),
    ),
}


def settings_of(device: Device) -> SchedulerSettings:
    return SchedulerSettings(
        max_model_len=MAX_MODEL_LEN, pack_tokens=saturation(device.fit), prefix_caching=False, max_parked_tokens=16_000
    )


class Draw(NamedTuple):
    """One draw of a load on a device."""

    load: Load
    texts: list[tuple[int, ...]]
    slos: dict[str, SLO]
    lone_s: float


class Attained(NamedTuple):
    """What a run at one rate attained; how often the device was divided anew."""

    score: Score
    num_repartitions: int


def draw_of(name: str, device: Device, num_requests: int, seed: int) -> Draw:
    load = load_of(name, num_requests, seed).within(MAX_MODEL_LEN)
    lone_s = device.fit.seconds([Share(p90_prompt(load, "text"), 0)])
    slos = targets(load, lone_s, K_TTFT, device.fit.next_tokens(1, BALANCED.num_prompt).fitted_s, K_TPOT)
    return Draw(load, prompts(load, VOCAB_SIZE, seed), slos, lone_s)


def attained(name: str, device: Device, way: str, rate: float, num_requests: int, seed: int) -> Attained:
    """One run of one way."""
    return run_of(draw_of(name, device, num_requests, seed), device, way, rate, seed)


def run_of(draw: Draw, device: Device, way: str, rate: float, seed: int) -> Attained:
    settings = compared(settings_of(device))[way]
    found = simulate(draw.load.at_rate(rate), draw.texts, draw.slos, settings, device, seed=seed)
    return Attained(found.score, found.counters.get("repartitions", 0))


def drawn(name: str, device: Device, ways: Sequence[str], num_requests: int, seed: int) -> dict[str, Contender]:
    """Goodput of every way in one draw of a load."""
    draw = draw_of(name, device, num_requests, seed)

    def attain(way: str, rate: float) -> Run:
        return Run(rate, run_of(draw, device, way, rate, seed).score)

    starts = dict.fromkeys(ways, 0.3 / draw.lone_s)
    return contest(starts, attain, JOINT, tolerance=0.015, growth=1.5, most_rates=24)


def goodputs(name: str, device: Device, ways: Sequence[str], num_requests: int, draws: int) -> dict[str, Kept]:
    """The median of some draws."""
    found = [drawn(name, device, ways, num_requests, seed) for seed in range(1, draws + 1)]
    return {way: Kept(statistics.median(each[way].good for each in found)) for way in ways}


def section(means: str, found: Mapping[str, Mapping[str, Kept]]) -> str:
    ways = list(dict.fromkeys(way for by_way in found.values() for way in by_way))
    rows = [[way, *(by_way[way].told if way in by_way else "" for by_way in found.values())] for way in ways]
    table = report.table(["joint goodput, req/s", *found], rows)
    return f"## On {means}\n\n{table}\n\n{verdict(found)}"


def sections(options: argparse.Namespace) -> Iterator[str]:
    for each in options.machines:
        means, device = MACHINES[each]
        found = {}
        for name in options.loads:
            ways = [way for way in compared(settings_of(device)) if "shortest" not in way or name in options.ablation]
            found[name] = goodputs(name, device, ways, options.num_requests, options.draws)
        yield section(means, found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--ablation", nargs="*", choices=LOADS, default=list(LOADS), help="loads with other orders too")
    parser.add_argument("--num-requests", type=int, default=200, help="of a draw")
    parser.add_argument("--draws", type=int, default=3, help="other requests each; the page shows medians")
    parser.add_argument("--folder", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    said = f"{options.num_requests} requests a draw, median of {options.draws}; steps are off by {SPREAD:.0%}."
    done: list[str] = []
    for part in sections(options):
        done.append(part)
        body = "\n\n".join([said, *done])
        command = report.command(COMMAND, arguments)
        report.write(
            "multiplex-simulated", "Prompts and tokens on one device, on prices", command, body, options.folder
        )


if __name__ == "__main__":
    main()
