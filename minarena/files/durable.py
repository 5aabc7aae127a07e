"""A file is whole under its final name, or it is not there; and what a run records of files and of this code.

    write_text(text, path)          under another name, flushed to disk, renamed
    write_whole(table, path)        the same for a table, .csv or .parquet
    with naming_os_errors(path, unfinished): ...    what goes wrong names `path`; `unfinished` is deleted
    read_record(path)               a JSON object, or a ValueError that names the file

What it does not do: notice what a disk does to a file later (checkpoints have checksums for that).
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError

from minarena.runtime.console import first_line

RECORDED = ("torch", "transformers", "bitsandbytes", "safetensors", "numpy", "pandas", "ftfy")
TMP_SUFFIX = "unfinished"  # what is being written; a crash leaves it, and the next write clears it away


def commit() -> str | None:
    """The commit of this code, with a + where its tree is changed; None outside git."""
    folder = str(Path(__file__).parent)
    git = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def naming_os_errors(path: str | Path, unfinished: Path | None = None) -> Iterator[None]:
    """What goes wrong in the block is an OSError that names `path`; `unfinished` (file or folder) is deleted.

    The system names no file for a full disk, and safetensors' error is none that Python knows.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if unfinished:
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
        safe = "what was whole before still is, and the same command goes on (train.py: with --resume)"
        raise OSError(f"{path}: not written: {first_line(error)}; {safe}") from error


def write_text(text: str, path: Path) -> None:
    unfinished = path.with_name(f"{path.name}.{TMP_SUFFIX}")
    with naming_os_errors(path, unfinished):
        unfinished.write_text(text, encoding="utf-8")
        replace_durably(unfinished, path)


def replace_durably(unfinished: str | Path, path: str | Path) -> None:
    flush_to_disk(Path(unfinished))
    os.replace(unfinished, path)
    flush_to_disk(Path(path).resolve().parent)


def flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def read_record(path: Path) -> dict:
    """A JSON object from a file; ValueError that names the file where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = "no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
    raise ValueError(f"{path} is damaged: {reason}; restore it, or delete its folder")


def file_record(path: str) -> dict:
    """What train_config.json keeps of a data file, so that another file under the same name is noticed."""
    with open(path, "rb") as file:
        return {
            "file": str(path),
            "bytes": Path(path).stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def write_whole(table: pd.DataFrame, path: str) -> None:
    """Write a table by its ending, .csv or .parquet; until it is on the disk, nothing has that name."""
    unfinished = Path(f"{path}.{TMP_SUFFIX}")
    with naming_os_errors(path, unfinished):
        if path.endswith(".csv"):
            table.to_csv(unfinished, index=False)
        else:
            table.to_parquet(unfinished, index=False, write_page_checksum=True)
        replace_durably(unfinished, path)
