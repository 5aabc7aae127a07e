"""Probabilities for a table of pairs from any number of adapters over one base, joined by id.

Each adapter sees a row in the order that it was trained in (two mirrored models: two passes, the seed's
notebook), or in both (--tta all: four passes, the other reading of the seed's text). The base is loaded once;
adapters change in place. Results are a Series with the id as its index, never positions: rows are sorted by
length on the way, and public code for this very task has written sorted predictions back to unsorted rows.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from minarena.data import swapped
from minarena.dist import SINGLE_PROCESS, World
from minarena.ensemble.parts import PART, store_part, stored_part
from minarena.files.adapter import load_adapter_
from minarena.files.durable import read_record
from minarena.runtime.console import say
from minarena.runtime.memory import predict_on_all_ranks
from minarena.step import predict_p_first
from minarena.text import encode, pad_id


@dataclass
class TrainedAdapter:
    """An adapter's folder, the order it was trained in (ab, ba, both), its train_config.json ({} if none)."""

    folder: str
    order: str
    record: dict


def find_adapter(argument: str) -> TrainedAdapter:
    """`DIR` or `DIR:ba` -> the adapter; an order in the argument wins over the recorded one.

    Raises ValueError where there is no finished adapter, or its record is none.
    """
    folder, _, order = argument.rpartition(":")
    if order not in ("ab", "ba", "both"):
        folder, order = argument, ""
    if not (Path(folder) / "adapter_config.json").is_file():
        unfinished = (Path(folder) / "train_config.json").exists()
        raise ValueError(
            f"--adapter {folder}: "
            + ("its training is unfinished" if unfinished else "no adapter_config.json there")
        )
    home = Path(folder).resolve()  # the record of a checkpoint stands in its run's folder
    path = (home.parent if home.name.startswith("checkpoint-") else home) / "train_config.json"
    record = read_record(path) if path.exists() else {}
    order = order or record.get("order", "ab")
    if order not in ("ab", "ba", "both"):
        raise ValueError(f"{path}: order {order!r}: must be ab, ba or both")
    model, length = record.get("model", "tiny"), record.get("max_length", 8)
    for name, fits in (
        ("model", isinstance(model, str) and model),
        ("max_length", isinstance(length, int) and length >= 8),
        ("truncation", record.get("truncation", "left") in ("left", "middle")),
        ("matmul", record.get("matmul", "dequant") in ("dequant", "llm-int8")),
    ):
        if not fits:
            raise ValueError(f"{path}: {name} {record[name]!r}: not what train.py writes")
    return TrainedAdapter(folder, order, record)


def passes(
    adapters: list[TrainedAdapter], tta: str, weights: list[float] | None
) -> list[tuple[int, str, float]]:
    """(adapter number, order, weight) of every pass over the rows.

    An adapter's weight is shared by its passes, and all weights add up to 1.
    """
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
    fraction: float = 0.4,
    weights: list[float] | None = None,
    max_length: int = 2200,
    truncation: str = "left",
    folder: Path | None = None,
    auto: bool = False,
    world: World = SINGLE_PROCESS,
    **computing,
) -> pd.Series:
    """P(the table's response_a wins), one value for each id. Changes the model's adapter.

    table: with repaired texts and unique ids.

    tta: "uncertain" is "all" for the `fraction` of the rows whose p is nearest 0.5, and "none" for the others
    (the 12th of the WSDM Cup, see snip.py).
    folder: where finished parts are kept (parts.py); None keeps none. auto: whether the token budget is
    lowered, for all that follows, where the GPU cannot hold it. world: each rank predicts its share of the
    rows, and has all of them in the end. computing: token_budget and dtype of
    predict_first.
    """
    done: dict[tuple[int, str], pd.Series] = {}
    how = {"max_length": max_length, "truncation": truncation, "folder": folder}
    how |= {"auto": auto, "world": world}

    def average(plan: list[tuple[int, str, float]], rows: pd.DataFrame) -> pd.Series:
        total = pd.Series(0.0, index=pd.Index(rows["id"], name="id"), name="p_a")
        for i, order, weight in plan:
            if (i, order) not in done:
                done[i, order] = one_pass(
                    model, tokenizer, rows, adapters[i], order, f"{i}-{order}", computing, **how
                )
            total += weight * done[i, order].loc[total.index]  # by id
        return total

    p_a = average(passes(adapters, tta, weights), table)
    if tta == "uncertain":
        nearest = (p_a - 0.5).abs().nsmallest(round(fraction * len(p_a))).index
        both = average(passes(adapters, "all", weights), table[table["id"].isin(nearest)])
        p_a.loc[both.index] = both
    return p_a


def one_pass(
    model: nn.Module,
    tokenizer,
    table: pd.DataFrame,
    adapter: TrainedAdapter,
    order: str,
    name: str,
    computing: dict,
    *,
    max_length: int,
    truncation: str,
    folder: Path | None,
    auto: bool,
    world: World,
) -> pd.Series:
    """P(response_a wins) by one adapter that is shown the rows in `order`, with the ids as its index.

    name: of the parts in `folder`. computing["token_budget"] is lowered in place (memory.py). For the other
    arguments see predict_pairs.
    """
    shown, p_first, loaded = table if order == "ab" else swapped(table), [], False
    for start in range(0, len(shown), PART):
        rows, this = shown.iloc[start : start + PART], f"{name}-{start // PART:05d}"
        p = world.all_gather(stored_part(folder, this, rows["id"]))[0]  # rank 0 alone has a folder
        if p is None:
            if not loaded:
                load_adapter_(model, adapter.folder)
                loaded = True
            ids = encode(tokenizer, rows, max_length, truncation)
            label = f"{adapter.folder} {order}" + f", rows from {start:,}" * (len(shown) > PART)
            predict = partial(predict_p_first, model, label=label, pad_id=pad_id(tokenizer), **computing)
            p = predict_on_all_ranks(predict, ids, rows["id"], computing, auto, world)
            say(f"{label}: {len(ids):,} rows done")
            store_part(folder, this, rows["id"], p)
        p_first.append(p)
    p = np.concatenate(p_first)
    return pd.Series(p if order == "ab" else 1 - p, index=pd.Index(shown["id"], name="id"))
