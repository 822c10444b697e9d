"""A simulation as it is kept: one JSON document, a picture and a page. Needs the extra `bench`, as all that draws."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headway.bench import simulated_telling as telling
from headway.bench.chart import COLOURS, Curve, Mark, Panel, Style, png
from headway.bench.page import Cell, Page, Table, html
from headway.bench.result import plain, provenance
from headway.bench.simulated import Result, Run, Simulator, Tried

WIDE = 8.0  # rates further apart than this are drawn on a logarithmic axis


def write(simulator: Simulator, result: Result, command: str) -> str:
    """Put all three into the folder; says where they are."""
    folder: Path = simulator.options.out
    drawn = panels(simulator, result)
    about = document(simulator, result, command)
    try:
        (folder / "result.json").write_text(json.dumps(plain(about), indent=1) + "\n", encoding="utf8")
        png(drawn, folder / "chart.png")
        (folder / "report.html").write_text(html(page(simulator, result, about, drawn)), encoding="utf8")
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}.") from error
    return f"Written: {folder / 'report.html'}, {folder / 'chart.png'} and {folder / 'result.json'}"


def document(simulator: Simulator, result: Result, command: str) -> dict[str, Any]:
    """All of it but `provenance` and `speed` follows from the flags."""
    load, options = simulator.load, simulator.options
    return {
        "format": 1,
        "provenance": provenance(command),
        "speed": {
            "num_requests": result.num_simulated,
            "wall_s": result.wall_s,
            "decisions_per_s": {
                name: {f"{rate:g}": telling.decisions_per_s(one.runs[rate]) for rate in result.shown_rates}
                for name, one in result.tried.items()
            },
        },
        "load": {"name": load.name, "source": load.source, "num_requests": len(load.requests)},
        "seed": options.seed,
        "share": options.share,
        "costs": options.costs,
        "num_devices": simulator.plan.num_devices,
        "device": simulator.plan.device,
        "alone": {"num_prompt": simulator.num_alone, "ttft_s": simulator.alone_s},
        "targets": simulator.slos,
        "shown_rates": result.shown_rates,
        "policies": {name: _of_tried(one) for name, one in result.tried.items()},
    }


def _of_tried(one: Tried) -> dict[str, Any]:
    return {
        "settings": one.settings,
        "goodput": {"rate": one.every_class.rate, "failed_at": one.every_class.failed_at},
        "all_in_one": {"rate": one.all_in_one.rate, "failed_at": one.all_in_one.failed_at},
        "runs": [{"rate": run.rate, "score": run.score, "counters": run.counters} for run in one.by_rate],
    }


def page(simulator: Simulator, result: Result, about: dict[str, Any], drawn: Sequence[Panel]) -> Page:
    """The report."""
    load, options = simulator.load, simulator.options
    facts = {
        f"{name}: requests/s for every class": telling.verdict(one.every_class) for name, one in result.tried.items()
    }
    made = about["provenance"]
    return Page(
        f"{load.name}, simulated: in time, up to which rate",
        f"{len(load.requests)} requests in each run, {simulator.plan.num_devices} "
        f"{'device' if simulator.plan.num_devices == 1 else 'devices'}, {options.share:.0%} of each class in time",
        facts,
        drawn,
        [_table(rows, options.share) for rows in telling.tables(simulator, result)],
        {
            "command": made["command"],
            "load": load.source,
            "seed": str(options.seed),
            "devices": telling.devices(simulator),
            "switched": telling.switched_off(next(iter(simulator.plan.schedulers.values()))) or "nothing",
            "targets": ", ".join(f"{kind} TTFT {telling.ms(slo.ttft_s)}" for kind, slo in simulator.slos.items()),
            "rules": "The engine's own scheduler and driver on a virtual clock; a step takes what it is priced at. Who "
            "was refused has missed. A quantile is a value that occurred (nearest rank).",
            "columns": telling.COLUMNS,
            "careful": " ".join(simulator.load.cautions()) or "nothing",
            "speed": telling.speed(result),
            "versions": ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
            "when": made["at"],
        },
    )


def _table(rows: telling.Rows, share: float) -> Table:
    """Shares of classes are good or bad news."""
    is_share = [name in ("text", "image", "search", "file", "all") for name in rows.header]
    cells: list[list[str | Cell]] = [
        [
            Cell(cell, float(cell.rstrip("%")) >= 100 * share) if judged else cell
            for cell, judged in zip(row, is_share, strict=True)
        ]
        for row in rows.rows
    ]
    return Table(rows.title, rows.header, cells)


# Panels


def panels(simulator: Simulator, result: Result) -> list[Panel]:
    """Over the rate: the worst class, all together, each class (if there are several); and at one rate other scales of
    the targets."""
    rate, kinds = result.shown_rates[0], simulator.load.kinds
    looks: list[tuple[str, Callable[[Run], float]]] = [
        ("In time, the worst class", lambda run: min(run.score.shares().values())),
        ("In time, all together", lambda run: run.score.overall.joint),
        *((f"In time, class {kind}", _share_of(kind)) for kind in kinds),
    ]
    several = looks if len(kinds) > 1 else looks[-1:]
    over = [_over_rate(result, simulator.options.share, title, look) for title, look in several]
    return [*over, _scales(result, simulator.options.share, rate)]


def _share_of(kind: str) -> Callable[[Run], float]:
    return lambda run: run.score.by_kind[kind].joint


def _over_rate(result: Result, share: float, title: str, look: Callable[[Run], float]) -> Panel:
    curves = [
        _curve(number, name, [run.rate for run in one.by_rate], [look(run) for run in one.by_rate])
        for number, (name, one) in enumerate(result.tried.items())
    ]
    rates = [rate for one in result.tried.values() for rate in one.runs]
    x_log = max(rates) > WIDE * min(rates)
    return Panel(title, "requests/s", "share", curves, [Mark("y", share)], x_log=x_log, y_range=(-0.02, 1.04))


def _scales(result: Result, share: float, rate: float) -> Panel:
    curves = []
    for number, (name, one) in enumerate(result.tried.items()):
        scales = one.runs[rate].score.scales
        worst = [min(scaled.by_kind.values(), default=math.nan) for scaled in scales]
        curves.append(_curve(number, name, [scaled.scale for scaled in scales], worst))
    title = f"The worst class, had the targets been longer or shorter, at {rate:.3g}/s"
    return Panel(title, "times the targets", "share", curves, [Mark("y", share)], y_range=(-0.02, 1.04))


def _curve(number: int, name: str, x: Sequence[float], y: Sequence[float]) -> Curve:
    """A scheduler has the same colour everywhere; there are fewer colours than schedulers may be named."""
    style: Style = "line" if number < len(COLOURS) else "dashed"
    return Curve(name, x, y, style, COLOURS[number % len(COLOURS)])
