"""The training rows, the batch of an optimiser step, and the held-out rows: token ids with their labels.

    rows = encode_rows(tokenizer, pairs, config)          every row as --order shows it
    batch = rows.of_step(step, batch_size=16, seed=0)     the same rows on every rank
    batch.share(world)                                    what this rank computes of them
    held_out = encode_both_orders(tokenizer, table, config)

A row is shown as it stands in the table (order ab), mirrored (ba, --swap), or in both ways in the same step
(both).
Texts are not kept: those of 600,000 rows are gigabytes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from minarena.batching import balance_by_tokens, rows_of_step
from minarena.config import TrainConfig
from minarena.data import row_weights, swapped
from minarena.dist import World
from minarena.text import encode


@dataclass
class Batch:
    """Rows of one optimiser step, or one rank's share; total_weight and names are of the whole step."""

    rows: list[np.ndarray]  # token ids of each row
    p_first: np.ndarray  # (rows,) label: P(the answer shown first wins)
    weights: np.ndarray  # (rows,) weight of each row in the loss
    total_weight: float  # of the whole step, over all ranks
    names: list[str]  # the table's id of each of the step's pairs, each once

    def share(self, world: World) -> "Batch":
        """This rank's rows: about as many tokens as any other rank's, perhaps none."""
        mine = balance_by_tokens([len(row) for row in self.rows], world.size)[world.rank]
        rows = [self.rows[i] for i in mine]
        return Batch(rows, self.p_first[mine], self.weights[mine], self.total_weight, self.names)


@dataclass
class Rows:
    """All training rows. Pair i of the table is row i; with order both its mirror image is row pairs + i."""

    rows: list[np.ndarray]  # token ids
    p_first: np.ndarray  # (rows,)
    weights: np.ndarray  # (rows,)
    names: np.ndarray  # (pairs,) the table's ids

    @property
    def pairs(self) -> int:
        return len(self.names)

    def of_step(self, step: int, batch_size: int, seed: int) -> Batch:
        """The rows of optimiser step `step` (from 0): `batch_size` pairs, in each order shown."""
        drawn = rows_of_step(step, self.pairs, batch_size, seed)
        chosen = np.concatenate([drawn + start for start in range(0, len(self.rows), self.pairs)])
        weights = self.weights[chosen]
        rows = [self.rows[i] for i in chosen]
        return Batch(rows, self.p_first[chosen], weights, weights.sum(), self.names[drawn].tolist())


def encode_rows(tokenizer, pairs: pd.DataFrame, config: TrainConfig) -> Rows:
    """Tokenise the training table (data.py; repaired texts, labels known) as --order shows it."""
    views = {"ab": [pairs], "ba": [swapped(pairs)], "both": [pairs, swapped(pairs)]}[config.order]
    return Rows(
        rows=[row for view in views for row in encode(tokenizer, view, config.max_length, config.truncation)],
        p_first=np.concatenate([view["label"].to_numpy() for view in views]),
        weights=np.concatenate([row_weights(view, config.pseudo_weight) for view in views]),
        names=pairs["id"].to_numpy(),
    )


@dataclass
class HeldOut:
    """The held-out rows: their table without answers (id, label, prompt), and token ids in both orders."""

    table: pd.DataFrame
    rows: dict[str, list[np.ndarray]]  # order (ab, ba) -> token ids of each row


def encode_both_orders(tokenizer, held_out: pd.DataFrame, config: TrainConfig) -> HeldOut:
    """Tokenise the held-out table in both orders; labels stay the table's, P(response_a wins)."""
    views = {"ab": held_out, "ba": swapped(held_out)}
    rows = {o: encode(tokenizer, view, config.max_length, config.truncation) for o, view in views.items()}
    return HeldOut(held_out[["id", "label", "prompt"]], rows)
