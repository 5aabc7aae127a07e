"""One page that says what runs learnt: a figure and a sentence each, and the texts they got most wrong.

    python -m minarena.report runs/ab runs/ba                       finished or not: report.html
    python -m minarena.report runs/ab runs/ba --probs probs.csv     and what infer.py --probs wrote

The page is one file without script, font or request; figures are inline SVG in the page's own colours, light
or dark (report.css). Read are each run's train_config.json, log.jsonl and, once it is finished, eval.parquet;
and the data files that the record names, for texts, languages and lengths. What it does not do: load a model.
A difference below two standard errors is called noise. Nothing imports this file.
"""

import html
import io
import json
import re
from dataclasses import MISSING, dataclass, field
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minarena import metrics
from minarena.batching import steps_per_epoch
from minarena.config import first_line, option, parse, run
from minarena.data import TEXTS, file_record
from minarena.files import read_frames, read_pairs
from minarena.parts import write_text
from minarena.text import encode, load_tokenizer, repaired
from minarena.tiny import byte_tokenizer, demo_pairs

SHOWN, CHARACTERS = 20, 1200  # mistakes, and flips; of each text
POINTS = 2000  # dots of a scatter plot: more are a blot, and megabytes
SMALL = 20  # rows: of a smaller group nothing can be said
SKILL = np.log(2)  # log loss of one half for every row
OWN = {"ab": "p_a_ab", "ba": "p_a_ba", "both": "p_a"}  # the column of the order that a run was trained in
# Colours are marks that page() turns into the page's own, which differ in light and dark.
INK, FAINT, COLOURS = "#a20001", "#a20002", [f"#a1000{i}" for i in range(5)]
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "minarena", "text.parse_math": False, "font.size": 9}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE |= {name: INK for name in ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")}
STYLE |= {name: FAINT for name in ("axes.edgecolor", "xtick.color", "ytick.color")}


@dataclass
class ReportConfig:
    runs: list[str] = option(MISSING, "folders that train.py wrote, or is writing")
    data: list[str] = option([], "files with texts and labels (looked up besides the runs' own)")
    probs: list[str] = option([], "files that infer.py --probs wrote, to compare with")
    out: str = option("report.html", "the page to write")
    no_texts: bool = option(False, "figures only, no text of the data")


@dataclass
class Run:
    """events: of log.jsonl so far; rows: eval.parquet by id, with what is known of each row (texts, language,
    cut) and `group`, which rows of one prompt share; None before the run's end. note: what is not known."""

    name: str
    record: dict
    events: list[dict]
    rows: pd.DataFrame | None = None
    note: str = ""


def main(argv: list[str] | None = None) -> dict:
    config = parse(ReportConfig, argv, __doc__)
    if not Path(config.out).resolve().parent.is_dir():
        raise ValueError(f"--out {config.out}: no such folder")
    more = [read_pairs(config.data).set_index("id")] if config.data else []
    runs = [read_run(folder, more) for folder in config.runs]
    done = [one for one in runs if one.rows is not None]
    judges = judges_of(done, config.probs, more)
    with matplotlib.rc_context(STYLE):
        sections = [learnt(runs)]
        if judges:
            chief, rows = list(judges.items())[-1]
            shown = {one.name: one.rows.assign(p=one.rows[OWN[one.record["order"]]]) for one in done}
            sections += [good(judges), believed(shown | {chief: rows})] + [position(done)] * bool(done)
            sections += [length(chief, rows), weak(rows)]
            sections += [] if config.no_texts else [worst(done, chief, rows)]
        write_text(page(runs, sections), Path(config.out))
    result = {"out": config.out, "runs": config.runs, "rows": {name: len(r) for name, r in judges.items()}}
    print(json.dumps(result))
    return result


# ------------------------------------------------------------------------------------------------ what is read


def read_run(folder: str, more: list[pd.DataFrame]) -> Run:
    """A run's folder as it is now; ValueError where it is none. more: the rows of --data by id."""
    try:
        record = json.loads(Path(folder, "train_config.json").read_text())
        _ = [
            record[name] for name in ("epochs", "rows", "batch_size", "order", "seed", "data_files", "model")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no train_config.json of train.py: {first_line(error)}") from error
    log, path = Path(folder, "log.jsonl"), Path(folder, "eval.parquet")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    one = Run(plain(folder), record, [event for line in lines for event in parsed(line)])
    if path.exists():
        try:
            one.rows = pd.read_parquet(path).set_index("id")
            know_rows_(one, more)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: {first_line(error)}") from error
    return one


def parsed(line: str) -> list[dict]:
    """The event of a line; a line that is being written, or was cut off, is none yet."""
    try:
        event = json.loads(line)
    except ValueError:
        return []
    return [event] if isinstance(event, dict) and {"event", "step"} <= event.keys() else []


def know_rows_(one: Run, more: list[pd.DataFrame]) -> None:
    """Join to a run's held-out rows, in place and by id, what the data files know of them."""
    ids, files, base = (
        one.rows.index,
        [file["file"] for file in one.record["data_files"]],
        one.record["model"],
    )
    known = [*more, pd.DataFrame(columns=[*TEXTS, "label", "language"])]
    try:
        if not files:
            known.append(demo_pairs(len(ids), one.record["seed"], held_out=True).set_index("id"))
        elif one.record["data_files"] == [file_record(path) for path in files]:
            known.append(read_pairs(files).set_index("id"))
        else:
            one.note = f"{files[0]} is not the file of the training any more."
    except (OSError, ValueError) as error:
        one.note = f"{first_line(error)}."
    known = pd.concat(known)
    known = known[~known.index.duplicated()].reindex(ids)
    same = np.isclose(known["label"].astype(float), one.rows["label"])  # else it is another row of that id
    one.rows = one.rows.join(known.loc[same, [*TEXTS, "language"]]).assign(cut=None)
    there = one.rows["prompt"].notna()
    one.rows["group"] = one.rows["prompt"].where(there, ids.to_series())
    if not there.all():
        one.note += (
            f" The texts of {(~there).sum():,} of {len(ids):,} held-out rows were not found (--data FILE)."
        )
    try:
        tokenizer, most = (
            byte_tokenizer() if base == "tiny" else load_tokenizer(base),
            one.record["max_length"],
        )
        rows = encode(tokenizer, repaired(one.rows[there]), most + 1)  # one token more than fits
        one.rows.loc[there, "cut"] = [len(row) > most for row in rows]
    except ValueError as error:
        one.note += f" Which rows were cut is not known: {first_line(error)}."


def judges_of(done: list[Run], probs: list[str], more: list[pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """name -> rows with p, P(a wins). The last is the chief one: of --probs, the ensemble, or the run as trained."""
    judges = {}
    for one in done:
        for order, column in OWN.items():
            trained = ", as trained" * (order == one.record["order"])
            judges[f"{one.name} {order}{trained}"] = one.rows.assign(p=one.rows[column])
    if done and all(one.rows.index.equals(done[0].rows.index) for one in done):
        own = [one.rows[OWN[one.record["order"]]] for one in done]
        judges["ensemble" if len(done) > 1 else done[0].name] = done[0].rows.assign(p=np.mean(own, axis=0))
    for path in probs:
        p = pd.concat([frame for frame, _ in read_frames(path)])
        if not {"id", "winner_model_a"} <= set(p.columns):
            raise ValueError(f"--probs {path}: no columns id and winner_model_a: no file of infer.py --probs")
        p = pd.to_numeric(p.set_index(p["id"].astype(str))["winner_model_a"], errors="coerce")
        rows = pd.concat([one.rows for one in done] + [table.assign(group=table["prompt"]) for table in more])
        rows = rows[~rows.index.duplicated() & rows["label"].notna()].assign(p=p[~p.index.duplicated()])
        judges[plain(Path(path).name)] = rows = rows.dropna(subset="p")
        if not len(rows) or not rows["p"].between(0, 1).all():
            raise ValueError(f"--probs {path}: no probabilities of rows with a known label: give --data FILE")
    return judges


# ---------------------------------------------------------------------------------- figures, and what they say


def learnt(runs: list[Run]) -> str:
    loss, rate, said = axes("optimiser step", "loss, nats a row"), axes("optimiser step", "learning rate"), ""
    for colour, one in zip(cycle(COLOURS), runs, strict=False):
        steps = pd.DataFrame([e for e in one.events if e["event"] == "step"], columns=["step", "loss", "lr"])
        order = "mean" if one.record["order"] == "both" else one.record["order"]
        evals = [(e["step"], e[order]["log_loss"]) for e in one.events if e["event"] == "eval"]
        tenth = max(2, len(steps) // 10)
        loss.plot(steps["step"], steps["loss"], color=colour, alpha=0.25, linewidth=0.8)
        smooth = steps["loss"].rolling(tenth, min_periods=1).mean()
        loss.plot(steps["step"], smooth, color=colour, label=one.name)
        loss.plot(*np.array(evals).reshape(-1, 2).T, "o-", color=colour, markersize=5)
        rate.plot(steps["step"], steps["lr"], color=colour)
        start, end = steps["loss"].head(tenth), steps["loss"].tail(tenth)
        planned = one.record["epochs"] * steps_per_epoch(one.record["rows"], one.record["batch_size"])
        said += f" {one.name} is unfinished: {len(steps):,} of {planned:,} steps." * (one.rows is None)
        if len(steps) > 1:
            fall = change(end.mean() - start.mean(), np.hypot(start.sem(), end.sem()))
            said += f" {one.name} went from {start.mean():.3f} to {end.mean():.3f} ({fall})."
        said += "".join(f" Held out: {value:.3f} at step {step:,}." for step, value in evals[-1:])
    loss.axhline(SKILL, color=FAINT, linestyle=":")
    loss.legend()
    about = (
        "Training loss of each step (thin) and mean of a tenth of them; held out (dots); no skill (dotted)."
    )
    return section("Did it learn?", [(loss, about + said), (rate, "The learning rate of each step.")])


def good(judges: dict[str, pd.DataFrame]) -> str:
    *others, chief = judges
    rows, figures = (
        judges[chief],
        {name: (accuracy(judge), log_loss(judge)) for name, judge in judges.items()},
    )
    known = decided(rows[rows["prompt"].notna()])
    longer = (known["response_a"].str.len() - known["response_b"].str.len()).to_numpy(float)
    rule = np.where(longer == 0, 0.5, (longer > 0) == (known["label"] > 0.5))  # of equal lengths: half right
    figures["longer wins"] = mean(rule, known), (np.nan, np.nan)
    said = f"{chief} agrees with people on {pm(*figures[chief][0])} of {len(rows):,} rows about "
    said += f"{rows['group'].nunique():,} prompts; the rule that the longer answer wins, on {pm(*mean(rule, known))}: "
    said += f"{change(*mean(metrics.correct(known['label'], known['p']) - rule, known))}."
    loss = f"Log loss of {chief}: {pm(*figures[chief][1])}; no skill is {SKILL:.3f} (dotted)."
    for other in others:
        if judges[other].index.equals(rows.index):
            loss += f" Against {other}: {change(*mean(entropy(rows) - entropy(judges[other]), rows))}."
    panels = [(forest("accuracy", {name: f[0] for name, f in figures.items()}, 0.5), said)]
    panels += [(forest("log loss, nats a row", {name: f[1] for name, f in figures.items()}, SKILL), loss)]
    return section("How good is it?", panels, table(figures))


def believed(judges: dict[str, pd.DataFrame]) -> str:
    panels = []
    for colour, (name, rows) in zip(cycle(COLOURS), judges.items(), strict=False):
        label, p, ones = rows["label"].to_numpy(), rows["p"].to_numpy(), np.ones(len(rows))
        n, x, y = (found := metrics.reliability(label, p, ones))[:, found[0] > 0]
        ax, x, y = axes(f"P(a wins) by {name}", "share in which a won"), x / n, y / n
        ax.plot([0, 1], [0, 1], color=FAINT, linestyle=":")
        ax.bar(x, n / n.sum(), 0.05, color=FAINT, alpha=0.4)
        ax.errorbar(x, y, np.sqrt(y * (1 - y) / n), fmt="o-", color=colour, markersize=4)
        ece = metrics.bootstrap(lambda w, y=label, p=p: metrics.calibration_error(y, p, w), rows["group"])
        drawn = (np.random.default_rng(0).random((200, len(p))) < p).astype(float)
        chance = np.mean([metrics.calibration_error(labels, p, ones) for labels in drawn])
        over, sure = mean(metrics.overconfidence(label, p), rows), np.maximum(p, 1 - p).mean()
        said = (
            f"{name} is {sure:.3f} sure on average, and right in {sure - over[0]:.3f}: {change(*over)}. ECE "
        )
        said += f"{pm(*ece)}; labels drawn from these probabilities would give {chance:.3f}. Brier score "
        panels.append((ax, said + f"{pm(*mean(metrics.brier(label, p), rows))}; no skill is 0.250."))
    return section("Can I believe its probabilities?", panels)


def position(done: list[Run]) -> str:
    panels = []
    for one in done:
        rows, ab, ba = one.rows, one.rows["p_a_ab"], one.rows["p_a_ba"]
        flip, ax = metrics.flips(ab, ba), axes("P(a wins), a shown first", "P(a wins), b shown first")
        for which, name in enumerate(("same verdict", "it flips")):
            some = rows[flip == which].head(POINTS // 2)
            ax.scatter(some["p_a_ab"], some["p_a_ba"], 7, COLOURS[which], alpha=0.5, linewidth=0, label=name)
        ax.legend()
        said = (
            f"{one.name} flips {pm(*mean(flip, rows))} of its verdicts with the order. P(the first wins) is "
        )
        said += f"{pm(*mean(ab, rows))} with a first, {pm(*mean(1 - ba, rows))} with b first; their mean less one "
        panels.append((ax, said + f"half: {change(*mean(metrics.first(ab, ba) - 0.5, rows))}."))
    return section("Does the position matter?", panels)


def length(chief: str, rows: pd.DataFrame) -> str:
    ratio = np.log2(rows["response_a"].str.len() + 1) - np.log2(
        rows["response_b"].str.len() + 1
    )  # characters
    ax, part = axes("log2(length of a / length of b)", "P(a wins)"), quantiles(ratio, 6)
    for colour, column, name in ((COLOURS[1], "label", "people"), (COLOURS[0], "p", chief)):
        y = rows[column].groupby(part)
        ax.errorbar(
            ratio.groupby(part).mean(), y.mean(), y.sem(), fmt="o-", color=colour, markersize=4, label=name
        )
    ax.legend()
    r = [lambda w, y=rows[column]: metrics.correlation(ratio, y, w) for column in ("label", "p")]
    people, judge = (pm(*metrics.bootstrap(each, rows["group"])) for each in r)
    more = change(*metrics.bootstrap(lambda w: r[1](w) - r[0](w), rows["group"]))
    said = f"The log ratio of the lengths correlates {people} with people's verdicts, {judge} with {chief}'s: {more}."
    by = ratio.abs().groupby(quantiles(ratio.abs(), 4))
    groups = {f"longer by up to {2 ** sizes.max():.1f} times": rows.loc[sizes.index] for _, sizes in by}
    return section("Does the length decide?", [(ax, said), by_group(groups)])


def weak(rows: pd.DataFrame) -> str:
    size = rows["prompt"].str.len()
    groups = {str(name): some for name, some in rows.groupby("language")}
    by = size.groupby(quantiles(size, 4))
    groups |= {f"prompt to {s.max():,.0f} characters": rows.loc[s.index] for _, s in by}
    groups |= {("whole", "cut at --max-length")[bool(cut)]: some for cut, some in rows.groupby("cut")}
    figures = {f"{name} ({len(some):,})": (accuracy(some), log_loss(some)) for name, some in groups.items()}
    return section("Where is it weak?", [by_group(groups)], table(figures))


def worst(done: list[Run], chief: str, rows: pd.DataFrame) -> str:
    """The most confident mistakes of the chief judge, and the verdicts of any run that turn round the most."""
    wrong = decided(rows)[metrics.correct(decided(rows)["label"], decided(rows)["p"]) == 0]
    wrong = wrong.assign(
        by=(wrong["p"] - 0.5).abs(), what=f"{chief}: P(a wins) " + wrong["p"].map("{:.3f}".format)
    )
    flips = []
    for one in done:
        p_ab, p_ba = one.rows["p_a_ab"], one.rows["p_a_ba"]
        what = (
            f"{one.name}: P(a wins) "
            + p_ab.map("{:.3f}".format)
            + " in ab, "
            + p_ba.map("{:.3f}".format)
            + " in ba"
        )
        flips.append(one.rows.assign(by=(p_ab - p_ba).abs(), what=what)[metrics.flips(p_ab, p_ba) == 1])
    told = ""
    for title, some in (
        ("most confident mistakes", wrong),
        ("largest flips", pd.concat(flips or [wrong.head(0)])),
    ):
        some = some[some["prompt"].notna()].nlargest(SHOWN, "by")
        told += f"<h3>The {len(some)} {title}</h3>" + "".join(
            map(details, some.reset_index().to_dict("records"))
        )
    return section("What did it get most wrong?", [], told)


# ----------------------------------------------------------------------------------------- words, axes and HTML


def mean(values: np.ndarray, rows: pd.DataFrame) -> tuple[float, float]:
    """(mean, its standard error over prompts)"""
    values = np.asarray(values)
    return (values.mean() if len(values) else np.nan), metrics.standard_error(
        values, rows["group"].to_numpy()
    )


def decided(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["label"] != 0.5]


def accuracy(rows: pd.DataFrame) -> tuple[float, float]:
    return mean(metrics.correct(rows["label"], rows["p"]), decided(rows))


def entropy(rows: pd.DataFrame) -> np.ndarray:
    return metrics.cross_entropy(rows["label"].to_numpy(), rows["p"].to_numpy())


def log_loss(rows: pd.DataFrame) -> tuple[float, float]:
    return mean(entropy(rows), rows)


def quantiles(values: pd.Series, parts: int) -> pd.Series:
    """The number of the part that each value falls into, parts of about as many rows."""
    return pd.qcut(values, parts, labels=False, duplicates="drop")


def pm(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}" if np.isfinite(value) else "-"


def change(value: float, error: float) -> str:
    size = "beyond noise" if abs(value) > 2 * error else "within noise"
    return f"{value:+.3f} ± {error:.3f}, {size}"


def by_group(groups: dict[str, pd.DataFrame]) -> tuple[Axes, str]:
    """The accuracy of each group that is not too small; the lowest is compared with that of all others."""
    groups = {name: some for name, some in groups.items() if len(decided(some)) >= SMALL}
    figures = {name: accuracy(some) for name, some in groups.items()}
    ax = forest("accuracy", figures, 0.5)
    if len(figures) < 2:
        return ax, f"Too few rows to compare: a group needs {SMALL}."
    low, high = (pick(figures, key=lambda name: figures[name][0]) for pick in (min, max))
    gap = figures[low][0] - figures[high][0], np.hypot(figures[low][1], figures[high][1])
    # the extremes of many groups differ by two standard errors by chance alone
    size = "beyond noise" if abs(gap[0]) > 3 * gap[1] else f"within the noise of {len(figures)} groups"
    return (
        ax,
        f"Lowest: {low}, {pm(*figures[low])}. Highest: {high}, {pm(*figures[high])}. The gap is {size}.",
    )


def axes(x: str, y: str, height: float = 2.7) -> Axes:
    ax = Figure(figsize=(4, height), layout="constrained").subplots()
    ax.set(xlabel=x, ylabel=y)
    return ax


def forest(x: str, figures: dict[str, tuple[float, float]], line: float) -> Axes:
    """One row for each name, with a dot and two standard errors to either side."""
    ax = axes(x, "", 0.6 + 0.24 * len(figures))
    for i, (value, error) in enumerate(figures.values()):
        ax.errorbar(value, -i, xerr=2 * error, fmt="o", color=COLOURS[0], markersize=5)
    ax.set_yticks(-np.arange(len(figures)), [short(name) for name in figures])
    ax.axvline(line, color=FAINT, linestyle=":")
    return ax


def picture(ax: Axes, said: str) -> str:
    """Inline SVG with the sentence below it; colours become those of the page."""
    file = io.StringIO()
    ax.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(
        r'<svg .*?viewBox="(.*?)".*?>',
        r'<svg role="img" viewBox="\1">',
        svg[svg.index("<svg") :],
        count=1,
        flags=re.DOTALL,
    )
    svg = re.sub(r"#a1000(\d)", r"var(--c\1)", re.sub(r'<g id=".*?"', "<g", svg))
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    return f"<figure>{svg}<figcaption>{html.escape(said)}</figcaption></figure>"


def section(question: str, panels: list[tuple[Axes, str]], more: str = "") -> str:
    figures = "".join(picture(*panel) for panel in panels)
    return f'<section><h2>{question}</h2><div class="figures">{figures}</div>{more}</section>'


def table(figures: dict[str, tuple]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(plain(name))}</td><td>{pm(*right)}</td><td>{pm(*loss)}</td></tr>"
        for name, (right, loss) in figures.items()
    )
    return f"<table><tr><th></th><th>accuracy</th><th>log loss</th></tr>{rows}</table>"


def details(row: dict) -> str:
    """A row with its texts, all of it as text: nothing in it can become HTML."""
    people = {1.0: "people: a", 0.0: "people: b", 0.5: "people: a tie"}.get(
        row["label"], f"label {row['label']:.2f}"
    )
    texts = "".join(f"<dt>{name.replace('_', ' ')}</dt><dd dir=auto>{cut(row[name])}</dd>" for name in TEXTS)
    head = html.escape(plain(f"{row['what']}; {people}"))
    where = html.escape(plain(f"{row['language']}, {row['id']}"))
    return f"<details><summary>{head} <span>{where}</span></summary><dl>{texts}</dl></details>"


def cut(text: str) -> str:
    more = len(text) - CHARACTERS
    return html.escape(plain(text[:CHARACTERS])) + (
        f" <em>[{more:,} more characters]</em>" if more > 0 else ""
    )


def plain(text: str) -> str:
    """Without what an HTML page cannot hold: control characters and lone halves of UTF-16 pairs."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", text)


def short(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:12]}…{name[-13:]}"


def page(runs: list[Run], sections: list[str]) -> str:
    about = ""
    for one in runs:
        r = one.record
        what = (
            f"{one.name}: {r['model']} in order {r['order']}, {r['rows']:,} rows, lr {r['lr']:g}. {one.note}"
        )
        about += f"<p class=soft>{html.escape(plain(what))}</p>"
    if len(sections) == 1:
        about += "<p>The rest comes with held-out probabilities: when a run ends, or from --probs.</p>"
    style = Path(__file__).with_suffix(".css").read_text()
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    note = "± is one standard error over prompts, as rows that share a prompt are not independent; bars are two. "
    note += "What is below two is called noise. a and b are the two answers; people's verdict is the label."
    body = f"<h1>What the judge learnt</h1>{about}<p class=soft>{note}</p>{''.join(sections)}"
    return f'<!DOCTYPE html><html lang="en"><head>{head}<title>minarena: report</title><style>{style}</style></head><body>{body}</body></html>'


if __name__ == "__main__":
    run(main)
