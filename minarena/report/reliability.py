"""Can a judge be believed? Calibration, place and length, as plain functions; the report is made of them.

label, p, prompt as in metrics.py; every figure says its unit and its source. A figure that is no mean has as
its standard error the spread of it when whole prompts are drawn with replacement (Efron 1979,
https://doi.org/10.1214/aos/1176344552; in groups: Davison & Hinkley 1997, 3.8): it takes w (rows,), how often
each row counts.
"""

from collections.abc import Callable

import numpy as np


def brier(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """(p - label)^2 of each row; no skill is 0.25. Brier 1950, his sum over the two outcomes halved:
    https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2"""
    return (p - label) ** 2


def overconfidence(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Of each row, the confidence max(p, 1 - p) less the label of the answer that p prefers: on average above
    0 where a judge is right less often than it says."""
    return np.where(p > 0.5, p - label, label - p)


def bin_of(p: np.ndarray, bins: int = 10) -> np.ndarray:
    """The bin of each row, of `bins` equal ones in (0, 1]. A reliability diagram shows a bin's mean label
    over its mean p: equal where probabilities can be believed."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], p)


def calibration_error(label: np.ndarray, p: np.ndarray, w: np.ndarray, bins: int = 10) -> float:
    """ECE: mean over rows of the distance between their bin's mean p and mean label, 0 to 1. Naeini et al.
    2015 (https://doi.org/10.1609/aaai.v29i1.9602); Guo et al. 2017 (https://arxiv.org/abs/1706.04599) bin the
    confidence. Chance keeps it above 0: compare it with that of labels drawn from p."""
    return np.abs(np.bincount(bin_of(p, bins), w * (p - label))).sum() / w.sum()


def flips(p_ab: np.ndarray, p_ba: np.ndarray) -> np.ndarray:
    """1 where the verdict on a row changes with the order the answers are shown in, else 0; both: P(a wins).
    Its mean is 1 - consistency of Zheng et al. 2023 (MT-Bench, table 2): https://arxiv.org/abs/2306.05685"""
    return ((p_ab > 0.5) != (p_ba > 0.5)).astype(float)


def first(p_ab: np.ndarray, p_ba: np.ndarray) -> np.ndarray:
    """P(the answer shown first wins) of each row, mean of both orders: 0.5 on average without bias."""
    return (p_ab + 1 - p_ba) / 2


def correlation(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Pearson's r, -1 to 1. Verdicts of 0 and 1 have a smaller one than probabilities that lean as much."""
    (xx, xy), (_, yy) = np.cov(x, y, aweights=w)
    return xy / np.sqrt(xx * yy) if xx * yy else np.nan


def slope(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """By how much y rises where x rises by 1, in least squares: alike for verdicts and their chances."""
    (xx, xy), _ = np.cov(x, y, aweights=w)
    return xy / xx if xx else np.nan


def bootstrap(figure: Callable, prompt: np.ndarray, draws: int = 500, seed: int = 0) -> tuple[float, float]:
    """(figure(w) of the rows as they are, its standard error): the spread over samples of whole prompts; nan
    for less than two."""
    each, rng = np.unique(prompt, return_inverse=True)[1], np.random.default_rng(seed)
    n = each.max() + 1  # prompts
    if n < 2:
        return float(figure(np.ones(len(each)))), np.nan
    drawn = [np.bincount(rng.integers(n, size=n), minlength=n)[each] for _ in range(draws)]
    return float(figure(np.ones(len(each)))), float(np.std([figure(w) for w in drawn], ddof=1))
