"""How well steps are predicted: `python -m headway.bench.prediction`.

The engine fits its cost model at the start as always, without a cache. Then steps of other shapes are run in a random
order, in several rounds: whole prompts, chunks behind a context, packs of mixed prompts, and tokens of several requests
at once. In the last round each is predicted twice: by the fit alone, and by the model that has seen the rounds before
it (its online correction and its `upper`).
"""

import argparse
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track

from headway.bench import report
from headway.bench.calm import Calm
from headway.config import EngineSettings
from headway.core.cost import CostModel, Share
from headway.placement.calibrate import step_s
from headway.placement.engine import Engine, build_engine
from headway.placement.fitting import Shape, shapes

COMMAND = "python -m headway.bench.prediction"


class Case(NamedTuple):
    group: str
    name: str
    shape: Shape


class Judged(NamedTuple):
    """One step of the last round. All in seconds but `covered`: whether it took no longer than `upper`."""

    case: Case
    fitted_s: float
    corrected_s: float
    taken_s: float
    covered: bool


def cases(longest: int) -> list[Case]:
    """None of them was fitted to; none is longer than `longest` tokens and context together."""

    def whole(length: int) -> Case:
        return Case("whole prompts", f"{length} tokens", (Share(length, 0),))

    def chunk(length: int, context: int) -> Case:
        return Case("chunks behind a context", f"{length} behind {context}", (Share(length, context),))

    def pack(*lengths: int) -> Case:
        return Case("packs of prompts", " + ".join(map(str, lengths)), tuple(Share(length, 0) for length in lengths))

    def decode(count: int, context: int) -> Case:
        return Case("decode batches", f"{count} × one behind {context}", (Share(1, context),) * count)

    def mixed(length: int, count: int, context: int) -> Case:
        shape = (Share(length, 0), *[Share(1, context)] * count)
        return Case("prompts beside tokens", f"{length} beside {count} × one behind {context}", shape)

    wanted = [
        *map(whole, (24, 96, 200, 400, 800, 1600)),
        *(chunk(length, context) for length in (24, 96, 200) for context in (200, 800, 1600)),
        *(pack(*lengths) for lengths in ((24, 24), (8, 40, 90), (200, 10, 10), (24,) * 6, (150, 150, 150))),
        *(decode(count, context) for count in (2, 4, 16) for context in (50, 400, 1600)),
        *(mixed(length, 4, 200) for length in (40, 300)),
    ]
    fitted = {shape for shape, is_held_out in shapes(longest) if not is_held_out}
    return [case for case in wanted if case.shape not in fitted and all(sum(share) <= longest for share in case.shape)]


def judge(engine: Engine, chosen: Sequence[Case], num_rounds: int, calm: Calm) -> list[Judged]:
    """Run all cases once a round, in a new order each; what is returned is about the last."""
    cost = CostModel(engine.facts.cost_fit)
    order, rng = list(chosen), random.Random(0)
    judged: list[Judged] = []
    for case in chosen:  # memory that is touched for the first time is slow
        step_s(engine.stage, case.shape)
    for number in track(range(num_rounds), description="rounds"):
        rng.shuffle(order)
        for case in order:
            taken_s = calm.measure(partial(step_s, engine.stage, case.shape))
            corrected_s = cost.predict(case.shape)
            if number == num_rounds - 1:
                covered = taken_s <= cost.upper(corrected_s)
                judged.append(Judged(case, cost.fit.seconds(case.shape), corrected_s, taken_s, covered))
            cost.observe(cost.fit.price(case.shape), taken_s)
    return sorted(judged, key=lambda one: chosen.index(one.case))


def mape(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean of |predicted / taken - 1|."""
    return sum(abs(predicted / taken - 1) for predicted, taken in pairs) / len(pairs)


def by_group(judged: Sequence[Judged]) -> list[list[str]]:
    """A row per group, and one for all."""
    groups = [*dict.fromkeys(one.case.group for one in judged), "all"]
    rows = []
    for group in groups:
        members = [one for one in judged if group in (one.case.group, "all")]
        before = mape([(one.fitted_s, one.taken_s) for one in members])
        after = mape([(one.corrected_s, one.taken_s) for one in members])
        covered = sum(one.covered for one in members)
        rows.append([group, str(len(members)), f"{before:.1%}", f"{after:.1%}", f"{covered} of {len(members)}"])
    return rows


def by_case(judged: Sequence[Judged]) -> list[list[str]]:
    return [
        [
            one.case.group,
            one.case.name,
            f"{one.taken_s * 1e3:.4g}",
            f"{one.fitted_s * 1e3:.4g} ({one.fitted_s / one.taken_s - 1:+.0%})",
            f"{one.corrected_s * 1e3:.4g} ({one.corrected_s / one.taken_s - 1:+.0%})",
        ]
        for one in judged
    ]


def page(engine: Engine, judged: Sequence[Judged], num_rounds: int, calm: Calm) -> str:
    facts = engine.facts
    fit = facts.cost_fit
    coefficients = (
        f"{fit.step_s * 1e3:.3g} ms a step, {fit.token_s * 1e6:.3g} µs a token, {fit.segment_s * 1e6:.3g} µs a "
        f"segment, {fit.pair_s * 1e9:.3g} ns a pair of query and key"
    )
    groups = ["steps", "number", "error before correction", "after", "within `upper`"]
    details = ["steps", "what", "taken ms", "fitted ms (off by)", "corrected ms (off by)"]
    return (
        f"{facts.model_name}, {facts.means}. Fitted at the start ({facts.cost_source}; "
        f"{facts.cost_error:.1%} off on the steps held out then): {coefficients}.\n\n"
        "Error is the mean of |predicted / taken − 1| over one round of steps in a random order. *Before*: the fit "
        f"alone. *After*: with the online correction, which has seen the {num_rounds - 1} rounds before it. `upper` is "
        f"to hold in nine cases of ten. {calm.verdict()}\n\n"
        f"{report.table(groups, by_group(judged))}\n\n## Each step\n\n{report.table(details, by_case(judged))}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--rounds", type=int, default=4, help="of all steps; the last is judged")
    parser.add_argument("--longest", type=int, default=2048, help="tokens and context of a step")
    parser.add_argument("--quick", action="store_true", help="two rounds of steps up to 256 tokens")
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    arguments = parser.parse_args()
    longest, num_rounds = (256, 2) if arguments.quick else (arguments.longest, arguments.rounds)
    if num_rounds < 2:
        parser.error("--rounds must be at least 2: the last is judged, the others are learnt from.")
    engine = build_engine(
        EngineSettings(model=arguments.model, max_model_len=longest, max_num_seqs=16, cost_cache=False)
    )
    engine.pool.fault_in(engine.pool.shape.pool_bytes)
    with torch.inference_mode():
        calm = Calm()
        judged = judge(engine, cases(longest), num_rounds, calm)
    body = page(engine, judged, num_rounds, calm)
    report.write("prediction", "How well steps are predicted", report.command(COMMAND, None), body, arguments.folder)


if __name__ == "__main__":
    main()
