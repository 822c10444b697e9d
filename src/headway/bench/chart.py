"""Curves to look at: PNG for a README, SVG inside a page that may be light or dark. Knows nothing of what is drawn."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Style = Literal["line", "dashed", "dots", "steps"]

# Okabe and Ito's palette but for black and yellow: told apart by the colour-blind, readable on light and dark
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
COLOUR_OF = {"text": COLOURS[0], "image": COLOURS[1], "search": COLOURS[2], "file": COLOURS[3]}
INK = "#010203"  # stands for the page's own text colour in an SVG
PANEL_INCHES = (5.6, 3.6)


class Curve(NamedTuple):
    """A named series; `colour` "" takes the next one of the palette. An empty name is not in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style = "line"
    colour: str = ""


class Mark(NamedTuple):
    """A thin dashed line across the panel, at an x or at a y."""

    axis: Literal["x", "y"]
    at: float
    colour: str = INK


class Panel(NamedTuple):
    """One pair of axes. `y_range` None: whatever fits."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()
    x_log: bool = False
    y_log: bool = False
    y_range: tuple[float, float] | None = None


def png(panels: Sequence[Panel], path: Path, num_columns: int = 2) -> Path:
    """Write the panels side by side on white."""
    with matplotlib.rc_context({"font.size": 10}):
        figure = _figure(panels, num_columns)
        figure.savefig(path, format="png", dpi=144, facecolor="white")
    return path


def svg(panel: Panel, salt: str = "") -> str:
    """One panel as an `<svg>` element to put into a page: no background, text and axes in the page's colour. Panels
    on one page need different salts, since the ids within are made from it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt or panel.title, "font.size": 10}):
        _figure([panel], 1).savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    element = text[text.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    # as wide as its place; the viewBox keeps the shape
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    label = panel.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return element.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).replace(INK, "currentColor")


def cdf(values: Sequence[float], num_all: int | None = None) -> tuple[list[float], list[float]]:
    """Steps from 0 on of the share at or under each value. With `num_all`, those that have no value never arrive."""
    ordered = sorted(values)
    total = len(ordered) if num_all is None else num_all
    if not ordered:
        return [], []
    return [ordered[0], *ordered], [0.0, *((rank + 1) / total for rank in range(len(ordered)))]


def _figure(panels: Sequence[Panel], num_columns: int) -> Figure:
    num_columns = min(num_columns, len(panels))
    num_rows = -(-len(panels) // num_columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
    for number, panel in enumerate(panels):
        _draw(figure.add_subplot(num_rows, num_columns, number + 1), panel)
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, color=INK, fontsize=11, loc="left")
    axes.set_xlabel(panel.x_label, color=INK)
    axes.set_ylabel(panel.y_label, color=INK)
    next_colour = 0
    for curve in panel.curves:
        colour = curve.colour
        if not colour:
            colour = COLOURS[next_colour % len(COLOURS)]
            next_colour += 1
        _draw_curve(axes, curve, colour)
    for mark in panel.marks:
        draw = axes.axvline if mark.axis == "x" else axes.axhline
        draw(mark.at, color=mark.colour, linestyle=(0, (4, 3)), linewidth=1, alpha=0.7)
    if panel.x_log:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    if panel.y_log:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    if panel.y_range is not None:
        axes.set_ylim(*panel.y_range)
    axes.grid(visible=True, color=INK, alpha=0.15, linewidth=0.6)
    axes.tick_params(which="both", colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    if any(curve.name for curve in panel.curves):
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _plain_ticks(axis: Axis) -> None:
    """500 and not five times ten to the second."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    if curve.style == "steps":
        axes.step(curve.x, curve.y, where="post", color=colour, label=curve.name or None, linewidth=1.6)
    elif curve.style == "dots":
        axes.plot(curve.x, curve.y, "o", color=colour, label=curve.name or None, markersize=5)
    else:
        line = "--" if curve.style == "dashed" else "-"
        axes.plot(curve.x, curve.y, line, marker="o", markersize=4, color=colour, label=curve.name or None)
