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
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from minarena.data import TEXTS, swapped
from minarena.sources import from_chosen, layout

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
        tables.append(table.set_index(table["row"].to_numpy() - 1 + rows).assign(file=str(path)))
        rows += read
    table = pd.concat(tables)
    double = table["id"].duplicated()
    repeated = double & table["made_id"]  # an id made of the texts: the same pair again, not a mistake
    if repeated.any():
        print(f"{repeated.sum():,} pairs are repeated: the first of each is used", file=sys.stderr)
    for _, second in table[double & ~repeated].head(1).iterrows():
        first = table[table["id"] == second["id"]].iloc[0]
        where = f"{second['file']}: row {second['row']}, column id"
        raise ValueError(f"{where}: {second['id']!r} again; it is row {first['row']} of {first['file']}")
    internal = ["file", "row", "made_id", "equal_scores"] + ["pseudo"] * (not table["pseudo"].any())
    return table[~repeated].drop(columns=internal)


def read_file(path: str, ties: str | None, limit: int | None, bar) -> tuple[pd.DataFrame, int]:
    """(the table of a file's usable rows, number of rows read). Beside data.py's columns it has `row`, the
    row's number in the file, and `made_id`, whether the id is ours. For the arguments see read_pairs."""
    parts, unused, rows, convert = [], Counter(), 0, None
    progress = None
    for frame, position in read_frames(path):
        if convert is None:
            convert, columns = layout(frame, path), frame.columns
            size = Path(path).stat().st_size
            progress = bar and bar(
                total=size, desc=f"read {Path(path).name}", unit="B", unit_scale=True, disable=None
            )
        frame = frame.reindex(columns=columns).assign(row=range(rows + 1, rows + len(frame) + 1))
        rows += len(frame)
        part = convert(frame, path)
        parts.append(part if ties is None else usable(part, ties, unused))
        if progress is not None:
            progress.update(max(0, position - progress.n))
        if limit and sum(map(len, parts)) >= limit:
            break
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
    print(f"{path}: {name} layout, {rows:,} rows read, {len(table):,} used{reasons}", file=sys.stderr)
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
    readers = {".parquet": parquet_frames, ".csv": csv_frames, ".jsonl": jsonl_frames}
    zipped = str(path).lower().endswith(".gz")
    ending = Path(str(path).lower().removesuffix(".gz")).suffix
    if ending not in readers:
        raise ValueError(f"{path}: unknown ending {ending!r}; known are {', '.join(readers)}, also with .gz")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path}: empty file")
    try:
        with open(path, "rb") as raw, gzip.open(raw) if zipped else nullcontext(raw) as stream:
            for frame in readers[ending](stream):
                yield frame, raw.tell()
    # pyarrow's errors are the first two, gzip's the first four; their first line says what is wrong
    except (ValueError, OSError, EOFError, zlib.error, csv.Error) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise ValueError(f"{path}: not readable as {ending[1:]}: {reason}") from error


def parquet_frames(stream) -> Iterator[pd.DataFrame]:
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(stream).iter_batches(ROWS):
        yield batch.to_pandas()


def csv_frames(stream) -> Iterator[pd.DataFrame]:
    """Cells as text, by Python's csv: pandas makes null of the answers "None" and "NA", 7 of the id 007, and
    the empty text of a cell that a cut line lacks, in silence."""
    csv.field_size_limit(2**31 - 1)  # characters a cell; the default, 131,072, is below the longest answers
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = enumerate(cells for cells in csv.reader(text, strict=True) if cells)
    header = next(rows, (0, []))[1]
    while batch := list(islice(rows, ROWS)):
        for number, cells in batch:
            if len(cells) != len(header):
                raise ValueError(f"row {number}: {len(cells)} cells, the header has {len(header)}")
        yield pd.DataFrame([cells for _, cells in batch], columns=header, dtype=object)


def jsonl_frames(stream) -> Iterator[pd.DataFrame]:
    lines = enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), 1)
    while batch := list(islice(lines, ROWS)):
        rows = []
        for number, line in batch:
            if not line.strip():  # often the last one
                continue
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"line {number}: not an object with the columns as keys")
        yield pd.DataFrame(rows, dtype=object)  # object: pandas' own strings refuse a lone surrogate
