"""The questions of the page about training and trust, in page order: a drawing and a caption each.

    learnt, good, believed, position, length       each gives a section as HTML

Each takes its numbers from figures.py; draw_* draws them, say_* puts them into sentences. groups.py has the
questions about rows.
"""

from collections.abc import Iterator
from itertools import cycle

from matplotlib.axes import Axes

from minarena.report import figures, reliability
from minarena.report.groups import by_group, numbers
from minarena.report.page import COLOURS, FAINT, axes, forest, named, section, with_errors
from minarena.report.predictors import Predictor
from minarena.report.runs import Run
from minarena.report.summary import CONFIDENCE, LOSS, PLACE, RULE
from minarena.report.words import FIELDS, Estimate, Words, amount, difference, mean, side, verdict

POINTS = 1000  # dots of one colour in a scatter plot: more make one blot, and megabytes
TRAINED = " (trained)"


def learnt(runs: list[Run]) -> str:
    """Two panels over the optimiser steps: loss with the held-out log loss, and learning rate; runs may be
    unfinished."""
    curves = [figures.training_curve(run) for run in runs]
    loss, rate = axes("optimiser step", "loss, nats a row"), axes("optimiser step", "learning rate")
    for colour, run, curve in zip(cycle(COLOURS), runs, curves, strict=False):
        draw_training(loss, rate, colour, run.name, curve)
    loss.axhline(figures.NO_SKILL, color=FAINT, linestyle=":")
    said = "A thin line is the loss of each step, a thick line is its mean over a tenth of the steps. A dot "
    said += "is the log loss of the held-out rows; the dotted line is no skill, 0.693."
    said += "".join(say_training(run, curve) for run, curve in zip(runs, curves, strict=True))
    peak = f"This is the learning rate of each step; its peak is {max(rate.dataLim.y1, 0):.1e}."
    return section("Did the loss fall?", [(named(loss), said), (rate, peak)])


def draw_training(loss: Axes, rate: Axes, colour: str, name: str, curve: figures.Curve) -> None:
    steps = curve.steps
    loss.plot(steps["step"], steps["loss"], color=colour, alpha=0.25, linewidth=0.8)
    loss.plot(steps["step"], steps["loss"].rolling(curve.tenth, 1).mean(), color=colour, label=name)
    loss.plot(*curve.held_out.T, "o-", color=colour, markersize=5)
    rate.plot(steps["step"], steps["lr"], color=colour)


def say_training(run: Run, curve: figures.Curve) -> str:
    said = ""
    if len(curve.steps) > 1:
        neither = "has not fallen yet" if run.rows is None else "did not fall"
        change = verdict(curve.change, Words("rose", "fell", neither, "may have changed"))
        said += f" The training loss of {run.name} {change}: it was {curve.start:.3f} in the first tenth of "
        said += f"the steps and {curve.end:.3f} in the last."
    if len(curve.held_out):
        said += f" The held-out log loss of {run.name} came to {curve.held_out[-1, 1]:.3f}."
    return said


def good(best: Predictor, predictors: list[Predictor]) -> str:
    """Accuracy and log loss of every predictor, each on its own rows: two panels and a table, the sentences
    about `best`."""
    rows = best.rows
    right = [(each.name, mean(each.rows["right"], each.rows)) for each in predictors]
    loss = [(each.name, mean(each.rows["loss"], each.rows)) for each in predictors]
    rule = figures.longer_rule(rows)
    bold = tuple(each.name for each in predictors if each.trained)
    gap = difference(rows["right"] - rule, rows)
    accuracies = forest("accuracy", [*right, ("longer wins", mean(rule, rows))], 0.5, bold)
    losses = forest("log loss, nats a row", loss, figures.NO_SKILL, bold)
    panels = [(accuracies, say_accuracy(best, gap, mean(rule, rows))), (losses, say_loss(best, predictors))]
    groups = [(each.name + (TRAINED if each.trained else ""), each.rows) for each in predictors]
    return section("How good is it?", panels, numbers(groups, tuple(name + TRAINED for name in bold)))


def say_accuracy(best: Predictor, gap: Estimate, rule: Estimate) -> str:
    said = f"{best.name} agrees with {best.labeller} on {mean(best.rows['right'], best.rows)} of "
    said += f"{len(best.rows):,} rows, and {verdict(gap, RULE).removeprefix('It ')} the rule that the longer "
    return f"{said}answer wins: {rule}. Names in bold are runs in the order that they were trained in."


def say_loss(best: Predictor, predictors: list[Predictor]) -> str:
    said = f"The log loss of {best.name} is {mean(best.rows['loss'], best.rows)}; no skill is 0.693 (dotted)."
    told = {each.name: loss_difference(best, each) for each in predictors if each is not best}
    for which in FIELDS:
        those = [f"{name} {amount(found)}" for name, found in told.items() if side(found) == which]
        if those:
            said += f" It is {getattr(LOSS, which)} {', '.join(those)}."
    return said


def loss_difference(one: Predictor, other: Predictor) -> Estimate:
    """Mean loss of `one` less the mean loss of `other`, paired: both are compared on the same rows, one by
    one. So a hard row, on which both are bad, adds nothing to the error."""
    return difference(one.rows["loss"] - other.rows["loss"], one.rows)


def believed(predictors: list[Predictor]) -> str:
    """A reliability diagram of each predictor, on its own rows."""
    return section("Can I believe its probabilities?", list(reliability_panels(predictors)))


def reliability_panels(predictors: list[Predictor]) -> Iterator[tuple[Axes, str]]:
    for colour, each in zip(cycle(COLOURS), predictors, strict=False):
        found = figures.calibration(each.rows)
        yield draw_reliability(colour, each.name, found), say_reliability(each.name, found)


def draw_reliability(colour: str, name: str, found: figures.Calibration) -> Axes:
    ax = axes(f"P(a wins) by {name}", "share in which a won", xlim=(0, 1), ylim=(0, 1))
    ax.plot([0, 1], [0, 1], color=FAINT, linestyle=":")
    x, labels, share = zip(*found.bins, strict=True)
    ax.bar(x, share, 0.05, color=FAINT, alpha=0.4)
    ax.errorbar(x, *with_errors(labels), fmt="o-", color=colour, markersize=4)
    return ax


def say_reliability(name: str, found: figures.Calibration) -> str:
    right = found.sure - found.over.value
    said = f"{name} {verdict(found.over, CONFIDENCE)}: it is {found.sure:.3f} sure and {right:.3f} right. "
    said += f"Its calibration error (ECE) is {found.ece}; labels drawn from its own probabilities would give "
    said += f"{found.chance:.3f}. Its Brier score is {found.brier}; no skill is 0.250. The grey bars are the "
    return said + "share of the rows."


def position(runs: list[Predictor]) -> str:
    """A panel of each run: P(a wins) with b shown first over P(a wins) with a shown first.

    runs: the finished runs, each in the order trained; their rows have p_ab and p_ba."""
    panels = []
    for each in runs:
        rows = each.rows
        flip = reliability.flips(rows["p_ab"], rows["p_ba"])
        panels.append((draw_position(rows, flip), say_position(each.run, figures.position_of(rows), flip)))
    return section("Does the position matter?", panels)


def draw_position(rows, flip) -> Axes:
    ax = axes("P(a wins), a shown first", "P(a wins), b shown first", xlim=(0, 1), ylim=(0, 1))
    for which, label in enumerate(("same verdict", "flips")):
        some = rows[flip == which].head(POINTS)
        ax.scatter(some["p_ab"], some["p_ba"], 7, COLOURS[which], alpha=0.5, linewidth=0, label=label)
    return named(ax)


def say_position(name: str, found: figures.Position, flip) -> str:
    said = f"{name} favours {verdict(found.place, PLACE)}: P(the first wins) is {found.first_ab} where a is "
    said += f"first and {found.first_ba} where b is. {found.flips} of its verdicts flip with the order."
    if flip.value_counts().max() > POINTS:
        said += f" Drawn are at most {POINTS:,} rows of a colour."
    return said


def length(best: Predictor) -> str:
    """Two panels: share and P(a wins) over the answers' lengths, and accuracy by the ratio of lengths.

    best: with rows whose texts are known."""
    ratio = figures.length_ratio(best.rows)
    ax = draw_length(best, figures.quantiles(ratio, best.rows, 6, "{} to {}"))
    said = say_length(best, figures.length_leaning(best.rows))
    times = 2 ** abs(ratio)
    groups = figures.quantiles(times, best.rows, 4, "{} to {} times as long")
    return section("Does the length decide?", [(ax, said), by_group(groups)])


def draw_length(best: Predictor, parts: list[figures.Group]) -> Axes:
    ax = axes("log2(length of a / length of b)", "P(a wins)")
    x = [figures.length_ratio(part).mean() for _, part in parts]
    for colour, column, who in ((COLOURS[1], "label", best.labeller), (COLOURS[0], "p", best.name)):
        found = [mean(part[column], part) for _, part in parts]
        ax.errorbar(x, *with_errors(found), fmt="o-", color=colour, markersize=4, label=who)
    return named(ax)


def say_length(best: Predictor, found: figures.Leaning) -> str:
    people = best.labeller
    words = Words(f"more than {people} do", f"less than {people} do", f"as {people} do", "or not")
    said = f"{best.name} leans on length {verdict(found.more, words)}. Where a gets twice as long, P(a wins) "
    said += f"of the judge rises by {found.judge_slope}; the share in which {people} prefer a rises by "
    said += f"{found.label_slope}. The correlations with length are {found.judge_r} and {found.label_r}."
    return said
