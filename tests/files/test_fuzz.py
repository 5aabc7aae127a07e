"""Whatever bytes or tables a file holds: a table comes out, or one line that names the file.

python -m pytest tests/test_fuzz.py                                   the same 500 files every time
python -m pytest tests/test_fuzz.py --hypothesis-profile=long         some minutes, other files each time

What is tried: rows of every layout with cells of any JSON value, written as each kind of file, then damaged;
and bytes that were never a file.
"""

import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow as pa
import pytest
from bad_input import ARENA, CHOSEN, LMSYS, ROW, TALK, parquet, zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minarena.data import TEXTS
from minarena.files import formats
from minarena.files.pairs import read_pairs

SHORT = settings(max_examples=300, derandomize=True)
SHORT = settings(SHORT, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
EFFORT = settings() if settings().max_examples > 1000 else SHORT
DEEP = "nested lists, "
LAYOUTS = [ROW, {k: v for k, v in ROW.items() if k != "winner"}, ROW | {"winner": [0.25, 0.75]}, LMSYS, ARENA]
LAYOUTS += [
    CHOSEN,
    CHOSEN | {"score_chosen": 8, "score_rejected": 7.5},
    {k: LMSYS[k] for k in ("id", *TEXTS)},
    {"context": TALK[:1], "response1": "a", "response2": "b", "overall_preference": -1},
    {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1},
    {
        "system": "s",
        "question": "q",
        "input": "i",
        "output_1": "a",
        "output_2": "b",
        "score_1": 1,
        "score_2": 2,
    },
    {**ARENA, "turn": 1, "model_a": "x", "model_b": "y"},
    {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]},
    {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
    {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
    {"prompt": "q", "chosen": "qa", "rejected": "qb", "chosen_rating": 3, "rejected_rating": 2},
    {"chosen": json.dumps(TALK), "rejected": json.dumps(TALK)},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
]
SPECIAL = [
    "",
    " ",
    "\0",
    "\ud800",
    "\u202e",
    '"',
    "\r",
    "[",
    "1e400",
    "nan",
    "tie",
    '["q", null]',
    "[0.5 0.5]",
]
SPECIAL += ["\n\nHuman: x\n\nAssistant: y", None, 0, 1, 10**400, -(10**30), float("nan"), float("inf"), True]
SPECIAL += [[0.5, 0.5], [10**400, 0], {}, [], [None], [{"role": "user", "content": None}], [{"role": []}]]


cells = st.one_of(
    st.sampled_from(SPECIAL),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
    st.integers(850, 1000).map(f"{DEEP}{{}}".format),  # about as deep as Python's stack
)
changes = st.dictionaries(
    st.sampled_from(sorted({"row", "(row)", "(part)", "label", *(key for row in LAYOUTS for key in row)})),
    cells,
    max_size=2,
)
tables = st.tuples(st.sampled_from(LAYOUTS), st.lists(changes, min_size=1, max_size=4))


def rows_of(table) -> list[dict]:
    layout, changed = table
    ids = [{"id": f"r{i}"} if "id" in layout else {} for i in range(len(changed))]
    return [layout | own | cells for own, cells in zip(ids, changed, strict=True)]


def as_json(cell) -> str:
    if isinstance(cell, str) and cell.startswith(DEEP):  # written out here: Python itself could not show it
        return int(cell.removeprefix(DEEP)) * "[" + int(cell.removeprefix(DEEP)) * "]"
    return json.dumps(cell)


def text(cell) -> str:
    return cell if isinstance(cell, str) and not cell.startswith(DEEP) else as_json(cell)


def as_jsonl(rows: list[dict]) -> bytes:
    lines = [", ".join(f"{as_json(key)}: {as_json(cell)}" for key, cell in row.items()) for row in rows]
    return "".join(f"{{{line}}}\n" for line in lines).encode()


def as_csv(rows: list[dict], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    names = [*dict.fromkeys(key for row in rows for key in row)]
    writer = csv.DictWriter(file, names, delimiter=delimiter)
    writer.writeheader()
    writer.writerows({key: text(cell) for key, cell in row.items()} for row in rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[dict]) -> bytes:
    """Columns in Arrow's own types where it has one for all cells, as text where it has not."""
    columns = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        column = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(column)
            parquet({name: columns[name]})
        except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
            columns[name] = pa.array([text(cell).encode(errors="replace").decode() for cell in column])
    return parquet(columns, compression="none")


def as_array(rows: list[dict]) -> bytes:
    return b"[" + b",\n".join(as_jsonl(rows).splitlines()) + b"]"


def as_arrow(rows: list[dict]) -> bytes:
    table, file = pa.parquet.read_table(io.BytesIO(as_parquet(rows))), io.BytesIO()
    with [pa.ipc.new_file, pa.ipc.new_stream][len(rows) % 2](file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


KINDS = {".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet}
KINDS |= {".json": as_array, ".arrow": as_arrow, ".tsv": lambda rows: as_csv(rows, "\t")}
PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=6)), max_size=3)


def damaged(content: bytes, edits: list) -> bytes:
    """At each place, a share of the length, some bytes are taken out and others put in."""
    for place, removed, added in edits:
        begin = int(place * len(content))
        content = content[:begin] + added + content[begin + removed :]
    return content


def check(path, content: bytes, rows_at_a_time: int, monkeypatch) -> None:
    path.write_bytes(content)
    monkeypatch.setattr(formats, "ROWS", rows_at_a_time)
    monkeypatch.setattr(formats, "BLOCK", [3, 2**16][len(content) % 2])
    try:
        table = read_pairs([str(path)], ties=[None, "half"][len(content) % 2])
    except ValueError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and message.replace(str(path), "").isprintable()
        assert len(message) < 2 * len(str(path)) + 500
        return
    assert table["id"].is_unique and table["label"].dropna().between(0, 1).all()
    for column in ("id", *TEXTS):
        assert all(isinstance(cell, str) and cell.encode() is not None for cell in table[column])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@EFFORT
@given(tables, st.sampled_from([*KINDS]), edits, st.sampled_from([*PACKED]), st.sampled_from([1, 2, 4096]))
def test_a_table_or_one_line_that_names_the_file(folder, patch, table, kind, edits, packed, rows):
    content = PACKED[packed](damaged(KINDS[kind](rows_of(table)), edits))
    check(folder / f"pairs{kind}{packed}", content, rows, patch)


@EFFORT
@given(st.binary(max_size=300), st.sampled_from([*KINDS]), st.sampled_from([*PACKED]))
def test_bytes_that_never_were_a_file(folder, patch, content, kind, packed):
    check(folder / f"pairs{kind}{packed}", content, 4096, patch)
