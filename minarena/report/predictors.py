"""What predicts held-out labels: each run in each order, their ensemble, and files of infer.py --probs.

    predictors = predictors_of(runs, ["probs.csv"], tables)
    predictors[0].rows          by id: label, p = P(a wins), right, loss, and what runs.py knows of the row
    best_of(predictors)         the one that the page is about

What it does not do: load a model, or draw.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from minarena import metrics
from minarena.data import EVAL_COLUMNS
from minarena.files.pairs import read_frames
from minarena.report.runs import PEOPLE, Run

OTHER = {"ab": "ba", "ba": "ab"}


@dataclass(frozen=True)
class Predictor:
    """rows, by id: label, p, right (1, 0, nan for a label of one half), loss (nats), group, texts, and where
    both orders are known p_ab and p_ba. run: the name of the run, if it is one. trained: whether the order is
    the one that the run was trained in."""

    name: str
    rows: pd.DataFrame
    run: str = ""
    trained: bool = False

    @property
    def labeller(self) -> str:
        """Who labelled the rows, as the subject or object of a sentence in the plural."""
        names = self.rows["labeller"].unique()
        return names[0] if len(names) == 1 else "the labels"


def predictors_of(runs: list[Run], probs: list[str], tables: list[pd.DataFrame]) -> list[Predictor]:
    """The finished runs in each order, their ensemble, and the --probs files. tables: the rows of --data."""
    found = [in_order(run, order) for run in runs for order in run.orders]
    if len(runs) > 1 and all(run.rows.index.equals(runs[0].rows.index) for run in runs):
        found.append(ensemble_of(runs))
    known = [table.assign(group=table["prompt"], labeller=PEOPLE) for table in tables]
    known += [run.rows for run in runs]
    same_name = Counter(Path(path).name for path in probs)
    for path in probs:
        name = Path(path).name if same_name[Path(path).name] == 1 else path
        found.append(Predictor(name, read_probs(path, known)))
    return found


def ensemble_of(runs: list[Run]) -> Predictor:
    """The mean of several runs, each in the order that it is judged by. p_ab and p_ba: the mean of the runs'
    single orders; where the pair is given as (b, a), every run sees the other order."""
    trained = [run.orders[-1] for run in runs]
    p = mean_of([run.rows[EVAL_COLUMNS[order]] for run, order in zip(runs, trained, strict=True)])
    single = ["ba" if order == "ba" else "ab" for order in trained]
    p_ab = mean_of([run.rows[EVAL_COLUMNS[order]] for run, order in zip(runs, single, strict=True)])
    p_ba = mean_of([run.rows[EVAL_COLUMNS[OTHER[order]]] for run, order in zip(runs, single, strict=True)])
    return Predictor("ensemble", judged(runs[0].rows.assign(p_ab=p_ab, p_ba=p_ba), p))


def mean_of(columns: list[pd.Series]) -> pd.Series:
    return sum(columns) / len(columns)


def in_order(run: Run, order: str) -> Predictor:
    shown = "both orders" if order == "mean" else f"order {order}"
    rows = run.rows.assign(p_ab=run.rows[EVAL_COLUMNS["ab"]], p_ba=run.rows[EVAL_COLUMNS["ba"]])
    trained = order == run.orders[-1]
    return Predictor(f"{run.name} in {shown}", judged(rows, rows[EVAL_COLUMNS[order]]), run.name, trained)


def read_probs(path: str, known: list[pd.DataFrame]) -> pd.DataFrame:
    """The rows of a --probs file whose label is known, judged; ValueError where there are none."""
    frame = pd.concat([frame for frame, _ in read_frames(path)])
    if not {"id", "winner_model_a"} <= set(frame.columns) or not known:
        needs = "needs columns id, winner_model_a, and --data FILE or a finished run"
        raise ValueError(f"--probs {path}: {needs}")
    # "cut" only a finished run has, "language" only a file that names it: where no table does, all is unknown
    rows = pd.concat([*known, pd.DataFrame(columns=["cut", "language"])]).dropna(subset="label")
    rows = rows[~rows.index.duplicated()]
    p = pd.to_numeric(frame.set_index(frame["id"].astype(str))["winner_model_a"], errors="coerce")
    p = p[~p.index.duplicated()].reindex(rows.index)
    if not p.dropna().between(0, 1).any():
        raise ValueError(f"--probs {path}: no probabilities of rows with a known label: give --data FILE")
    return judged(rows, p)[p.between(0, 1)]


def judged(rows: pd.DataFrame, p: pd.Series) -> pd.DataFrame:
    """The rows with p, P(a wins), and how good p is: right and loss."""
    label, right = rows["label"], pd.Series(np.nan, rows.index)
    right[label != 0.5] = metrics.is_correct(label, p)
    return rows.assign(p=p, right=right, loss=metrics.cross_entropy(label, p))


def best_of(predictors: list[Predictor]) -> Predictor:
    """The predictor with the lowest log loss, of rivals_of(predictors)."""
    return min(rivals_of(predictors), key=lambda each: each.rows["loss"].mean())


def rivals_of(predictors: list[Predictor]) -> list[Predictor]:
    """Those that judge the same rows as the last one: log losses of other rows cannot be compared.

    The last one is what the reader asked for beside the runs, a --probs file, or else the ensemble, or else
    the last run.
    """
    ids = set(predictors[-1].rows.index)
    return [each for each in predictors if set(each.rows.index) == ids]
