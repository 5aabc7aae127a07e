"""Estimates and what they mean in words.

    str(Estimate(0.8123, 0.025)) == "0.812 ± 0.025"
    verdict(Estimate(0.31, 0.04), Words("better", "worse", "as good", "unknown")) == "better (+0.310 ± 0.040)"

Compared with: hand-worked examples, and metrics.py's standard error over prompts.
"""

import numpy as np
import pandas as pd
import pytest

from minarena import metrics
from minarena.report.words import FIELDS, Estimate, Words, amount, difference, mean, side, verdict

WORDS = Words("above", "below", "neither", "unknown")


def rows_of(prompts: int, each: int = 2) -> pd.DataFrame:
    return pd.DataFrame({"group": np.repeat([f"prompt {i}" for i in range(prompts)], each)})


@pytest.mark.parametrize(
    "value, error, printed, which, said",
    [
        (0.31, 0.04, "0.310 ± 0.040", "more", "above (+0.310 ± 0.040)"),
        (-0.31, 0.04, "-0.310 ± 0.040", "less", "below (-0.310 ± 0.040)"),
        (0.08, 0.04, "0.080 ± 0.040", "neither", "neither (+0.080 ± 0.040, within noise)"),  # two, exactly
        (-0.0801, 0.04, "-0.080 ± 0.040", "less", "below (-0.080 ± 0.040)"),
        (0.31, np.nan, "0.310", "unknown", "unknown (+0.310, too little to tell)"),
        (np.nan, np.nan, "unknown", "unknown", "unknown (too little to tell)"),
        (0.31, 1e-17, "0.310", "more", "above (+0.310 ± 0.000)"),
    ],
)
def test_a_difference_is_said_by_its_sign_and_its_noise(value, error, printed, which, said):
    found = Estimate(value, error)
    assert str(found) == printed
    assert side(found) == which and which in FIELDS
    assert verdict(found, WORDS) == said == f"{getattr(WORDS, which)} {amount(found)}"


def test_a_mean_leaves_out_what_is_nan_and_its_error_is_over_prompts():
    rows = rows_of(15)
    values = pd.Series(np.random.default_rng(0).normal(size=30), rows.index)
    values[3] = np.nan
    found, known = mean(values, rows), values.notna().to_numpy()
    assert found.value == pytest.approx(np.nanmean(values))
    expected = metrics.standard_error(values[known].to_numpy(), rows["group"][known].to_numpy())
    assert found.error == pytest.approx(expected)
    assert found.error != pytest.approx(values.sem())  # as if rows were independent


def test_fewer_than_twenty_prompts_give_no_verdict_however_many_rows_they_have():
    for prompts, known in ((19, False), (20, True)):
        rows = rows_of(prompts, each=10)
        found = difference(np.linspace(1, 2, len(rows)), rows)
        assert found.value == pytest.approx(1.5) and np.isfinite(found.error) == known
