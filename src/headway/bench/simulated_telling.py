"""What a simulation says to a person: the lines on the terminal and the rows of the page. Simulates nothing and draws
nothing, so that it needs no extra."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from headway.core.settings import SchedulerSettings

COLUMNS = (
    "suspended and decisions: of a request; parked: tokens, the most at once; per s: decisions in a second of ours"
)

if TYPE_CHECKING:
    from headway.bench.search import Found
    from headway.bench.simulated import Result, Run, Simulator


class Rows(NamedTuple):
    """A table; every row begins with the name of a scheduler."""

    title: str
    header: list[str]
    rows: list[list[str]]


def opening(simulator: "Simulator") -> str:
    """What is simulated."""
    load, plan = simulator.load, simulator.plan
    targets = ", ".join(
        f"{kind} {ms(slo.ttft_s)}" + (f" and {ms(slo.tpot_s)} a token" if slo.tpot_s is not None else "")
        for kind, slo in simulator.slos.items()
    )
    lines = [
        f"{load.name}: {len(load.requests)} requests; {load.source}",
        f"devices: {devices(simulator)}",
        f"targets: {targets} (TTFT; {simulator.options.slo_k:g} × {ms(simulator.alone_s)} for "
        f"{simulator.num_alone} tokens alone, other classes in proportion)",
    ]
    off = switched_off(next(iter(plan.schedulers.values())))
    return "\n".join([*lines, f"switched: {off}"] if off else lines)


def devices(simulator: "Simulator") -> str:
    """How many, at which prices, and how well those are known."""
    plan, options = simulator.plan, simulator.options
    fit = plan.fit
    source = "example prices" if options.costs == "default" else options.costs
    told = (
        f"{plan.num_devices}, {fit.step_s * 1e3:.3g} ms a step, {fit.token_s * 1e3:.3g} ms a token, "
        f"{fit.segment_s * 1e3:.3g} ms a segment, {fit.pair_s * 1e6:.3g} µs a pair ({source}), "
        f"tiles of {plan.device.tile_s * 1e3:.3g} ms"
    )
    if options.misprediction != 1:
        told += f"; the scheduler believes {options.misprediction:g} × these prices at first"
    if options.spread:
        told += f"; steps spread by {options.spread:g}"
    return told


def switched_off(settings: SchedulerSettings) -> str:
    """Unlike what is served, whichever the policy."""
    off = [
        ("no prefix caching", settings.prefix_caching),
        ("no packing", settings.pack),
        ("nobody refused", settings.refuse_unattainable),
    ]
    return ", ".join(words for words, is_on in off if not is_on)


def told(simulator: "Simulator", result: "Result") -> str:
    """For the terminal."""
    lines = []
    for table in tables(simulator, result):
        lines += ["", table.title, *_aligned([table.header, *table.rows])]
    return "\n".join([*lines, f"({COLUMNS})", "", *simulator.load.cautions(), speed(result)])


def tables(simulator: "Simulator", result: "Result") -> list[Rows]:
    """Goodput if there was more than one rate to choose from; then all schedulers at each rate that is shown."""
    found = [] if len(simulator.options.rates or (0, 0)) == 1 else [_goodput(simulator, result)]
    return found + [_at(simulator, result, rate) for rate in result.shown_rates]


def _goodput(simulator: "Simulator", result: "Result") -> Rows:
    first = next(iter(result.tried.values())).every_class.rate
    rows = []
    for name, one in result.tried.items():
        ratio = one.every_class.rate / first if first and one.every_class.rate else math.nan
        rows.append(
            [name, verdict(one.every_class), "–" if math.isnan(ratio) else f"{ratio:.2f} ×", verdict(one.all_in_one)]
        )
    which = "Highest rate" if simulator.options.rates is None else "Highest of the rates"
    title = f"{which}, requests/s, with {simulator.options.share:.0%} in time"
    return Rows(title, ["scheduler", "of every class", "to the first", "of all together"], rows)


def _at(simulator: "Simulator", result: "Result", rate: float) -> Rows:
    kinds = simulator.load.kinds
    rows = []
    for name, one in result.tried.items():
        run = one.runs[rate]
        overall, counters = run.score.overall, run.counters
        rows.append(
            [
                name,
                *(f"{run.score.by_kind[kind].joint:.1%}" for kind in kinds),
                f"{overall.joint:.1%}",
                ms(overall.ttft_s.p50),
                ms(overall.ttft_s.p99),
                f"{overall.num_refused / overall.num:.1%}",
                f"{counters.get('preemptions', 0) / overall.num:.2f}",
                f"{counters.get('most_parked_tokens', 0)}",
                f"{counters.get('plans', 0) / overall.num:.2f}",
                f"{decisions_per_s(run):,.0f}",
            ]
        )
    header = ["scheduler", *kinds, "all", "TTFT p50", "p99", "refused", "suspended", "parked", "decisions", "per s"]
    return Rows(f"At {rate:.4g} requests/s, in time", header, rows)


def decisions_per_s(run: "Run") -> float:
    """Of our time, not of the virtual clock's."""
    return run.counters.get("plans", 0) / max(run.wall_s, 1e-9)


def verdict(found: "Found[Run]") -> str:
    """The rate in a few words."""
    if not found.rate:
        return f"under {found.points[0].rate:.3g}"
    return f"{found.rate:.3g}" if found.failed_at < math.inf else f"{found.rate:.3g} or more"


def speed(result: "Result") -> str:
    """How much was simulated, how fast, with the load's making."""
    per_minute = 60 * result.num_simulated / max(result.wall_s, 1e-9)
    return f"{result.num_simulated:,} requests simulated in {result.wall_s:.1f} s: {per_minute:,.0f} a minute."


def ms(seconds: float | None) -> str:
    if seconds is None or math.isnan(seconds):
        return "–"
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
