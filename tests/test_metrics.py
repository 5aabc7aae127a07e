"""Accuracy and log loss of predicted probabilities, with standard errors.

scores(label, p) -> {"accuracy", "accuracy_se", "log_loss", "log_loss_se"}
label: P(a wins) of each row, 1, 0 or between (exactly one half is a tie); p: the predicted P(a wins)

Compared with: scikit-learn, a hand-worked example, a loop, and the spread of many drawn samples.
"""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

from minarena.metrics import scores


def drawn(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.random(rows)
    return (rng.random(rows) < p).astype(float), p


def test_accuracy_and_log_loss_are_scikit_learns():
    label, p = drawn(1000)
    result = scores(label, p)
    assert result["accuracy"] == accuracy_score(label, p > 0.5)
    assert result["log_loss"] == pytest.approx(log_loss(label, p), abs=1e-12)


def test_soft_labels_count_on_both_sides_as_scikit_learns_weights_do():
    rng = np.random.default_rng(1)
    label, p = rng.random(200), rng.random(200)
    both = log_loss([1] * 200 + [0] * 200, [*p, *p], sample_weight=[*label, *(1 - label)])
    result = scores(label, p)
    assert result["log_loss"] == pytest.approx(both, abs=1e-12)
    assert result["accuracy"] == np.mean([(a > 0.5) == (b > 0.5) for a, b in zip(label, p, strict=True)])


def test_a_hand_worked_example():
    """Right, wrong, a tie (no accuracy, but a loss), a soft label on the right side."""
    result = scores(np.array([1.0, 0.0, 0.5, 0.75]), np.array([0.5001, 0.5001, 0.9, 0.8]))
    assert result["accuracy"] == pytest.approx(2 / 3)
    by_hand = [0.69295, 0.69335, 0.5 * 0.10536 + 0.5 * 2.30259, 0.75 * 0.22314 + 0.25 * 1.60944]
    assert result["log_loss"] == pytest.approx(sum(by_hand) / 4, abs=1e-4)
    spread = np.sqrt(((2 / 3) * (1 / 3) ** 2 + (1 / 3) * (2 / 3) ** 2) * 3 / 2 / 3)  # n - 1 = 2, n = 3
    assert result["accuracy_se"] == pytest.approx(spread)


def test_certainty_costs_as_much_as_scikit_learn_says_and_is_finite():
    label, p = np.array([1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0])
    assert np.isfinite(scores(label, p)["log_loss"])
    assert scores(label, p)["log_loss"] == pytest.approx(log_loss(label, np.clip(p, 1e-15, 1 - 1e-15)))


def test_the_standard_errors_are_the_spread_over_many_samples():
    several = [scores(*drawn(200, seed)) for seed in range(400)]
    for name in ("accuracy", "log_loss"):
        spread = np.std([s[name] for s in several])
        assert np.mean([s[name + "_se"] for s in several]) == pytest.approx(spread, rel=0.12)


def test_no_row_and_one_row_give_none_where_there_is_no_figure():
    """None, not NaN: JSON has no NaN."""
    nothing = scores(np.array([]), np.array([]))
    assert set(nothing.values()) == {None}
    tie = scores(np.array([0.5]), np.array([0.5]))
    assert tie["accuracy"] is tie["accuracy_se"] is tie["log_loss_se"] is None
    assert tie["log_loss"] == pytest.approx(np.log(2))
