"""Whatever file somebody passes to --data ends in a table, or in one line that names file, row and value.

read_pairs([path]) raises ValueError; `python train.py --data path` prints that line and exits with status 1,
before a model is loaded or a folder made.

The cases are data, in bad_input.py. Compared with: the words that each case says its message must have; the
texts as they were written.
"""

import json
import sys

import children
import numpy as np
import pandas as pd
import pytest
from bad_input import ACCEPTED, ODD, REFUSED, ROW, jsonl

import infer
import train
from minarena.files.pairs import read_pairs
from minarena.files.repair import repaired
from minarena.runtime import console


def named(cases: list) -> dict:
    return {"argvalues": cases, "ids": [case[0] for case in cases]}


def line_of(command, words: list[str], monkeypatch) -> str:
    """What the command says when it stops; anything but one line is an error here."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/command.py"])
    with pytest.raises(SystemExit) as stopped:
        console.run_command(lambda: command.main(words))
    assert stopped.value.__context__ is None and str(stopped.value).count("\n") == 0
    return str(stopped.value)


def test_there_are_cases_enough():
    assert len(REFUSED) >= 60 and len({name for name, _, _ in REFUSED}) == len(REFUSED)


@pytest.mark.parametrize(("name", "content", "words"), **named(REFUSED))
def test_a_file_that_cannot_be_used_is_refused_by_reader_and_commands(
    name, content, words, tmp_path, runs, monkeypatch
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_pairs([str(path)])
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.count("\n") == 0
    assert len(message) < len(str(path)) * 2 + 400 and message.isprintable()
    for word in words:
        assert word in message
    out = ["--out", str(tmp_path / "run")]
    trained = line_of(train, ["--data", str(path), "--n-splits", "2", *out], monkeypatch)
    assert trained == f"command.py: {message}"
    out = ["--out", str(tmp_path / "out.csv"), "--adapter", runs[0]]
    assert line_of(infer, ["--data", str(path), *out], monkeypatch) == trained
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "content", "cells"), **named(ACCEPTED))
def test_odd_texts_and_files_are_read_as_they_are(name, content, cells, tmp_path):
    (tmp_path / name).write_bytes(content)
    row = read_pairs([str(tmp_path / name)]).iloc[0]
    assert {column: row[column] for column in cells} == cells


@pytest.mark.parametrize("truncation", ["left", "middle"])
def test_odd_texts_are_trained_on_and_predicted(truncation, tiny, tmp_path):
    """All at once, each as prompt, as response_a and as response_b; most are longer than --max-length. A
    million characters stand in one prompt; the answers have 100,000 of them."""
    odd = [text for name, text in ODD.items() if name != "million"] + ["lone \ud83d half"]  # one is enough
    rows = [
        {**ROW, "id": f"{column} {number}", column: text[:most], "winner": ["model_a", "model_b"][number % 2]}
        for column, most in (("prompt", None), ("response_a", 100_000), ("response_b", 100_000))
        for number, text in enumerate(odd)
    ]
    path = tmp_path / "odd.jsonl"
    path.write_bytes(jsonl(*rows))
    how = ["--max-length", "200", "--truncation", truncation]
    words = ["--data", str(path), "--n-splits", "4", "--model", tiny, "--lora-r", "2", *how]
    result = train.main([*words, "--out", str(tmp_path / "run")])
    used = read_pairs([str(path)], ties="drop")
    blank = sum(not text.strip() for text in odd)
    assert len(used) == len(rows) - 3 * blank
    assert result["rows"] == sum(i % 4 != 0 for i in used.index) and np.isfinite(result["eval"]["log_loss"])
    words = ["--adapter", str(tmp_path / "run"), "--data", str(path), "--out", str(tmp_path / "s.csv")]
    infer.main([*words, "--probs", str(tmp_path / "p.parquet")])
    probs = pd.read_parquet(tmp_path / "p.parquet")
    assert list(probs["id"]) == [row["id"] for row in rows] == list(pd.read_csv(tmp_path / "s.csv")["id"])
    assert np.isfinite(probs["winner_model_a"]).all()


def test_repair_leaves_no_text_that_cannot_be_encoded():
    table = pd.DataFrame({column: [*ODD.values()] for column in ("prompt", "response_a", "response_b")})
    for text in repaired(table)["prompt"]:
        assert isinstance(text, str)
        text.encode()


@pytest.mark.parametrize("script", ["train", "infer"])
def test_from_the_shell_it_is_one_line_and_status_1(script, tmp_path, runs):
    path = tmp_path / "pairs.csv"
    path.write_text("id,prompt,response_a,response_b,winner\n1,q,a,b,model_c\n")
    words = ["--data", str(path), "--out", str(tmp_path / "out.csv")]
    words += ["--adapter", runs[0]] if script == "infer" else []
    code, said = children.run(script, words)
    reason = f"{path}: row 1, column winner: 'model_c' is neither response_a nor response_b nor a tie"
    reason += " in any usual word: --winner-words a=WORD b=WORD tie=WORD says which means which"
    assert code == 1 and "Traceback" not in said and "{" not in said  # no result
    assert said.splitlines()[-1] == f"{script}.py: {reason}"


def test_the_file_of_held_out_rows_is_checked_too(tmp_path, monkeypatch):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_bytes(jsonl(ROW))
    bad.write_bytes(jsonl({**ROW, "winner": json.loads("NaN")}))
    words = ["--data", str(good), "--eval-data", str(bad), "--out", str(tmp_path / "run")]
    assert f"{bad}: row 1, column winner: null" in line_of(train, words, monkeypatch)
