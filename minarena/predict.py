"""Probabilities for a table of pairs from any number of adapters over one base, joined by id.

Each adapter sees a row in the order that it was trained in (two mirrored models: two passes, the seed's
notebook), or in both (--tta all: four passes, the other reading of the seed's text). The base is loaded once;
adapters change in place. Results are a Series with the id as its index, never positions: rows are sorted by
length on the way, and public code for this very task has written sorted predictions back to unsorted rows.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from minarena.adapter import load_adapter_
from minarena.data import swapped
from minarena.step import predict_first
from minarena.text import encode, pad_id


@dataclass
class TrainedAdapter:
    """An adapter's folder, the order it was trained in (ab, ba or both) and its train_config.json ({} where
    none)."""

    folder: str
    order: str
    record: dict


def find_adapter(argument: str) -> TrainedAdapter:
    """`DIR` or `DIR:ba` -> the adapter; an order that is written in the argument wins over the recorded
    one."""
    folder, _, order = argument.rpartition(":")
    if order not in ("ab", "ba", "both"):
        folder, order = argument, ""
    if not (Path(folder) / "adapter_config.json").is_file():
        unfinished = (Path(folder) / "train_config.json").exists()
        raise ValueError(
            f"--adapter {folder}: "
            + ("its training is unfinished" if unfinished else "no adapter_config.json there")
        )
    path = Path(folder) / "train_config.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    return TrainedAdapter(folder, order or record.get("order", "ab"), record)


def passes(
    adapters: list[TrainedAdapter], tta: str, weights: list[float] | None
) -> list[tuple[int, str, float]]:
    """(adapter number, order, weight) of every pass over the rows; an adapter's weight is shared by its
    passes, and all weights add up to 1."""
    weights = np.array(weights or [1.0] * len(adapters)) / sum(weights or [len(adapters)])
    plan = []
    for i, adapter in enumerate(adapters):
        orders = ["ab", "ba"] if tta == "all" or adapter.order == "both" else [adapter.order]
        plan += [(i, order, weights[i] / len(orders)) for order in orders]
    return plan


def predict_pairs(
    model: nn.Module,
    tokenizer,
    table: pd.DataFrame,
    adapters: list[TrainedAdapter],
    *,
    tta: str = "none",
    weights: list[float] | None = None,
    max_length: int = 2200,
    **computing,
) -> pd.Series:
    """P(the table's response_a wins), one value for each id; `table` has repaired texts. Changes the model's
    adapter.

    computing: token_budget and dtype of step.predict_first.
    """
    plan = passes(adapters, tta, weights)
    shown = {"ab": table, "ba": swapped(table)}
    rows = {
        order: encode(tokenizer, shown[order], max_length)
        for order in sorted({order for _, order, _ in plan})
    }
    p_a = pd.Series(0.0, index=pd.Index(table["id"], name="id"), name="p_a")
    loaded = None
    for i, order, weight in plan:
        if loaded != i:
            load_adapter_(model, adapters[i].folder)
            loaded = i
        p = predict_first(
            model, rows[order], label=f"{adapters[i].folder} {order}", pad_id=pad_id(tokenizer), **computing
        )
        p_a += weight * pd.Series(
            p if order == "ab" else 1 - p, index=pd.Index(shown[order]["id"], name="id")
        )
    return p_a
