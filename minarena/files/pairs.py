"""Files of any known layout -> the table of pairs of data.py, some thousand rows at a time.

    read_pairs(["train.parquet", "more.jsonl.gz"], ties="drop")      .parquet, .csv, .jsonl, also with .gz

Only ROWS rows at a time are Python objects; the table keeps its texts in Arrow's buffers, so that a file of
any size is read in a few times its bytes. What the columns mean is known by sources.py. Everything wrong with
a file is a ValueError that names file, row (the first is 1) and column, raised before any model is loaded.
"""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from minarena.data import TEXTS, swapped
from minarena.files.layouts import from_chosen, layout, shown
from minarena.runtime.console import first_line, printable, say

ROWS = 4096
COIN_SEED = 0xFACED  # not --seed: every command must deal a file alike, or labels could not be joined by id


def read_pairs(
    paths: list[str], limit: int | None = None, ties: str | None = None, bar: Callable | None = None
) -> pd.DataFrame:
    """Read and join files of any known layout, in the order given; ids are unique over all of them.

    limit: use the first `limit` rows. ties: for training, "drop" or "half" (label 0.5); rows that teach
    nothing (an empty text, equal answers) are then left out and reported by reason. None keeps every row,
    which is what inference needs. bar: tqdm. Raises ValueError for a file that cannot be used, naming file,
    row and column.
    """
    tables, rows = [], 0
    for path in paths:
        left = limit and limit - sum(map(len, tables))
        if left == 0:
            break
        table, read = read_file(path, ties, left, bar)
        tables.append(table.set_index(table["row"].to_numpy() - 1 + rows).assign(file=printable(str(path))))
        rows += read
    table = pd.concat(tables)
    double = table["id"].duplicated()
    repeated = double & table["made_id"]  # an id made of the texts: the same pair again, not a mistake
    if repeated.any():
        say(f"{repeated.sum():,} pairs are repeated: the first of each is used")
    for _, second in table[double & ~repeated].head(1).iterrows():
        first = table[table["id"] == second["id"]].iloc[0]
        where = f"{second['file']}: row {second['row']}, column id"
        raise ValueError(f"{where}: {shown(second['id'])} again; it is row {first['row']} of {first['file']}")
    internal = ["file", "row", "made_id", "equal_scores"] + ["pseudo"] * (not table["pseudo"].any())
    return table[~repeated].drop(columns=internal)


def read_file(path: str, ties: str | None, limit: int | None, bar) -> tuple[pd.DataFrame, int]:
    """(the table of a file's usable rows, number of rows read). Beside data.py's columns it has `row`, the
    row's number in the file, and `made_id`, whether the id is ours. For the arguments see read_pairs."""
    parts, unused, rows, convert = [], Counter(), 0, None
    progress = None
    try:
        for frame, position in read_frames(path):
            if convert is None:
                convert, columns = layout(frame, path), frame.columns
                size = Path(path).stat().st_size
                look = {
                    "desc": f"read {printable(Path(path).name)}",
                    "unit": "B",
                    "unit_scale": True,
                    "disable": None,
                }
                progress = bar and bar(total=size, **look)
            frame = frame.reindex(columns=columns).assign(row=range(rows + 1, rows + len(frame) + 1))
            rows += len(frame)
            part = convert(frame, path)
            parts.append(part if ties is None else usable(part, ties, unused))
            if progress is not None:
                progress.update(max(0, position - progress.n))
            if limit and sum(map(len, parts)) >= limit:
                break
    finally:  # a bar that is left open is drawn once more, after the line that says what is wrong
        if progress is not None:
            progress.close()
    if not rows:
        raise ValueError(f"{path}: no rows")
    table = pd.concat(parts, ignore_index=True)
    if limit and len(table) > limit:
        unused["beyond --limit"] = len(table) - limit
        table = table.head(limit)
    table = dealt(table) if convert is from_chosen else table
    reasons = "".join(f"; {count:,} {reason}" for reason, count in unused.items() if count)
    name = convert.__name__.removeprefix("from_")
    say(f"{path}: {name} layout, {rows:,} rows read, {len(table):,} used{reasons}")
    return table, rows


def usable(table: pd.DataFrame, ties: str, unused: Counter) -> pd.DataFrame:
    """The rows that can teach something; the others are counted in `unused`, under the first reason that
    fits."""
    blank = {column: table[column].str.strip() == "" for column in TEXTS}
    reasons = {
        "with an empty prompt": blank["prompt"],
        "with an empty response": blank["response_a"] | blank["response_b"],
        "with equal responses": table["response_a"] == table["response_b"],
        "with equal scores": table["equal_scores"],
        "ties (--ties half keeps them)": (table["label"] == 0.5) & ~table["pseudo"] & (ties == "drop"),
    }
    kept = pd.Series(True, index=table.index)
    for reason, bad in reasons.items():
        unused[reason] += int((kept & bad).sum())
        kept &= ~bad
    return table[kept]


def dealt(table: pd.DataFrame) -> pd.DataFrame:
    """Chosen answers, which all stand in response_a, dealt to a and b: of the file's rows 2k - 1 and 2k one
    goes to each side, and a coin for each k says which. So the sides are balanced whatever part is read."""
    pair, second = np.divmod(table["row"].to_numpy() - 1, 2)
    coin = np.random.default_rng(COIN_SEED).random(pair.max(initial=0) + 1) < 0.5
    to_b, mirrored = coin[pair] ^ (second == 1), swapped(table)
    columns = ("response_a", "response_b", "label")
    return table.assign(**{column: table[column].where(~to_b, mirrored[column]) for column in columns})


def read_frames(path: str) -> Iterator[tuple[pd.DataFrame, int]]:
    """(the next ROWS rows with the file's own columns, bytes of the file read so far), by the file's ending;
    what the file holds must be what its ending says."""
    readers = {".parquet": parquet_rows, ".csv": csv_rows, ".jsonl": jsonl_rows}
    zipped = str(path).lower().endswith(".gz")
    ending = Path(str(path).lower().removesuffix(".gz")).suffix
    if ending not in readers:
        raise ValueError(f"{path}: unknown ending {ending!r}; known are {', '.join(readers)}, also with .gz")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path}: empty file")
    done, batch = 0, [None]
    try:
        with open(path, "rb") as raw, gzip.open(raw) if zipped else nullcontext(raw) as stream:
            columns, rows = readers[ending](stream)
            while batch:
                batch = []
                try:
                    batch.extend(islice(rows, ROWS))
                except Exception as error:  # those before the bad row are in the batch
                    raise ValueError(f"row {done + len(batch) + 1}: {first_line(error)}") from error
                done += len(batch)
                if batch:  # as objects: pandas' own strings refuse a lone surrogate
                    yield pd.DataFrame(batch, columns=columns, dtype=object), raw.tell()
    except Exception as error:  # pyarrow alone raises a dozen kinds for a damaged file
        raise ValueError(f"{path}: not readable as {ending[1:]}: {first_line(error)}") from error


# Each gives (the columns' names, or None where each row has its own; the rows one by one).


def parquet_rows(stream) -> tuple[list[str], Iterator[list]]:
    """Cells as Python's objects: pandas makes floats of [1, null], obeys whatever a file's metadata tells it,
    and fails on nested and on damaged cells."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stream)
    rows = (row for batch in file.iter_batches(ROWS) for row in zip(*batch.columns, strict=True))
    return file.schema_arrow.names, ([cell.as_py() for cell in row] for row in rows)


def csv_rows(stream) -> tuple[list[str], Iterator[list[str]]]:
    """Cells as text, by Python's csv: pandas makes null of the answers "None" and "NA", 7 of the id 007, and
    the empty text of a cell that a cut line lacks, in silence."""
    csv.field_size_limit(2**31 - 1)  # characters a cell; the default, 131,072, is below the longest answers
    rows = (cells for cells in csv.reader(lines(stream), strict=True) if cells)
    header = next(rows, [])

    def whole(cells: list[str]) -> list[str]:
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} cells, the header has {len(header)}")
        return cells

    return header, map(whole, rows)


def jsonl_rows(stream) -> tuple[None, Iterator[dict]]:
    def row(line: str) -> dict:
        found = json.loads(line, object_pairs_hook=object_of)
        if not isinstance(found, dict):
            raise ValueError("not an object with the columns as keys")
        return found

    return None, (row(line) for line in lines(stream) if line.strip())  # the last one is often blank


def object_of(pairs: list[tuple]) -> dict:
    """json's own takes the last of two equal keys: which of two winners is meant, nobody knows."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands there twice: {shown([key for key, _ in pairs])}")
    return found


def lines(stream) -> Iterator[str]:
    """A file's lines, their ends as they are; of a line that is no UTF-8 the number is told."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} is not UTF-8: save the file as UTF-8") from error
        yield from io.StringIO(text, newline="") if "\r" in text else [text]  # a lone \r ends a line, too
