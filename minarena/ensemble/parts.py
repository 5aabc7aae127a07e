"""Inference in parts of 10,000 rows, each saved when done; after any interruption the same command continues.

    folder = open_parts("pseudo.parquet.parts", run)      run: all that decides the result
    p = stored_part(folder, "0-ab-00003", ids)            None if the part must be computed; then
    store_part(folder, "0-ab-00003", ids, p)

Under its final name a part is whole (files/durable.py). A part stores its row ids and is computed again when
they do not match.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from minarena.files.durable import read_record, write_text, write_whole
from minarena.files.lock import lock_folder
from minarena.runtime.console import first_line, say

PART = 10_000  # rows: some minutes of a 9B on one GPU, the most that an interruption costs


def open_parts(folder: str, run: dict) -> Path:
    """Make the folder, or go on in it; ValueError where it holds parts of another run, or is in use."""
    path, record = Path(folder), Path(folder) / "run.json"
    text = json.dumps(run, indent=2)
    path.mkdir(exist_ok=True)
    lock_folder(path)
    if record.exists():
        before = read_record(record)
        other = [name for name, value in json.loads(text).items() if before.get(name) != value]
        if other:
            remedy = "restore it, or delete that"
            raise ValueError(f"{folder} holds parts of a run with another {other[0]}: {remedy}")
        done = len([*path.glob("*.parquet")])
        say(f"{folder}: going on; {done} parts are done already")
    else:
        for stray in path.glob("*.parquet"):  # without their record nobody knows whose they are
            stray.unlink()
        write_text(text, record)
    return path


def stored_part(folder: Path | None, name: str, ids: pd.Series) -> np.ndarray | None:
    """The stored numbers of the rows `ids`, in order; None: the part is missing, damaged or another's."""
    path = folder / f"{name}.parquet" if folder else None
    if not path or not path.exists():
        return None
    try:
        stored = pd.read_parquet(path, page_checksum_verification=True)
        return stored["p"].to_numpy() if list(stored["id"]) == list(ids) else None
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        say(f"{path} is damaged ({first_line(error)}): computed again")
        return None


def store_part(folder: Path | None, name: str, ids: pd.Series, p: np.ndarray) -> None:
    if folder:
        write_whole(pd.DataFrame({"id": ids.to_numpy(), "p": p}), str(folder / f"{name}.parquet"))
