"""Around the ratios: tighter and looser targets, answers of more than one token, and where this project's way loses.

`python -m headway.bench.goodput_more` runs after `headway.bench.goodput`, on the same model, and needs what that found:
rates are set relative to it. Its sections are kept beside the cases and stand on the same page.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from headway.bench import goodput_page, report
from headway.bench.contest import JOINT, TTFT, Contender, contest
from headway.bench.goodput import REPEATS, Case, Field, Tries, field_of, most_rate, say, scaled, steady_ttft_s
from headway.bench.goodput_page import AROUND, MORE, OURS
from headway.bench.load import Load, prompts, targets
from headway.bench.named import named
from headway.bench.policies import policies
from headway.bench.replay import replay
from headway.bench.score import GOOD_SHARE
from headway.config import EngineSettings
from headway.core.request import Request, Sampling
from headway.core.settings import SchedulerSettings
from headway.placement.engine import Engine, build_engine

SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 2.0)
SWEEP_LOAD = 0.7  # of our goodput
LIGHT, OVERLOAD = 0.1, 1.5  # of our goodput
MIXED_CHUNKS = (16, 32, 64, 128, 256)
K_TPOT = 2.0  # a token may take so many times what it takes alone
UNIFORM_TOKENS = 64
UNIFORM_K = 2.0
UNIFORM_NAMES = (OURS, "none", "fcfs", "chunk 64", "chunk 256")


def sweep(field: Field, case: goodput_page.CaseResult) -> str:
    """One rate, targets from 0.4 to 2 times those of the case, set anew for each run."""
    rate = SWEEP_LOAD * goodput_now(field, case)
    names = [OURS, case.best_chunk.name, "fcfs"]
    rows = []
    holds = dict.fromkeys(names, "never")
    for scale in reversed(SCALES):
        other = replace(field, slos=scaled(field.slos, scale))
        runs = {name: other.attain(name, rate) for name in names}
        for name, run in runs.items():
            if run.worst >= GOOD_SHARE and (holds[name] == "never" or scale < float(holds[name])):
                holds[name] = f"{scale:g}"
        rows.append([f"{scale:g}", *(f"{run.worst:.0%} ({run.overall:.0%})" for run in runs.values())])
    held = ", ".join(f"{name} {scale}" for name, scale in holds.items())
    return (
        f"At {rate:.3g} req/s ({SWEEP_LOAD:.0%} of our goodput in {case.name}): what the worst class attained, and all "
        f"together.\n\n{report.table(['targets ×', *names], rows[::-1])}\n\nThe smallest scale in the table at which "
        f"every class keeps 90 %: {held}."
    )


def goodput_now(field: Field, case: goodput_page.CaseResult) -> float:
    """Ours in the case, on a machine that is as fast as this one is now."""
    return case.policy(OURS).goodput * case.isolated_ttft_ms / (1e3 * field.isolated_s)


def joint(engine: Engine, case: Case, options: argparse.Namespace, tries: Tries) -> str:
    """Answers as long as the trace's, TTFT and TPOT targets together, against steps that mix tokens and chunks."""
    load = named(case.load, num_requests=options.num_requests, seed=1).scaled(1 / case.divisor)
    load = load.within(engine.facts.max_model_len)
    isolated_s, tpot_s = steady_ttft_s(engine, load), isolated_tpot_s(engine)
    slos = targets(load, isolated_s, case.k, tpot_s, K_TPOT)
    compared = policies(engine.scheduler.settings, MIXED_CHUNKS)
    texts = prompts(load, engine.stage.model.config.vocab_size, 1)
    field = Field(engine, load, texts, isolated_s, slos, compared, tries)
    chunks = [name for name in compared if name.startswith("chunk") and "fcfs" not in name]
    found = contest(
        dict.fromkeys([OURS, *chunks], options.joint_rate),
        field.attain,
        JOINT,
        tolerance=0.1,
        growth=1.6,
        repeats=REPEATS,
    )
    best = max(chunks, key=lambda name: found[name].good)
    rows = []
    for name, contender in found.items():
        run = min(contender.runs, key=lambda run: abs(run.rate - contender.good))
        marks = run.score.overall
        rows.append(
            [
                name,
                f"{'≥ ' if contender.is_open else ''}{contender.good:.3g}",
                f"{marks.joint:.0%}",
                f"{1e3 * marks.ttft_s.p50:.0f} / {1e3 * marks.ttft_s.p99:.0f}",
                f"{1e3 * marks.tpot_s.p50:.1f} / {1e3 * marks.tpot_s.p99:.1f}",
            ]
        )
    header = ["scheduler", "joint goodput, req/s", "met at it, all", "TTFT ms, p50 / p99", "TPOT ms, p50 / p99"]
    ratio = f"{found[OURS].good / found[best].good:.2f}" if found[best].good else "no rate kept by a chunk size"
    return (
        f"{load.source}. TTFT targets as above with k = {case.k:g}; TPOT within {K_TPOT:g} × the {1e3 * tpot_s:.1f} ms "
        f"of a lone answer. A chunked step holds a token for everybody who decodes and prompts up to its size. "
        f"Ours / best ({best}): {ratio}.\n\n{report.table(header, rows)}"
    )


def isolated_tpot_s(engine: Engine) -> float:
    """Seconds between the tokens of a lone answer."""
    request = Request("lone", tuple(range(64)), 33, 0.0, sampling=Sampling(temperature=0.0))
    return replay(engine, [request], engine.scheduler.settings).records["lone"].tpot_s or 0.0


def uniform(engine: Engine, case: Case, options: argparse.Namespace, tries: Tries) -> str:
    """All prompts of one length, one class: nothing long to suspend, nothing to reorder. Several draws of instants."""
    draws: list[dict[str, Contender]] = []
    for seed in range(1, options.draws + 1):
        load = uniform_load(case, options.num_requests, seed)
        isolated_s = steady_ttft_s(engine, load)
        texts = prompts(load, engine.stage.model.config.vocab_size, seed)
        compared = policies(engine.scheduler.settings, MIXED_CHUNKS)
        field = Field(engine, load, texts, isolated_s, targets(load, isolated_s, UNIFORM_K), compared, tries)
        starts = dict.fromkeys(UNIFORM_NAMES, 0.4 / isolated_s)
        draws.append(contest(starts, field.attain, TTFT, growth=1.4, repeats=REPEATS))
    return uniform_told(options.model, draws, len(load.requests), most_rate(load, engine.scheduler.cost.fit))


def uniform_load(case: Case, num_requests: int, seed: int) -> Load:
    """The instants of a draw of the case's load, with prompts of one length and class."""
    load = named(case.load, num_requests=num_requests, seed=seed, window=seed - 1).answering(1)
    requests = tuple(replace(asked, num_prompt=UNIFORM_TOKENS, kind="text", blocks=()) for asked in load.requests)
    return replace(load, name="uniform", requests=requests)


def uniform_told(model: str, draws: Sequence[dict[str, Contender]], num_requests: int, most: float) -> str:
    """Every scheduler's goodput, ours over it, and the verdict: no less than so much of the best chunk size."""
    found = goodput_page.CaseResult(
        name="uniform lengths",
        model=model,
        source="",
        num_requests=num_requests,
        isolated_ttft_ms=0.0,
        targets_ms={"text": 0.0},
        policies=[goodput_page.policy_of(name, draws, draws[0][name], num_requests) for name in UNIFORM_NAMES],
        provenance="",
        bytes_per_parked_token=0,
        most_rate=most,
    )
    rows = [goodput_page.against(found, policy) for policy in found.policies]
    over = "1 draw" if len(draws) == 1 else f"{len(draws)} draws: medians (least … most)"
    return (
        f"Every prompt has {UNIFORM_TOKENS} tokens, Poisson arrivals, k = {UNIFORM_K:g}. {num_requests} requests a "
        f"run, {over}.\n\n{report.table(['scheduler', 'goodput, req/s', 'ours / it'], rows)}\n\n"
        f"{goodput_page.verdicts([found])}"
    )


def light_and_heavy(field: Field, case: goodput_page.CaseResult) -> str:
    """A tenth of our goodput, where nobody waits, and half as much again, where not everybody can be served."""
    ours = goodput_now(field, case)
    plain: SchedulerSettings = field.settings[OURS]
    more = {
        "operator, nobody refused": replace(plain, refuse_unattainable=False),
        "operator, deadline order": replace(plain, order="deadline", refuse_unattainable=False),
    }
    field = replace(field, settings=field.settings | more)
    names = [OURS, *more, case.best_chunk.name, "fcfs"]
    rows = []
    for share in (LIGHT, OVERLOAD):
        for name in names:
            run = field.attain(name, share * ours)
            marks = run.score.overall
            rows.append(
                [
                    f"{share:g} ×",
                    name,
                    f"{1e3 * marks.ttft_s.p50:.0f} / {1e3 * marks.ttft_s.p99:.0f}",
                    f"{marks.ttft_only:.0%}",
                    ", ".join(f"{k} {v:.0%}" for k, v in run.score.shares(ttft_only=True).items()),
                    marks.num_refused,
                ]
            )
    header = ["rate", "scheduler", "TTFT ms, p50 / p99", "met, all", "met, by class", "refused"]
    return (
        f"Multiples of our goodput in {case.name}, {ours:.3g} req/s on a machine as fast as it is here.\n\n"
        f"{report.table(header, rows)}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=MORE, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--case", type=Case.parse, default=Case("qwen", 16, 2.0), metavar="LOAD:DIVISOR:K")
    parser.add_argument("--num-requests", type=int, default=120, help="of a run")
    parser.add_argument(
        "--draws", type=int, default=1, help="of uniform lengths: other instants; their medians are shown"
    )
    parser.add_argument("--joint-rate", type=float, default=3.0, help="where the joint search begins")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--only", default="", metavar="WORD", help="the sections that have it in their title")
    parser.add_argument("--folder", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    known = {(c.model, c.name): c for c in goodput_page.read(options.folder).cases}
    case = known.get((options.model, options.case.name))
    if case is None:
        parser.error(f"run headway.bench.goodput --model {options.model} with this case first: rates come from it.")
    engine = build_engine(
        EngineSettings(model=options.model, max_model_len=options.max_model_len, enable_prefix_caching=False)
    )
    tries = Tries()
    field = field_of(engine, options.case, options.num_requests, 1, tries)
    makers: tuple[Callable[[], str], ...] = (
        lambda: sweep(field, case),
        lambda: light_and_heavy(field, case),
        lambda: uniform(engine, options.case, options, tries),
        lambda: joint(engine, options.case, options, tries),
    )
    for title, make in zip(AROUND, makers, strict=True):
        if options.only not in title:
            continue
        say(f"[bold]{title}[/]")
        body = f"{options.model}. {make()}\n\nPrinted by `{report.command(MORE, arguments)}`. {report.provenance()}"
        goodput_page.keep(options.folder, goodput_page.Section(title, body, case.full_name))
        goodput_page.write(options.folder)  # the next one may take long, and be broken off


if __name__ == "__main__":
    main()
