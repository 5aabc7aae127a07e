"""Figures, tables and texts as HTML: what the report's page is made of.

    picture(ax, caption)      a figure as inline SVG; report.html has its colours for light and dark
    cards, facts, table       the page's other shapes
    plain(text)               the text without characters that HTML cannot hold

Every text of the data goes through plain() and html.escape(): no data can become HTML. What it does not do:
know what is shown, or load anything (no script, no font, no image).
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

from minarena.report.words import Estimate

CHARACTERS = 1200  # shown of a text; the rest is counted
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
    """Empty axes, height in inches. A figure is as wide as a phone's screen and never scaled down."""
    ax = Figure(figsize=(4, height), layout="constrained").subplots()
    ax.set(xlabel=short(x, 50), ylabel=short(y, 40), **limits)
    return ax


def forest(x: str, figures: list[tuple[str, Estimate]], line: float, bold: tuple[str, ...] = ()) -> Axes:
    """One line for each name: the figure as a dot, two standard errors to either side as a bar."""
    ax = axes(x, "", 0.6 + 0.24 * len(figures))
    rows = -np.arange(len(figures))
    values, errors = with_errors([found for _, found in figures])
    ax.errorbar(values, rows, xerr=errors, fmt="o", color=COLOURS[0], markersize=5)
    ax.set_yticks(rows, [short(name, 34) for name, _ in figures])
    for label, (name, _) in zip(ax.get_yticklabels(), figures, strict=True):
        label.set_fontweight("bold" if name in bold else "normal")
    ax.set_ylim(0.5 - len(figures), 0.5)
    ax.axvline(line, color=FAINT, linestyle=":")
    return ax


def with_errors(found: list[Estimate]) -> tuple[list[float], np.ndarray]:
    """(the values, two standard errors of each), as matplotlib's errorbar takes them."""
    return [each.value for each in found], 2 * np.array([each.error for each in found])


def named(ax: Axes) -> Axes:
    """The axes with the names of what is drawn above them, where the names hide nothing."""
    lines, names = ax.get_legend_handles_labels()
    names = [short(name, 40) for name in names]
    where = dict(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, markerscale=1.5)
    ax.legend(lines, names, ncols=1 if max(map(len, names)) > 16 else 2, **where)
    return ax


def short(name: str, most: int) -> str:
    """The name in at most about `most` characters: its middle gives way."""
    return plain(name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 :]}")


def text(value: str) -> str:
    """Any text as HTML that shows it."""
    return html.escape(plain(value))


def picture(ax: Axes, caption: str) -> str:
    """The figure as inline SVG, with the caption."""
    file = io.StringIO()
    ax.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(
        r"^.*?<svg .*?viewBox|<metadata>.*?</metadata>|<style.*?</style>", "", file.getvalue(), flags=re.S
    )
    svg = re.sub(r"#a1000(\d)", r"var(--c\1)", re.sub(r'<g id=".*?"', "<g", svg))
    svg = '<svg role="img" viewBox' + svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>"


def section(question: str, panels: list[tuple[Axes, str]], more: str = "") -> str:
    figures = "".join(picture(*panel) for panel in panels)
    return f'<section><h2>{question}</h2><div class="figures">{figures}{more}</div></section>'


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], bold: tuple[str, ...] = ()) -> str:
    """bold: the first cells of the rows to print in bold."""
    lines = []
    for row in rows:
        mark = ' class="bold"' if row[0] in bold else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>")
    names = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<table><tr>{names}</tr>{''.join(lines)}</table>"


def cards(found: list[tuple[str, str, str]]) -> str:
    """Boxes side by side: (title, figure, what the figure means)."""
    boxes = [
        f"<div><h3>{text(title)}</h3><strong>{text(figure)}</strong><p>{text(meaning)}</p></div>"
        for title, figure, meaning in found
    ]
    return f'<div class="cards">{"".join(boxes)}</div>'


def facts(head: str, found: list[tuple[str, str]]) -> str:
    """A list item: a heading and lines of (name, value)."""
    lines = "".join(f"<dt>{text(name)}</dt><dd>{text(str(value))}</dd>" for name, value in found)
    return f"<li>{text(head)}<dl>{lines}</dl></li>"


def details(head: str, texts: dict[str, str]) -> str:
    """A line that opens to show its texts."""
    body = ""
    for name, whole in texts.items():
        rest = len(whole) - CHARACTERS
        more = f" <em>[{rest:,} more characters]</em>" if rest > 0 else ""
        body += f"<dt>{name}</dt><dd dir=auto>{text(whole[:CHARACTERS])}{more}</dd>"
    return f"<details><summary>{text(head)}</summary><dl>{body}</dl></details>"


def plain(value: str) -> str:
    """The text without control characters and without lone halves of UTF-16 pairs."""
    value = value.encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", value)


def page(opening: dict[str, str], runs: list[str], sections: list[str], labeller: str) -> str:
    """The whole page. opening: answer, cards and evidence as HTML; labeller: who labelled the rows."""
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    parts = {"runs": "".join(runs), "sections": "".join(sections), "labeller": text(labeller)}
    return template.substitute(opening, **parts)
