"""The page: tables of what was measured, and what was wanted and reached."""

import statistics
from collections.abc import Sequence

from headway.bench import report
from headway.bench.peers import limits, verdicts
from headway.bench.peers.engines import OURS, Engine, Venv
from headway.bench.peers.measure import Case, Found, Measured, Plan
from headway.models import presets

MOST_OF_READING = 1.02  # of the bandwidth that was measured: who reads faster shows that it is more


def rounds_of(measured: Measured) -> list[verdicts.Ratios]:
    """Ours over each peer, round by round, of peers that ran in all of them."""
    there = [found for found in measured.found if not found.failure and found.beside]
    num_rounds = max((len(taken) for found in there for taken in found.beside.values()), default=0)
    return [
        {
            (found.engine.name, case): taken[number] / found.rates[case][number]
            for found in there
            for case, taken in found.beside.items()
        }
        for number in range(num_rounds)
    ]


def own_rate(measured: Measured, precision: str, case: str) -> float | None:
    """Ours, the median of all that was measured of it: alone, and in turn with peers."""
    same = [found for found in measured.found if found.engine.precision == precision and not found.failure]
    taken = [
        rate for found in same for rate in (found.rates if found.engine.group == OURS else found.beside).get(case, ())
    ]
    return statistics.median(taken) if taken else None


def section(measured: Measured, plan: Plan) -> str:
    """One model."""
    there = [found for found in measured.found if not found.failure]
    best = limits.together(measured.limits)
    reads = [each.read / 1e9 for each in measured.limits]
    parts = [
        f"## {measured.model}",
        f"Products of {limits.SIDE} × {limits.SIDE} matrices by torch: {best.bf16 / 1e9:.0f} GFLOP/s in bfloat16, "
        f"{best.int8 / 1e9:.0f} GOP/s in int8, the best call of all, before and after each round. A plain sum reads "
        f"memory at {best.read / 1e9:.1f} GB/s at best ({min(reads):.1f} … {max(reads):.1f}).",
        report.table(["tokens/s", *(found.engine.name for found in there)], _rates(there, plan)),
        "Ours against the best peer of the same precision, each measured in turn with it, and as a share of what "
        "products and reading allow (every weight once, every key and value once, or the arithmetic, whichever takes "
        "longer; of all that was measured of ours, by itself and in turn with others):",
        report.table(["", "ratio, bf16", "of the limit", "ratio, int8", "of the limit"], _ratios(measured, plan, best)),
        reading(measured, plan, best),
        report.table(
            ["", "first token after a start, s", "least … most", "peak memory, MB", "installed, MB"],
            [_start(found) for found in there],
        ),
        _agreement(there),
        *(f"{found.engine.name} did not run: {found.failure}" for found in measured.found if found.failure),
    ]
    return "\n\n".join(part for part in parts if part)


def _rates(there: Sequence[Found], plan: Plan) -> list[list[str]]:
    return [[case.name, *(_spread(found.rates.get(case.name, []), "") for found in there)] for case in plan.cases]


def _spread(taken: Sequence[float], otherwise: str) -> str:
    if not taken:
        return otherwise
    middle = statistics.median(taken)
    return _short(middle) if len(taken) < 2 else f"{_short(middle)} ({_short(min(taken))} … {_short(max(taken))})"


def _short(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def _ratios(measured: Measured, plan: Plan, best: limits.Limits) -> list[list[str]]:
    rounds, rows = rounds_of(measured), []
    for case in plan.cases:
        row = [case.name]
        for precision in ("bf16", "int8"):
            engines = [found.engine for found in measured.found if found.engine.precision == precision]
            peer = verdicts.best(rounds, case.name, [engine.name for engine in engines if engine.group != OURS])
            ours = own_rate(measured, precision, case.name)
            row.append(f"{peer.ratio:.2f} × {peer.name}" if peer else "")
            row.append(f"{share(measured.model, case, precision, ours, best):.0%}" if ours else "")
        rows.append(row)
    return rows


def share(model: str, case: Case, precision: str, rate: float, best: limits.Limits) -> float:
    """Of what the machine allows."""
    config = presets.preset(model)
    if case.lengths:
        lengths = list(case.lengths)
        return limits.prefill_s(config, lengths, precision, best) * rate / sum(lengths)
    return limits.decode_s(config, case.batch, case.context, precision, best) * rate / case.batch


def reading(measured: Measured, plan: Plan, best: limits.Limits) -> str:
    """What was wanted, and whether it was reached."""
    alone, of_reading = next((case for case in plan.decodes if case.batch == 1), None), None
    if alone is not None and (rate := own_rate(measured, "bf16", alone.name)):
        of_reading = share(measured.model, alone, "bf16", rate, best)
        if of_reading > MOST_OF_READING:  # then that was no limit
            of_reading = None
    lines = [f"- {verdicts.verdict(wanted, rounds_of(measured), of_reading)}" for wanted in verdicts.WANTED]
    reached, undecided = (sum(f": {word}" in line for line in lines) for word in ("reached", "undecided"))
    told = f"Wanted: {reached} of {len(lines)} reached, {undecided} undecided (some rounds say so and some do not)."
    return f"{told}\n\n" + "\n".join(lines)


def _start(found: Found) -> list[str]:
    cold = found.cold_s
    return [
        found.engine.name,
        f"{statistics.median(cold):.2f}" if cold else "",
        f"{min(cold):.2f} … {max(cold):.2f}" if cold else "",
        f"{found.peak_bytes / 1e6:.0f}",
        f"{found.install_bytes / 1e6:.0f}",
    ]


def _agreement(there: Sequence[Found]) -> str:
    """Engines that read the same prompts draw mostly the same first tokens; another converter's fault would show."""
    ours = next((found for found in there if found.engine.group == OURS), None)
    if ours is None or not ours.first_tokens:
        return ""
    said = [
        f"{found.engine.name} {sum(a == b for a, b in zip(found.first_tokens, ours.first_tokens, strict=True))}"
        for found in there
        if found is not ours and found.first_tokens
    ]
    if not said:
        return ""
    return (
        f"First tokens that are {ours.engine.name}'s too, of {len(ours.first_tokens)} decoded prompts: "
        f"{', '.join(said)}. Weights are random, so that rounding may decide."
    )


def versions(engines: Sequence[Engine]) -> str:
    """What is pinned, by environment."""
    venvs: list[Venv] = list(dict.fromkeys(engine.venv for engine in engines if engine.venv is not None))
    return "; ".join(", ".join(venv.requirements.read_text(encoding="utf8").split()) for venv in venvs)


def notes(measured: Measured) -> str:
    """What each engine chose, or was told."""
    return "\n".join(f"- {found.engine.name}: {found.notes}." for found in measured.found if found.notes)
