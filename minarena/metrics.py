"""How good probabilities are: figures as plain functions of labels and predictions, with standard errors.

label: P(a wins), 1, 0 or between (a soft label; exactly one half is a tie); p: predicted P(a wins); prompt:
what each row is about, compared for equality. All (rows,), the first two float.

Rows that share a prompt are not independent: one hard prompt is several mistakes. So a standard error is over
prompts. (reliability.py has what is asked of a judge beyond that.)
"""

import numpy as np


def is_correct(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """1 where p is on the label's side of one half, else 0, for the rows whose label is not one half."""
    decided = label != 0.5
    return ((p > 0.5) == (label > 0.5))[decided].astype(float)


def cross_entropy(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """-label ln p - (1 - label) ln(1 - p) of each row, in nats; no skill is ln 2 = 0.6931."""
    p = np.clip(p, 1e-15, 1 - 1e-15)  # a certain mistake costs 34.5, not infinity
    return -label * np.log(p) - (1 - label) * np.log(1 - p)


def standard_error(values: np.ndarray, prompt: np.ndarray) -> float:
    """Of the mean of `values`, prompts taken as independent, rows of one prompt not; nan for less than two.
    Cameron & Miller 2015, https://doi.org/10.3368/jhr.50.2.317"""
    prompts, each = np.unique(prompt, return_inverse=True)
    n = len(prompts)
    off = np.bincount(each, values - values.mean()) if n > 1 else np.nan
    return float(np.sqrt(n / max(n - 1, 1) * np.sum(off**2)) / max(len(values), 1))


def scores(label: np.ndarray, p: np.ndarray, prompt: np.ndarray | None = None) -> dict[str, float | None]:
    """accuracy and log_loss with standard errors (`_se`); None where no row counts (JSON has no NaN). Without
    prompt, rows are taken as independent."""
    prompt = np.arange(len(p)) if prompt is None else prompt
    right, loss = (is_correct(label, p), prompt[label != 0.5]), (cross_entropy(label, p), prompt)
    result = {}
    for name, (values, groups) in {"accuracy": right, "log_loss": loss}.items():
        error = standard_error(values, groups)
        result[name] = float(values.mean()) if len(values) else None
        result[name + "_se"] = None if np.isnan(error) else error
    return result
