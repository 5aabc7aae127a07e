"""Figures of predicted probabilities, with standard errors over prompts.

scores(label, p, prompt) -> {"accuracy", "accuracy_se", "log_loss", "log_loss_se"}
bootstrap(figure, prompt) -> (figure(w) of the rows as they are, its standard error)
label: P(a wins) of each row, 1, 0 or between (exactly one half is a tie); p: the predicted P(a wins)

Compared with: scikit-learn, SciPy, hand-worked examples, loops, rows that are written down several times, and
the spread of many drawn samples.
"""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import linregress, pearsonr
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from minarena import metrics
from minarena.metrics import scores
from minarena.report import reliability


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


def soft(rows: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels between 0 and 1, probabilities and how often each row counts, sometimes not at all."""
    rng = np.random.default_rng(seed)
    return rng.random(rows), rng.random(rows), rng.integers(0, 4, rows)


def test_the_brier_score_is_scikit_learns_and_soft_labels_are_its_weights():
    label, p = drawn(500)
    assert reliability.brier(label, p).mean() == pytest.approx(brier_score_loss(label, p))
    label, p, _ = soft(500)
    both = brier_score_loss([1] * 500 + [0] * 500, [*p, *p], sample_weight=[*label, *(1 - label)])
    noise = (label * (1 - label)).mean()  # of a coin that falls on a with chance `label`: no p can avoid it
    assert reliability.brier(label, p).mean() == pytest.approx(both - noise)


@pytest.mark.parametrize("edges", [False, True])
def test_bins_are_those_of_scikit_learns_calibration_curve(edges):
    label, p = drawn(2000)
    if edges:
        p = np.linspace(0, 1, 11)[np.random.default_rng(3).integers(0, 11, 2000)]
    share, mean_p = calibration_curve(label, p, n_bins=10)
    which = reliability.bin_of(p)
    bins = [which == i for i in np.unique(which)]
    np.testing.assert_allclose([label[b].mean() for b in bins], share)
    np.testing.assert_allclose([p[b].mean() for b in bins], mean_p)
    weights = np.array([b.mean() for b in bins])
    expected = (weights * np.abs(share - mean_p)).sum()
    assert reliability.calibration_error(label, p, np.ones(2000)) == pytest.approx(expected)


def test_the_calibration_error_of_a_hand_worked_example_and_of_perfect_probabilities():
    label, p = np.array([1.0, 0.0, 1.0, 0.5]), np.array([0.95, 0.95, 0.15, 0.55])
    # (0.9, 1]: mean p .95, mean label .5; (0.1, 0.2]: .15 and 1; (0.5, 0.6]: .55 and .5
    assert reliability.calibration_error(label, p, np.ones(4)) == pytest.approx((2 * 0.45 + 0.85 + 0.05) / 4)
    assert reliability.calibration_error(p, p, np.ones(4)) == 0


def test_a_row_with_weight_3_counts_as_that_row_three_times():
    label, p, w = soft(200)
    x = np.random.default_rng(5).normal(size=200)
    again = np.repeat(np.arange(200), w)
    ones = np.ones(len(again))
    for figure, columns in (
        (reliability.calibration_error, (label, p)),
        (reliability.correlation, (x, p)),
        (reliability.slope, (x, p)),
    ):
        expected = figure(*(column[again] for column in columns), ones)
        assert figure(*columns, w) == pytest.approx(expected), figure.__name__


def test_correlation_and_slope_are_scipys():
    label, p, _ = soft(300)
    x = p + label
    assert reliability.correlation(x, p, np.ones(300)) == pytest.approx(pearsonr(x, p).statistic)
    assert reliability.slope(x, p, np.ones(300)) == pytest.approx(linregress(x, p).slope)


def test_flips_place_and_overconfidence_row_by_row():
    _, p_ab, _ = soft(100, seed=2)
    label, p_ba, _ = soft(100, seed=3)
    label = (label > 0.5).astype(float)
    flip, first, over = (
        reliability.flips(p_ab, p_ba),
        reliability.first(p_ab, p_ba),
        reliability.overconfidence(label, p_ab),
    )
    for i in range(100):
        verdicts = "a" if p_ab[i] > 0.5 else "b", "a" if p_ba[i] > 0.5 else "b"
        assert flip[i] == (verdicts[0] != verdicts[1])
        assert first[i] == pytest.approx((p_ab[i] + (1 - p_ba[i])) / 2)  # in ba the first answer is b
        confidence = p_ab[i] if p_ab[i] > 0.5 else 1 - p_ab[i]
        assert over[i] == pytest.approx(confidence - (verdicts[0] == ("a" if label[i] else "b")))
    assert reliability.first(np.array([0.9]), np.array([0.1])) == pytest.approx(
        0.9
    )  # says "the first" whatever is first
    assert reliability.flips(np.array([0.9]), np.array([0.1])) == 1


def clustered(prompts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(values, prompt): one to five rows a prompt, which have most of their value in common."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), rng.integers(1, 6, prompts))
    return rng.normal(size=prompts)[prompt] + 0.3 * rng.normal(size=len(prompt)), prompt


def test_the_standard_error_of_a_hand_worked_example():
    """Three prompts of 2, 1 and 1 rows; mean 2.5; sums of what is off: -2, 0.5, 1.5."""
    error = metrics.standard_error(np.array([1.0, 2.0, 3.0, 4.0]), np.array(["p", "p", "q", "r"]))
    assert error == pytest.approx(np.sqrt(3 / 2 * (4 + 0.25 + 2.25)) / 4)


def test_rows_that_share_a_prompt_tell_no_more_than_one_and_rows_of_their_own_are_independent():
    values, _ = clustered(80, 0)
    own = np.arange(len(values))
    error = metrics.standard_error(values, own)
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
    assert metrics.standard_error(np.tile(values, 5), np.tile(own, 5)) == pytest.approx(error)
    label, p = drawn(300)
    once = scores(label, p, np.arange(300))
    thrice = scores(np.tile(label, 3), np.tile(p, 3), np.tile(np.arange(300), 3))
    assert once == scores(label, p) and thrice == pytest.approx(once)
    assert (
        scores(np.tile(label, 3), np.tile(p, 3))["accuracy_se"] < 0.6 * once["accuracy_se"]
    )  # as if independent


def test_the_standard_error_over_prompts_is_the_spread_over_many_samples():
    several = [clustered(100, seed) for seed in range(400)]
    spread = np.std([values.mean() for values, _ in several])
    over_prompts = np.mean([metrics.standard_error(values, prompt) for values, prompt in several])
    over_rows = np.mean([metrics.standard_error(values, np.arange(len(values))) for values, _ in several])
    assert over_prompts == pytest.approx(spread, rel=0.12)
    assert over_rows < 0.7 * spread


def test_the_bootstrap_agrees_with_the_formula_and_with_a_loop_that_draws_prompts():
    values, prompt = clustered(60, 4)
    value, error = reliability.bootstrap(lambda w: np.average(values, weights=w), prompt, draws=2000)
    assert value == pytest.approx(values.mean())
    assert error == pytest.approx(metrics.standard_error(values, prompt), rel=0.08)
    rows = [values[prompt == i] for i in range(60)]
    rng, means = np.random.default_rng(9), []
    for _ in range(2000):
        means.append(np.concatenate([rows[i] for i in rng.integers(0, 60, 60)]).mean())
    assert error == pytest.approx(np.std(means), rel=0.08)


def test_of_a_single_prompt_the_bootstrap_knows_no_error():
    value, error = reliability.bootstrap(lambda w: np.average([1, 0, 0], weights=w), np.array(["a"] * 3))
    assert value == pytest.approx(1 / 3) and np.isnan(error)


def test_the_bootstrap_of_a_correlation_is_its_spread_over_many_samples():
    found = []
    for seed in range(150):
        x, prompt = clustered(60, seed)
        y = x + np.random.default_rng([seed, 1]).normal(size=60)[prompt]
        found.append(
            reliability.bootstrap(lambda w, x=x, y=y: reliability.correlation(x, y, w), prompt, draws=100)
        )
    r, errors = np.array(found).T
    assert errors.mean() == pytest.approx(r.std(), rel=0.15)


def test_one_prompt_has_no_standard_error():
    result = scores(np.array([1.0, 0.0]), np.array([0.7, 0.7]), np.array(["same", "same"]))
    assert result["accuracy"] == 0.5 and result["accuracy_se"] is result["log_loss_se"] is None


def test_the_logistic_fit_is_that_of_scipys_minimiser_and_finite_where_x_tells_all_labels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    hard = (rng.random(300) < 1 / (1 + np.exp(-0.4 - 1.5 * x))).astype(float)
    for label in (hard, 0.1 + 0.8 * hard, (x > 0).astype(float), np.ones(300)):  # the last two: separable

        def objective(b, label=label):
            logit = b[0] + b[1] * x
            return (np.logaddexp(0, logit) - label * logit).sum() + 1e-3 / 2 * (b**2).sum()

        best = minimize(objective, np.zeros(2), tol=1e-12).x
        found = reliability.logistic_fit(x, label)
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-best[0] - best[1] * x)), atol=2e-3)
        assert np.all(np.isfinite(found)) and objective(best) == pytest.approx(
            (metrics.cross_entropy(label, found)).sum() + 1e-3 / 2 * (best**2).sum(), abs=1e-2
        )


def test_the_rule_of_the_longer_answer_row_by_row():
    a, b = np.array([5, 5, 5, 1, 1]), np.array([1, 1, 5, 5, 5])
    found = reliability.longer_wins(a, b, np.array([1.0, 0.0, 1.0, 0.0, 1.0]))
    assert found.tolist() == [1, 0, 0.5, 1, 0]


def test_the_calibration_error_of_perfect_probabilities_is_what_chance_alone_gives():
    _, p = drawn(400)
    several = [(np.random.default_rng(seed).random(400) < p).astype(float) for seed in range(1, 100)]
    found = [reliability.calibration_error(label, p, np.ones(400)) for label in several]
    expected = reliability.chance_calibration_error(p)
    assert expected == pytest.approx(np.mean(found), abs=4 * np.std(found) / 10) and expected > 0.02
