"""The table of pairs, and the rules on it: swap, held-out fold, weights.

A table has the columns id (str), prompt, response_a, response_b (str), label (float: P(response_a wins), NaN
where the file has no winner) and, where a file has them, language, the columns of GROUPS, pseudo (bool: the
label is a pair of probabilities) and chosen (1 or 0: response_a or response_b is the one that the file calls
chosen). Its index is the row's place among all rows read, used or not; several answers to a prompt share
their row's place.

What it does not do: read files (files/pairs.py), repair texts (files/repair.py), or know tokens.
"""

import pandas as pd

TEXTS = ("prompt", "response_a", "response_b")
GROUPS = ("subset", "category", "domain", "source")  # what benchmarks of judges call the kinds of their rows
# The order a run was trained in -> which of its figures judge it: ab, ba, or the mean of both
JUDGED_BY = {"ab": "ab", "ba": "ba", "both": "mean"}
EVAL_COLUMNS = {"ab": "p_a_ab", "ba": "p_a_ba", "mean": "p_a"}  # these figures -> eval.parquet's P(a wins)


def swapped(table: pd.DataFrame) -> pd.DataFrame:
    """The mirrored table: each response in the other's place, P(a wins) turned round."""
    turned = {name: 1 - table[name] for name in ("label", "chosen") if name in table}
    return table.assign(response_a=table["response_b"], response_b=table["response_a"], **turned)


def split(
    table: pd.DataFrame, n_splits: int, fold: int, by: str = "row"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(train, held-out): a row is held out when its index modulo n_splits equals fold, the recipe's rule.

    by: "prompt" holds out all rows of a prompt by the index of its first row that is used.

    The index counts the rows of the file that are not used, too: --ties and --limit move no row to another
    fold (by prompt they can move one whose first row they drop). Pseudo-labelled rows are never held out:
    what is measured is agreement with people. Those of a prompt that is held out whole are in neither part.
    """
    place = pd.Series(table.index)
    place = place.groupby(table["prompt"].to_numpy()).transform("first") if by == "prompt" else place
    fold_rows = (place % n_splits == fold).to_numpy()
    held_out = fold_rows & ~table["pseudo"].to_numpy() if "pseudo" in table else fold_rows
    train = ~(fold_rows if by == "prompt" else held_out)
    return table[train].reset_index(drop=True), table[held_out].reset_index(drop=True)


def output_ids(table: pd.DataFrame) -> pd.Series:
    """The ids as the files have them: integers where all are."""
    return pd.to_numeric(table["id"]) if table.attrs.get("integer_ids") else table["id"]


def row_weights(table: pd.DataFrame, pseudo_weight: float) -> list[float]:
    """Of each row in the loss: 1 where people judged, pseudo_weight where a model did."""
    pseudo = table["pseudo"] if "pseudo" in table else [False] * len(table)
    return [pseudo_weight if by_model else 1.0 for by_model in pseudo]
