"""Prompts and tokens on one device, shared in every way there is: `python -m headway.bench.multiplex`.

In steps that mix chunks of prompts with tokens, as servers do by default, of the two sizes that prices favour; in
turns, at operators; in turns with tokens riding along; side by side on a fixed half each; and as this project's
controller decides. The same engine, weights and requests for all, one run of each in turn, in several draws of a load;
goodput is joint, TTFT and TPOT. Before that it is shown what a share of this device is worth: by the roofline that the
controller goes by, and as measured, alone and side by side. Beside what was measured stands what these prices make of
the same ways on the virtual clock: what the model predicts.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from headway.bench import multiplex_worth, report
from headway.bench.contest import JOINT, Contender, contest, sweep
from headway.bench.goodput import EXPECTED, Field, Tries, device_of, most_rate, say, steady_ttft_s
from headway.bench.goodput_more import isolated_tpot_s
from headway.bench.load import prompts, targets
from headway.bench.multiplex_loads import AUTO, K_TPOT, K_TTFT, LOADS, MIXED, compared, load_of
from headway.bench.multiplex_simulated import goodputs
from headway.bench.multiplex_sure import BLOCK, CONFIDENCE, FEWEST, drawn_again, pooled_goodput
from headway.bench.multiplex_verdict import Kept, verdict
from headway.bench.policies import requests_of
from headway.bench.replay import replay
from headway.bench.score import quantile
from headway.config import EngineSettings
from headway.placement.engine import Engine, build_engine

COMMAND = "python -m headway.bench.multiplex"
PAGES = {  # of each kind of kernels: name and title
    "bf16": ("multiplex", "Prompts and tokens on one device"),
    "int8": ("multiplex-int8", "Prompts and tokens on one device, in eight bits"),
}
FIRST_TRIES = 5  # runs of one way, to find where to compare all
RATES = (0.62, 0.75, 0.9, 1.05, 1.25)  # times what it keeps: all are run at each
STEADY_S, STEADY_PART = 150.0, 0.8  # how long the one setting is watched under one load, at which part of its goodput
MOST_CHANGES = 1.0  # of its division, a minute
PREDICTED_REQUESTS, PREDICTED_DRAWS = 120, 3  # of a goodput on prices
MOST_CHUNKS = 2  # sizes that are run: the best on prices
FURTHER, MOST_FURTHER = 1.15, 3  # a higher rate, or a lower one, and how many, if those given do not tell the best
FAR_BEHIND = 0.8  # of the best goodput in the first draw: who has less is not run in the others
MEANT = (
    "Goodput is where what all runs of a way attained together, at each of some rates, crosses 90%. In brackets: where "
    f"{CONFIDENCE:.0%} of it lie when requests are drawn again in blocks of about {BLOCK}, {FEWEST} at least of each "
    "part of a load, the same ones for all ways; what a machine does to a whole run is not in that. A claim is "
    "undecided where it is left open. Targets are those of the first draw; a way with less than "
    f"{FAR_BEHIND:g} of the best goodput there is not run in the others."
)


def field_of(engine: Engine, name: str, num_requests: int, tries: Tries, seed: int = 1) -> Field:
    load = load_of(name, num_requests, seed).within(engine.facts.max_model_len)
    isolated_s, tpot_s = steady_ttft_s(engine, load), isolated_tpot_s(engine)
    slos = targets(load, isolated_s, K_TTFT, tpot_s, K_TPOT)
    texts = prompts(load, engine.stage.model.config.vocab_size, seed)
    return Field(engine, load, texts, isolated_s, slos, compared(engine.scheduler.settings), tries)


def swept(field: Field, others: Sequence[Field], names: Sequence[str], rates: Sequence[float]) -> dict[str, Contender]:
    """All ways at the same rates, times what one of them, looked at by itself, is found to keep."""
    device = device_of(field.engine, field.engine.scheduler.cost.fit)
    most = most_rate(field.load, field.engine.scheduler.cost.fit)  # a burst ends, so any rate may pass on prices
    expected = contest({MIXED: 1.0}, field.predicted(device), JOINT, growth=1.6, most_rates=12)[MIXED].good
    start = min(max(EXPECTED * expected, 0.05), most)
    first = contest({MIXED: start}, field.attain, JOINT, growth=1.25, most_rates=FIRST_TRIES)
    middle = first[MIXED].good or min(run.rate for run in first[MIXED].runs)
    return swept_at(field, others, names, [middle * factor for factor in rates])


def swept_at(
    field: Field, others: Sequence[Field], names: Sequence[str], rates: Sequence[float]
) -> dict[str, Contender]:
    """All ways at these rates, and at more if these do not tell what the best of them keeps. `others` are other draws
    of the load: who is far behind in the first is not run in them."""
    tried = sorted(rates)
    found = sweep(names, field.attain, JOINT, tried)
    while len(tried) < len(rates) + MOST_FURTHER and (further := _further(found, tried)):
        tried = sorted([*tried, further])
        for contender in found.values():
            contender.take([field.attain(contender.name, further)], JOINT)
            contender.settle(JOINT)
    near = FAR_BEHIND * max(contender.good for contender in found.values())
    again = [contender for name, contender in found.items() if contender.good >= near or name in (AUTO, MIXED)]
    for draw, other in enumerate(others, 1):
        for rate in tried:
            for contender in again:
                contender.runs.append(replace(other.attain(contender.name, rate), draw=draw))
    return pooled(found)


def _further(found: Mapping[str, Contender], tried: Sequence[float]) -> float | None:
    """Another rate to try, where the best of them keeps its promises at all that were, or at none."""
    best = max(contender.good for contender in found.values())
    if best == tried[-1]:
        return best * FURTHER
    return None if best else tried[0] / FURTHER


def pooled(found: dict[str, Contender]) -> dict[str, Contender]:
    """What all runs of each say together. At a rate at which the one setting never divided the device it did what
    riding along does, and only chance tells their runs apart: there both are judged by the two of them. A contender's
    own runs stay the first."""
    auto, mixed = found[AUTO], found[MIXED]
    alike = {(run.rate, run.draw) for run in auto.runs if not run.num_repartitions}
    pairs = ((auto, mixed), (mixed, auto))
    more = [(each, [run for run in other.runs if (run.rate, run.draw) in alike]) for each, other in pairs]
    for contender, runs in more:
        contender.runs += runs
    for contender in found.values():
        contender.good = pooled_goodput(contender)
    return found


def on_prices(engine: Engine, name: str, ways: Sequence[str]) -> Mapping[str, Kept]:
    """What the ways would keep of such a load on the virtual clock, by the prices and shares that were measured at the
    engine's start: what the model predicts."""
    device = replace(device_of(engine, engine.scheduler.cost.fit), roofline=engine.scheduler.sharing.roofline)
    return goodputs(name, device, ways, PREDICTED_REQUESTS, PREDICTED_DRAWS)


def load_section(
    field: Field, found: Mapping[str, Contender], kept: Mapping[str, Kept], predicted: Mapping[str, Kept]
) -> str:
    """A table of one load, of which `field` is the first draw."""
    rows = []
    best = max(contender.good for contender in found.values())
    rates = sorted({run.rate for run in found[AUTO].runs})
    shown = max((rate for rate in rates if rate <= best), default=min(rates))
    for name, contender in found.items():
        run = next(run for run in contender.runs if run.rate == shown)
        ttft = [outcome.ttft_s for outcome in run.outcomes if outcome.ttft_s is not None]
        gaps = [gap for outcome in run.outcomes for gap in outcome.gaps_s]
        rows.append(
            [
                name,
                kept[name].told,
                str(len({run.draw for run in contender.runs})),
                predicted[name].told if name in predicted else "",
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
            "draws",
            "on prices",
            f"at {shown:.2f} req/s: met",
            "tokens/s",
            "TTFT ms: mean, p50, p95, p99",
            "TBT ms: likewise",
        ],
        rows,
    )
    asked = field.load.source.partition(";")[0]  # the rate is each run's own
    num_own = len(rates) * len({run.draw for run in found[AUTO].runs})  # the others are those of riding along
    changes = [run.num_repartitions for run in found[AUTO].runs[:num_own]]
    return (
        f"#### {field.load.name}\n\n{len(field.load.requests)} requests a run: {asked}, Poisson arrivals. "
        f"Targets: TTFT {1e3 * slo.ttft_s:.0f} ms ({K_TTFT:g} × a lone p90 prompt), "
        f"TPOT {1e3 * slo.tpot_s:.0f} ms ({K_TPOT:g} × a lone answer). All were run at "
        f"{', '.join(f'{rate:.2f}' for rate in rates)} requests/s. On prices: on the virtual clock, with "
        f"prices and shares as measured at the engine's start.\n\n{table}\n\n{AUTO} divided the "
        f"device anew in {sum(map(bool, changes))} of its {len(changes)} runs, {sum(changes)} times in all: where it "
        f"does not, it does what {MIXED.replace('turns, ', '')} does, and their goodputs go by the runs of both."
    )


def _spread_ms(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    return ", ".join(
        f"{1e3 * value:.0f}"
        for value in (statistics.mean(seconds), *(quantile(seconds, share) for share in (0.5, 0.95, 0.99)))
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
    parts = [f"## In {engine.facts.means}", multiplex_worth.section(engine, roofline), f"### Goodput\n\n{MEANT}"]
    kept: dict[str, Mapping[str, Kept]] = {}
    predicted: dict[str, Mapping[str, Kept]] = {}
    for number, name in enumerate(options.loads, 1):
        tries, plain = Tries(), [way for way in compared(engine.scheduler.settings) if "shortest" not in way]
        predicted[name] = on_prices(engine, name, plain)
        num_requests = max(options.num_requests, round(options.seconds * predicted[name][MIXED].rate))
        field = field_of(engine, name, num_requests, tries)
        others = [  # measured now: what a run finds is set against how fast the machine was then
            replace(field_of(engine, name, num_requests, tries, seed), slos=field.slos)
            for seed in range(2, options.draws + 1)
        ]
        say(f"[bold]{name}[/]: {field.load.source}", highlight=False)
        ways = [way for way in field.settings if "shortest" not in way or name in options.ablation]
        chunks = sorted((way for way in ways if way.startswith("chunk")), key=lambda way: predicted[name][way].rate)
        ways = [way for way in ways if way not in chunks[:-MOST_CHUNKS]]
        found = swept(field, others, ways, options.rates)
        again = drawn_again(found, len(LOADS[name]))
        kept[name] = {way: Kept.of(contender, again[way]) for way, contender in found.items()}
        runs = {id(run): run for contender in found.values() for run in contender.runs}
        num_disturbed = sum(run.disturbed for run in runs.values())
        steady = [steadiness(field, kept[name][AUTO].rate)] if name in options.steady else []
        parts.append(
            f"{load_section(field, found, kept[name], predicted[name])}\n\n{tries.num_discarded} disturbed runs were "
            f"thrown away and made again; {num_disturbed} stayed disturbed and are included."
        )
        parts += steady
        missing = options.loads[number:]
        broken_off = [f"Not run: {', '.join(missing)}."] if missing else []
        yield "\n\n".join([*parts, *broken_off, "#### The one setting", verdict(kept, predicted)])
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
    parser.add_argument("--num-requests", type=int, default=60, help="of a run, at least")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="so long they come, at least, at the rate that prices promise"
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=RATES,
        metavar="X",
        help="times what riding along keeps: all run at each",
    )
    parser.add_argument("--draws", type=int, default=3, help="of a load: other lengths and instants")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    for kernels in options.kernels:
        settings = EngineSettings(
            model=options.model,
            lanes="auto",
            quantization="int8" if kernels == "int8" else "none",
            max_model_len=options.max_model_len,
            enable_prefix_caching=False,
        )
        page, title = PAGES[kernels]
        for text in section(settings, options):
            command = report.command(COMMAND, arguments)
            report.write(page, title, command, f"{options.model}.\n\n{text}", options.folder)


if __name__ == "__main__":
    main()
