"""Runs as train.py left them, or is leaving them: record, log, and held-out rows with what is known of them.

    one = read_run("runs/ab", [])         one.events so far; one.rows by id, None before the run is finished
    judges_of([one], ["probs.csv"], []) name -> rows with p, from eval.parquet, ensembles and infer.py --probs

Texts, languages and lengths come from the data files that the record names, by id, if those are still the
same files. What is not known is said in one.note. What it does not do: compute figures, or change a run.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from minarena import metrics
from minarena.batching import steps_per_epoch
from minarena.data import TEXTS
from minarena.files.base import check_folder, load_tokenizer
from minarena.files.durable import file_record, read_record
from minarena.files.pairs import as_typed, read_frames, read_pairs
from minarena.files.repair import repaired
from minarena.files.resume import read_log
from minarena.runtime.console import first_line
from minarena.text import encode
from minarena.tiny import byte_tokenizer, demo_pairs

OWN = {"ab": "p_a_ab", "ba": "p_a_ba", "both": "p_a"}  # P(a wins) in the order that a run was trained in


@dataclass
class Run:
    """events: of log.jsonl so far. rows: eval.parquet by id, with what is known of each row (texts, language,
    cut) and group, which rows of one prompt share; None before the run's end. note: what is not known."""

    name: str
    record: dict
    events: list[dict]
    rows: pd.DataFrame | None = None
    note: str = ""


def read_run(folder: str, more: list[pd.DataFrame]) -> Run:
    """A run's folder as it is now; ValueError where it is none. more: the rows of --data by id."""
    record, path = Path(folder, "train_config.json"), Path(folder, "eval.parquet")
    if not record.exists():
        raise ValueError(f"{folder}: no run of train.py: there is no train_config.json")
    try:
        one = Run(
            folder,
            read_record(record),
            [event for event in read_log(folder) if event.keys() >= {"event", "step"}],
        )
        one.rows = pd.read_parquet(path).set_index("id") if path.exists() else None
        about(one)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not what train.py writes: {first_line(error)}") from error
    if one.rows is not None:
        know_rows_(one, more)
    return one


def about(one: Run) -> str:
    """What was trained, and how far; the runs' list at the top."""
    record, done = one.record, sum(event["event"] == "step" for event in one.events)
    planned = record["epochs"] * steps_per_epoch(record["rows"], record["batch_size"])
    state = f"{done:,} of {planned:,} steps" + ", unfinished" * (one.rows is None)
    what = f"{record['model']} in order {record['order']}, {record['rows']:,} rows, lr {record['lr']:g}"
    return f"{what}; {state}. {one.note}"


def know_rows_(one: Run, more: list[pd.DataFrame]) -> None:
    """Join to a run's held-out rows, in place and by id, what the data files know of them."""
    ids, record = one.rows.index, one.record
    known, files = list(more), [file["file"] for file in record["data_files"]]
    try:
        if files and record["data_files"] != [file_record(path) for path in files]:
            raise ValueError(f"{' or '.join(files)} was changed since the training")
        table = (
            read_pairs(files, **as_typed(record))
            if files
            else demo_pairs(len(ids), record["seed"], held_out=True)
        )
        known.append(table.set_index("id"))
    except (OSError, ValueError) as error:
        one.note += f"{first_line(error)}. "
    known = pd.concat([*known, pd.DataFrame(columns=["label", "language", *TEXTS])])
    known = known[~known.index.duplicated()].reindex(ids)
    same = np.isclose(known["label"].astype(float), one.rows["label"])  # else another row has that id
    one.rows = one.rows.join(known.loc[same, ["language", *TEXTS]]).assign(cut=None)
    there = one.rows["prompt"].notna()
    one.rows["group"] = one.rows["prompt"].where(there, ids.to_series())
    if not there.all():
        one.note += f"The texts of {(~there).sum():,} held-out rows are not known (--data FILE). "
    try:
        if record["model"] == "tiny":
            tokenizer = byte_tokenizer()
        else:
            check_folder(record["model"])
            tokenizer = load_tokenizer(record["model"])
        rows = encode(tokenizer, repaired(one.rows[there]), record["max_length"] + 1)  # one more than fits
        one.rows.loc[there, "cut"] = [len(row) > record["max_length"] for row in rows]
    except ValueError as error:
        one.note += f"Which rows were cut is not known: {first_line(error)}."


def judges_of(done: list[Run], probs: list[str], more: list[pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """name -> judged rows. The last is what the page is about: --probs, the ensemble, or the only run."""
    judges, own = {}, [one.rows[OWN[one.record["order"]]] for one in done]
    for one in done:
        for order in sorted(OWN, key=one.record["order"].__eq__):  # the one that it was trained in is last
            judges[judge_name(one, order)] = judged(one.rows, one.rows[OWN[order]])
    if len(done) > 1 and all(p.index.equals(own[0].index) for p in own):
        judges["ensemble"] = judged(done[0].rows, sum(own) / len(own))
    known = [table.assign(group=table["prompt"]) for table in more] + [one.rows for one in done]
    for path in probs:
        p = pd.concat([frame for frame, _ in read_frames(path)])
        if not {"id", "winner_model_a"} <= set(p.columns) or not known:
            needs = "needs columns id, winner_model_a, and --data FILE or a finished run"
            raise ValueError(f"--probs {path}: {needs}")
        rows = pd.concat(known).dropna(subset="label")
        rows = rows[~rows.index.duplicated()]
        p = pd.to_numeric(p.set_index(p["id"].astype(str))["winner_model_a"], errors="coerce")
        p = p[~p.index.duplicated()].reindex(rows.index)
        if not p.dropna().between(0, 1).any():
            raise ValueError(f"--probs {path}: no probabilities of rows with a known label: give --data FILE")
        judges[Path(path).name] = judged(rows, p)[p.between(0, 1)]
    return judges


def judge_name(one: Run, order: str) -> str:
    return f"{one.name} in " + ("both orders" if order == "both" else f"order {order}")


def judged(rows: pd.DataFrame, p: pd.Series) -> pd.DataFrame:
    """With p, P(a wins), and how good it is: right (1, 0, nan where the label is one half), loss in nats."""
    label, right = rows["label"], pd.Series(np.nan, rows.index)
    right[label != 0.5] = metrics.is_correct(label, p)
    return rows.assign(p=p, right=right, loss=metrics.cross_entropy(label, p))
