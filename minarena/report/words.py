"""Estimates and what they mean in words.

    mean(values, rows)               Estimate(value, its standard error over prompts), printed 0.812 ± 0.025
    verdict(difference, Words(...))  "does better than (+0.310 ± 0.040)"

A difference below two standard errors is called noise. Of fewer than ENOUGH prompts (or rows, or steps) a
standard error is no more than a guess: nothing is claimed then. What it does not do: draw, or know runs.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from minarena import metrics
from minarena.metrics import ENOUGH


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, in the figure's own unit; nan where either is not known."""

    value: float
    error: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "unknown"
        # An error of 0 (but for rounding) comes from a few values that happen to be equal: it says nothing.
        return f"{self.value:.3f} ± {self.error:.3f}" if self.error > 1e-9 else f"{self.value:.3f}"


@dataclass(frozen=True)
class Words:
    """What to say of a difference: above 0, below 0, within noise, or of too few rows to tell."""

    more: str
    less: str
    neither: str
    unknown: str


FIELDS = ("more", "less", "neither", "unknown")  # the fields of Words


def mean(values: pd.Series | np.ndarray, rows: pd.DataFrame) -> Estimate:
    """The mean of the values that are not nan, and its standard error over the prompts (rows' `group`)."""
    values = pd.Series(values, rows.index).dropna()
    error = metrics.standard_error(values.to_numpy(), rows.loc[values.index, "group"].to_numpy())
    return Estimate(float(values.mean()), error)


def difference(values: pd.Series | np.ndarray, rows: pd.DataFrame) -> Estimate:
    """The mean of one difference a row; its error is nan where there are fewer than ENOUGH prompts."""
    found = mean(values, rows)
    return found if rows["group"].nunique() >= ENOUGH else Estimate(found.value, np.nan)


def side(found: Estimate) -> str:
    """The field of Words for a difference: above 0 by two standard errors, below 0, neither, unknown."""
    if np.isnan(found.error):
        return "unknown"
    if abs(found.value) <= 2 * found.error:
        return "neither"
    return "more" if found.value > 0 else "less"


def amount(found: Estimate) -> str:
    """The difference in brackets, and why no more is said of it where nothing is."""
    if np.isnan(found.value):
        return "(too little to tell)"
    if np.isnan(found.error):
        return f"({found.value:+.3f}, too little to tell)"
    noise = ", within noise" if side(found) == "neither" else ""
    return f"({found.value:+.3f} ± {found.error:.3f}{noise})"


def verdict(found: Estimate, words: Words) -> str:
    return f"{getattr(words, side(found))} {amount(found)}"
