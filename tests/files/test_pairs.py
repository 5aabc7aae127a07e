"""Files are read piece by piece, and no row is lost in silence; texts are repaired by all cores.

read_pairs([path], ties="drop", limit=9, bar=tqdm)     rows that teach nothing: left out, reported by reason
read_pairs([path])                                    every row, as inference needs it
repaired(table, workers=2)                            ftfy in two processes

Compared with: the rows that were written, reading in one piece, and ftfy itself.
"""

import io
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ftfy
import pandas as pd
import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from test_layouts import chosen_rows, jsonl
from tqdm import tqdm

from minarena.data import output_ids, split
from minarena.files import formats, repair
from minarena.files.pairs import read_pairs
from minarena.files.repair import fix_texts, repaired
from minarena.tiny import demo_pairs


def test_rows_that_teach_nothing_are_counted_by_reason_and_kept_for_inference(tmp_path, capsys):
    texts = [
        ("q", "a", "b", "model_a"),
        ("q", " \n", "b", "model_a"),
        ("q", "a", "", "model_b"),
        ("\t", "a", "b", "model_b"),
        ("q", "same", "same", "model_b"),
        ("q", "a", "b", "tie"),
        ("q", "a", "c", "tie (bothbad)"),
        ("", "", "", "tie"),  # counted once, under the first reason
        ("q", "c", "d", "model_b"),
    ]
    columns = ["prompt", "response_a", "response_b", "winner"]
    rows = [{"id": i, **dict(zip(columns, text, strict=True))} for i, text in enumerate(texts)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    dropped = read_pairs([path], ties="drop")
    said = capsys.readouterr().err
    assert list(dropped["id"]) == ["0", "8"]
    reasons = "2 with an empty prompt; 2 with an empty response; 1 with equal responses"
    columns = "a=response_a b=response_b id=id prompt=prompt winner=winner"
    used = f"9 rows read, 2 used; {reasons}; 2 ties (--ties half keeps them)"
    assert said == f"{path}: two answers ({columns}), {used}\n"
    half = read_pairs([path], ties="half")
    assert list(half["id"]) == ["0", "5", "6", "8"] and list(half["label"]) == [1, 0.5, 0.5, 0]
    assert list(read_pairs([path])["id"]) == [str(i) for i in range(9)]
    capsys.readouterr()
    assert read_pairs([path], limit=2, ties="half")["id"].tolist() == ["0", "5"]
    assert "9 rows read, 2 used" in (said := capsys.readouterr().err) and "2 beyond --limit" in said


def test_a_rows_fold_does_not_depend_on_which_other_rows_are_used(tmp_path):
    row = {"prompt": "q", "response_a": "A", "response_b": "B"}
    winners = ["tie" if i % 3 == 0 else "model_a" for i in range(30)]
    path = jsonl(tmp_path / "t.jsonl", [{"id": i, **row, "winner": w} for i, w in enumerate(winners)])
    for ties in ("drop", "half"):
        held_out = split(read_pairs([path], ties=ties), n_splits=5, fold=2)[1]
        assert {int(i) % 5 for i in held_out["id"]} == {2}


def test_a_pair_that_is_repeated_in_a_file_without_ids_is_used_once(tmp_path, capsys):
    first = jsonl(tmp_path / "a.jsonl", chosen_rows(5))
    second = jsonl(tmp_path / "b.jsonl", chosen_rows(8))
    table = read_pairs([first, second], ties="drop")
    assert sorted(table["prompt"]) == [f"q{i}" for i in range(8)]
    assert "5 pairs are repeated" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl", ".jsonl.gz", ".csv.gz"])
def test_reading_in_small_pieces_changes_nothing(ending, tmp_path, monkeypatch):
    rng = random.Random(1)
    words = ["a", "ответ", "答案", '"quoted"', "new\nline", ",", "🍕"]
    rows = [
        {"id": i, **{c: " ".join(rng.choices(words, k=5)) for c in ("prompt", "response_a", "response_b")}}
        | {"winner": rng.choice(["model_a", "model_b"])}
        for i in range(50)
    ]
    path = tmp_path / f"pairs{ending}"
    if "jsonl" in ending:
        jsonl(path, rows)
    else:
        frame = pd.DataFrame(rows)
        frame.to_parquet(path) if ending == ".parquet" else frame.to_csv(path, index=False)
    whole = read_pairs([str(path)])
    assert whole["prompt"].tolist() == [row["prompt"] for row in rows]
    monkeypatch.setattr(formats, "ROWS", 7)
    pd.testing.assert_frame_equal(read_pairs([str(path)]), whole)


def test_a_wrong_cell_in_a_later_piece_is_named_by_its_row_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "ROWS", 7)
    row = {"prompt": "q", "response_a": "A", "response_b": "B", "winner": "model_a"}
    rows = [{"id": i, **row} for i in range(30)]
    del rows[23]["prompt"]
    with pytest.raises(ValueError, match="row 24, column prompt: null is not text"):
        read_pairs([jsonl(tmp_path / "x.jsonl", rows)])


def test_a_line_that_is_cut_in_a_later_piece_is_named_by_its_row_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "ROWS", 7)
    (tmp_path / "x.csv").write_text("id,prompt,response_a,response_b\n" + "1,q,a,b\n" * 22 + "1,q\n")
    with pytest.raises(ValueError, match="row 23: 2 cells, the header has 4"):
        list(formats.read_frames(str(tmp_path / "x.csv")))


def test_the_bar_reaches_the_size_of_the_file(tmp_path):
    path = jsonl(tmp_path / "dpo.jsonl", chosen_rows(100))
    bars = []

    def bar(**settings):
        bars.append(tqdm(file=io.StringIO(), **settings | {"disable": False}))  # as in a terminal
        return bars[-1]

    read_pairs([path], bar=bar)
    assert [(bar.n, bar.total) for bar in bars] == [(Path(path).stat().st_size,) * 2]


# ---------------------------------------------------------------------------------------------- repair


@given(st.text(st.characters(max_codepoint=127)) | st.sampled_from(["a &amp; b", "a\r\nb", "\x1b[1mbold"]))
def test_ascii_text_that_is_not_shown_to_ftfy_would_come_back_unchanged(text):
    assert fix_texts([text]) == [ftfy.fix_text(text)]


def test_repair_by_two_processes_is_repair_by_one_and_keeps_rows_and_index(monkeypatch):
    monkeypatch.setattr("minarena.files.repair.BATCH", 7)
    table = demo_pairs(50, seed=2)
    table["response_b"] = [f"schÃ¶n {i} ﬁne" if i % 3 else text for i, text in enumerate(table["response_b"])]
    table = table.set_index(pd.Index(range(100, 600, 10)))
    mended = repaired(table, workers=2)
    pd.testing.assert_frame_equal(mended, repaired(table, workers=1))
    assert list(mended["response_b"]) == [ftfy.fix_text(text) for text in table["response_b"]]
    assert list(mended.index) == list(table.index) and list(mended["id"]) == list(table["id"])


def test_a_script_without_a_main_guard_is_not_run_again_by_the_processes_of_repair(tmp_path):
    program = """
import pandas as pd
from minarena.files import repair
print("begins")
repair.BATCH = 1
table = pd.DataFrame({name: ["schÃ¶n"] * 4 for name in ("prompt", "response_a", "response_b")})
print(set(repair.repaired(table, workers=2)["prompt"]) == {"schön"}, __name__)
"""
    (tmp_path / "script.py").write_text(program, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(tmp_path / "script.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert (ended.stdout, ended.stderr) == ("begins\nTrue __main__\n", "")


def test_where_the_processes_of_repair_die_one_process_does_it_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(repair, "in_order", lambda pool, *_: [pool.submit(os._exit, 9).result()])
    table = demo_pairs(5, seed=2).assign(prompt="schÃ¶n")
    pd.testing.assert_frame_equal(repaired(table, workers=2), table.assign(prompt="schön"))
    assert capsys.readouterr().err == "The 2 processes that repair texts died: one does it, slowly\n"


def test_few_batches_wait_for_the_processes_of_repair():
    begun = []
    with ThreadPoolExecutor(2) as pool:
        batches = (begun.append(i) or i for i in range(30))
        for i, result in enumerate(repair.in_order(pool, 4, lambda batch: -batch, batches)):
            assert result == -i and len(begun) <= i + 5
    assert len(begun) == 30


# ---------------------------------------------------------------------------------------------- options

ANSWERS = [{"q": "one?", "x": "A", "y": "B", "vote": 1}, {"q": "two?", "x": "A", "y": "B", "vote": 2}]
COLUMNS = {"prompt": "q", "a": "x", "b": "y", "winner": "vote"}


def test_columns_and_winner_words_say_what_names_do_not(tmp_path, capsys):
    path = jsonl(tmp_path / "rows.jsonl", ANSWERS)
    with pytest.raises(
        ValueError, match=r"nearest layout: .*; missing: a, b; it has q, x, y, vote; --columns"
    ):
        read_pairs([path])
    with pytest.raises(
        ValueError, match=r"row 1, column vote: 1 is neither x nor y .* --winner-words a=WORD"
    ):
        read_pairs([path], columns=COLUMNS)
    for one, two in ((1, 0), (0, 1)):
        words = {"a": str(2 - one), "b": str(1 + one)}
        table = read_pairs([path], columns=COLUMNS, winner_words=words)
        assert list(table["label"]) == [one, two]
    typed = [f"{key}={name}" for key, name in COLUMNS.items()]
    again = read_pairs([path], columns=typed, winner_words=["a=1.0", "b=2", "tie=0"])
    assert list(again["label"]) == [1, 0] and list(again["prompt"]) == ["one?", "two?"]
    assert "; --winner-words tie=0: not in the first 2 rows" in capsys.readouterr().err
    read_pairs([path], columns=COLUMNS, winner_words={"a": "1.0", "b": "2"})
    assert "--winner-words" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="score_a=NAME score_b=NAME: one of the two is missing"):
        read_pairs([path], columns=COLUMNS | {"score_a": "vote"})
    with pytest.raises(ValueError, match="--columns prompt=nowhere: no such column; it has q, x, y, vote"):
        read_pairs([path], columns={"prompt": "nowhere"})


def test_columns_say_that_one_side_is_the_better_one(tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "response_a": "A", "response_b": "B", "winner": "model_a"} for i in range(30)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    read_pairs([path])
    option = "--columns chosen=response_a rejected=response_b"
    assert f"response_a wins 100% of the rows; if it is the better one: {option}" in capsys.readouterr().err
    table = read_pairs([path], columns={"chosen": "response_a", "rejected": "response_b"})
    assert {0.0, 1.0} == set(table["label"]) and list(table["chosen"]) == list(table["label"])


def test_columns_may_name_what_stands_inside_a_cell(tmp_path):
    answers = {"data": {"prompt": "q", "answer1": "A", "answer2": "B"}, "result": [{"selected": "left"}]}
    path = jsonl(tmp_path / "studio.jsonl", [answers, {**answers, "result": [{"selected": "right"}]}])
    with pytest.raises(ValueError) as error:
        read_pairs([path])
    shown = str(error.value).partition("--columns ")[2].partition(" would")[0]
    table = read_pairs([path], columns=shown.split())
    assert list(table["label"]) == [1, 0] and list(table["prompt"]) == ["q", "q"]


def test_a_label_is_refused_in_training_and_left_out_of_inference(tmp_path, capsys):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "response_a": "A", "response_b": "B", "label": 1}])
    with pytest.raises(ValueError, match=r"column label: .* --columns winner=label --winner-words a=WORD"):
        read_pairs([path], ties="drop")
    assert read_pairs([path])["label"].isna().all() and "not used: label" in capsys.readouterr().err
    for ties in (None, "drop"):
        assert list(read_pairs([path], ties=ties, winner_words={"a": "1", "b": "0"})["label"]) == [1]


TWO = {"response_a": "A", "response_b": "B"}
WAYS_OUT = {  # a row that is refused, and the options in its message that make it read
    "a cell of keys and values": {"question": {"id": "", "full_text": "q"}, **TWO},
    "answers without a score": {
        "prompt": "q",
        "responses": [{"text": "A", "by": ""}, {"text": "B", "by": ""}],
    },
    "a prompt inside": {"info": {"post": "q", "site": None}, **TWO},
}


@pytest.mark.parametrize("what", WAYS_OUT)
def test_a_refusal_shows_the_columns_that_settle_it(what, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [WAYS_OUT[what]] * 2)
    with pytest.raises(ValueError) as error:
        read_pairs([path])
    shown = str(error.value).partition("--columns ")[2].partition(" would")[0]
    table = read_pairs([path], columns=shown.split())
    assert table[["prompt", "response_a", "response_b"]].to_numpy().tolist() == [["q", "A", "B"]] * 2


def test_a_refused_winner_is_told_with_the_words_of_its_column(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", **TWO, "winner": i % 2} for i in range(9)])
    with pytest.raises(ValueError, match=r"--winner-words a=WORD b=WORD tie=WORD .* \(it holds 0, 1\)"):
        read_pairs([path])


# ---------------------------------------------------------------------------------------------- ids


def test_judges_who_differ_stay_and_those_who_agree_are_one(tmp_path, capsys):
    row = {"question_id": 81, "prompt": "q", "response_a": "A", "response_b": "B"}
    rows = [{**row, "winner": winner} for winner in ("model_a", "model_b", "model_b")]
    rows += [{**row, "question_id": 82, "prompt": "r", "winner": "model_a"}] * 3
    path = jsonl(tmp_path / "rows.jsonl", rows)
    table = read_pairs([path], ties="half")
    assert list(table["id"]) == ["81", "81-2", "81-3", "82"] and list(table["label"]) == [1, 0, 0, 1]
    assert "2 pairs are repeated: the first of each is used" in capsys.readouterr().err
    assert list(read_pairs([path])["id"]) == [
        "81",
        "81-2",
        "81-3",
        "82",
        "82-2",
        "82-3",
    ]  # every row, in order


@pytest.mark.parametrize("ids", [["x", "x", "x-2"], ["x-2", "x", "x", "x"]])
def test_numbers_of_ids_that_are_met_again_are_unique_themselves(ids, tmp_path):
    rows = [{"id": x, "prompt": f"q{i}", "response_a": "A", "response_b": "B"} for i, x in enumerate(ids)]
    table = read_pairs([jsonl(tmp_path / "rows.jsonl", rows)])
    assert table["id"].is_unique and list(table["prompt"]) == [f"q{i}" for i in range(len(ids))]


@pytest.mark.parametrize(
    ("ids", "integers"),
    [
        ([1, 2], True),
        ([-5, 2**62], True),
        (["1", "2"], False),
        ([1, "2"], False),
        ([1, 2**64], False),
        ([1, 1], False),
    ],
)
def test_ids_are_of_their_own_kind_in_the_output(ids, integers, tmp_path):
    rows = [{"id": x, "prompt": f"q{i}", "response_a": "A", "response_b": "B"} for i, x in enumerate(ids)]
    out = output_ids(read_pairs([jsonl(tmp_path / "rows.jsonl", rows)]))
    assert (list(out) == ids and out.dtype == "int64") if integers else all(isinstance(x, str) for x in out)


def test_the_order_of_a_file_changes_neither_ids_nor_sides(tmp_path):
    rows = chosen_rows(40)
    tables = [
        read_pairs([jsonl(tmp_path / f"{i}.jsonl", part)])
        for i, part in enumerate((rows, rows[::-1], rows[7:]))
    ]
    whole = tables[0].set_index("id")
    for table in tables[1:]:
        part = table.set_index("id")
        pd.testing.assert_frame_equal(part, whole.loc[part.index])


def test_one_winner_word_with_two_meanings_is_refused(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text("question,answer_1,answer_2,vote\nwhy,because,no,1\n", encoding="utf-8")
    for words in (["a=1", "b=2", "tie=1"], ["a=1", "b=1.0"]):
        with pytest.raises(ValueError, match="--winner-words: one word has two meanings: 1, "):
            read_pairs([str(path)], winner_words=words)
    assert read_pairs([str(path)], winner_words=["a=1", "b=2", "tie=0"])["label"].tolist() == [1.0]
