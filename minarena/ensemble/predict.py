"""Probabilities for a table of pairs from any number of adapters over one base, joined by id.

    base = Predictor(model, tokenizer, compute, max_length=2200)
    p_a = predict_pairs(base, table, [find_adapter("runs/ab"), find_adapter("runs/ba")])

Each adapter sees a row in the order that it was trained in (two mirrored models: two passes, as in the
recipe's notebook), or in both orders (--tta all: four passes, the other reading of the recipe's text). The
base is loaded once; adapters change in place. Results are a Series with the id as its index, never positions:
rows are sorted by length on the way, and public code for this very task has written sorted predictions back
to unsorted rows.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from minarena.config import UNRECORDED, TrainConfig, choices
from minarena.data import swapped
from minarena.dist import SINGLE_PROCESS, World
from minarena.ensemble.parts import PART, store_part, stored_part
from minarena.files.adapter import load_adapter_
from minarena.files.durable import read_record
from minarena.model import PreferenceModel
from minarena.runtime.console import say
from minarena.runtime.memory import predict_on_all_ranks
from minarena.step import Compute
from minarena.text import encode


@dataclass
class TrainedAdapter:
    """An adapter's folder, the order it was trained in (ab, ba, both), its train_config.json ({} if none)."""

    folder: str
    order: str
    record: dict


@dataclass
class Predictor:
    """One base that serves several adapters, one after the other, and how rows are shown to it."""

    model: PreferenceModel
    tokenizer: object
    compute: Compute
    max_length: int = UNRECORDED["max_length"]
    truncation: str = UNRECORDED["truncation"]
    parts: Path | None = None  # folder of finished parts (parts.py); None keeps none
    world: World = SINGLE_PROCESS  # each rank predicts its share of the rows and gets all results


def find_adapter(argument: str) -> TrainedAdapter:
    """`DIR` or `DIR:ba` -> the adapter; an order in the argument wins over the recorded one.

    Raises ValueError where there is no finished adapter, or where its record is damaged.
    """
    orders = choices(TrainConfig, "order")
    folder, _, order = argument.rpartition(":")
    if order not in orders:
        folder, order = argument, ""
    if not (Path(folder) / "adapter_config.json").is_file():
        unfinished = (Path(folder) / "train_config.json").exists()
        reason = "its training is unfinished" if unfinished else "no adapter_config.json there"
        raise ValueError(f"--adapter {folder}: {reason}")
    home = Path(folder).resolve()  # the record of a checkpoint stands in its run's folder
    path = (home.parent if home.name.startswith("checkpoint-") else home) / "train_config.json"
    record = read_record(path) if path.exists() else {}
    order = order or record.get("order", UNRECORDED["order"])
    if order not in orders:
        raise ValueError(f"{path}: order {order!r}: must be ab, ba or both")
    model, length = record.get("model", "tiny"), record.get("max_length", UNRECORDED["max_length"])
    fits = {
        "model": isinstance(model, str) and model,
        "max_length": isinstance(length, int) and length >= 8,
    }
    for name in ("truncation", "matmul"):
        fits[name] = record.get(name, UNRECORDED[name]) in choices(TrainConfig, name)
    for name, right in fits.items():
        if not right:
            raise ValueError(f"{path}: {name} {record[name]!r}: not what train.py writes")
    return TrainedAdapter(folder, order, record)


def passes(
    adapters: list[TrainedAdapter], tta: str, weights: list[float] | None
) -> list[tuple[int, str, float]]:
    """(adapter number, order, weight) of every pass over the rows.

    The passes of an adapter divide its weight equally, and all weights add up to 1.
    """
    weights = np.array(weights or [1.0] * len(adapters)) / sum(weights or [len(adapters)])
    plan = []
    for i, adapter in enumerate(adapters):
        orders = ["ab", "ba"] if tta == "all" or adapter.order == "both" else [adapter.order]
        plan += [(i, order, weights[i] / len(orders)) for order in orders]
    return plan


def predict_pairs(
    base: Predictor,
    table: pd.DataFrame,
    adapters: list[TrainedAdapter],
    tta: str = "none",
    fraction: float = 0.4,
    weights: list[float] | None = None,
) -> pd.Series:
    """P(the table's response_a wins), one value for each id. Changes the base's adapter.

    table: with repaired texts and unique ids. tta: none, all, or uncertain: all for the `fraction` of the
    rows whose p is nearest 0.5, none for the others (as the 12th-place solution did, see truncation.py).
    weights: one for each adapter; None: equal.
    """
    known: dict[tuple[int, str], pd.Series] = {}  # passes over all rows

    p_a = average(base, table, adapters, passes(adapters, tta, weights), known)
    if tta == "uncertain":
        nearest = (p_a - 0.5).abs().nsmallest(round(fraction * len(p_a))).index
        rows = table[table["id"].isin(nearest)]  # none, where the fraction of few rows rounds to 0
        if len(rows):
            both = average(base, rows, adapters, passes(adapters, "all", weights), known)
            p_a.loc[both.index] = both
    return p_a


def average(
    base: Predictor,
    table: pd.DataFrame,
    adapters: list[TrainedAdapter],
    plan: list[tuple[int, str, float]],
    known: dict[tuple[int, str], pd.Series],
) -> pd.Series:
    """The weighted mean of the passes in `plan`, by id; passes in `known` are taken from there, others
    added."""
    total = pd.Series(0.0, index=pd.Index(table["id"], name="id"), name="p_a")
    for i, order, weight in plan:
        if (i, order) not in known:
            known[i, order] = one_pass(base, table, adapters[i], order, f"{i}-{order}")
        total += weight * known[i, order].loc[total.index]  # by id
    return total


def one_pass(
    base: Predictor, table: pd.DataFrame, adapter: TrainedAdapter, order: str, name: str
) -> pd.Series:
    """P(response_a wins) by one adapter that is shown the rows in `order`, with the ids as its index.

    name: of the parts in base.parts.
    """
    view = table if order == "ab" else swapped(table)
    p_first, loaded = [], False
    for start in range(0, len(view), PART):
        rows, part = view.iloc[start : start + PART], f"{name}-{start // PART:05d}"
        p = base.world.all_gather(stored_part(base.parts, part, rows["id"]))[0]  # only rank 0 has a folder
        if p is None:
            if not loaded:
                load_adapter_(base.model, adapter.folder)
                loaded = True
            ids = encode(base.tokenizer, rows, base.max_length, base.truncation)
            label = f"{adapter.folder} {order}"
            if len(view) > PART:
                label += f", rows from {start:,}"
            names = rows["id"].tolist()
            p = predict_on_all_ranks(base.model, ids, names, base.compute, base.world, label)
            say(f"{label}: {len(ids):,} rows done")
            store_part(base.parts, part, rows["id"], p)
        p_first.append(p)
    p = np.concatenate(p_first)
    return pd.Series(p if order == "ab" else 1 - p, index=pd.Index(view["id"], name="id"))
