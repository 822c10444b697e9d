"""A report to look at: one HTML file with its curves in it, which asks the network for nothing. Knows only how things
are laid out, not what they mean."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from headway.bench.chart import Panel, svg

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --card: #f6f8fa; --rule: #d1d9e0;
        --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --card: #161b22; --rule: #30363d;
          --good: #3fb950; --bad: #ff7b72; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p.lead { color: var(--soft); margin: 0 0 1.5rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.fact { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .75rem 1rem; }
.fact b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.fact span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
.chart { border: 1px solid var(--rule); border-radius: .6rem; padding: .5rem; }
.chart svg { display: block; width: 100%; height: auto; }
.chart svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
td.good { color: var(--good); } td.bad { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


class Cell(NamedTuple):
    """Text that is good or bad news."""

    text: str
    good: bool


class Table(NamedTuple):
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]


class Page(NamedTuple):
    """`facts` are the few figures on top, label to figure; `notes` how it was measured."""

    title: str
    lead: str
    facts: Mapping[str, str]
    panels: Sequence[Panel]
    tables: Sequence[Table]
    notes: Mapping[str, str]


def html(page: Page) -> str:
    """The whole file."""
    facts = "".join(f"<div class=fact><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in page.facts.items())
    charts = "".join(f"<div class=chart>{svg(panel, f'{n}')}</div>" for n, panel in enumerate(page.panels))
    tables = "".join(_table(table) for table in page.tables)
    notes = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in page.notes.items())
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>{STYLE}</style>\n"
        f"<h1>{escape(page.title)}</h1>\n<p class=lead>{escape(page.lead)}</p>\n<div class=facts>{facts}</div>\n"
        f"<div class=charts>{charts}</div>\n{tables}\n<h2>How it was measured</h2>\n<dl>{notes}</dl>\n</html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in table.rows)
    return (
        f"<h2>{escape(table.title)}</h2>\n<div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    return f"<td class={'good' if cell.good else 'bad'}>{escape(cell.text)}</td>"
