"""Probabilities for a table of pairs from any number of adapters over one base, joined by id.

    base = load_predictor(found, table)                        found: adapters.find_ensemble_(config, world)
    p_a = predict_pairs(base, table, found.adapters, tta="all")

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

from minarena.config import UNRECORDED
from minarena.data import swapped
from minarena.dist import SINGLE_PROCESS, World
from minarena.ensemble.adapters import Ensemble, TrainedAdapter
from minarena.ensemble.parts import PART, store_part, stored_part
from minarena.fast.path import take_fast_path_
from minarena.files.adapter import load_adapter_
from minarena.files.base import load_base
from minarena.lora import PROJECTIONS
from minarena.model import DTYPES, PreferenceModel
from minarena.runtime.console import printable, say
from minarena.runtime.memory import predict_on_all_ranks
from minarena.runtime.warn import say_encoding
from minarena.step import Compute, make_compute
from minarena.text import encode, pad_id


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
    aloud: bool = True  # whether a pass over the rows has a bar and a line
    kept: dict | None = None  # adapters that stay in memory: folder -> modules by name; None: none stays


def load_predictor(found: Ensemble, rows: pd.DataFrame, **more) -> Predictor:
    """The base, on the fast path where that runs. rows: with repaired texts, by which load_base decides on
    int8. more: the last fields."""
    config, device = found.config, found.device
    model, tokenizer = load_base(config, device, rows)
    for adapter in found.adapters:
        trained = adapter.record.get("int8_columns")
        if config.matmul == "int8" and trained != model.int8_columns:
            say(f"{adapter.folder}: trained with other outlier columns ({trained or 'none'})")
    dtype = DTYPES[config.dtype]
    if config.fast == "on" and device.type == "cuda":
        take_fast_path_(model, dtype)
    compute = make_compute(config.token_budget, device, dtype, pad_id(tokenizer), training=False)
    return Predictor(model, tokenizer, compute, config.max_length, config.truncation, **more)


def say_cut(base: Predictor, table: pd.DataFrame, adapters: list[TrainedAdapter], tta: str) -> None:
    """What of the texts the model will not see, in the orders that they are shown in."""
    orders = {order for _, order, _ in passes(adapters, tta, None)}
    say_encoding(base.tokenizer, table, base.max_length, base.truncation, orders)


def passes(
    adapters: list[TrainedAdapter], tta: str, weights: list[float] | None
) -> list[tuple[int, str, float]]:
    """(adapter number, order, weight) of every pass over the rows.

    The passes of an adapter divide its weight equally, and all weights add up to 1. tta: also ab or ba, the
    one order that every adapter sees.
    """
    weights = np.array(weights or [1.0] * len(adapters)) / sum(weights or [len(adapters)])
    plan = []
    for i, adapter in enumerate(adapters):
        order = tta if tta in ("ab", "ba") else adapter.order
        orders = ["ab", "ba"] if tta == "all" or order == "both" else [order]
        plan += [(i, order, weights[i] / len(orders)) for order in orders]
    return plan


def predict_pairs(
    base: Predictor,
    table: pd.DataFrame,
    adapters: list[TrainedAdapter],
    tta: str = "none",
    fraction: float = 0.4,
    weights: list[float] | None = None,
    known: dict[tuple[int, str], pd.Series] | None = None,
) -> pd.Series:
    """P(the table's response_a wins), one value for each id. Changes the base's adapter.

    table: with repaired texts and unique ids. tta: none, all, or uncertain: all for the `fraction` of the
    rows whose p is nearest 0.5, none for the others (as the 12th-place solution did, see truncation.py).
    weights: one for each adapter; None: equal. known: (adapter number, order) -> a pass over all rows of this
    table: those of an earlier call are not made again, new ones are added.
    """
    known = {} if known is None else known
    p_a = average(base, table, adapters, passes(adapters, tta, weights), known)
    if tta == "uncertain":
        nearest = (p_a - 0.5).abs().nsmallest(round(fraction * len(p_a))).index
        rows = table[table["id"].isin(nearest)]  # none, where the fraction of few rows rounds to 0
        if len(rows):
            both = average(base, rows, adapters, passes(adapters, "all", weights), dict(known))
            p_a.loc[both.index] = both
    return p_a


def average(
    base: Predictor,
    table: pd.DataFrame,
    adapters: list[TrainedAdapter],
    plan: list[tuple[int, str, float]],
    known: dict[tuple[int, str], pd.Series],
) -> pd.Series:
    """The weighted mean of the passes in `plan`, by id. Passes in `known` are not made again; new ones go
    there."""
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
                put_on_(base, adapter.folder)
                loaded = True
            ids = encode(base.tokenizer, rows, base.max_length, base.truncation)
            label = f"{printable(adapter.folder)} {order}" if base.aloud else None  # of a progress bar, too
            if label and len(view) > PART:
                label += f", rows from {start:,}"
            names = rows["id"].tolist()
            p = predict_on_all_ranks(base.model, ids, names, base.compute, base.world, label)
            if label:
                say(f"{label}: {len(ids):,} rows done")
            store_part(base.parts, part, rows["id"], p)
        p_first.append(p)
    p = np.concatenate(p_first)
    return pd.Series(p if order == "ab" else 1 - p, index=pd.Index(view["id"], name="id"))


def put_on_(base: Predictor, folder: str) -> None:
    """Let the adapter in `folder` judge: read it, or take its modules where they are kept."""
    if base.kept is None or folder not in base.kept:
        load_adapter_(base.model, folder)
    if base.kept is not None:
        own = (*PROJECTIONS, "score")
        modules = {name: each for name, each in base.model.named_modules() if name.rpartition(".")[2] in own}
        for name, module in base.kept.setdefault(folder, modules).items():
            base.model.set_submodule(name, module)
