"""Every case on the virtual clock: `python -m headway.bench.goodput_simulated`. Needs no model and no calm machine.

The same core and driver as in the engine, on a device that is the prices of half a billion parameters on two cores.
Says what the schedulers make of a load when nothing disturbs them, for more loads and draws than there is time to
measure; what is measured stands beside it on the page.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

from headway.bench import goodput_page, report
from headway.bench.contest import TTFT, Contender, Run, contest
from headway.bench.goodput import ALWAYS, CASES, CHUNK_NAMES, Case
from headway.bench.load import Load, base_kind, p90_prompt, prompts, targets
from headway.bench.named import named
from headway.bench.policies import EXAMPLE_FIT, policies, simulate
from headway.core.cost import Share
from headway.core.settings import SchedulerSettings
from headway.placement.fitting import saturation
from headway.placement.simulate import Device

COMMAND = "python -m headway.bench.goodput_simulated"
FCFS = "fcfs"
TITLE = "On the virtual clock: all loads"
MODEL = "0.5 b, prices"
MAX_MODEL_LEN = 4096
VOCAB_SIZE = 32_000
SPREAD = 0.05  # of the logarithm of what a step takes against its price
DEVICE = Device(fit=EXAMPLE_FIT, tile_s=0.006, num_pages=40_000, spread=SPREAD)
SETTINGS = SchedulerSettings(
    max_model_len=MAX_MODEL_LEN,
    max_num_queued=1 << 20,
    pack_tokens=saturation(EXAMPLE_FIT),
    prefix_caching=False,
    max_parked_tokens=16_000,
)
BOUND = (
    f"Who refuses nobody cannot for ever keep more than this, the device never idle and packs always of "
    f"{SETTINGS.pack_tokens} tokens (who refuses the longest, or reads in longer chunks, can keep a little more):"
)


class Draw(NamedTuple):
    """Goodput of every scheduler in one draw of a case, and the rate that would fill all time."""

    contenders: Mapping[str, Contender]
    full: float


def draw(case: Case, num_requests: int, seed: int) -> Draw:
    load = named(case.load, num_requests=num_requests, seed=seed, window=seed - 1)
    load = load.scaled(1 / case.divisor).answering(1).within(MAX_MODEL_LEN)
    isolated_s = EXAMPLE_FIT.seconds([Share(p90_prompt(load, base_kind(load)), 0)])
    slos, texts = targets(load, isolated_s, case.k), prompts(load, VOCAB_SIZE, seed)
    compared = policies(SETTINGS)

    def attain(name: str, rate: float) -> Run:
        return Run(rate, simulate(load.at_rate(rate), texts, slos, compared[name], DEVICE).score)

    starts = dict.fromkeys([*ALWAYS, *CHUNK_NAMES], 0.5 / isolated_s)
    return Draw(contest(starts, attain, TTFT, tolerance=0.05, growth=2.0, most_rates=24), full_rate(load))


def full_rate(load: Load) -> float:
    """Requests a second that fill all time, were every pack as long as packs get: a prompt pays for its part of one."""
    packed = [min(1.0, asked.num_prompt / SETTINGS.pack_tokens) for asked in load.requests]
    alone_s = [EXAMPLE_FIT.seconds([Share(asked.num_prompt, 0)]) for asked in load.requests]
    return len(packed) / sum(s - (1 - part) * EXAMPLE_FIT.step_s for s, part in zip(alone_s, packed, strict=True))


def bound(case: Case, draws: Sequence[Draw]) -> str:
    """What bounds those who refuse nobody, and pack no further than packs go."""
    full = statistics.median(each.full for each in draws)
    ratios = [each.full / good for each in draws if (good := each.contenders[FCFS].good)]
    beside = (
        f", {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f}) × FCFS unchunked" if ratios else ""
    )
    return f"- {case.name}: {full:.3g} req/s{beside}."


def result(case: Case, num_requests: int, draws: Sequence[Mapping[str, Contender]]) -> goodput_page.CaseResult:
    """In the form in which measured cases are kept, as far as the tables need it."""
    return goodput_page.CaseResult(
        name=case.name,
        model=MODEL,
        source="",
        num_requests=num_requests,
        isolated_ttft_ms=0.0,
        targets_ms={},
        policies=[goodput_page.policy_of(name, draws, draws[0][name], num_requests) for name in draws[0]],
        provenance="",
        bytes_per_parked_token=0,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", type=Case.parse, default=CASES, metavar="LOAD:DIVISOR:K")
    parser.add_argument("--num-requests", type=int, default=300, help="of a draw")
    parser.add_argument("--draws", type=int, default=3, help="other requests each; the page shows medians")
    parser.add_argument("--folder", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    draws: dict[Case, list[Draw]] = {case: [] for case in options.cases}
    turns = [(case, seed) for case in options.cases for seed in range(1, options.draws + 1)]
    for case, seed in track(turns, description="simulating"):
        draws[case].append(draw(case, options.num_requests, seed))
    results = [result(case, options.num_requests, [each.contenders for each in found]) for case, found in draws.items()]
    bounds = "\n".join(bound(case, found) for case, found in draws.items())
    body = (
        f"Printed by `{report.command(COMMAND, arguments)}`: a step takes {1e3 * EXAMPLE_FIT.step_s:.0f} ms + "
        f"{1e3 * EXAMPLE_FIT.token_s:.2f} ms per token + {1e3 * EXAMPLE_FIT.segment_s:.0f} ms per prompt + "
        f"{1e6 * EXAMPLE_FIT.pair_s:.2f} µs per pair of tokens, as an engine with half a billion parameters measured "
        f"on two cores; tiles of {1e3 * DEVICE.tile_s:.0f} ms. {options.num_requests} requests a run, "
        f"{options.draws} draws: median (least … most).\n\n{goodput_page.ratios(results)}\n\n"
        f"{goodput_page.verdicts(results)}\n\n{BOUND}\n\n{bounds}\n\n{report.provenance()}"
    )
    goodput_page.keep(options.folder, goodput_page.Section(TITLE, body))
    goodput_page.write(options.folder)


if __name__ == "__main__":
    main()
