"""Prompts and tokens on one device, shared in every way there is: `python -m headway.bench.multiplex`.

In steps that mix chunks of prompts with tokens, as servers do by default; in turns, at operators; in turns with tokens
riding along; side by side on a fixed half each; and as this project's controller decides. The same engine, weights and
requests for all, one run of each in turn; goodput is joint, TTFT and TPOT. Before that it is shown what a share of this
device is worth: by the roofline that the controller goes by, and as measured, alone and side by side.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from headway.bench import report
from headway.bench.contest import JOINT, Contender, contest, sweep
from headway.bench.goodput import EXPECTED, Field, Tries, device_of, most_rate, say, steady_ttft_s
from headway.bench.goodput_more import isolated_tpot_s
from headway.bench.load import Load, prompts, targets
from headway.bench.policies import policies, requests_of
from headway.bench.replay import replay
from headway.bench.score import quantile
from headway.bench.traces import Asked
from headway.config import EngineSettings
from headway.core.cost import Share
from headway.core.roofline import Roofline, Split
from headway.core.settings import SchedulerSettings
from headway.placement.dividing import Pair, best_s, side_by_side
from headway.placement.engine import Engine, build_engine

COMMAND = "python -m headway.bench.multiplex"
CHUNKS = (32, 128)
TURNS, MIXED, SPLIT, AUTO = "turns", "turns, riding along", "fixed split", "auto"
K_TTFT, K_TPOT = 3.0, 3.0
FIRST_TRIES = 5  # runs of one way, to find where to compare all
RATES = (0.62, 0.75, 0.9, 1.05, 1.25)  # times what it keeps: all are run at each
WITHIN = 0.03  # of the best of the others: how far the one setting may be behind on any load
STEADY_S, STEADY_PART = 150.0, 0.8  # how long the one setting is watched under one load, at which part of its goodput
MOST_CHANGES = 1.0  # of its division, a minute
AHEAD = 1.15  # times each of the plain ways: wanted where the model says that a share pays
PROMPTS = ((Share(64, 0),), (Share(256, 0),), (Share(128, 512),))  # held out: the friction is measured with others
TOKENS = ((Share(1, 128),) * 2, (Share(1, 512),) * 4, (Share(1, 256),) * 16)


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


# What a share is worth


class Worth(NamedTuple):
    """Paces (prompts, tokens) side by side, as predicted and as measured, for one pair of steps."""

    prompts: tuple[Share, ...]
    tokens: tuple[Share, ...]
    predicted: tuple[float, float]
    measured: tuple[float, float]

    @property
    def sum_of_speeds(self) -> float:
        """1 for taking turns: what both get done in the time of one, each in parts of its own speed alone."""
        return sum(1 / pace for pace in self.measured)


def worth(engine: Engine, roofline: Roofline, split: Split) -> list[Worth]:
    stage, units = engine.stage, roofline.units
    found = []
    with torch.inference_mode():
        for one in PROMPTS:
            for other in TOKENS:
                alone = Pair(best_s(stage, one), best_s(stage, other))
                both = side_by_side(stage, one, other, split, units)
                measured = (both.prompts_s / alone.prompts_s, both.tokens_s / alone.tokens_s)
                found.append(Worth(one, other, roofline.paces(one, other, split), measured))
    return found


class Alone(NamedTuple):
    """Seconds of a step on one unit over those on all, predicted and measured."""

    shape: tuple[Share, ...]
    predicted: float
    measured: float


def on_one_unit(engine: Engine, roofline: Roofline) -> list[Alone]:
    found = []
    least = min(roofline.powers)
    with torch.inference_mode():
        for shape in (*PROMPTS, *TOKENS):
            whole_s = best_s(engine.stage, shape)
            torch.set_num_threads(least)
            try:
                part_s = best_s(engine.stage, shape)
            finally:
                torch.set_num_threads(roofline.units)
            predicted = roofline.demand(shape, least).seconds / roofline.demand(shape, roofline.units).seconds
            found.append(Alone(shape, predicted, part_s / whole_s))
    return found


def words(shape: tuple[Share, ...]) -> str:
    one = shape[0]
    if one.num_tokens == 1:
        return f"a token of {len(shape)} behind {one.context_tokens}"
    return f"{one.num_tokens} tokens" + (f" behind {one.context_tokens}" if one.context_tokens else "")


def model_section(engine: Engine, roofline: Roofline) -> str:
    split = roofline.splits[len(roofline.splits) // 2]
    alone, both = on_one_unit(engine, roofline), worth(engine, roofline, split)
    error_alone = statistics.mean(abs(each.predicted / each.measured - 1) for each in alone)
    error_both = statistics.mean(
        abs(predicted / measured - 1)
        for each in both
        for predicted, measured in zip(each.predicted, each.measured, strict=True)
    )
    rates = [
        [units, f"{power.flops / 1e9:.0f}", f"{power.attention_flops / 1e9:.0f}", f"{power.bytes / 1e9:.1f}"]
        for units, power in sorted(roofline.powers.items())
    ]
    sums = [each.sum_of_speeds for each in both]
    prompts_pace, tokens_pace = both[-1].measured
    return "\n\n".join(
        [
            "### What a share of this device is worth",
            "Rates of its cores, measured at the engine's start:",
            report.table(["cores", "GFLOP/s, matrices", "GFLOP/s, attention", "GB/s of weights"], rates),
            "How many times as long a step takes alone on the fewest cores, predicted by the roofline / measured "
            f"(mean error {error_alone:.0%}): "
            + "; ".join(f"{words(each.shape)} {each.predicted:.2f} / {each.measured:.2f}" for each in alone)
            + ".",
            f"Side by side on {split.prompts} + {split.tokens}, how many times as long as alone on all, predicted / "
            f"measured (mean error {error_both:.0%}). The sum of speeds is 1 for taking turns.",
            report.table(
                ["prompt", "tokens", "prompt's pace", "tokens' pace", "sum of speeds"],
                [
                    [
                        words(each.prompts),
                        words(each.tokens),
                        *(f"{p:.2f} / {m:.2f}" for p, m in zip(each.predicted, each.measured, strict=True)),
                        f"{each.sum_of_speeds:.2f}",
                    ]
                    for each in both
                ],
            ),
            f"The sum of speeds is {min(sums):.2f} … {max(sums):.2f}, median {statistics.median(sums):.2f}. For the "
            f"last pair: a share pays where taking turns leaves prompts less than 1/{prompts_pace:.2f} of the device, "
            f"that is where a token's step takes more than {1 - 1 / prompts_pace:.0%} of its target, and is possible "
            f"where it takes less than {1 / tokens_pace:.0%}.",
        ]
    )


# Goodput


def field_of(engine: Engine, name: str, num_requests: int, tries: Tries) -> Field:
    load = load_of(name, num_requests, seed=1).within(engine.facts.max_model_len)
    isolated_s, tpot_s = steady_ttft_s(engine, load), isolated_tpot_s(engine)
    slos = targets(load, isolated_s, K_TTFT, tpot_s, K_TPOT)
    texts = prompts(load, engine.stage.model.config.vocab_size, 1)
    return Field(engine, load, texts, isolated_s, slos, compared(engine.scheduler.settings), tries)


def swept(field: Field, names: Sequence[str]) -> Mapping[str, Contender]:
    """All ways at the same rates, around what one of them, looked at by itself, is found to keep."""
    device = device_of(field.engine, field.engine.scheduler.cost.fit)
    most = most_rate(field.load, field.engine.scheduler.cost.fit)  # a burst ends, so any rate may pass on prices
    expected = contest({MIXED: 1.0}, field.predicted(device), JOINT, growth=1.6, most_rates=12)[MIXED].good
    start = min(max(EXPECTED * expected, 0.05), most)
    first = contest({MIXED: start}, field.attain, JOINT, growth=1.25, most_rates=FIRST_TRIES)
    middle = first[MIXED].good or min(run.rate for run in first[MIXED].runs)
    return sweep(names, field.attain, JOINT, [middle * factor for factor in RATES])


def load_section(field: Field, found: Mapping[str, Contender]) -> str:
    """A table of one load."""
    rows = []
    best = max(contender.good for contender in found.values())
    rates = [run.rate for run in next(iter(found.values())).runs]
    shown = max((rate for rate in rates if rate <= best), default=min(rates))
    for name, contender in found.items():
        run = next(run for run in contender.runs if run.rate == shown)
        ttft = [outcome.ttft_s for outcome in run.outcomes if outcome.ttft_s is not None]
        gaps = [gap for outcome in run.outcomes for gap in outcome.gaps_s]
        rows.append(
            [
                name,
                Kept.of(contender).told,
                f"{run.score.overall.joint:.0%}",
                f"{run.score.throughput_tokens:.0f}",
                _spread_ms(ttft),
                _spread_ms(gaps),
            ]
        )
    slo = field.slos["text"]
    assert slo.ttft_s is not None
    assert slo.tpot_s is not None
    table = report.table(
        [
            "how",
            "joint goodput, req/s",
            f"at {shown:.2f} req/s: met",
            "tokens/s",
            "TTFT ms: mean, p50, p95, p99",
            "TBT ms: likewise",
        ],
        rows,
    )
    asked = field.load.source.partition(";")[0]  # the rate is each run's own
    return (
        f"#### {field.load.name}\n\n{asked}, Poisson arrivals. Targets: TTFT {1e3 * slo.ttft_s:.0f} ms ({K_TTFT:g} × a "
        f"lone p90 prompt), TPOT {1e3 * slo.tpot_s:.0f} ms ({K_TPOT:g} × a lone answer). All were run at "
        f"{', '.join(f'{rate:.2f}' for rate in rates)} requests/s.\n\n{table}"
    )


def _spread_ms(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    return ", ".join(
        f"{1e3 * value:.0f}"
        for value in (statistics.mean(seconds), *(quantile(seconds, share) for share in (0.5, 0.95, 0.99)))
    )


class Kept(NamedTuple):
    """The highest rate at which one way keeps its promises, or a bound of it: it kept every rate that was tried, or
    none."""

    rate: float
    or_more: bool = False
    or_less: bool = False

    @classmethod
    def of(cls, contender: Contender) -> "Kept":
        if contender.good == 0.0:
            return cls(min(run.rate for run in contender.runs), or_less=True)
        return cls(contender.good, or_more=contender.good == max(run.rate for run in contender.runs))

    @property
    def told(self) -> str:
        return f"{'≥ ' if self.or_more else '< ' if self.or_less else ''}{self.rate:.2f}"

    def over(self, other: "Kept") -> "Over":
        ratio = self.rate / other.rate if other.rate else 1.0 if self.rate == 0.0 else float("inf")
        return Over(ratio, self.or_more or other.or_less, self.or_less or other.or_more)


class Over(NamedTuple):
    """One goodput over another, or a bound of that."""

    ratio: float
    or_more: bool = False
    or_less: bool = False

    @property
    def told(self) -> str:
        sign = {(True, True): "about ", (True, False): "≥ ", (False, True): "≤ "}
        return f"{sign.get((self.or_more, self.or_less), '')}{self.ratio:.2f}"

    def says(self, wanted: float) -> str:
        """Whether it is so much, if the bounds say that."""
        if self.ratio >= wanted:
            return "undecided" if self.or_less else "reached"
        return "undecided" if self.or_more else "not reached"


def verdict(found: Mapping[str, Mapping[str, Kept]]) -> str:
    """Load by load: whether the one setting keeps up with the best of the others, by how much it is ahead of each
    plain way, and where that leaves what is served by default."""
    return "\n".join(f"- {name}: {_verdict(by_way)}" for name, by_way in found.items())


def _verdict(by_way: Mapping[str, Kept]) -> str:
    def best(ways: Sequence[str]) -> str:
        return max(ways, key=lambda way: by_way[way].rate)

    others = [way for way in by_way if way != AUTO and "shortest" not in way]
    plain = (best([way for way in others if way.startswith("chunk")]), TURNS, SPLIT)
    over = by_way[AUTO].over(by_way[best(others)])
    ahead = {way: by_way[AUTO].over(by_way[way]) for way in plain}
    rest = best([way for way in others if way != MIXED])
    return (
        f"{over.told} × the best of the others ({best(others)}); within {WITHIN:.0%}: {over.says(1 - WITHIN)}. "
        f"{', '.join(f'{each.told} × {way}' for way, each in ahead.items())}; {AHEAD:g} × each: "
        f"{min(ahead.values(), key=lambda each: each.ratio).says(AHEAD)}. What is served by default, {MIXED}: "
        f"{by_way[MIXED].over(by_way[rest]).told} × the best of the rest but {AUTO} ({rest})."
    )


def steadiness(field: Field, goodput: float) -> str:
    """How often the controller divides the device anew while the load stays what it is, but for chance."""
    rate = STEADY_PART * goodput
    load = load_of(field.load.name, max(2, round(STEADY_S * rate)), seed=2).within(field.engine.facts.max_model_len)
    texts = prompts(load, field.engine.stage.model.config.vocab_size, 2)
    run = replay(field.engine, requests_of(load.at_rate(rate), texts, field.slos), field.settings[AUTO])
    num_changes, minutes = run.counters.get("repartitions", 0), run.duration_s / 60
    per_minute = num_changes / minutes
    return (
        f"At {rate:.2f} requests/s for {minutes:.1f} minutes, {AUTO} divided the device anew {num_changes} times, "
        f"{per_minute:.2f} a minute; at most {MOST_CHANGES:g}: "
        f"{'reached' if per_minute <= MOST_CHANGES else 'not reached'}."
    )


def section(settings: EngineSettings, options: argparse.Namespace) -> Iterator[str]:
    """Everything of one kind of kernels, anew after each load: the next one may take long, and be broken off."""
    engine = build_engine(settings)
    roofline = engine.scheduler.sharing.roofline
    if roofline is None:
        raise SystemExit("This machine gives the engine one core: there is nothing to divide. Give it two.")
    say(f"[bold]{engine.facts.means}[/]", highlight=False)
    parts = [f"## In {engine.facts.means}", model_section(engine, roofline), "### Goodput"]
    kept: dict[str, Mapping[str, Kept]] = {}
    for number, name in enumerate(options.loads, 1):
        tries = Tries()
        field = field_of(engine, name, options.num_requests, tries)
        say(f"[bold]{name}[/]: {field.load.source}", highlight=False)
        ways = [way for way in field.settings if "shortest" not in way or name in options.ablation]
        found = swept(field, ways)
        kept[name] = {way: Kept.of(contender) for way, contender in found.items()}
        num_disturbed = sum(run.disturbed for contender in found.values() for run in contender.runs)
        steady = [steadiness(field, kept[name][AUTO].rate)] if name in options.steady else []
        parts.append(
            f"{load_section(field, found)}\n\n{tries.num_discarded} disturbed runs were thrown away and made again; "
            f"{num_disturbed} stayed disturbed and are included."
        )
        parts += steady
        missing = options.loads[number:]
        broken_off = [f"Not run: {', '.join(missing)}."] if missing else []
        yield "\n\n".join([*parts, *broken_off, "#### The one setting", verdict(kept)])
    engine.pool.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--kernels", nargs="+", choices=("bf16", "int8"), default=["bf16", "int8"])
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument(
        "--ablation", nargs="*", choices=LOADS, default=["balanced"], help="loads with other orders too"
    )
    parser.add_argument(
        "--steady", nargs="*", choices=LOADS, default=["balanced"], help="loads under which it is watched for long"
    )
    parser.add_argument("--num-requests", type=int, default=60, help="of a run")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    sections: dict[str, str] = {}
    for kernels in options.kernels:
        settings = EngineSettings(
            model=options.model,
            lanes="auto",
            quantization="int8" if kernels == "int8" else "none",
            max_model_len=options.max_model_len,
            enable_prefix_caching=False,
        )
        for sections[kernels] in section(settings, options):
            body = f"{options.model}, {options.num_requests} requests a run.\n\n" + "\n\n".join(sections.values())
            command = report.command(COMMAND, arguments)
            report.write("multiplex", "Prompts and tokens on one device", command, body, options.folder)


if __name__ == "__main__":
    main()
