"""How far the length of the answers alone goes: the floor that a model must beat.

    python benchmarks/baselines.py --data train.parquet --eval-data valid.parquet

"The longer answer wins" has nothing to fit and gives no probabilities, so it has an accuracy and no log loss;
where both are equally long it is given half a point. The second floor is a logistic regression (scikit-learn,
its defaults) on two numbers, the difference of the lengths in characters (in thousands) and of their
logarithms, fitted on --data. Texts are counted as train.py repairs them; rows that are ties are left out. The
last line on stdout is one JSON object.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pandas as pd

from benchmarks.random_base import print_result
from minarena.files.pairs import read_pairs
from minarena.files.repair import repaired
from minarena.metrics import scores, standard_error
from minarena.report import reliability
from minarena.runtime.console import run_command


def main(argv: list[str] | None = None) -> dict:
    options = parse(argv)
    held_out = read_labelled([options.eval_data])
    result = {"rows": len(held_out), "longer_wins": longer_wins(held_out)}
    if options.data:
        train = read_labelled(options.data)
        result |= {"fitted_rows": len(train), "length_regression": length_regression(train, held_out)}
    print_result(vars(options), result)
    return result


def read_labelled(paths: list[str]) -> pd.DataFrame:
    """Repaired rows that have a winner."""
    table = read_pairs(paths)
    if table["label"].isna().any():
        raise ValueError(f"{', '.join(paths)}: rows without a winner: the floors need the column winner")
    return repaired(table[table["label"] != 0.5])


def lengths(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Characters of each row's response_a and response_b, both (rows,) float."""
    a, b = (table[column].str.len().to_numpy(dtype=float) for column in ("response_a", "response_b"))
    return a, b


def longer_wins(table: pd.DataFrame) -> dict[str, float]:
    """Accuracy of "the longer answer wins", with its standard error."""
    a, b = lengths(table)
    right = reliability.longer_wins(a, b, table["label"].to_numpy())
    return {
        "accuracy": float(right.mean()),
        "accuracy_se": standard_error(right, table["prompt"].to_numpy()),
        "equally_long": int((a == b).sum()),
    }


def length_regression(train: pd.DataFrame, held_out: pd.DataFrame) -> dict[str, float]:
    """metrics.scores of a logistic regression on the two differences of length."""
    from sklearn.linear_model import LogisticRegression

    def features(table: pd.DataFrame) -> np.ndarray:  # (rows, 2)
        a, b = lengths(table)
        return np.stack([(a - b) / 1000, np.log1p(a) - np.log1p(b)], axis=1)

    fitted = LogisticRegression().fit(features(train), train["label"].to_numpy() > 0.5)
    return scores(held_out["label"].to_numpy(), fitted.predict_proba(features(held_out))[:, 1])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", help="training files, for the regression")
    parser.add_argument("--eval-data", required=True, help="file to be scored on")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
