"""Figures and tables as HTML that holds whatever the data hold: what report.py's page is made of.

picture(ax, said): a matplotlib figure as inline SVG, its colours those of the page (report.html: light, dark)
plain(text): what an HTML file can hold of any text; every text of the data goes through it and html.escape

What it does not do: know what is shown, or load anything: no script, no font, no image.
"""

import html
import io
import re
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CHARACTERS = 1200  # of a text; the rest is counted
# Marks that picture() turns into the page's own colours, which differ in light and dark.
INK, FAINT, COLOURS = "#a20001", "#a20002", [f"#a1000{i}" for i in range(5)]
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "minarena", "text.parse_math": False, "font.size": 9}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK)
STYLE |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), FAINT)


def styled():
    """A context in which figures look as the page does."""
    return matplotlib.rc_context(STYLE)


def axes(x: str, y: str, height: float = 2.7, **limits) -> Axes:
    """Empty axes, height in inches; a figure is as wide as a phone and never scaled down."""
    ax = Figure(figsize=(4, height), layout="constrained").subplots()
    ax.set(xlabel=short(x, 50), ylabel=short(y, 40), **limits)
    return ax


def forest(x: str, figures: dict[str, tuple[float, float]], line: float) -> Axes:
    """A row for each name, with its figure as a dot and two standard errors to either side."""
    ax = axes(x, "", 0.6 + 0.24 * len(figures))
    values, errors = np.array([*figures.values()]).T
    rows = -np.arange(len(figures))
    ax.errorbar(values, rows, xerr=2 * errors, fmt="o", color=COLOURS[0], markersize=5)
    ax.set_yticks(rows, [short(name, 28) for name in figures])
    ax.axvline(line, color=FAINT, linestyle=":")
    return ax


def named(ax: Axes) -> Axes:
    """With the names of what is drawn above it, where they hide nothing."""
    lines, names = ax.get_legend_handles_labels()
    names = [short(name, 40) for name in names]
    where = dict(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, markerscale=1.5)
    ax.legend(lines, names, ncols=1 if max(map(len, names)) > 16 else 2, **where)
    return ax


def short(name: str, most: int) -> str:
    return plain(name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 :]}")


def picture(ax: Axes, said: str) -> str:
    """Inline SVG with the sentence below it."""
    file = io.StringIO()
    ax.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(
        r"^.*?<svg .*?viewBox|<metadata>.*?</metadata>|<style.*?</style>", "", file.getvalue(), flags=re.S
    )
    svg = re.sub(r"#a1000(\d)", r"var(--c\1)", re.sub(r'<g id=".*?"', "<g", svg))
    svg = '<svg role="img" viewBox' + svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    return f"<figure>{svg}<figcaption>{html.escape(said)}</figcaption></figure>"


def section(question: str, panels: list[tuple[Axes, str]], more: str = "") -> str:
    figures = "".join(picture(*panel) for panel in panels)
    return f'<section><h2>{question}</h2><div class="figures">{figures}{more}</div></section>'


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["".join(f"<td>{html.escape(plain(cell))}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<table><tr>{head}</tr><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def details(head: str, texts: dict[str, str]) -> str:
    """A line that opens to its texts, each as text: nothing in it can become HTML."""
    body = ""
    for name, text in texts.items():
        more = f" <em>[{len(text) - CHARACTERS:,} more characters]</em>" * (len(text) > CHARACTERS)
        body += f"<dt>{name}</dt><dd dir=auto>{html.escape(plain(text[:CHARACTERS]))}{more}</dd>"
    return f"<details><summary>{html.escape(plain(head))}</summary><dl>{body}</dl></details>"


def plain(text: str) -> str:
    """Without control characters and lone halves of UTF-16 pairs."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", text)


def page(runs: list[str], sections: list[str]) -> str:
    lines = "".join(f"<li>{html.escape(plain(line))}</li>" for line in runs)
    template = Template(Path(__file__).with_name("report.html").read_text())
    return template.substitute(runs=lines, sections="".join(sections))
