"""What is computed of held-out rows: each question of the page as numbers, before any word or drawing.

rows: a DataFrame of predictors.py. Errors are over prompts (words.py). What it does not do: phrase a verdict,
or draw.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from minarena import metrics
from minarena.data import JUDGED_BY, TEXTS
from minarena.metrics import ENOUGH
from minarena.report import reliability
from minarena.report.runs import Run
from minarena.report.words import Estimate, difference, mean

NO_SKILL = np.log(2)  # log loss of one half for every row


@dataclass(frozen=True)
class Curve:
    """A run's training loss. steps: step, loss (nats a row), lr; held_out (E, 2): step and log loss of each
    evaluation; tenth: steps of the moving mean, a tenth of all but at least 2; start, end: mean loss of the
    first and of the last tenth; change: end - start."""

    steps: pd.DataFrame
    held_out: np.ndarray
    tenth: int
    start: float
    end: float
    change: Estimate


def training_curve(run: Run) -> Curve:
    """Of the log so far. The change has no error, so nothing is claimed, below ENOUGH steps."""
    events = [event for event in run.events if event["event"] == "step"]
    steps = pd.DataFrame(events, columns=["step", "loss", "lr"])
    key = JUDGED_BY[run.record["order"]]
    evaluations = [event for event in run.events if event["event"] == "eval" and event.get(key)]
    held_out = [(event["step"], event[key]["log_loss"]) for event in evaluations]
    tenth = max(2, len(steps) // 10)
    first, last = steps["loss"][:tenth], steps["loss"][-tenth:]
    error = np.hypot(first.sem(), last.sem()) if len(steps) >= ENOUGH else np.nan
    change = Estimate(last.mean() - first.mean(), error)
    return Curve(steps, np.reshape(held_out, (-1, 2)), tenth, first.mean(), last.mean(), change)


def longer_rule(rows: pd.DataFrame) -> pd.Series:
    """How often the rule "the longer answer wins" is right: 1, 0, 1/2 for equal lengths; nan for a tie and
    where the texts are not known."""
    a, b = rows["response_a"].str.len(), rows["response_b"].str.len()
    rule = pd.Series(reliability.longer_wins(a, b, rows["label"]), rows.index)
    return rule.where(rows["right"].notna() & a.notna())


def length_ratio(rows: pd.DataFrame) -> pd.Series:
    """log2(characters of a / characters of b); nan where the texts are not known."""
    a, b = (np.log2(rows[column].str.len().astype(float) + 1) for column in TEXTS[1:])
    return a - b


@dataclass(frozen=True)
class Beyond:
    """Does a judge know more than position and length? loss: the judge's; simple: the log loss of a logistic
    regression on these two, fitted to the very rows, which favours it; gain: loss - simple (below 0: yes).
    lengths: whether the lengths are known; else position alone counts. rows: how many were compared."""

    loss: Estimate
    simple: Estimate
    gain: Estimate
    lengths: bool
    rows: int


def beyond_position_and_length(rows: pd.DataFrame) -> Beyond:
    """Of the rows whose lengths are known, if they are ENOUGH; else of all rows, by position alone."""
    ratio = length_ratio(rows)
    lengths = bool(ratio.notna().sum() >= ENOUGH)
    if lengths:
        rows, ratio = rows[ratio.notna()], ratio.dropna()
    else:
        ratio = pd.Series(0.0, rows.index)
    label = rows["label"].to_numpy(float)
    p = reliability.logistic_fit(ratio.to_numpy(), label)
    simple = pd.Series(metrics.cross_entropy(label, p), rows.index)
    gain = difference(rows["loss"] - simple, rows)
    return Beyond(mean(rows["loss"], rows), mean(simple, rows), gain, lengths, len(rows))


@dataclass(frozen=True)
class Calibration:
    """bins: mean p, mean label (an Estimate) and share of the rows of each bin; sure: mean confidence; over:
    mean confidence less accuracy; ece, chance: the calibration error, and the one that chance would give."""

    bins: list[tuple[float, Estimate, float]]
    sure: float
    over: Estimate
    ece: Estimate
    chance: float
    brier: Estimate


def calibration(rows: pd.DataFrame) -> Calibration:
    """rows: with label and p. Empty bins are left out; the error of the ECE is a bootstrap over prompts."""
    label, p = rows["label"].to_numpy(), rows["p"].to_numpy()
    parts = [part for _, part in rows.groupby(reliability.bin_of(p))]
    bins = [(part["p"].mean(), mean(part["label"], part), len(part) / len(rows)) for part in parts]
    ece = reliability.bootstrap(lambda w: reliability.calibration_error(label, p, w), rows["group"])
    return Calibration(
        bins,
        sure=float(np.maximum(p, 1 - p).mean()),
        over=difference(reliability.overconfidence(label, p), rows),
        ece=Estimate(*ece),
        chance=reliability.chance_calibration_error(p),
        brier=mean(reliability.brier(label, p), rows),
    )


@dataclass(frozen=True)
class Position:
    """flips: share of verdicts that change with the order; place: P(the answer shown first wins) - 1/2;
    first_ab, first_ba: P(the answer shown first wins) where this is a, and where this is b."""

    flips: Estimate
    place: Estimate
    first_ab: Estimate
    first_ba: Estimate


def position_of(rows: pd.DataFrame) -> Position:
    """rows: with p_ab and p_ba, P(a wins) where a is shown first and where b is."""
    ab, ba = rows["p_ab"], rows["p_ba"]
    place = difference(reliability.first(ab, ba) - 0.5, rows)
    return Position(mean(reliability.flips(ab, ba), rows), place, mean(ab, rows), mean(1 - ba, rows))


@dataclass(frozen=True)
class Leaning:
    """How much P(a wins) rises where a gets twice as long (slope), and Pearson's r, each of the labels and of
    the judge; more: the judge's slope less the labels'."""

    label_slope: Estimate
    label_r: Estimate
    judge_slope: Estimate
    judge_r: Estimate
    more: Estimate


def length_leaning(rows: pd.DataFrame) -> Leaning:
    """rows: whose texts are known. All errors are bootstraps over prompts."""
    ratio = length_ratio(rows).to_numpy()

    def over_prompts(figure, y: pd.Series) -> Estimate:
        return Estimate(*reliability.bootstrap(lambda w: figure(ratio, y.to_numpy(), w), rows["group"]))

    slope, r = reliability.slope, reliability.correlation
    found = [over_prompts(figure, rows[y]) for y in ("label", "p") for figure in (slope, r)]
    return Leaning(*found, over_prompts(slope, rows["p"] - rows["label"]))


Group = tuple[str, pd.DataFrame]  # (name, its rows)


def quantiles(values: pd.Series, rows: pd.DataFrame, number: int, name: str) -> list[Group]:
    """The rows cut into `number` parts of about equal size by ascending values; equal values stay together.
    Each part is called by its lowest and highest value, in as many decimals as tell all of them apart.

    name: with two fields {}, the lowest and the highest value."""
    of_row = pd.qcut(values, number, labels=False, duplicates="drop").fillna(0)
    parts = [part for _, part in rows.groupby(of_row)]
    ends = [(values[part.index].min(), values[part.index].max()) for part in parts]
    wide = sum(low < high for low, high in ends)
    for decimals in range(0 if (values % 1 == 0).all() else 1, 16):
        printed = [[f"{end:,.{decimals}f}" for end in both] for both in ends]
        apart = len({tuple(both) for both in printed}) == len(parts)
        if apart and sum(low != high for low, high in printed) == wide:
            break
    return [(name.format(*both), part) for both, part in zip(printed, parts, strict=True)]


def large_enough(groups: list[Group]) -> list[Group]:
    """The groups with ENOUGH rows or more whose label is not one half."""
    return [(name, part) for name, part in groups if part["right"].count() >= ENOUGH]
