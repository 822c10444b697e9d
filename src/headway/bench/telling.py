"""What a measurement says to a person: the lines on the terminal and the page. Measures and judges nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from headway.bench.chart import Curve, Panel, cdf
from headway.bench.compare import CONFIDENCE, FEW_BLOCKS, Ratio
from headway.bench.load import Load
from headway.bench.measure import Alone, Run, Turns
from headway.bench.page import Cell, Page, Table
from headway.bench.result import panels
from headway.bench.score import SCALES, Marks, attained, quantile
from headway.bench.search import Found, Point
from headway.core.request import SLO

LATE_MS = 10.0  # a generator later than this at p99 is part of what it measures
LONG_S = 10.0  # from here on told in seconds, so that a column stays narrow
SHORT = 0.95  # of the tokens asked for: answers with fewer are less work than the load says


def shown_point(found: Found[Run]) -> Point[Run]:
    """The one to look at closely: that of the goodput, or else the lowest of all."""
    return next((point for point in found.points if point.rate == found.rate), found.points[0])


def page_of(
    found: Found[Run], load: Load, alone: Alone, targets: Mapping[str, SLO], document: Mapping[str, Any]
) -> Page:
    """The report of one server."""
    shown, share, ttft_only = shown_point(found), document["share"], document["ttft_only"]
    run, at = shown.runs[0], f"at {shown.rate:.3g} requests/s"
    by_rate = [(f"{point.rate:.3g}", one.score.overall) for point in found.points for one in point.runs]
    facts = {
        f"requests/s with {_in_time(share, ttft_only)}": verdict(found),
        f"attained {at}": f"{_judged(run.score.overall, ttft_only):.1%}",
        f"TTFT p99 {at}": _ms(run.score.overall.ttft_s.p99),
        "refused or failed": str(run.score.overall.num_refused + run.score.overall.num_failed),
    }
    tables = [
        _by_rate(found, share, ttft_only),
        _latency_table("Latencies, by rate", "requests/s", by_rate),
        _by_class(shown, targets, share, ttft_only),
        _latency_table(f"Latencies, by class, {at}", "class", list(run.score.by_kind.items())),
        _targets(alone, targets),
        _scales(shown, share),
    ]
    title = f"{document['server']['model'] or 'A server'}: in time, up to which rate"
    lead = f"{document['server']['url']}, {load.name}, {len(load.requests)} requests in each run"
    drawn = panels(found.points, shown, targets, share, ttft_only=ttft_only)
    return Page(title, lead, facts, drawn, tables, _notes(document))


def _judged(marks: Marks, ttft_only: bool) -> float:
    """The share that the goodput goes by."""
    return marks.ttft_only if ttft_only else marks.joint


def _in_time(share: float, ttft_only: bool) -> str:
    return f"{share:.0%} of every class in time" + (" for their first token" if ttft_only else "")


def verdict(found: Found[Run]) -> str:
    """The goodput in a few words."""
    if not found.rate:
        return f"under {found.points[0].rate:.3g}"
    return f"{found.rate:.3g}" if found.failed_at < math.inf else f"{found.rate:.3g} or more"


def lines(found: Found[Run], share: float, *, ttft_only: bool = False) -> list[str]:
    """For the terminal."""
    told = [
        f"{'requests/s':>10}  {'attained':>8}  {'worst class':>13}"
        + "".join(f"  {name} p50  {'p90':>7}  {'p99':>7}" for name in ("TTFT", "TPOT"))
    ]
    for point in found.points:
        run, worst = point.runs[0], min(point.shares, key=lambda kind: point.shares[kind])
        marks = run.score.overall
        told.append(
            f"{point.rate:>10.3g}  {_judged(marks, ttft_only):>8.1%}  {worst + f' {point.shares[worst]:.1%}':>13}"
            + "".join(f"  {_ms(q.p50):>8}  {_ms(q.p90):>7}  {_ms(q.p99):>7}" for q in (marks.ttft_s, marks.tpot_s))
            + f"  {'passed' if point.passed else 'missed'}"
        )
    told.append(f"Goodput: {verdict(found)} requests/s with {_in_time(share, ttft_only)}.")
    return told + warnings([run for point in found.points for run in point.runs])


def warnings(runs: Sequence[Run]) -> list[str]:
    """What makes the numbers worth less, and what the server complained of."""
    told = []
    late = max(run.late_ms["p99"] for run in runs)
    if late > LATE_MS:
        told.append(f"Careful: the generator itself was up to {late:.0f} ms late (p99), so the machine was too busy.")
    got = [outcome.num_output / outcome.num_asked for run in runs for outcome in run.outcomes if outcome.num_asked]
    if (part := quantile(got, 0.5)) < SHORT:
        told.append(f"Careful: half of the answers had no more than {part:.0%} of their tokens: less work was done.")
    reasons: dict[str, int] = {}
    complaints: dict[str, str] = {}
    for run in runs:
        complaints = run.complaints | complaints
        for reason, count in run.score.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    for reason, count in reasons.items():
        told.append(f"{count} requests ended with {reason}{': ' + complaints[reason] if reason in complaints else ''}")
    return told


def _by_rate(found: Found[Run], share: float, ttft_only: bool) -> Table:
    rows: list[list[str | Cell]] = []
    for point in found.points:
        for run in point.runs:
            overall = run.score.overall
            shares = run.score.shares(ttft_only=ttft_only)
            worst = min(shares, key=lambda kind: shares[kind])
            lowest = shares[worst]
            rows.append(
                [
                    f"{point.rate:.3g}",
                    f"{overall.joint:.1%}",
                    Cell(f"{worst} {lowest:.1%}", lowest >= share),
                    f"{overall.ttft_only:.1%}",
                    f"{run.score.goodput:.3g}",
                    str(overall.num_refused),
                    str(overall.num_failed),
                    f"{run.late_ms['p99']:.1f} ms",
                ]
            )
    header = [
        "requests/s",
        "all targets",
        "worst class",
        "TTFT",
        "good/s",
        "refused",
        "failed",
        "late p99",
    ]
    return Table("By rate", header, rows)


_LATENCIES = ("TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "ITL p50", "p90", "p99")


def _latencies(marks: Marks) -> list[str]:
    return [_ms(seconds) for quantiles in (marks.ttft_s, marks.tpot_s, marks.itl_s) for seconds in quantiles]


def _latency_table(title: str, of: str, rows: Sequence[tuple[str, Marks]]) -> Table:
    """In a table of its own: beside what was attained it would be wider than the page."""
    return Table(title, [of, *_LATENCIES], [[name, *_latencies(marks)] for name, marks in rows])


def _by_class(point: Point[Run], targets: Mapping[str, SLO], share: float, ttft_only: bool) -> Table:
    rows: list[list[str | Cell]] = []
    for kind, marks in point.runs[0].score.by_kind.items():
        slo = targets.get(kind, SLO())
        rows.append(
            [
                kind,
                str(marks.num),
                _ms(slo.ttft_s),
                _ms(slo.tpot_s),
                f"{marks.joint:.1%}" if ttft_only else Cell(f"{marks.joint:.1%}", marks.joint >= share),
                Cell(f"{marks.ttft_only:.1%}", marks.ttft_only >= share) if ttft_only else f"{marks.ttft_only:.1%}",
            ]
        )
    header = ["class", "requests", "TTFT target", "TPOT target", "all targets", "TTFT"]
    return Table(f"By class, at {point.rate:.3g} requests/s", header, rows)


def _targets(alone: Alone, targets: Mapping[str, SLO]) -> Table:
    rows = [
        [
            kind,
            str(alone.num_prompt[kind]),
            _ms(alone.ttft_s[kind]),
            _ms(targets[kind].ttft_s),
            _ms(targets[kind].tpot_s),
        ]
        for kind in alone.ttft_s
    ]
    return Table("Alone on the machine", ["class", "p90 prompt", "TTFT alone", "TTFT target", "TPOT target"], rows)


def _scales(point: Point[Run], share: float) -> Table:
    score = point.runs[0].score
    rows: list[list[str | Cell]] = [
        [
            f"{s.scale:.1f}",
            f"{s.overall:.1%}",
            *(Cell(f"{s.by_kind[k]:.1%}", s.by_kind[k] >= share) for k in score.by_kind),
        ]
        for s in score.scales
    ]
    title = f"Had all targets been so many times as long, at {point.rate:.3g} requests/s"
    return Table(title, ["scale", "all", *score.by_kind], rows)


# A comparison


def comparison_page(
    turns: Turns,
    ratios: Sequence[Ratio],
    labels: tuple[str, str],
    targets: Mapping[str, SLO],
    document: Mapping[str, Any],
) -> Page:
    """The report of two servers."""
    label_a, label_b = labels
    first, lost, ttft_only = ratios[0], ratios[-1], document["ttft_only"]
    facts = {
        f"{label_a}: {first.name}": f"{first.a:.1%}",
        f"{label_b}: {first.name}": f"{first.b:.1%}",
        f"{label_a}, {label_b}: refused or failed": f"{lost.a:.1%}, {lost.b:.1%}",
        **{f"{label_b} over {label_a}: {one.name}": _times(one.ratio) for one in ratios if one.name in _HEADLINES},
    }
    rows = [[one.name, f"{one.a:.4g}", f"{one.b:.4g}", _times(one.ratio), _interval(one)] for one in ratios]
    table = Table("Ratios", ["", label_a, label_b, "ratio", f"{CONFIDENCE:.0%} interval"], rows)
    runs = [
        [
            str(n + 1),
            labels["AB".index(side)],
            f"{_judged(run.score.overall, ttft_only):.1%}",
            *_latencies(run.score.overall),
            str(run.score.overall.num_refused + run.score.overall.num_failed),
        ]
        for n, (side, run) in enumerate(turns.runs)
    ]
    judged = "TTFT target" if ttft_only else "all targets"
    order = Table("Every run, in its order", ["run", "server", judged, *_LATENCIES, "refused or failed"], runs)
    title = f"{label_b} against {label_a}"
    lead = f"The same load in turns, A B B A, at {document['rate']:.3g} requests/s"
    notes = {"targets": f"multiples of what a lone request takes at {label_a}", **_notes(document)}
    drawn = comparison_panels(turns, labels, targets, ttft_only=ttft_only)
    return Page(title, lead, facts, drawn, [table, order], notes)


_HEADLINES = ("TTFT p50, answered (s)", "TTFT p99, answered (s)")


def comparison_panels(
    turns: Turns, labels: tuple[str, str], targets: Mapping[str, SLO], *, ttft_only: bool = False
) -> list[Panel]:
    """The distributions of TTFT, and what was attained at other scales of the targets."""
    ttft, sweep = [], []
    for side, label in zip("AB", labels, strict=True):
        outcomes = [outcome for which, run in turns.runs if which == side for outcome in run.outcomes]
        ttft.append(
            Curve(label, *cdf([o.ttft_s * 1000 for o in outcomes if o.ttft_s is not None], len(outcomes)), "steps")
        )
        shares = [attained(outcomes, targets, scale, ttft_only=ttft_only) for scale in SCALES]
        sweep.append(Curve(label, SCALES, shares))
    unit = (-0.02, 1.04)
    return [
        Panel("Time to first token, all classes", "ms", "share", ttft, x_log=True, y_range=unit),
        Panel(
            f"Had the {'TTFT targets' if ttft_only else 'targets'} been longer or shorter",
            "times the targets",
            "share",
            sweep,
            y_range=unit,
        ),
    ]


def comparison_lines(ratios: Sequence[Ratio], labels: tuple[str, str], num_blocks: int) -> list[str]:
    """For the terminal."""
    width = max(len(one.name) for one in ratios)
    told = [f"{'':<{width}}  {labels[0]:>10}  {labels[1]:>10}  {'ratio':>7}  {CONFIDENCE:.0%} interval"]
    told += [
        f"{one.name:<{width}}  {one.a:>10.4g}  {one.b:>10.4g}  {_plain(one.ratio):>7}  {_interval(one)}"
        for one in ratios
    ]
    if num_blocks < FEW_BLOCKS:
        told.append(f"Careful: few blocks ({num_blocks}); give --blocks {FEW_BLOCKS} or more to trust the intervals.")
    return told


def _notes(document: Mapping[str, Any]) -> dict[str, str]:
    late = [quantile([run["p99"] for run in document["late_ms"]], share) for share in (0.5, 1.0)]
    provenance = document["provenance"]
    return {
        "command": provenance["command"],
        "load": document["load"]["source"],
        "seeds": ", ".join(f"{name} {seed}" for name, seed in document["seeds"].items()),
        "generator": f"open loop; late by {late[0]:.1f} ms at p99 in the median run, {late[1]:.1f} ms in the worst",
        "rules": "Latencies count from the instant at which the load asked. Refused, failed and broken answers have "
        "missed and were not tried again. A quantile is a value that occurred (nearest rank).",
        "machine of the generator": f"{provenance['machine']}, load average {provenance['load_average'][0]}",
        "versions": ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
        "when": provenance["at"],
    }


def _times(ratio: float) -> str:
    return "none" if math.isnan(ratio) else f"{ratio:.3f} ×"


def _plain(ratio: float) -> str:
    return "–" if math.isnan(ratio) else f"{ratio:.3f}"


def _interval(one: Ratio) -> str:
    return "–" if math.isnan(one.low) else f"{one.low:.3f} … {one.high:.3f}"


def _ms(seconds: float | None) -> str:
    if seconds is None or math.isnan(seconds):
        return "–"
    ms = seconds * 1000
    return f"{seconds:.1f} s" if seconds >= LONG_S else f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"
