"""The questions of the page about rows: in which groups is the judge weak, and which rows does it get wrong?

    weak(best)               accuracy by language, subset, prompt length, ..., of groups with ENOUGH rows
    worst(best, runs)        texts of the most confident mistakes and of the largest flips

What it does not do: say what is more than noise among many groups (their ends differ by chance).
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from minarena.data import GROUPS, TEXTS
from minarena.metrics import ENOUGH
from minarena.report import reliability
from minarena.report.figures import Group, large_enough, quantiles
from minarena.report.page import axes, details, forest, section, table
from minarena.report.predictors import Predictor
from minarena.report.runs import PEOPLE
from minarena.report.words import mean

SHOWN = 20  # mistakes, and flips
LINES = 30  # groups in one figure
CUT = {False: "not cut", True: "cut at --max-length"}


def weak(best: Predictor) -> str:
    """best: with rows whose texts are known."""
    rows = best.rows
    kinds = [groups_of(rows, column) for column in ("language", *GROUPS) if column in rows]
    by_prompt = quantiles(rows["prompt"].str.len(), rows, 4, "prompt {} to {} characters")
    if rows["cut"].nunique() > 1:
        by_prompt += [(CUT[cut], part) for cut, part in rows.groupby("cut")]
    kinds = [groups for groups in kinds if len(large_enough(groups)) > 1]
    panels = [by_group(groups, benchmark=True) for groups in kinds] + [by_group(by_prompt)]
    listed = [group for groups in [*kinds, by_prompt] for group in large_enough(groups)]
    return section("Where is it weak?", panels, numbers(listed))


def groups_of(rows: pd.DataFrame, column: str) -> list[Group]:
    """The rows by the text of a column; rows without a value are in no group."""
    known = rows[rows[column].notna()]
    prefix = "" if column == "language" else f"{column} "
    return [(f"{prefix}{value}", part) for value, part in known.groupby(known[column].astype(str))]


def by_group(groups: list[Group], benchmark: bool = False) -> tuple[Axes, str]:
    """The accuracy of each group that is large enough, and a sentence on the lowest and the highest.

    benchmark: whether to add the mean over the groups, the figure of benchmarks such as RewardBench (Lambert
    et al. 2024, https://arxiv.org/abs/2403.13787)."""
    found = [(name, mean(part["right"], part)) for name, part in large_enough(groups)]
    if len(found) < 2:
        return axes("accuracy", "", 0.8), f"There are no two groups of {ENOUGH} rows or more to compare."
    ordered = sorted(found, key=lambda group: group[1].value)
    (low, lowest), (high, highest) = ordered[0], ordered[-1]
    gap, error = highest.value - lowest.value, np.hypot(highest.error, lowest.error)
    if np.isnan(error):
        size = "too little to tell"
    elif gap > 3 * error:  # the ends of many groups are two standard errors apart by chance alone
        size = "more than noise"
    else:
        size = f"within the noise of {len(found)} groups"
    said = f"The lowest is {low}, {lowest}; the highest is {high}, {highest}: {size}."
    if benchmark:
        said += f" The mean over the {len(found)} groups is {np.mean([each.value for _, each in found]):.3f}."
    if len(found) > LINES:
        said += f" Drawn are the {LINES} lowest."
        found = ordered[:LINES]
    left = len(groups) - len(large_enough(groups))
    if left:
        said += f" {left:,} groups of fewer than {ENOUGH} rows are left out."
    return forest("accuracy", found, 0.5), said


def numbers(groups: list[Group], bold: tuple[str, ...] = ()) -> str:
    """A table: rows, accuracy and log loss of each group."""
    lines = []
    for name, part in groups:
        right, loss = mean(part["right"], part), mean(part["loss"], part)
        lines.append((name, f"{len(part):,}", str(right), str(loss)))
    return table(("", "rows", "accuracy", "log loss"), lines, bold)


def worst(best: Predictor, runs: list[Predictor]) -> str:
    """runs: the finished runs, each in the order trained."""
    mistakes, flips = confident_mistakes(best), largest_flips(best, runs)
    listed = texts_of(f"The {len(mistakes)} most confident mistakes", mistakes)
    listed += texts_of(f"The {len(flips)} largest flips", flips)
    return section("What did it get most wrong?", [], listed)


def confident_mistakes(best: Predictor) -> pd.DataFrame:
    """The wrong verdicts farthest from one half, with what to say of each."""
    rows = best.rows[best.rows["right"] == 0]
    said = [f"{best.name}: P(a wins) {p:.3f}" for p in rows["p"]]
    rows = rows.assign(size=abs(rows["p"] - 0.5), said=said)
    return rows[rows["prompt"].notna()].nlargest(SHOWN, "size")


def largest_flips(best: Predictor, runs: list[Predictor]) -> pd.DataFrame:
    """The rows of any run whose P(a wins) moves most between the orders, of those whose verdict changes."""
    found = [best.rows.head(0).assign(size=0.0, said="")]
    for each in runs:
        rows = each.rows[reliability.flips(each.rows["p_ab"], each.rows["p_ba"]) == 1]
        pairs = zip(rows["p_ab"], rows["p_ba"], strict=True)
        said = [f"{each.run}: P(a wins) {ab:.3f} if a is first, {ba:.3f} if b is" for ab, ba in pairs]
        found.append(rows.assign(size=abs(rows["p_ab"] - rows["p_ba"]), said=said))
    rows = pd.concat(found)
    return rows[rows["prompt"].notna()].nlargest(SHOWN, "size")


def texts_of(title: str, rows: pd.DataFrame) -> str:
    listed = ""
    for number, row in rows.iterrows():
        label = {1.0: "a", 0.0: "b"}.get(row["label"], f"a with {row['label']:.2f}")
        who = "people" if row["labeller"] == PEOPLE else "generated label"
        language = f" ({row['language']})" if isinstance(row["language"], str) else ""
        texts = {"id": number} | {column.replace("_", " "): row[column] for column in TEXTS}
        listed += details(f"{row['said']}; {who}: {label}{language}", texts)
    return f"<div><h3>{title}</h3>{listed}</div>"
