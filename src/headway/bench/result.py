"""A measurement as it is kept: one JSON document that says what was asked of whom, and what came of it.

Owns the document and the panels that are drawn from it; `bench/page.py` lays them out.
"""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from headway import __version__
from headway.bench.chart import COLOUR_OF, INK, Curve, Mark, Panel, cdf
from headway.bench.compare import Ratio
from headway.bench.measure import Run
from headway.bench.score import Marks, Outcome
from headway.bench.search import Point
from headway.core.request import SLO

VERSIONS = ("aiohttp", "numpy", "matplotlib")
OUTCOME_COLUMNS = (
    "kind", "at_s", "num_prompt", "num_output", "ending", "ttft_s", "tpot_s", "end_s", "reason",
)  # fmt: skip


def plain(thing: Any) -> Any:
    """Types of ours as JSON knows it: by name; what is not finite is null."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: plain(getattr(thing, field.name)) for field in fields(thing)}
    if isinstance(thing, tuple) and hasattr(thing, "_asdict"):
        return {name: plain(value) for name, value in thing._asdict().items()}
    if isinstance(thing, Mapping):
        return {str(name): plain(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [plain(value) for value in thing]
    if isinstance(thing, float):
        return thing if math.isfinite(thing) else None
    return thing


def provenance(command: str) -> dict[str, Any]:
    """When, with what and on which machine the generator ran."""
    return {
        "command": command,
        "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "versions": {"headway": __version__, "python": platform.python_version()}
        | {name: version(name) for name in VERSIONS},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}",
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def of_run(run: Run) -> dict[str, Any]:
    """Everything about a run but the times between tokens, of which only the quantiles are kept."""
    rows = [[plain(getattr(outcome, name)) for name in OUTCOME_COLUMNS] for outcome in run.outcomes]
    return {
        "rate": run.rate,
        "token_seed": run.seed,
        "score": plain(run.score),
        "generator_late_ms": run.late_ms,
        "complaints": run.complaints,
        "outcomes": {"columns": OUTCOME_COLUMNS, "rows": rows},
    }


def of_point(point: Point[Run]) -> dict[str, Any]:
    shares = {kind: plain(share) for kind, share in point.shares.items()}
    return {"rate": point.rate, "passed": point.passed, "shares": shares, "runs": [of_run(run) for run in point.runs]}


def of_ratios(ratios: Sequence[Ratio]) -> list[Any]:
    return [plain(ratio) for ratio in ratios]


# Panels


def panels(
    points: Sequence[Point[Run]],
    shown: Point[Run],
    targets: Mapping[str, SLO],
    share: float,
    *,
    ttft_only: bool = False,
) -> list[Panel]:
    """Attainment and TTFT over the rate; at one rate the distribution of TTFT, and other scales of the targets."""
    outcomes = [outcome for run in shown.runs for outcome in run.outcomes]
    return [
        attainment(points, share, ttft_only=ttft_only),
        ttft_over_rate(points),
        distribution(outcomes, targets, f"Time to first token at {shown.rate:.3g} requests/s"),
        scales(shown, share),
    ]


def attainment(points: Sequence[Point[Run]], share: float, *, ttft_only: bool = False) -> Panel:
    def of(marks: Marks) -> float:
        return marks.ttft_only if ttft_only else marks.joint

    rates = [point.rate for point in points]
    curves = []
    for kind in _kinds(points):
        # a class that did not occur at a rate has no point there
        some = [(p.rate, _mean([of(r.score.by_kind[kind]) for r in p.runs if kind in r.score.by_kind])) for p in points]
        known = [(rate, attained) for rate, attained in some if not math.isnan(attained)]
        curves.append(Curve(kind, [x for x, _ in known], [y for _, y in known], colour=COLOUR_OF.get(kind, "")))
    everybody = [_mean([of(run.score.overall) for run in point.runs]) for point in points]
    curves.append(Curve("all", rates, everybody, "dashed", INK))
    title = "Requests that attained " + ("their TTFT target" if ttft_only else "all their targets")
    return Panel(title, "requests/s", "share", curves, [Mark("y", share)], y_range=(-0.02, 1.04))


def ttft_over_rate(points: Sequence[Point[Run]]) -> Panel:
    rates = [point.rate for point in points]
    curves = [
        Curve(name, rates, [1000 * _mean([getattr(run.score.overall.ttft_s, name) for run in p.runs]) for p in points])
        for name in ("p50", "p90", "p99")
    ]
    return Panel("Time to first token, all classes", "requests/s", "ms", curves, y_log=True)


def distribution(outcomes: Sequence[Outcome], targets: Mapping[str, SLO], title: str) -> Panel:
    """Of all requests of a class: those without a first token keep its curve below 1."""
    curves, marks = [], []
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        some = [outcome for outcome in outcomes if outcome.kind == kind]
        x, y = cdf([outcome.ttft_s * 1000 for outcome in some if outcome.ttft_s is not None], len(some))
        colour = COLOUR_OF.get(kind, "")
        curves.append(Curve(kind, x, y, "steps", colour))
        target_s = targets.get(kind, SLO()).ttft_s
        if target_s is not None:
            marks.append(Mark("x", target_s * 1000, colour or INK))
    return Panel(title, "ms; dashed: the target", "share", curves, marks, x_log=True, y_range=(-0.02, 1.04))


def scales(point: Point[Run], share: float) -> Panel:
    scales_ = [scaled.scale for scaled in point.runs[0].score.scales]
    curves = [
        Curve(kind, scales_, _over_scales(point, kind), colour=COLOUR_OF.get(kind, "")) for kind in _kinds([point])
    ]
    title = f"Had the targets been longer or shorter, at {point.rate:.3g} requests/s"
    return Panel(title, "times the targets", "share", curves, [Mark("y", share)], y_range=(-0.02, 1.04))


def _over_scales(point: Point[Run], kind: str) -> list[float]:
    runs = [run for run in point.runs if kind in run.score.by_kind]
    return [_mean([run.score.scales[n].by_kind[kind] for run in runs]) for n in range(len(runs[0].score.scales))]


def _kinds(points: Sequence[Point[Run]]) -> list[str]:
    return list(dict.fromkeys(kind for point in points for run in point.runs for kind in run.score.by_kind))


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
