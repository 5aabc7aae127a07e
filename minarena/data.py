"""Files of pairs -> one table, and the three rules on that table: labels, swap, held-out fold.

The table has the columns id (str), prompt, response_a, response_b (str), label (float: P(response_a wins),
NaN where the file has no winner) and language (where the file has one). Everything wrong with a file is a
ValueError that names file, row (the first is 1) and column, raised before any model is loaded.

Does not repair text (text.py) and knows no tokens. A new layout is a row in LAYOUTS and a function.
"""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

TEXTS = ("prompt", "response_a", "response_b")


def read_pairs(paths: list[str], limit: int | None = None) -> pd.DataFrame:
    """Read and join files of any known layout, in the order given; ids are unique over all of them.

    Raises ValueError for a file that cannot be used, naming file, row and column.
    """
    tables = [read_file(path).assign(file=str(path)) for path in paths]
    table = pd.concat(tables, ignore_index=True)
    double = table["id"].duplicated(keep="first")
    if double.any():
        second = table[double].iloc[0]
        first = table[table["id"] == second["id"]].iloc[0]
        where = f"{second['file']}: row {second['row']}, column id"
        raise ValueError(f"{where}: {second['id']!r} again; it is row {first['row']} of {first['file']}")
    return table.drop(columns=["file", "row"]).head(limit or len(table))


def read_file(path: str) -> pd.DataFrame:
    """One file -> the table, plus `row`, each pair's row number in its file."""
    frame = read_frame(path)
    if not len(frame):
        raise ValueError(f"{path}: no rows")
    double = frame.columns[frame.columns.duplicated()]
    if len(double):
        raise ValueError(f"{path}: column {double[0]}: stands there twice")
    for columns, convert in LAYOUTS:
        if columns <= set(frame.columns):
            return convert(frame.assign(row=range(1, len(frame) + 1)), path)
    missing = sorted(LAYOUTS[0][0] - set(frame.columns))
    raise ValueError(
        f"{path}: missing column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}"
    )


def read_frame(path: str) -> pd.DataFrame:
    """The file's columns as they are, by its ending; what it holds must be what the ending says."""
    readers = {".parquet": pd.read_parquet, ".csv": read_csv, ".jsonl": read_jsonl}
    ending = Path(path).suffix.lower()
    if ending not in readers:
        raise ValueError(f"{path}: unknown ending {ending!r}; known are {', '.join(readers)}")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path}: empty file")
    try:
        return readers[ending](path)
    # pyarrow's errors are the first two, json's on "[[[[..." the last; their first line says what is wrong
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path}: not readable as {ending[1:]}: {str(error).splitlines()[0]}") from error


def read_csv(path: str) -> pd.DataFrame:
    """Cells as text, by Python's csv: pandas makes null of the answers "None" and "NA", 7 of the id 007, and
    the empty text of a cell that a cut line lacks, in silence."""
    csv.field_size_limit(2**31 - 1)  # characters a cell; the default, 131,072, is below the longest answers
    with open(path, encoding="utf-8-sig", newline="") as file:
        header, *rows = [cells for cells in csv.reader(file, strict=True) if cells] or [[]]
    for number, cells in enumerate(rows, 1):
        if len(cells) != len(header):
            raise ValueError(f"row {number}: {len(cells)} cells, the header has {len(header)}")
    return pd.DataFrame(rows, columns=header, dtype=object)


def read_jsonl(path: str) -> pd.DataFrame:
    rows = []
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: not an object with the columns as keys")
            rows.append(row)
    return pd.DataFrame(rows, dtype=object)  # object: pandas' own strings refuse a lone surrogate


def from_competition(frame: pd.DataFrame, path: str) -> pd.DataFrame:
    """The WSDM Cup's columns: id, prompt, response_a, response_b as plain text; winner model_a or model_b
    (train only)."""
    ids = checked(frame, path, "id", lambda v: isinstance(v, str | int | np.integer) and v != "", "no id")
    frame["id"] = ids.map(lambda v: without_lone_surrogates(str(v)))
    for column in TEXTS:
        texts = checked(frame, path, column, lambda v: isinstance(v, str), "not text")
        frame[column] = texts.map(without_lone_surrogates)
    frame["label"] = np.nan
    if "winner" in frame:
        winners = {"model_a": 1.0, "model_b": 0.0}
        known = checked(
            frame,
            path,
            "winner",
            lambda v: isinstance(v, str) and v in winners,
            "neither model_a nor model_b",
        )
        frame["label"] = known.map(winners).astype(float)
    kept = ["id", *TEXTS, "label", "row"] + ["language"] * ("language" in frame)
    return frame[kept]


# Which columns make which layout: the first that fits is taken. Other data sets' layouts go here, before this
# one.
LAYOUTS = [({"id", *TEXTS}, from_competition)]


def checked(frame: pd.DataFrame, path: str, column: str, good: Callable, problem: str) -> pd.Series:
    """The column, as Python objects, if every value is `good`; else a ValueError that names the first that is
    not."""
    values = frame[column].astype(object)
    bad = ~values.map(good).astype(bool)
    if bad.any():
        null = bad & values.isna()
        bad = null if null.any() else bad  # of [1, null] pandas makes floats: the null is to blame, not the 1
        row, value = frame.loc[bad, "row"].iloc[0], values[bad].iloc[0]
        shown = "null" if value is None or value is pd.NA or value != value else repr(value)[:60]
        raise ValueError(f"{path}: row {row}, column {column}: {shown} is {problem}")
    return values


def without_lone_surrogates(text: str) -> str:
    """Halves of a UTF-16 pair, which JSON can hold and neither a tokenizer nor parquet takes; pairs are
    joined."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def swapped(table: pd.DataFrame) -> pd.DataFrame:
    """The mirrored table: each response in the other's place and P(a wins) turned round. Twice is no
    change."""
    return table.assign(
        response_a=table["response_b"], response_b=table["response_a"], label=1 - table["label"]
    )


def split(table: pd.DataFrame, n_splits: int, fold: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(train, held-out): a row is held out when its index modulo n_splits equals fold, the seed's rule."""
    held_out = np.arange(len(table)) % n_splits == fold
    return table[~held_out].reset_index(drop=True), table[held_out].reset_index(drop=True)


def file_record(path: str) -> dict:
    """What train_config.json keeps of a data file, so that another file under the same name is noticed."""
    with open(path, "rb") as file:
        return {
            "file": str(path),
            "bytes": Path(path).stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
