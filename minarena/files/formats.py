"""A file's rows with its own columns, some thousand at a time, by the file's ending.

    for frame, position in read_frames("pairs.jsonl.gz"): ...      KINDS, also compressed (COMPRESSED)

A line or cell of more than LIMIT bytes ends in one line, so that no file of a few bytes fills the memory.
What it does not do: know what the columns mean (layouts.py), or find files (sources.py).
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path

import pandas as pd
from pyarrow import ArrowInvalid, CompressedInputStream, ipc
from pyarrow.parquet import ParquetFile

from minarena.runtime.console import first_line

STDIN = "(stdin)"  # is read as lines of JSON
ROWS = 4096  # that are Python's objects at a time
LIMIT = 2**28  # bytes of a line or cell
BLOCK = 2**16  # characters of a .json array that are read at a time
SPACE = re.compile(r"[ \t\r\n]*")
WHAT_TO_DO = dict.fromkeys((".zip", ".tar", ".7z"), "unpack it, and name the file or folder inside")
WHAT_TO_DO |= dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as .csv")
WHAT_TO_DO |= dict.fromkeys((".pkl", ".pickle"), "pickles are never loaded: save the table as .parquet")


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED[".zst"] = partial(CompressedInputStream, compression="zstd")


def bytes_of(path: str):
    return nullcontext(sys.stdin.buffer) if path == STDIN else open(path, "rb")


def opened(raw, zipped: str):
    return io.BufferedReader(COMPRESSED[zipped](raw)) if zipped else nullcontext(raw)


def endings(path: str) -> tuple[str, str]:
    """(.jsonl, .gz) of a name; "" for what it lacks."""
    if path == STDIN:
        return ".jsonl", ""
    *_, first, last = ["", "", *Path(str(path).lower()).suffixes]
    return (first, last) if last in COMPRESSED else (last, "")


def read_frames(path: str) -> Iterator[tuple[pd.DataFrame, int]]:
    """(the next ROWS rows with the file's own columns, bytes of the file read so far); what the file holds
    must be what its ending says, and have a row."""
    ending, zipped = endings(path)
    if ending not in KINDS:
        known = f"known are {', '.join(KINDS)}, also with {', '.join(COMPRESSED)}"
        raise ValueError(f"{path}: unknown ending {ending!r}; {WHAT_TO_DO.get(ending, known)}")
    if path != STDIN and not (Path(path).is_file() and Path(path).stat().st_size):
        raise ValueError(f"{path}: {'empty' if Path(path).is_file() else 'no such'} file")
    done = 0
    try:
        with bytes_of(path) as raw, opened(raw, zipped) as stream:
            columns, rows = KINDS[ending](stream)
            while True:
                batch = []
                try:
                    batch.extend(islice(rows, ROWS))
                except Exception as error:  # those before the bad row are in the batch
                    raise ValueError(f"row {done + len(batch) + 1}: {first_line(error)}") from error
                if not batch:
                    break
                done += len(batch)
                place = raw.tell() if raw.seekable() else 0  # a pipe has none
                # as objects: pandas' own strings refuse a lone surrogate
                yield pd.DataFrame(batch, columns=columns, dtype=object), place
    except Exception as error:  # pyarrow alone raises a dozen kinds for a damaged file
        raise ValueError(f"{path}: not readable as {ending[1:]}: {first_line(error)}") from error
    if not done:
        raise ValueError(f"{path}: no rows")


# Each gives (the columns' names, or None where each row has its own; the rows one by one).


def parquet_rows(stream) -> tuple[list[str], Iterator[list]]:
    file = ParquetFile(stream)
    return file.schema_arrow.names, cells_of(file.iter_batches(ROWS))


def arrow_rows(stream) -> tuple[list[str], Iterator[list]]:
    """Arrow's two formats: the one for files, and the stream that `datasets` saves to disk."""
    try:
        file = ipc.open_file(stream)
        batches = map(file.get_batch, range(file.num_record_batches))
    except ArrowInvalid:
        stream.seek(0)
        file = batches = ipc.open_stream(stream)
    return file.schema.names, cells_of(validated(batches))


def validated(batches: Iterable) -> Iterator:
    """A damaged batch would end the process where its cells are read, without an error."""
    for batch in batches:
        batch.validate(full=True)
        yield from (batch.slice(i, ROWS) for i in range(0, len(batch), ROWS))


def cells_of(batches: Iterable) -> Iterator[list]:
    """Cells as Python's objects: pandas makes floats of [1, null], obeys whatever a file's metadata tells it,
    and fails on nested and on damaged cells."""
    for batch in batches:
        large = batch.nbytes > LIMIT
        for row in zip(*batch.columns, strict=True):
            cells = [cell.as_py() for cell in row]
            if large and any(isinstance(cell, str) and len(cell) > LIMIT for cell in cells):
                raise ValueError(f"a cell of more than {LIMIT:,} characters")
            yield cells


def csv_rows(stream) -> tuple[list[str], Iterator[list[str]]]:
    """Cells as text, by Python's csv: pandas makes null of the answers "None" and "NA", 7 of the id 007, and
    the empty text of a cell that a cut line lacks, in silence."""
    csv.field_size_limit(LIMIT)  # characters a cell; the default, 131,072, is below the longest answers
    text = lines(stream)
    first = next(text, "")
    delimiter = max(",;\t", key=first.count)
    rows = (cells for cells in csv.reader(chain([first], text), delimiter=delimiter, strict=True) if cells)
    header = next(rows, [])

    def whole(cells: list[str]) -> list[str]:
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} cells, the header has {len(header)}")
        return cells

    return header, map(whole, rows)


def json_rows(stream) -> tuple[None, Iterator[dict]]:
    """One object a line; where the first line is no object, an array or objects over several lines."""
    begun, text = "", lines(stream)
    if not stream.peek(64)[:64].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        begun = next((line for line in text if line.strip()), "")
    found = map(DECODER.decode, filter(str.strip, chain([begun], text)))
    try:
        DECODER.decode(begun)
    except json.JSONDecodeError:
        found = elements(stream, begun)
    return None, map(whole_object, found)


def whole_object(found) -> dict:
    if not isinstance(found, dict):
        raise ValueError("not an object with the columns as keys")
    return found


def elements(stream, text: str) -> Iterator:
    """The elements of a JSON array, or objects one after the other; only what is not decoded yet is held.
    text: what was read already."""
    decode, place = codecs.getincrementaldecoder("utf-8-sig")().decode, 0

    def more() -> bool:
        nonlocal text, place
        # Ever more: an element is decoded from its start
        block = decode(stream.read(max(BLOCK, len(text) - place)))
        text, place = text[place:] + block, 0
        return bool(block)

    def sign() -> str:
        """The next character that is no space; "" at the end."""
        nonlocal place
        while (place := SPACE.match(text, place).end()) == len(text) and more():
            pass
        return text[place : place + 1]

    end = "]" if sign() == "[" else ""
    place += len(end)
    while sign() not in ("]", ""):
        try:
            found, place = DECODER.raw_decode(text, place)
        except json.JSONDecodeError as error:
            if error.pos < len(text) - 10 and not error.msg.startswith("Unterminated"):
                raise  # else it is the end of what was read so far that is wrong
            if len(text) - place > LIMIT:
                raise ValueError(f"an element of more than {LIMIT:,} characters") from error
            if not more():
                raise
            continue
        yield found
        comma = sign() == ","  # sign() moves `place`: `place += sign()` would add to the old one
        place += comma
    closed = sign() == "]"
    place += closed
    if sign() or (end and not closed):
        raise ValueError("the file does not end where its array does")


def object_of(pairs: list[tuple]) -> dict:
    """json's own takes the last of two equal keys: which of two winners is meant, nobody knows."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands there twice: {[key for key, _ in pairs]!s:.60}")
    return found


def lines(stream) -> Iterator[str]:
    """A file's lines, their ends as they are. ValueError names the number of a line that is not UTF-8."""
    for number, line in enumerate(iter(lambda: stream.readline(LIMIT + 1), b""), 1):
        if len(line) > LIMIT:
            raise ValueError(f"line {number} has more than {LIMIT:,} bytes")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} is not UTF-8: save the file as UTF-8") from error
        yield from io.StringIO(text, newline="") if "\r" in text else [text]  # a lone \r ends a line, too


DECODER = json.JSONDecoder(object_pairs_hook=object_of)
KINDS = {".parquet": parquet_rows, ".csv": csv_rows, ".jsonl": json_rows, ".json": json_rows}
KINDS |= {".ndjson": json_rows, ".tsv": csv_rows, ".arrow": arrow_rows}
