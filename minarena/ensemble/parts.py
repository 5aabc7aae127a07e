"""A long job in durable parts: stopped at any moment, even by kill -9, the same command goes on.

    folder = open_parts("pseudo.parquet.parts", run)      run: all that decides the result
    p = stored_part(folder, "0-ab-00003", ids)            None if it must be computed; then
    store_part(folder, "0-ab-00003", ids, p)

Under its final name a part is whole (files/durable.py). A part holds the ids of its rows, and is not taken
for other rows.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from minarena.files.durable import read_record, write_text, write_whole
from minarena.runtime.console import first_line, say

PART = 10_000  # rows: some minutes of a 9B on one GPU, the most that an interruption costs


def open_parts(folder: str, run: dict) -> Path:
    """Make the folder, or go on in it. Raises ValueError where it holds parts of another run."""
    path, record = Path(folder), Path(folder) / "run.json"
    text = json.dumps(run, indent=2)
    if record.exists():
        begun = read_record(record)
        other = [name for name, value in json.loads(text).items() if begun.get(name) != value]
        if other:
            raise ValueError(
                f"{folder} holds parts of a run with another {other[0]}: restore it, or delete that"
            )
        done = len([*path.glob("*.parquet")])
        say(f"{folder}: going on; {done} parts are done already")
    else:
        path.mkdir(exist_ok=True)
        for stray in path.glob("*.parquet"):  # without their record nobody knows whose they are
            stray.unlink()
        write_text(text, record)
    return path


def stored_part(folder: Path | None, name: str, ids: pd.Series) -> np.ndarray | None:
    """The numbers of the rows `ids`, in their order, if the part of that name is there, whole and theirs."""
    path = folder and folder / f"{name}.parquet"
    if not path or not path.exists():
        return None
    try:
        stored = pd.read_parquet(path, page_checksum_verification=True)
        return stored["p"].to_numpy() if list(stored["id"]) == list(ids) else None
    except Exception as error:  # of a damaged file pyarrow raises many kinds
        say(f"{path} is damaged ({first_line(error)}): computed again")
        return None


def store_part(folder: Path | None, name: str, ids: pd.Series, p: np.ndarray) -> None:
    if folder:
        write_whole(pd.DataFrame({"id": ids.to_numpy(), "p": p}), str(folder / f"{name}.parquet"))
