"""Files of any known layout -> the table of pairs of data.py, some thousand rows at a time.

    read_pairs(["train.parquet", "shards/", "more.jsonl.gz"], ties="drop")      --data: sources.py

Only ROWS rows at a time are Python objects; the table keeps its texts in Arrow's buffers, so that a file of
any size is read in a few times its bytes. What the columns mean is known by layouts.py. Everything wrong with
a file is a ValueError that names file, row (the first is 1) and column, raised before any model is loaded.
"""

from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from minarena.data import TEXTS
from minarena.files.columns import NAMED
from minarena.files.formats import read_frames
from minarena.files.layouts import ROW, describe_reading, reading_of, table_of
from minarena.files.sources import data_files
from minarena.runtime.console import printable, say
from minarena.runtime.warn import say_one_sided

# Version of what is recorded where chosen / rejected files are read: 1 dealt their sides by the row's number
READING = 2


def read_pairs(
    paths: list[str],
    limit: int | None = None,
    ties: str | None = None,
    bar: Callable | None = None,
    columns: dict[str, str] | list[str] = (),
    winner_words: dict[str, str] | list[str] = (),
) -> pd.DataFrame:
    """Read and join files of any known layout, in the order given; ids are unique over all of them.

    limit: use the first `limit` rows. ties: for training, "drop" or "half" (label 0.5); rows that teach
    nothing (an empty text, equal answers) are then left out and reported by reason. None keeps every row,
    which is what inference needs. bar: tqdm. columns, winner_words: key -> name, or as typed (KEY=NAME).
    Raises ValueError for a file that cannot be used, naming file, row and column.
    """
    tables, rows, settings = [], 0, [by_key(columns), by_key(winner_words)]
    for path in (file for argument in paths for file in data_files(argument)):
        left = limit and limit - sum(map(len, tables))
        if left == 0:
            break
        try:
            table, read = read_file(path, ties, left, bar, *settings)
        except ValueError as error:  # one line, whatever the names of columns hold
            raise ValueError(printable(str(error))) from error
        tables.append(table.set_index(table["row"].to_numpy() - 1 + rows).assign(file=printable(str(path))))
        rows += read
    table = with_unique_ids(pd.concat(tables), training=ties is not None)
    table.attrs["integer_ids"] = bool(table["number"].all())
    if "chosen" in table:
        say("model_a is the chosen answer or the other, by a hash of the texts (infer.py --probs: p_chosen)")
    unknown = [name for name in ("chosen", *NAMED) if name in table and table[name].isna().all()]
    unknown += [] if table["pseudo"].any() else ["pseudo"]
    return table.drop(columns=["file", "row", "made_id", "number", *unknown])


def as_typed(options: dict) -> dict:
    """--columns and --winner-words of a config's or a record's options, as read_pairs takes them."""
    return {name: options.get(name, []) for name in ("columns", "winner_words")}


def by_key(given: dict[str, str] | list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in given) if isinstance(given, list) else dict(given)


def read_file(path: str, ties, limit, bar, columns: dict, words: dict) -> tuple[pd.DataFrame, int]:
    """(the table of a file's usable rows, number of rows read). Beside data.py's columns it has those of
    layouts.table_of. For the arguments see read_pairs."""
    frames, rows = read_frames(path), 0
    first = next(frames)
    head = first[0].head(1000)  # by these rows the reading is decided
    reading = reading_of(head, path, columns, words, training=ties is not None)
    look = {"desc": f"read {printable(Path(path).name)}", "unit": "B", "disable": None if bar else True}
    look["total"] = Path(path).stat().st_size if Path(path).is_file() else None  # of stdin nobody knows
    parts, unused = [], Counter()
    # a bar that is left open is drawn once more, after the line that says what is wrong
    with (bar or tqdm)(unit_scale=True, **look) as progress:
        for frame, position in chain([first], frames):
            numbers = range(rows + 1, rows + len(frame) + 1)
            frame = frame.reindex(columns=head.columns).assign(**{ROW: numbers})
            rows += len(frame)
            part = table_of(frame, reading)
            unused["with fewer than two answers"] += len(frame) - part["row"].nunique()
            parts.append(part if ties is None else usable(part, ties, unused))
            progress.update(max(0, position - progress.n))
            if limit and sum(map(len, parts)) >= limit:
                break
    table = pd.concat(parts, ignore_index=True)
    whole, table = len(table), table.head(limit or len(table))
    unused["beyond --limit"] = whole - len(table)
    reasons = "".join(f"; {count:,} {reason}" for reason, count in unused.items() if count)
    what, left = describe_reading(reading, head, words)
    say(f"{path}: {what}, {rows:,} rows read, {len(table):,} used{reasons}{left}")
    if reading.form == "answers":
        say_one_sided(table, path, reading.columns)
    return table, rows


def usable(table: pd.DataFrame, ties: str, unused: Counter) -> pd.DataFrame:
    """The rows that can teach something; the others are counted in `unused`, under the first reason that
    fits."""
    blank = {column: table[column].str.strip() == "" for column in TEXTS}
    reasons = {
        "with an empty prompt": blank["prompt"],
        "with an empty response": blank["response_a"] | blank["response_b"],
        "with equal responses": table["response_a"] == table["response_b"],
        "ties (--ties half keeps them)": (table["label"] == 0.5) & ~table["pseudo"] & (ties == "drop"),
    }
    kept = pd.Series(True, index=table.index)
    for reason, bad in reasons.items():
        unused[reason] += int((kept & bad).sum())
        kept &= ~bad
    return table[kept]


def with_unique_ids(table: pd.DataFrame, training: bool) -> pd.DataFrame:
    """Make ids unique. A repeated id gets -2, -3, ..; if several files use the same ids, the file's name is
    put before them. training: rows that repeat a pair of the same id are left out, unless judges differ."""
    if not table["id"].duplicated().any():
        return table
    place, table = table.index, table.reset_index(drop=True)  # several rows of one place are its answers
    again = table[table["id"].duplicated(keep=False)]
    pair = again.groupby(["id", *TEXTS])["label"]
    repeated = again.index[training & (pair.cumcount() > 0) & (pair.transform("nunique") == 1)]
    if len(repeated):
        say(f"{len(repeated):,} pairs are repeated: the first of each is used")
        table, place = table.drop(index=repeated), place.delete(repeated)
    own = again[~again["made_id"] & ~again.index.isin(repeated)]
    shared = set(own["file"][own.groupby("id")["file"].transform("nunique") > 1])
    if shared:
        say(f"{', '.join(sorted(shared))}: the same ids in several files: their rows are named FILE:ID")
        these = table["file"].isin(shared) & ~table["made_id"]
        table.loc[these, "id"] = table["file"].map(lambda file: Path(file).name) + ":" + table["id"]
    while (double := table["id"].duplicated()).any():
        table.loc[double, "id"] += "-" + (table.groupby("id").cumcount() + 1).astype(str)
        table["number"] = False
    return table.set_axis(place)
