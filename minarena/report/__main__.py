"""One page that says what runs learnt: a figure and a sentence each, and the texts they got most wrong.

    python -m minarena.report runs/ab runs/ba                       finished or not: report.html
    python -m minarena.report runs/ab runs/ba --probs probs.csv     and what infer.py --probs wrote

One file without script, font or request; report.html is its template, page.py draws it. Read are each run's
train_config.json, log.jsonl and, once it is finished, eval.parquet; and the data files that the record names,
for texts, languages and lengths. What it does not do: load a model. A difference below two standard errors is
called noise. Nothing imports this file.
"""

import json
import sys
from dataclasses import MISSING, dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from minarena import metrics
from minarena.config import option, parse
from minarena.data import TEXTS
from minarena.files.durable import write_text
from minarena.files.pairs import read_pairs
from minarena.report import reliability
from minarena.report.page import COLOURS, FAINT, axes, details, forest, named, page, section, styled, table
from minarena.report.runs import Run, about, judge_name, judges_of, read_run
from minarena.runtime.console import run_command, say

SHOWN = 20  # mistakes, and flips
POINTS = 1000  # dots of one colour in a scatter plot: more are a blot, and megabytes
SMALL = 20  # rows or steps: of fewer nothing can be said
SKILL = np.log(2)  # log loss of one half for every row


@dataclass
class ReportConfig:
    runs: list[str] = option(MISSING, "folders that train.py wrote, or is writing")
    data: list[str] = option([], "files with texts and labels, where the runs' own do not have them")
    probs: list[str] = option([], "files that infer.py --probs wrote, to compare with")
    out: str = option("report.html", "the page to write")
    no_texts: bool = option(False, "figures only, no text of the data")


def main(argv: list[str] | None = None) -> dict:
    config = parse(ReportConfig, argv, __doc__)
    if not Path(config.out).resolve().parent.is_dir():
        raise ValueError(f"--out {config.out}: no such folder")
    if Path(config.out).suffix not in (".html", ".htm"):  # and so none of the files that it reads
        raise ValueError(f"--out {config.out}: must end in .html")
    more = [read_pairs(config.data).set_index("id")] if config.data else []
    runs = [read_run(folder, more) for folder in config.runs]
    done = [one for one in runs if one.rows is not None]
    judges = judges_of(done, config.probs, more)
    with styled():
        sections = [learnt(runs)]
        if judges:
            name, rows = list(judges.items())[-1]
            own = dict.fromkeys([*(judge_name(one, one.record["order"]) for one in done), name])
            sections += [good(judges), believed({each: judges[each] for each in own})]
            sections += [position(done)] if done else []
            known = rows[rows["prompt"].notna()]
            sections += [length(name, known), weak(known)] if len(known) >= SMALL else []
            sections += [] if config.no_texts else [worst(done, name, rows)]
        else:
            sections.append(section("The rest comes with held-out probabilities, when a run has ended.", []))
        write_text(page([f"{one.name}: {about(one)}" for one in runs], sections), Path(config.out))
    result = {"out": config.out, "runs": config.runs, "rows": {name: len(r) for name, r in judges.items()}}
    say(f"{len(runs)} runs, {len(done)} finished -> {config.out}: open it in a browser")
    print(json.dumps(result))
    return result


# ------------------------------------------------------------------------------- the questions, in page order


def learnt(runs: list[Run]) -> str:
    loss, rate = axes("optimiser step", "loss, nats a row"), axes("optimiser step", "learning rate")
    said = "Thin: each step; thick: the mean of a tenth of them; dots: held-out rows; dotted: no skill."
    for colour, one in zip(cycle(COLOURS), runs, strict=False):
        steps = pd.DataFrame([e for e in one.events if e["event"] == "step"], columns=["step", "loss", "lr"])
        order = one.record["order"].replace("both", "mean")
        evals = [(e["step"], e[order]["log_loss"]) for e in one.events if e["event"] == "eval"]
        x, y, n = steps["step"], steps["loss"], max(2, len(steps) // 10)
        loss.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        loss.plot(x, y.rolling(n, 1).mean(), color=colour, label=one.name)
        loss.plot(*np.array(evals).reshape(-1, 2).T, "o-", color=colour, markersize=5)
        rate.plot(x, steps["lr"], color=colour)
        start, end = y[:n].mean(), y[-n:].mean()
        error = np.hypot(y[:n].sem(), y[-n:].sem()) if len(y) >= SMALL else np.nan
        yet = " yet" * (one.rows is None)
        how = verdict(end - start, error, f"got worse|learnt|learnt nothing{yet}|may have learnt")
        said += f" {one.name} {how}: from {start:.3f} in its first tenth to {end:.3f} in its last." * (
            len(y) > 1
        )
        said += "".join(f" Its held-out log loss came to {value:.3f}." for _, value in evals[-1:])
    loss.axhline(SKILL, color=FAINT, linestyle=":")
    peak = f"The learning rate of each step; its peak is {max(rate.dataLim.y1, 0):.1e}."
    return section("Did it learn?", [(named(loss), said), (rate, peak)])


def good(judges: dict[str, pd.DataFrame]) -> str:
    *others, name = judges
    rows = judges[name]
    longer = rows["response_a"].str.len() - rows["response_b"].str.len()
    rule = ((longer > 0) == (rows["label"] > 0.5)).where(longer != 0, 0.5)  # of equal lengths half is right
    rule = rule.astype(float).where(rows["right"].notna() & longer.notna())
    words = "does better than|does worse than|does not differ from|cannot be compared with"
    how = compared(rows["right"] - rule, rows, words)
    agrees = with_error(*mean(rows["right"], rows))
    said = f"{name} agrees with people on {agrees} of {len(rows):,} rows, and {how} "
    said += f"the rule that the longer answer wins: {with_error(*mean(rule, rows))}."
    loss = f"Log loss of {name}: {with_error(*mean(rows['loss'], rows))}; no skill is 0.693 (dotted)."
    words = "worse than|better than|as good as|not comparable with"
    told = {other: compared(rows["loss"] - judges[other]["loss"], rows, words) for other in others}
    for how in words.split("|"):
        those = ", ".join(other + by.removeprefix(how) for other, by in told.items() if by.startswith(how))
        loss += f" It is {how} {those}." * bool(those)
    figures = {other: mean(judge["right"], judge) for other, judge in judges.items()}
    panels = [(forest("accuracy", figures | {"longer wins": mean(rule, rows)}, 0.5), said)]
    figures = {other: mean(judge["loss"], judge) for other, judge in judges.items()}
    panels.append((forest("log loss, nats a row", figures, SKILL), loss))
    return section("How good is it?", panels, numbers(judges))


def believed(judges: dict[str, pd.DataFrame]) -> str:
    panels = []
    for colour, (name, rows) in zip(cycle(COLOURS), judges.items(), strict=False):
        label, p, ones = rows["label"].to_numpy(), rows["p"].to_numpy(), np.ones(len(rows))
        ax = axes(f"P(a wins) by {name}", "share in which a won", xlim=(0, 1), ylim=(0, 1))
        ax.plot([0, 1], [0, 1], color=FAINT, linestyle=":")
        bins = [some for _, some in rows.groupby(reliability.bin_of(p))]
        x, share = [some["p"].mean() for some in bins], [len(some) / len(rows) for some in bins]
        y, error = np.array([mean(some["label"], some) for some in bins]).T
        ax.bar(x, share, 0.05, color=FAINT, alpha=0.4)
        ax.errorbar(x, y, 2 * error, fmt="o-", color=colour, markersize=4)
        ece = reliability.bootstrap(
            lambda w, y=label, p=p: reliability.calibration_error(y, p, w), rows["group"]
        )
        drawn = (np.random.default_rng(0).random((200, len(p))) < p).astype(float)
        chance = np.mean([reliability.calibration_error(labels, p, ones) for labels in drawn])
        over, sure = reliability.overconfidence(label, p), np.maximum(p, 1 - p).mean()
        words = "is over-confident|is under-confident|is as sure as it is right|may be over-confident"
        said = f"{name} {compared(over, rows, words)}: {sure:.3f} sure, {sure - over.mean():.3f} right. "
        said += f"ECE {with_error(*ece)}; labels drawn from its probabilities would give {chance:.3f}. "
        said += f"Brier score {with_error(*mean(reliability.brier(label, p), rows))}; "
        panels.append((ax, said + "no skill is 0.250. Grey: share of the rows."))
    return section("Can I believe its probabilities?", panels)


def position(done: list[Run]) -> str:
    panels = []
    for one in done:
        rows, ab, ba = one.rows, one.rows["p_a_ab"], one.rows["p_a_ba"]
        flip = reliability.flips(ab, ba)
        ax = axes("P(a wins), a shown first", "P(a wins), b shown first", xlim=(0, 1), ylim=(0, 1))
        for which, name in enumerate(("same verdict", "flips")):
            some = rows[flip == which].head(POINTS)
            ax.scatter(some["p_a_ab"], some["p_a_ba"], 7, COLOURS[which], alpha=0.5, linewidth=0, label=name)
        words = "the answer shown first|the answer shown second|no place|one place or none"
        place = compared(reliability.first(ab, ba) - 0.5, rows, words)
        said = f"{one.name} favours {place}: P(the first wins) is "
        said += (
            f"{with_error(*mean(ab, rows))} when a is first and {with_error(*mean(1 - ba, rows))} when b is. "
        )
        said += f"{with_error(*mean(flip, rows))} of its verdicts flip with the order."
        said += f" Drawn are at most {POINTS:,} rows of a colour." * bool(flip.value_counts().max() > POINTS)
        panels.append((named(ax), said))
    return section("Does the position matter?", panels)


def length(name: str, rows: pd.DataFrame) -> str:
    a, b = (np.log2(rows[column].str.len() + 1) for column in TEXTS[1:])  # characters
    ax, ratio, found = axes("log2(length of a / length of b)", "P(a wins)"), a - b, []
    six = parts(ratio, rows, 6)
    for colour, column, who in ((COLOURS[1], "label", "people"), (COLOURS[0], "p", name)):
        y, error = np.array([mean(some[column], some) for some in six]).T
        x = [ratio[some.index].mean() for some in six]
        ax.errorbar(x, y, 2 * error, fmt="o-", color=colour, markersize=4, label=who)
        for figure in (reliability.slope, reliability.correlation):
            drawn = reliability.bootstrap(lambda w, f=figure, y=rows[column]: f(ratio, y, w), rows["group"])
            found.append(with_error(*drawn))
    more = reliability.bootstrap(
        lambda w: reliability.slope(ratio, rows["p"] - rows["label"], w), rows["group"]
    )
    words = "more than people|less than people|as people do|or not"
    said = f"{name} leans on length {verdict(*more, words)}: where a gets twice as long its P(a wins) rises "
    said += f"by {found[2]}, people's by {found[0]}. Correlations: {found[3]} and {found[1]}."
    groups = {}
    for some in parts(abs(ratio), rows, 4):
        groups[f"to {2 ** abs(ratio[some.index]).max():.1f} times as long"] = some
    return section("Does the length decide?", [(named(ax), said), by_group(groups)])


def weak(rows: pd.DataFrame) -> str:
    groups = {str(language): some for language, some in rows.groupby("language")}
    for some in parts(rows["prompt"].str.len(), rows, 4):
        groups[f"prompt to {some['prompt'].str.len().max():,} characters"] = some
    groups |= {("not cut", "cut at --max-length")[bool(cut)]: some for cut, some in rows.groupby("cut")}
    return section("Where is it weak?", [by_group(groups)], numbers(groups))


def by_group(groups: dict[str, pd.DataFrame]) -> tuple[Axes, str]:
    """The accuracy of each group that is not too small, and the lowest beside the highest."""
    groups = {name: some for name, some in groups.items() if some["right"].count() >= SMALL}
    figures = {name: mean(some["right"], some) for name, some in groups.items()}
    if len(figures) < 2:
        return axes("accuracy", "", 0.8), f"There are no two groups of {SMALL} rows or more to compare."
    low, high = (pick(figures, key=lambda name: figures[name][0]) for pick in (min, max))
    gap, error = figures[high][0] - figures[low][0], np.hypot(figures[high][1], figures[low][1])
    # the ends of many groups are two standard errors apart by chance alone
    noise = f"within the noise of {len(figures)} groups" if error >= 0 else "too little to tell"
    size = "more than noise" if gap > 3 * error else noise
    said = (
        f"Lowest: {low}, {with_error(*figures[low])}; highest: {high}, {with_error(*figures[high])}: {size}."
    )
    return forest("accuracy", figures, 0.5), said


def worst(done: list[Run], name: str, rows: pd.DataFrame) -> str:
    """The texts of the most confident mistakes, and of the verdicts of any run that the order turns most."""
    wrong = rows[rows["right"] == 0]
    wrong = wrong.assign(by=abs(wrong["p"] - 0.5), said=[f"{name}: P(a wins) {p:.3f}" for p in wrong["p"]])
    flips = [wrong.head(0)]
    for one in done:
        flip = one.rows[reliability.flips(one.rows["p_a_ab"], one.rows["p_a_ba"]) == 1]
        pairs = zip(flip["p_a_ab"], flip["p_a_ba"], strict=True)
        said = [f"{one.name}: P(a wins) {ab:.3f} if a is first, {ba:.3f} if b is" for ab, ba in pairs]
        flips.append(flip.assign(by=abs(flip["p_a_ab"] - flip["p_a_ba"]), said=said))
    told = ""
    for title, some in (("most confident mistakes", wrong), ("largest flips", pd.concat(flips))):
        some = some[some["prompt"].notna()].nlargest(SHOWN, "by")
        told += f"<div><h3>The {len(some)} {title}</h3>"
        for number, row in some.iterrows():
            people = {1.0: "a", 0.0: "b"}.get(row["label"], f"a with {row['label']:.2f}")
            texts = {"id": number} | {column.replace("_", " "): row[column] for column in TEXTS}
            told += details(f"{row['said']}; people: {people} ({row['language']})", texts)
        told += "</div>"
    return section("What did it get most wrong?", [], told)


# ------------------------------------------------------------------------------------------- figures in words


def mean(values: pd.Series, rows: pd.DataFrame) -> tuple[float, float]:
    """(mean of the values that are there, its standard error over prompts)"""
    values = pd.Series(values, rows.index).dropna()
    error = metrics.standard_error(values.to_numpy(), rows.loc[values.index, "group"].to_numpy())
    return values.mean(), error


def parts(values: pd.Series, rows: pd.DataFrame, number: int) -> list[pd.DataFrame]:
    """The rows with the lowest values, the next, ...: about as many in each part."""
    of_row = pd.qcut(values, number, labels=False, duplicates="drop").fillna(0)  # equal values: one part
    return [part for _, part in rows.groupby(of_row)]


def numbers(groups: dict[str, pd.DataFrame]) -> str:
    columns = [
        (name, some, mean(some["right"], some), mean(some["loss"], some)) for name, some in groups.items()
    ]
    rows = [
        (name, f"{len(some):,}", with_error(*right), with_error(*loss)) for name, some, right, loss in columns
    ]
    return table(("", "rows", "accuracy", "log loss"), rows)


def with_error(value: float, error: float) -> str:
    """An error of 0 (but for rounding) is none: that of a few values which happen to be equal."""
    return "unknown" if np.isnan(value) else f"{value:.3f}" + f" ± {error:.3f}" * bool(error > 1e-9)


def compared(values: pd.Series, rows: pd.DataFrame, words: str) -> str:
    """The verdict on a mean; fewer than SMALL prompts, whose error is no more than a guess, give none."""
    value, error = mean(values, rows)
    return verdict(value, error if rows["group"].nunique() >= SMALL else np.nan, words)


def verdict(value: float, error: float, words: str) -> str:
    """What a difference means, of "more|less|neither|unknown", and the difference itself."""
    more, less, neither, unknown = words.split("|")
    if np.isnan(error):
        amount = "" if np.isnan(value) else f"{value:+.3f}, "
        return f"{unknown} ({amount}too little to tell)"
    if abs(value) > 2 * error:
        return f"{more if value > 0 else less} ({value:+.3f} ± {error:.3f})"
    return f"{neither} ({value:+.3f} ± {error:.3f}, within noise)"


if __name__ == "__main__":
    sys.argv[0] = "minarena.report"  # its name where something is wrong: -m puts a path there
    run_command(main)
