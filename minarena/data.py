"""The table of pairs, and the rules on it: swap, held-out fold, weights.

A table has the columns id (str), prompt, response_a, response_b (str), label (float: P(response_a wins), NaN
where the file has no winner) and, where a file has them, language and pseudo (bool: the label is another
model's pair of probabilities). Its index is the row's place among all rows read, used or not.

Files become this table in files.py, which is imported when one is read: the demo reads none. What it does
not do: repair text (text.py), or know tokens.
"""

import pandas as pd

TEXTS = ("prompt", "response_a", "response_b")


def swapped(table: pd.DataFrame) -> pd.DataFrame:
    """The mirrored table: each response in the other's place, P(a wins) turned round."""
    return table.assign(
        response_a=table["response_b"], response_b=table["response_a"], label=1 - table["label"]
    )


def split(table: pd.DataFrame, n_splits: int, fold: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(train, held-out): a row is held out when its index modulo n_splits equals fold, the seed's rule.

    The index counts the rows of the file that are not used, too: --ties and --limit move no row to another
    fold. Pseudo-labelled rows are never held out: what is measured is agreement with people.
    """
    held_out = table.index % n_splits == fold
    if "pseudo" in table:
        held_out &= ~table["pseudo"].to_numpy()
    return table[~held_out].reset_index(drop=True), table[held_out].reset_index(drop=True)


def row_weights(table: pd.DataFrame, pseudo_weight: float) -> list[float]:
    """Of each row in the loss: 1 where people judged, pseudo_weight where a model did."""
    pseudo = table["pseudo"] if "pseudo" in table else [False] * len(table)
    return [pseudo_weight if by_model else 1.0 for by_model in pseudo]
