"""The product's claim, measured: `python -m headway.bench.goodput`.

Goodput is the highest rate at which every class of requests meets its TTFT target for at least 90 % of its requests.
Here it is found, on one engine with one set of weights, for this project's scheduler and for what others do: suspended
at operators or at layers, in chunks of 16 … 2048 tokens, never suspended in the order of deadlines or of arrival. The
policies take turns run by run; chunk sizes all begin where the best of them is expected, lower if none passes there,
and those that pass go on to higher rates until the last one fails.

These machines are shared, and their clocks drift. So before and after each run a lone prompt is timed: the run's rate
and targets are scaled by the isolated TTFT before it, as if the machine had stayed what it was at the beginning, and if
the two differ by more than `DRIFT` the run is thrown away and made again. One whose result is close to the line, or
that fails but not by far, is made three times, and the median counts.

Results are kept case by case in docs/results/goodput.json; the page is made from that file.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from headway.bench import goodput_page, report
from headway.bench.contest import LOWEST, TTFT, Contender, Run, contest, outlast
from headway.bench.load import Load, base_kind, lone_prompt, p90_prompt, prompts, targets
from headway.bench.named import named
from headway.bench.policies import CHUNKS, policies, requests_of, simulate
from headway.bench.replay import replay
from headway.bench.score import quantile, score
from headway.config import EngineSettings
from headway.core.cost import CostFit, Share
from headway.core.request import SLO, Request, Sampling
from headway.core.settings import SchedulerSettings
from headway.placement.engine import Engine, build_engine
from headway.placement.simulate import Device
from headway.stages.tiling import AIM

COMMAND = "python -m headway.bench.goodput"
ALWAYS = ("operator", "layer", "deadline, none", "fcfs", "fcfs, packed")
CHUNK_NAMES = tuple(f"chunk {size}" for size in CHUNKS)
EXPECTED = 0.75  # of a simulated goodput: where the search for the real one begins
LONE_RUNS = 7
LONE_RUNS_BESIDE = 5  # of a run, before it and after it
DRIFT = 1.2  # between those two: more, and the run was disturbed
STEADY = 1.1  # between two measurements of an undisturbed machine, at most
MAX_TRIES = 4
REPEATS = 3  # of a run whose result is close
say = Console(stderr=True).print


class Case(NamedTuple):
    """A load at a length scale, with targets k times as long as the isolated prefill of its p90 prompt."""

    load: str
    divisor: float
    k: float

    @property
    def name(self) -> str:
        return f"{self.load} 1/{self.divisor:g}, k = {self.k:g}"

    @classmethod
    def parse(cls, text: str) -> "Case":
        """LOAD:DIVISOR:K, for example qwen:16:2."""
        try:
            load, divisor, k = text.split(":")
            return cls(load, float(divisor), float(k))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no case: give LOAD:DIVISOR:K, such as qwen:16:2") from error


CASES = tuple(
    Case(load, divisor, k)
    for load, divisor, ks in (
        ("qwen", 16, (2.0, 1.5)),
        ("qwen", 32, (2.0, 1.5)),
        ("azure-code", 16, (2.0,)),
        ("mooncake", 64, (2.0,)),
    )
    for k in ks
)


@dataclass
class Tries:
    """How many runs were thrown away as disturbed."""

    num_discarded: int = 0


@dataclass
class Field:
    """One draw of a case's load on one engine: everything that a run needs."""

    engine: Engine
    load: Load
    prompts: list[tuple[int, ...]]
    isolated_s: float
    slos: dict[str, SLO]
    settings: dict[str, SchedulerSettings]
    tries: Tries

    def attain(self, name: str, rate: float) -> Run:
        """One run of one policy, an undisturbed one if possible, at this rate and these targets were the machine as
        fast as at the beginning: both go with the isolated TTFT just before the run."""
        for number in range(1, MAX_TRIES + 1):
            before_s = isolated_ttft_s(self.engine, self.load, LONE_RUNS_BESIDE)
            slower = before_s / self.isolated_s
            slos = scaled(self.slos, slower)
            requests = requests_of(self.load.at_rate(rate / slower), self.prompts, slos)
            run = replay(self.engine, requests, self.settings[name])
            after_s = isolated_ttft_s(self.engine, self.load, LONE_RUNS_BESIDE)
            is_disturbed = max(before_s, after_s) > DRIFT * min(before_s, after_s)
            if not is_disturbed:
                break
            self.tries.num_discarded += number < MAX_TRIES
        outcomes = run.outcomes()
        found = Run(
            rate,
            score(outcomes, slos),
            run.counters.get("preemptions", 0),
            run.counters.get("most_parked_tokens", 0),
            quantile(run.decisions_s, 0.5),
            quantile(run.decisions_s, 0.99),
            is_disturbed,
            tuple(outcomes),
            run.counters.get("repartitions", 0),
            tuple(each.meets_all(slos[each.kind]) for each in sorted(outcomes, key=lambda each: each.at_s)),
        )
        shares = " ".join(f"{kind} {share:.0%}" for kind, share in found.score.shares(ttft_only=True).items())
        say(f"  {name:<16} {rate:7.3f}/s  × {1 / slower:.2f}  {shares}", highlight=False)
        return found

    def predicted(self, device: Device) -> Callable[[str, float], Run]:
        """Makes the same runs on the virtual clock."""

        def attain(policy: str, rate: float) -> Run:
            simulated = simulate(self.load.at_rate(rate), self.prompts, self.slos, self.settings[policy], device)
            return Run(rate, simulated.score)

        return attain


def scaled(slos: Mapping[str, SLO], factor: float) -> dict[str, SLO]:
    """All targets so many times as long."""

    def times(target_s: float | None) -> float | None:
        return None if target_s is None else factor * target_s

    return {kind: SLO(times(slo.ttft_s), times(slo.tpot_s), times(slo.total_s)) for kind, slo in slos.items()}


def isolated_ttft_s(engine: Engine, load: Load, num_runs: int = LONE_RUNS) -> float:
    """Seconds to the first token of a lone p90 prompt of the load's base class, the median of a few."""
    length, vocab_size = p90_prompt(load, base_kind(load)), engine.stage.model.config.vocab_size
    lone = [
        Request(f"lone {n}", lone_prompt(length, n, vocab_size, 0), 1, 3.0 * n, sampling=Sampling(temperature=0.0))
        for n in range(num_runs + 1)
    ]
    records = replay(engine, lone, engine.scheduler.settings).records
    return statistics.median([record.ttft_s or 0.0 for record in records.values()][1:])


def steady_ttft_s(engine: Engine, load: Load) -> float:
    """The same of a machine that nobody disturbs: the lesser of two measurements in a row that agree, or of all."""
    found = [isolated_ttft_s(engine, load)]
    for _ in range(MAX_TRIES):
        found.append(isolated_ttft_s(engine, load))
        if max(found[-2:]) <= STEADY * min(found[-2:]):
            return min(found[-2:])
    return min(found)


def field_of(engine: Engine, case: Case, num_requests: int, seed: int, tries: Tries) -> Field:
    load = named(case.load, num_requests=num_requests, seed=seed, window=seed - 1)
    load = load.scaled(1 / case.divisor).answering(1)
    load = load.within(engine.facts.max_model_len)
    isolated_s = steady_ttft_s(engine, load)
    texts = prompts(load, engine.stage.model.config.vocab_size, seed)
    compared = policies(engine.scheduler.settings, CHUNKS)
    return Field(engine, load, texts, isolated_s, targets(load, isolated_s, case.k), compared, tries)


def device_of(engine: Engine, fit: CostFit) -> Device:
    """What the simulator takes for this engine's device."""
    return Device(
        fit=fit,
        tile_s=AIM * engine.scheduler.settings.tile_s,
        num_layers=engine.stage.model.config.num_layers,
        num_pages=engine.pool.shape.num_pages,
        page_tokens=engine.pool.shape.page_tokens,
        spread=engine.facts.cost_error,
    )


def run_case(engine: Engine, case: Case, options: argparse.Namespace, tries: Tries) -> goodput_page.CaseResult:
    """All of a case: simulated, contested with several draws, then the other chunk sizes."""
    draws: list[dict[str, Contender]] = []
    first: Field | None = None
    predicted: dict[str, Contender] = {}
    names: list[str] = []
    for seed in range(1, options.draws + 1):
        field = field_of(engine, case, options.num_requests, seed, tries)
        say(f"[bold]{case.name}[/], draw {seed} of {options.draws}: {field.load.source}", highlight=False)
        predicted_now = contest(
            dict.fromkeys([*(options.only or ALWAYS), *CHUNK_NAMES], 1.0),
            field.predicted(device_of(engine, engine.scheduler.cost.fit)),
            TTFT,
            growth=2.0,
            most_rates=24,
        )
        if first is None:
            first, predicted = field, predicted_now
            names = list(options.only or ALWAYS)
        starts = {name: max(EXPECTED * predicted_now[name].good, LOWEST) for name in names}
        draws.append(contest(starts, field.attain, TTFT, tolerance=options.tolerance, repeats=REPEATS))
        draws[-1] |= _chunks(field, draws[-1], predicted_now)
    assert first is not None
    num_requests = len(first.load.requests)
    return goodput_page.CaseResult(
        name=case.name,
        model=options.model,
        source=first.load.source,
        num_requests=num_requests,
        isolated_ttft_ms=1e3 * first.isolated_s,
        targets_ms={kind: 1e3 * (slo.ttft_s or 0.0) for kind, slo in first.slos.items()},
        policies=[goodput_page.policy_of(name, draws, predicted[name], num_requests) for name in draws[0]],
        provenance=report.provenance(),
        bytes_per_parked_token=_bytes_per_token(engine),
        kernels=_kernels(engine),
        num_discarded=tries.num_discarded,
        alone=alone(first.load, engine.scheduler.cost.fit, first.isolated_s, first.slos),
        most_rate=most_rate(first.load, engine.scheduler.cost.fit),
        command=options.command,
    )


def alone(load: Load, fit: CostFit, isolated_s: float, slos: Mapping[str, SLO]) -> dict[str, float]:
    """Which share of each class would be in time if nobody else were there: by the prices, which are taken to be as far
    off everywhere as they are for the prompt whose isolated TTFT was measured."""

    def price_s(num_prompt: int) -> float:
        return fit.seconds((Share(num_prompt, 0),))

    off = isolated_s / price_s(p90_prompt(load, base_kind(load)))
    in_time: dict[str, list[bool]] = {}
    for asked in load.requests:
        target_s = slos[asked.kind].ttft_s
        met = target_s is None or off * price_s(asked.num_prompt) <= target_s
        in_time.setdefault(asked.kind, []).append(met)
    return {kind: statistics.mean(each) for kind, each in in_time.items()}


def most_rate(load: Load, fit: CostFit) -> float:
    """Requests per second whose prompts alone would fill all time of a device of these prices, were a step free."""
    own_s = [fit.seconds((Share(asked.num_prompt, 0),)) - fit.step_s for asked in load.requests]
    return 1 / statistics.mean(own_s)


def _kernels(engine: Engine) -> str:
    """With which kernels it was made, and what a step takes with them."""
    facts, fit = engine.facts, engine.scheduler.cost.fit
    return (
        f"Made in {facts.means}, tiles of at most {facts.max_tile_ms:g} ms; a step takes "
        f"{1e3 * fit.step_s:.1f} ms + {1e3 * fit.token_s:.2f} ms per token + "
        f"{1e3 * fit.segment_s:.1f} ms per prompt + {1e6 * fit.pair_s:.2f} µs per pair of tokens."
    )


def _bytes_per_token(engine: Engine) -> int:
    """What a suspended prompt keeps for each of its tokens: activations, and keys and values in pages."""
    shape = engine.pool.shape
    return engine.stage.bytes_per_token + shape.page_bytes // shape.page_tokens


def _chunks(field: Field, draw: Mapping[str, Contender], predicted: Mapping[str, Contender]) -> dict[str, Contender]:
    """The chunk sizes that are not in the draw, from the goodput of those that are on; if none is, from where the best
    of them is expected, and lower if none passes there."""
    known = [name for name in CHUNK_NAMES if name in draw]
    others = [name for name in CHUNK_NAMES if name not in draw]
    start = max([draw[name].good for name in known] or [EXPECTED * predicted[name].good for name in CHUNK_NAMES])
    return outlast(others, field.attain, TTFT, max(start, LOWEST), repeats=REPEATS, descend=not known)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--cases", nargs="+", type=Case.parse, default=CASES, metavar="LOAD:DIVISOR:K")
    parser.add_argument("--num-requests", type=int, default=150, help="of a run")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these schedulers, fcfs among them, and all chunk sizes"
    )
    parser.add_argument(
        "--draws", type=int, default=3, help="of requests: other lengths and instants; the page shows their median"
    )
    parser.add_argument("--tolerance", type=float, default=0.08, help="of a goodput")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    options.command = report.command(COMMAND, arguments)
    engine = build_engine(
        EngineSettings(model=options.model, max_model_len=options.max_model_len, enable_prefix_caching=False)
    )
    for case in options.cases:
        goodput_page.keep(options.folder, run_case(engine, case, options, Tries()))
    goodput_page.write(options.folder)


if __name__ == "__main__":
    main()
