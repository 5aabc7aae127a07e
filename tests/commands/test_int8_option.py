"""--matmul int8 in the commands: found once, recorded, compared, and left alone where it would do harm.

train.py --matmul int8                    a line says what rounding changes; the record has int8_columns
train.py --matmul int8 --resume           the same columns, or a refusal
infer.py --adapter DIR                    the product that the adapter was trained with

Compared with: the same run with --matmul dequant, and a run that was not interrupted.
"""

import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import write_pairs

import infer
import train
from minarena.files import base, outliers
from minarena.tiny import demo_pairs

WORDS = ["--batch-size", "8", "--lora-r", "4", "--lora-dropout", "0", "--head-dropout", "0"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("rows") / "valid.parquet", demo_pairs(60, 5, True))


@pytest.fixture(scope="module")
def trained(valid):
    """A function (folder, options) -> the run's record with its losses: the demo's base, 48 rows, 6 steps."""
    data = write_pairs(Path(valid).with_name("train.parquet"), demo_pairs(48, 5))
    return partial(train_on, data, valid)


def train_on(data: str, valid: str, out: Path, *words: str) -> dict:
    train.main([*WORDS, "--data", data, "--eval-data", valid, "--out", str(out), *words])
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    record = json.loads((out / "train_config.json").read_text())
    return record | {"losses": [event["loss"] for event in events if event["event"] == "step"]}


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("int8") / "run"
    return out, trained(out, "--matmul", "int8")


@pytest.fixture(scope="module")
def dequantized(trained, tmp_path_factory) -> dict:
    return trained(tmp_path_factory.mktemp("dequant") / "run")


def test_a_run_in_int8_learns_as_the_dequantized_one_does_but_not_the_same_bits(run, dequantized):
    _, record = run
    assert record["matmul"] == "int8" and len(record["int8_columns"]) == 16
    assert dequantized["int8_columns"] is None
    pairs = [*zip(record["losses"], dequantized["losses"], strict=True)]
    assert len(pairs) == 6 and all(a == pytest.approx(b, abs=0.02) for a, b in pairs)
    assert any(a != b for a, b in pairs)


def test_infer_takes_the_product_of_training_and_says_what_it_changes(run, valid, tmp_path, capsys):
    out, record = run
    p = {}
    for words in ([], ["--matmul", "dequant"]):
        files = ["--out", str(tmp_path / "s.csv"), "--probs", str(tmp_path / "p.csv")]
        infer.main(["--adapter", str(out), "--data", valid, *files, *words])
        p[bool(words)] = pd.read_csv(tmp_path / "p.csv")["winner_model_a"]
        said = capsys.readouterr().err
        assert (record["int8_columns"] in said) == (not words)
        assert "other outlier columns" not in said
    evaluated = pd.read_parquet(out / "eval.parquet")["p_a_ab"]
    difference = (p[False] - evaluated).abs()  # in other micro-batches a rounding may fall the other way
    assert difference.median() < 1e-6 and difference.max() < 0.002
    assert 1e-6 < (p[True] - p[False]).abs().max() < 0.05


def test_a_resumed_run_is_the_straight_one_and_other_columns_are_refused(run, trained, tmp_path, monkeypatch):
    _, record = run
    out, real = tmp_path / "cut", train.train_step
    calls = []

    def stopping(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 4:
            raise FloatingPointError("cut off here")
        return real(*arguments, **keywords)

    monkeypatch.setattr(train, "train_step", stopping)
    with pytest.raises(FloatingPointError):
        trained(out, "--matmul", "int8")
    monkeypatch.setattr(train, "train_step", real)
    with monkeypatch.context() as m:
        m.setattr(outliers, "COLUMN_PAIRS", 3)
        with pytest.raises(ValueError, match="--resume: the outlier columns of --matmul int8 were"):
            trained(out, "--matmul", "int8", "--resume")
    with pytest.raises(ValueError, match="--resume: matmul was 'int8', now it is 'dequant'"):
        trained(out, "--resume")
    assert trained(out, "--matmul", "int8", "--resume")["losses"] == record["losses"]


@pytest.mark.parametrize("error", [0.3, float("nan")])
def test_where_int8_would_do_harm_the_run_goes_on_dequantized_and_says_so(
    error, trained, dequantized, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(outliers, "hidden_error", lambda *_: error)
    record = trained(tmp_path / "int8", "--matmul", "int8")
    assert "goes on with --matmul dequant" in capsys.readouterr().err
    assert record["int8_columns"] == "" and record["losses"] == dequantized["losses"]
    assert base.GUARD_ROWS == 8 and torch.get_num_threads() >= 1
