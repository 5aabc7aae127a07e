"""How good probabilities are: figures as plain functions of labels and predictions, with standard errors.

label: P(a wins), 1, 0 or between (a soft label; exactly one half is a tie); p: predicted P(a wins). Both
(rows,) float.
"""

import numpy as np


def correct(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """1 where p is on the label's side of one half, else 0, for the rows whose label is not one half."""
    decided = label != 0.5
    return ((p > 0.5) == (label > 0.5))[decided].astype(float)


def cross_entropy(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """-label ln p - (1 - label) ln(1 - p) of each row, in nats; no skill is ln 2 = 0.6931."""
    p = np.clip(p, 1e-15, 1 - 1e-15)  # a certain mistake costs 34.5, not infinity
    return -label * np.log(p) - (1 - label) * np.log(1 - p)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of `values`, rows taken as independent."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def scores(label: np.ndarray, p: np.ndarray) -> dict[str, float | None]:
    """accuracy and log_loss with standard errors (`_se`); None where no row counts (JSON has no NaN)."""
    result = {}
    for name, values in (("accuracy", correct(label, p)), ("log_loss", cross_entropy(label, p))):
        result[name] = float(values.mean()) if len(values) else None
        result[name + "_se"] = standard_error(values) if len(values) > 1 else None
    return result
