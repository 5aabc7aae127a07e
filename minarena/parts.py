"""A long job in durable parts: stopped at any moment, even by kill -9, the same command goes on.

    folder = open_parts("pseudo.parquet.parts", run)      run: all that decides the result
    p = stored_part(folder, "0-ab-00003", ids)            None if it must be computed; then
    store_part(folder, "0-ab-00003", ids, p)
    write_whole(table, "pseudo.parquet")                  whole under its name, or not there at all

A file is written under another name, flushed to disk and renamed: under its final name it is whole. A part
holds the ids of its rows, and is not taken for other rows.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from minarena.checkpoint import flush_to_disk
from minarena.config import first_line

PART = 10_000  # rows: some minutes of a 9B on one GPU, the most that an interruption costs


def open_parts(folder: str, run: dict) -> Path:
    """Make the folder, or go on in it. Raises ValueError where it holds parts of another run."""
    path, record = Path(folder), Path(folder) / "run.json"
    text = json.dumps(run, indent=2)
    if record.exists():
        begun = json.loads(record.read_text())
        other = [name for name, value in json.loads(text).items() if begun.get(name) != value]
        if other:
            raise ValueError(
                f"{folder} holds parts of a run with another {other[0]}: restore it, or delete that"
            )
        done = len([*path.glob("*.parquet")])
        print(f"{folder}: going on; {done} parts are done already", file=sys.stderr)
    else:
        path.mkdir(exist_ok=True)
        write_text(text, record)
    return path


def stored_part(folder: Path | None, name: str, ids: pd.Series) -> np.ndarray | None:
    """The numbers of the rows `ids`, in their order, if the part of that name is there, whole and theirs."""
    path = folder and folder / f"{name}.parquet"
    if not path or not path.exists():
        return None
    try:
        stored = pd.read_parquet(path)
        return stored["p"].to_numpy() if list(stored["id"]) == list(ids) else None
    except (ValueError, OSError, KeyError) as error:
        print(f"{path} is damaged ({first_line(error)}): computed again", file=sys.stderr)
        return None


def store_part(folder: Path | None, name: str, ids: pd.Series, p: np.ndarray) -> None:
    if folder:
        write_whole(pd.DataFrame({"id": ids.to_numpy(), "p": p}), str(folder / f"{name}.parquet"))


def write_whole(table: pd.DataFrame, path: str) -> None:
    """Write a table by its ending, .csv or .parquet; until it is on the disk, nothing has that name."""
    aside = f"{path}.unfinished"
    table.to_csv(aside, index=False) if path.endswith(".csv") else table.to_parquet(aside, index=False)
    put_in_place(aside, path)


def write_text(text: str, path: Path) -> None:
    aside = path.with_name(path.name + ".unfinished")
    aside.write_text(text)
    put_in_place(aside, path)


def put_in_place(aside: str | Path, path: str | Path) -> None:
    flush_to_disk(Path(aside))
    os.replace(aside, path)
    flush_to_disk(Path(path).resolve().parent)
