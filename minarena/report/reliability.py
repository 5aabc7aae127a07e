"""Can a judge be believed? Calibration, position and length, as plain functions of labels and probabilities.

label, p, prompt: as in metrics.py, all (rows,). Each docstring gives the figure's unit and its source. The
standard error of a figure that is not a mean is a bootstrap over prompts (Efron 1979,
https://doi.org/10.1214/aos/1176344552; of groups: Davison & Hinkley 1997, 3.8); such a figure is a function
of w (rows,), how often each row was drawn.
"""

from collections.abc import Callable

import numpy as np


def brier(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """(p - label)^2 of each row; no skill is 0.25. Half of Brier's own sum over the two outcomes (1950,
    https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2)."""
    return (p - label) ** 2


def overconfidence(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """For each row, the confidence max(p, 1 - p) less the label of the answer that p prefers. The mean is
    above 0 where a judge is right less often than it says."""
    return np.where(p > 0.5, p - label, label - p)


def bin_of(p: np.ndarray, bins: int = 10) -> np.ndarray:
    """The bin of each row, 0 to bins - 1; the bins divide (0, 1] equally. A reliability diagram draws a bin's
    mean label over its mean p: equal where probabilities can be believed."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], p)


def calibration_error(label: np.ndarray, p: np.ndarray, w: np.ndarray, bins: int = 10) -> float:
    """ECE, 0 to 1: the distance between a bin's mean p and its mean label, averaged over the rows. Naeini et
    al. 2015 (https://doi.org/10.1609/aaai.v29i1.9602); Guo et al. 2017 (https://arxiv.org/abs/1706.04599) bin
    the confidence. Chance keeps the ECE above 0: compare it with chance_calibration_error."""
    return np.abs(np.bincount(bin_of(p, bins), w * (p - label))).sum() / w.sum()


def chance_calibration_error(p: np.ndarray, draws: int = 200, seed: int = 0) -> float:
    """The ECE that perfect probabilities would show by chance: its mean over labels drawn from p."""
    drawn = (np.random.default_rng(seed).random((draws, len(p))) < p).astype(float)
    ones = np.ones(len(p))
    return float(np.mean([calibration_error(label, p, ones) for label in drawn]))


def flips(p_ab: np.ndarray, p_ba: np.ndarray) -> np.ndarray:
    """1 where the verdict on a row changes with the order in which the answers are shown, else 0; both
    arguments are P(a wins). The mean is 1 - consistency of Zheng et al. 2023 (MT-Bench, table 2,
    https://arxiv.org/abs/2306.05685)."""
    return ((p_ab > 0.5) != (p_ba > 0.5)).astype(float)


def first(p_ab: np.ndarray, p_ba: np.ndarray) -> np.ndarray:
    """P(the answer shown first wins) of each row, averaged over both orders; 0.5 on average without bias."""
    return (p_ab + 1 - p_ba) / 2


def longer_wins(size_a: np.ndarray, size_b: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How often the rule "the longer answer wins" agrees with each label: 1, 0, or 1/2 for equal lengths."""
    return np.where(size_a == size_b, 0.5, ((size_a > size_b) == (label > 0.5)).astype(float))


def logistic_fit(x: np.ndarray, label: np.ndarray, ridge: float = 1e-3, steps: int = 200) -> np.ndarray:
    """P(a wins) of each row by logistic regression on x (rows,) and a constant, fitted to these very rows.

    The constant is what a judge can learn from the position alone, x what it can learn from x. Newton's
    method (Hastie et al. 2009, 4.4.1); the ridge, on both coefficients, keeps them finite where x tells all
    labels apart.
    """
    columns, coefficient = np.stack([np.ones(len(x)), x], axis=1), np.zeros(2)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-columns @ coefficient))
        gradient = columns.T @ (label - p) - ridge * coefficient
        hessian = (columns * (p * (1 - p))[:, None]).T @ columns + ridge * np.eye(2)
        change = np.linalg.solve(hessian, gradient)
        coefficient += change / max(1.0, np.abs(change).max())  # at most 1 a step: a full one can overshoot
        if np.abs(change).max() < 1e-9:
            break
    return 1 / (1 + np.exp(-columns @ coefficient))


def correlation(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Pearson's r, -1 to 1. Labels of 0 and 1 have a smaller r than probabilities that lean on x as much."""
    (xx, xy), (_, yy) = np.cov(x, y, aweights=w)
    return xy / np.sqrt(xx * yy) if xx * yy else np.nan


def slope(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """By how much y rises where x rises by 1 (least squares); the same for labels and for probabilities."""
    (xx, xy), _ = np.cov(x, y, aweights=w)
    return xy / xx if xx else np.nan


def bootstrap(figure: Callable, prompt: np.ndarray, draws: int = 500, seed: int = 0) -> tuple[float, float]:
    """(figure(w) of the rows as they are, its standard error). The error is the spread of figure(w) over
    samples of whole prompts, drawn with replacement; nan for fewer than two prompts."""
    each, rng = np.unique(prompt, return_inverse=True)[1], np.random.default_rng(seed)
    n = each.max() + 1  # prompts
    value = float(figure(np.ones(len(each))))
    if n < 2:
        return value, np.nan
    drawn = [np.bincount(rng.integers(n, size=n), minlength=n)[each] for _ in range(draws)]
    return value, float(np.std([figure(w) for w in drawn], ddof=1))
