"""Files of pairs become one table, and a file that cannot is refused by file, row and column.

table = read_pairs(["train.parquet", "more.csv"], limit=100)
table.columns: id (str), prompt, response_a, response_b (str), label (P(a wins)), language if the file has one
swapped(table): each response in the other's place, the label turned round
split(table, n_splits=1000, fold=0) -> (training rows, held-out rows)

Compared with: the rows that were written, Python's own csv and json writers, and loops over rows.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from minarena.data import split, swapped
from minarena.files.durable import file_record
from minarena.files.pairs import read_pairs

COLUMNS = ["id", "prompt", "response_a", "response_b", "winner"]
ROWS = [
    {"id": "007", "prompt": "None", "response_a": "NA", "response_b": "null", "winner": "model_a"},
    {"id": "1e3", "prompt": "n/a", "response_a": "", "response_b": "-1", "winner": "model_b"},
    {"id": "nan", "prompt": 'a,"b"\n\nc', "response_a": " 1.0 ", "response_b": "TRUE", "winner": "model_a"},
    {"id": "é", "prompt": "为什么?", "response_a": "مرحبا", "response_b": "🙂\t\\n", "winner": "model_b"},
]


def write(path, rows, columns=None) -> str:
    """Rows (dicts) as the ending says, by writers that are not the ones under test where there are any."""
    columns = columns or list(rows[0])
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pd.DataFrame(rows, columns=columns, dtype=object).to_parquet(path, index=False)
    return str(path)


def changed(index: int, **cells) -> list[dict]:
    return [{**row, **cells} if i == index else row for i, row in enumerate(ROWS)]


def refusal(*paths) -> str:
    with pytest.raises(ValueError) as error:
        read_pairs([str(path) for path in paths])
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_every_cell_comes_back_as_it_was_written(ending, tmp_path):
    table = read_pairs([write(tmp_path / f"pairs{ending}", ROWS)])
    assert list(table.columns) == ["id", "prompt", "response_a", "response_b", "label"]
    for read, row in zip(table.to_dict("records"), ROWS, strict=True):
        assert read == {**{c: row[c] for c in COLUMNS[:4]}, "label": float(row["winner"] == "model_a")}


def test_an_answer_of_any_length_is_read(tmp_path):
    rows = [{**ROWS[0], "response_a": "long " * 100_000}]  # Python's csv stops at 131,072 characters, unasked
    assert read_pairs([write(tmp_path / "pairs.csv", rows)]).loc[0, "response_a"] == rows[0]["response_a"]


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_numbers_as_ids_become_text_and_the_language_is_kept(ending, tmp_path):
    rows = [{**row, "id": i, "language": "English", "scored": 1} for i, row in enumerate(ROWS)]
    table = read_pairs([write(tmp_path / f"pairs{ending}", rows)])
    assert list(table["id"]) == ["0", "1", "2", "3"] and list(table["language"]) == ["English"] * 4
    assert "scored" not in table


def test_a_file_without_winners_has_unknown_labels(tmp_path):
    rows = [{c: row[c] for c in COLUMNS[:4]} for row in ROWS]
    assert read_pairs([write(tmp_path / "test.csv", rows)])["label"].isna().all()


def test_several_files_are_joined_in_the_order_given_and_cut_at_the_limit(tmp_path):
    first = write(tmp_path / "b.csv", ROWS[:2])
    second = write(tmp_path / "a.jsonl", ROWS[2:])
    assert list(read_pairs([first, second])["id"]) == [row["id"] for row in ROWS]
    assert list(read_pairs([second, first], limit=3)["id"]) == ["nan", "é", "007"]


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize(("column", "key"), [("prompt", "prompt"), ("response_a", "a"), ("response_b", "b")])
def test_a_missing_column_is_named_with_the_file(ending, column, key, tmp_path):
    rows = [{c: v for c, v in row.items() if c != column} for row in ROWS]
    path = write(tmp_path / f"pairs{ending}", rows)
    said = refusal(path)
    assert said.startswith(f"{path}: nearest layout: two answers a and b with a winner; missing: {key}")
    assert "; it has id, " in said
    assert f"--columns {key}=NAME" in said or f" {key}=NAME" in said


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])  # a csv has no null: empty is the empty text
@pytest.mark.parametrize("column", COLUMNS)
def test_null_is_named_with_file_row_and_column(ending, column, tmp_path):
    path = write(tmp_path / f"pairs{ending}", changed(2, **{column: None}))
    assert f"{path}: row 3, column {column}: null" in refusal(path)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_null_among_numbers_is_the_one_that_is_named(ending, tmp_path):
    """pandas makes floats of [1, null]: the row to blame is the null's, not the first float's."""
    rows = [{**row, "id": None if i == 2 else i} for i, row in enumerate(ROWS)]
    path = tmp_path / f"pairs{ending}"
    if ending == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    assert f"{path}: row 3, column id: null" in refusal(write(path, rows) if ending == ".jsonl" else path)


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("winner", ["model_c", "0", "", "-1"])
def test_an_unknown_winner_is_named_with_file_row_and_column(ending, winner, tmp_path):
    path = write(tmp_path / f"pairs{ending}", changed(1, winner=winner))
    assert f"{path}: row 2, column winner: {winner!r}" in refusal(path)


@pytest.mark.parametrize("value", [7, 1.5, True, ["a"], {"role": "user", "content": "a"}])
def test_a_text_that_is_no_text_is_named(value, tmp_path):
    path = write(tmp_path / "pairs.jsonl", changed(3, response_b=value))
    assert f"{path}: row 4, column response_b: {value!r}" in refusal(path)


def test_an_empty_id_is_named(tmp_path):
    path = write(tmp_path / "pairs.csv", changed(1, id=""))
    assert f"{path}: row 2, column id" in refusal(path)


def test_an_id_that_is_met_again_gets_a_number_and_files_with_the_same_ids_their_names(tmp_path, capsys):
    path = write(tmp_path / "pairs.csv", changed(3, id="1e3"))
    assert list(read_pairs([path])["id"]) == ["007", "1e3", "nan", "1e3-2"]
    first = write(tmp_path / "first.jsonl", [{**ROWS[0], "id": 7}])
    second = write(tmp_path / "second.csv", [ROWS[1], {**ROWS[2], "id": "7"}])  # 7 and "7" are one id
    capsys.readouterr()
    assert list(read_pairs([first, second])["id"]) == ["first.jsonl:7", "second.csv:1e3", "second.csv:7"]
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"{first}, {second}: the same ids in several files: their rows are named FILE:ID"


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_a_file_without_bytes_and_one_without_rows_are_refused(ending, tmp_path):
    path = tmp_path / f"pairs{ending}"
    path.write_bytes(b"")
    assert f"{path}: empty file" in refusal(path)
    if ending == ".jsonl":
        path.write_text("\n")
        assert str(path) in refusal(path)
    else:
        pd.DataFrame(columns=COLUMNS).to_parquet(path) if ending == ".parquet" else path.write_text(
            ",".join(COLUMNS) + "\n"
        )
        assert f"{path}: no rows" in refusal(path)


@pytest.mark.parametrize("holds", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("says", [".parquet", ".csv", ".jsonl"])
def test_a_file_that_is_not_what_its_ending_says_is_refused(holds, says, tmp_path):
    if holds == says:
        return
    path = tmp_path / f"pairs{says}"
    path.write_bytes(Path(write(tmp_path / f"real{holds}", ROWS)).read_bytes())
    assert refusal(path).startswith(f"{path}: ")


def test_other_unreadable_files_are_refused_by_name(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "latin.csv").write_bytes("id,prompt,response_a,response_b\n1,é,b,c\n".encode("latin-1"))
    (tmp_path / "ragged.csv").write_text("id,prompt,response_a,response_b\n1,a,b,c\n2,a,b,c,d\n")
    (tmp_path / "short.csv").write_text("id,prompt,response_a,response_b\n1,a,b,c\n2,a,b\n")
    (tmp_path / "open.csv").write_text('id,prompt,response_a,response_b\n1,a,b,"c\n')
    (tmp_path / "twice.csv").write_text("id,prompt,prompt,response_a,response_b\n1,a,b,c,d\n")
    (tmp_path / "cut.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])[:20])
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (tmp_path / "pairs.xlsx").write_text("x")
    whole = Path(write(tmp_path / "pairs.parquet", ROWS)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    said = {path.name: refusal(path) for path in sorted(tmp_path.iterdir()) if path.name != "pairs.parquet"}
    assert all(line.startswith(f"{tmp_path / name}: ") for name, line in said.items()), said
    assert "row 2: 3 cells, the header has 4" in said["short.csv"]  # else a cut file gets an empty answer
    assert "row 2: 5 cells, the header has 4" in said["ragged.csv"] and "row 2" in said["cut.jsonl"]
    assert "column prompt: stands there twice" in said["twice.csv"]
    assert "save the sheet as .csv" in said["pairs.xlsx"]
    assert "no such file" in refusal(tmp_path / "none.csv")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    for ending in (".csv", ".jsonl"):
        path = tmp_path / f"pairs{ending}"
        path.write_bytes(b"\xef\xbb\xbf" + Path(write(path, ROWS)).read_bytes())
        assert list(read_pairs([str(path)])["id"]) == [row["id"] for row in ROWS]


def test_lone_surrogates_are_replaced_and_pairs_are_joined(tmp_path):
    """JSON can hold half of a UTF-16 pair; neither a tokenizer nor parquet takes it."""
    path = tmp_path / "pairs.jsonl"
    cells = {"id": "\\ud83d1", "prompt": "a\\ud83d", "response_a": "\\ude00b", "response_b": "\\ud83d\\ude00"}
    line = "{" + ", ".join(f'"{column}": "{cell}"' for column, cell in cells.items()) + "}"
    path.write_text(line + "\n")
    table = read_pairs([str(path)])
    assert table.loc[0, "id"] == "\ufffd1"
    assert table.loc[0, ["prompt", "response_a", "response_b"]].tolist() == ["a\ufffd", "\ufffdb", "😀"]
    table.to_parquet(tmp_path / "copy.parquet")


def test_swap_flips_the_label_and_nothing_else_and_twice_is_no_change(tmp_path):
    table = read_pairs([write(tmp_path / "pairs.csv", [{**row, "language": "x"} for row in ROWS])])
    table["label"] = [1.0, 0.0, 0.25, 0.5]
    before = table.copy()
    for old, new in zip(table.to_dict("records"), swapped(table).to_dict("records"), strict=True):
        by_hand = {**old, "response_a": old["response_b"], "response_b": old["response_a"]}
        assert new == {**by_hand, "label": 1 - old["label"]}
    pd.testing.assert_frame_equal(swapped(swapped(table)), table)
    pd.testing.assert_frame_equal(table, before)  # the argument is left as it was


def test_held_out_rows_are_those_whose_index_leaves_fold_as_the_remainder():
    table = pd.DataFrame({"id": [str(i) for i in range(23)]})
    for fold in range(5):
        train, held_out = split(table, 5, fold)
        assert list(held_out["id"]) == [str(i) for i in range(23) if i % 5 == fold]
        assert list(train["id"]) == [str(i) for i in range(23) if i % 5 != fold]
        assert list(train.index) == list(range(len(train)))
    assert len(split(pd.DataFrame({"id": np.arange(48_439)}), 1000, 0)[1]) == 49  # the seed's validation part


def test_the_record_of_a_file_changes_with_its_bytes(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, example B.1
    assert file_record(str(path)) == {"file": str(path), "bytes": 3, "sha256": sha256}
