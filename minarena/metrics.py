"""How good probabilities are: accuracy and log loss of predictions, with standard errors over prompts.

label (rows,): P(a wins), 1, 0 or between (a soft label; exactly one half is a tie). p (rows,): the predicted
P(a wins). prompt (rows,): what each row is about; only compared for equality.

Rows that share a prompt are not independent: a hard prompt makes several mistakes at once. So prompts, not
rows, are counted for a standard error. What it does not do: calibration, position and length
(report/reliability.py).
"""

import numpy as np

ENOUGH = 20  # rows, prompts or steps: of fewer a standard error is no more than a guess


def is_correct(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """1 where p is on the label's side of one half, else 0; only for the rows whose label is not one half."""
    decided = label != 0.5
    return ((p > 0.5) == (label > 0.5))[decided].astype(float)


def cross_entropy(label: np.ndarray, p: np.ndarray) -> np.ndarray:
    """-label ln p - (1 - label) ln(1 - p) of each row, in nats; no skill is ln 2 = 0.6931."""
    p = np.clip(p, 1e-15, 1 - 1e-15)  # a certain mistake costs 34.5, not infinity
    return -label * np.log(p) - (1 - label) * np.log(1 - p)


def standard_error(values: np.ndarray, prompt: np.ndarray) -> float:
    """The standard error of the mean of `values`; nan for fewer than two prompts.

    Prompts count as independent, rows of one prompt do not: the cluster-robust error of Cameron & Miller
    2015, https://doi.org/10.3368/jhr.50.2.317, with their correction n / (n - 1) for n prompts.
    """
    prompts, each = np.unique(prompt, return_inverse=True)
    n = len(prompts)
    off = np.bincount(each, values - values.mean()) if n > 1 else np.nan
    return float(np.sqrt(n / max(n - 1, 1) * np.sum(off**2)) / max(len(values), 1))


def scores(label: np.ndarray, p: np.ndarray, prompt: np.ndarray | None = None) -> dict[str, float | None]:
    """accuracy and log_loss with their standard errors (`_se`); None where no row counts (JSON has no NaN).
    Without prompt, rows are taken as independent."""
    prompt = np.arange(len(p)) if prompt is None else prompt
    right, loss = (is_correct(label, p), prompt[label != 0.5]), (cross_entropy(label, p), prompt)
    result = {}
    for name, (values, groups) in {"accuracy": right, "log_loss": loss}.items():
        error = standard_error(values, groups)
        result[name] = float(values.mean()) if len(values) else None
        result[name + "_se"] = None if np.isnan(error) else error
    return result
