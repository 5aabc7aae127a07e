"""Read runs that train.py wrote or is writing: record, log, and held-out rows with what the data say of them.

    run = read_run("runs/ab", [])      run.events so far; run.rows by id, None before the run is finished

Texts, languages and other groups come from the data files that the record names, joined by id, if those files
are unchanged. What is not known is said in run.note. What it does not do: compute figures, or change a run.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from minarena.batching import steps_per_epoch
from minarena.data import EVAL_COLUMNS, GROUPS, JUDGED_BY, TEXTS
from minarena.files.base import check_folder
from minarena.files.durable import file_record, read_record
from minarena.files.pairs import as_typed, read_pairs
from minarena.files.repair import repaired
from minarena.files.resume import read_log
from minarena.files.tokenizer import load_tokenizer
from minarena.runtime.console import first_line
from minarena.text import encode
from minarena.tiny import byte_tokenizer, demo_pairs

PEOPLE, GENERATED = "people", "the generated labels"  # who said which answer is better


@dataclass
class Run:
    """What is known of a run.

    events: of log.jsonl so far. note: sentences on what is not known. orders: the keys of EVAL_COLUMNS; the
    run is judged by the last one. rows: eval.parquet by id, None before the run's end, with the known
    texts, language and GROUPS, cut (whether the row is longer than --max-length), group (the same for rows of
    one prompt) and labeller.
    """

    name: str
    record: dict
    events: list[dict]
    rows: pd.DataFrame | None = None
    note: str = ""
    orders: list[str] = field(default_factory=list)

    @property
    def labeller(self) -> str:
        return PEOPLE if self.record["data_files"] else GENERATED


def read_run(folder: str, more: list[pd.DataFrame]) -> Run:
    """A run's folder as it is now; ValueError where it is none. more: the rows of --data, by id."""
    record, path = Path(folder, "train_config.json"), Path(folder, "eval.parquet")
    if not record.exists():
        raise ValueError(f"{folder}: no run of train.py: there is no train_config.json")
    try:
        events = [event for event in read_log(folder) if event.keys() >= {"event", "step"}]
        run = Run(folder, read_record(record), events)
        trained = JUDGED_BY[run.record["order"]]
        run.orders = [order for order in EVAL_COLUMNS if order != trained] + [trained]
        run.rows = pd.read_parquet(path).set_index("id") if path.exists() else None
        about(run)  # KeyError where the record lacks what the page needs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not what train.py writes: {first_line(error)}") from error
    if run.rows is not None:
        join_data_(run, more)
        note_cut_rows_(run)
    return run


def about(run: Run) -> str:
    """What was trained, and how far."""
    record, done = run.record, sum(event["event"] == "step" for event in run.events)
    planned = record["epochs"] * steps_per_epoch(record["rows"], record["batch_size"])
    state = f"{done:,} of {planned:,} steps" + (", unfinished" if run.rows is None else "")
    what = f"{record['model']} in order {record['order']}, {record['rows']:,} rows, lr {record['lr']:g}"
    return f"{what}; {state}."


def join_data_(run: Run, more: list[pd.DataFrame]) -> None:
    """Join to a run's held-out rows, in place and by id, what the data files say of them."""
    ids, record = run.rows.index, run.record
    tables, files = list(more), [file["file"] for file in record["data_files"]]
    try:
        if files and record["data_files"] != [file_record(path) for path in files]:
            raise ValueError(f"{' or '.join(files)} was changed since the training")
        demo = {"rows": len(ids), "seed": record["seed"], "held_out": True}
        table = read_pairs(files, **as_typed(record)) if files else demo_pairs(**demo)
        tables.append(table.set_index("id"))
    except (OSError, ValueError) as error:
        run.note += f" {first_line(error)}."
    known = pd.concat([*tables, pd.DataFrame(columns=["label", "language", *TEXTS])])
    known = known[~known.index.duplicated()].reindex(ids)
    same = np.isclose(known["label"].astype(float), run.rows["label"])  # else another row has that id
    columns = [column for column in ("language", *GROUPS, *TEXTS) if column in known]
    run.rows = run.rows.join(known.loc[same, columns]).assign(labeller=run.labeller)
    there = run.rows["prompt"].notna()
    run.rows["group"] = run.rows["prompt"].where(there, ids.to_series())
    if not there.all():
        run.note += f" The texts of {(~there).sum():,} held-out rows are not known (--data FILE)."


def note_cut_rows_(run: Run) -> None:
    """Mark, in place, the rows longer than --max-length; needs their texts and the base's tokenizer."""
    record, there = run.record, run.rows["prompt"].notna()
    run.rows["cut"] = None
    try:
        if record["model"] == "tiny":
            tokenizer = byte_tokenizer()
        else:
            check_folder(record["model"])
            tokenizer = load_tokenizer(record["model"])
        rows = encode(tokenizer, repaired(run.rows[there]), record["max_length"] + 1)  # one more than fits
        run.rows.loc[there, "cut"] = [len(row) > record["max_length"] for row in rows]
    except ValueError as error:
        run.note += f" Which rows were cut is not known: {first_line(error)}."
