"""report.html: tables and interactive plots in one file that needs no network."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from unishard.bench.figures import Figure, figures
from unishard.bench.results import Results
from unishard.bench.spent import ATTRIBUTION
from unishard.bench.tables import Sheet, heading, sheets
from unishard.errors import UnsupportedError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #24292f; }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0; } .wide { overflow-x: auto; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #d0d7de; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.ours td { background: #ddf4ff; }
.note { color: #57606a; font-size: 13px; } .plot { width: 100%; height: 480px; }
"""


def write_report(results: Results, path: Path) -> None:
    """Write the page.

    Raises:
        UnsupportedError: plotly, whose script the page carries, is not installed.
    """
    path.write_text(render(results), encoding="utf-8")


def render(results: Results) -> str:
    """The page as text."""
    parts = ["<h1>unishard bench</h1>", *(f"<p>{escape(line)}</p>" for line in heading(results))]
    parts += [_table(sheet, {e.name for e in results.entries if e.ours}) for sheet in sheets(results)]
    drawn = figures(results)
    parts += [_placeholder(index, figure) for index, figure in enumerate(drawn)]
    parts += [_settings(results), _attribution()]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>unishard bench</title>"
        f"<style>{_STYLE}</style><script>{_plotly()}</script></head><body>\n"
        + "\n".join(parts)
        + f"\n<script>{_script(drawn)}</script></body></html>\n"
    )


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UnsupportedError(
            "report.html needs plotly: pip install 'unishard[bench]' or plotly alone, then "
            "`unishard bench --from results.json`"
        ) from error
    return get_plotlyjs()


def _table(sheet: Sheet, ours: set[str]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in sheet.columns)
    body = "".join(
        f"<tr{' class=ours' if row[0] in ours else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in sheet.rows
    )
    return (
        f"<h2>{escape(sheet.title)}</h2><div class=wide><table><tr>{head}</tr>{body}</table></div>"
        f"<p class=note>{escape(sheet.note)}</p>"
    )


def _placeholder(index: int, figure: Figure) -> str:
    return (
        f"<h2>{escape(figure.title)}</h2><p class=note>{escape(figure.text)}</p>"
        f"<div class=plot id='plot{index}'></div>"
    )


def _settings(results: Results) -> str:
    rows = [[entry.name, entry.setting] for entry in results.entries]
    items = "".join(f"<li><b>{escape(name)}</b>: {escape(setting)}</li>" for name, setting in rows)
    return f"<h2>Settings</h2><ul>{items}</ul>"


def _attribution() -> str:
    items = "".join(f"<li><b>{escape(kind)}</b>: {escape(text)}</li>" for kind, text in ATTRIBUTION.items())
    return f"<h2>How time is attributed</h2><ul>{items}</ul>"


def _script(drawn: list[Figure]) -> str:
    common = {"margin": {"t": 20, "b": 130}, "hovermode": "closest", "template": "none"}
    plots = [{"traces": f.traces, "layout": {**common, **f.layout}} for f in drawn]
    # A text that closes the script element must not be able to appear inside it.
    data = json.dumps(plots).replace("</", "<\\/")
    return (
        f"const plots = {data};\n"
        "plots.forEach((plot, index) => Plotly.newPlot(`plot${index}`, plot.traces, plot.layout,"
        " {displaylogo: false, responsive: true}));"
    )
