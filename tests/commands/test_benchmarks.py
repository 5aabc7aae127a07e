"""What the scripts in benchmarks/ compute and print, as far as a CPU can tell.

python benchmarks/peft_trainer.py --model DIR --data train.parquet --eval-data valid.parquet
python benchmarks/baselines.py --data train.parquet --eval-data valid.parquet

Compared with: rows chosen by hand, and the rows that train.py's own functions give.
"""

import json

import numpy as np
import pandas as pd
import pytest
from bases import write_base

from benchmarks import baselines, options, peft_trainer, random_base
from minarena.data import swapped
from minarena.files.tokenizer import load_tokenizer
from minarena.text import encode
from minarena.tiny import demo_pairs


def write_rows(path, winners: list) -> tuple[str, pd.DataFrame]:
    rows = demo_pairs(len(winners), seed=len(winners)).drop(columns="label").assign(winner=winners)
    rows["id"] = [f"{path.stem}-{i}" for i in range(len(rows))]
    rows["prompt"] = [f"{path.stem} {prompt}" for prompt in rows["prompt"]]
    rows.to_parquet(path, index=False)
    return str(path), rows


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_peer_trains_on_the_rows_of_train_py_without_its_ties(order, tmp_path, monkeypatch):
    """A tie once became a row that the second answer wins. Ties that are held out stay, as train.py's do."""
    base = write_base("llama", tmp_path / "base")
    data, rows = write_rows(tmp_path / "train.parquet", ["model_a", "tie", "model_b", "model_a"])
    held_out, _ = write_rows(tmp_path / "valid.parquet", ["model_b", "tie", "model_a"])
    seen = []

    def trained(model, rows, labels, *_):
        seen.extend([rows, labels.tolist()])
        return [0.5], [1.0]

    monkeypatch.setattr(peft_trainer, "load_classifier", lambda *_: (None, "eager"))
    monkeypatch.setattr(peft_trainer, "with_peft", lambda model, *_: model)
    monkeypatch.setattr(peft_trainer, "run_trainer", trained)
    monkeypatch.setattr(peft_trainer, "predict_first", lambda model, rows, *_: np.full(len(rows), 0.6))
    words = ["--model", base, "--data", data, "--eval-data", held_out, "--order", order]
    result = peft_trainer.main([*words, "--max-length", "300"])
    kept = rows.drop(index=1)
    shown = swapped(kept.assign(label=[1.0, 0.0, 1.0])) if order == "ba" else kept
    expected = encode(load_tokenizer(base), shown, 300)
    assert [row.tolist() for row in seen[0]] == [row.tolist() for row in expected]
    assert seen[1] == ([0, 1, 0] if order == "ab" else [1, 0, 1])  # class 0: the answer shown first wins
    assert result["rows"] == 3 and result["eval_rows"] == 3
    rows.drop(columns="winner").to_parquet(tmp_path / "unknown.parquet")
    with pytest.raises(ValueError, match="no winner for id"):
        peft_trainer.main([*words, "--data", str(tmp_path / "unknown.parquet")])
    soft, _ = write_rows(tmp_path / "soft.parquet", [[0.3, 0.7], [0.9, 0.1]])
    with pytest.raises(ValueError, match="soft labels"):
        peft_trainer.main([*words, "--data", soft])


def test_the_first_random_rows_are_the_same_however_many_are_drawn():
    few, many = (random_base.random_rows(n, 500, 7, 300) for n in (5, 21))
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
    assert len({len(row) for row in many}) > 10 and min(row.min() for row in many) >= 4


def test_the_longer_answer_wins_by_hand_and_the_line_says_where_it_was_measured(tmp_path, capsys):
    rows = demo_pairs(4, seed=1).drop(columns="label")
    rows = rows.assign(response_a=["aaa", "a", "aa", "a"], response_b=["b", "bbb", "bb", "bb"])
    rows.assign(winner=["model_a", "model_a", "model_b", "tie"]).to_parquet(tmp_path / "v.parquet")
    result = baselines.main(["--eval-data", str(tmp_path / "v.parquet")])
    assert result["rows"] == 3 and result["longer_wins"]["accuracy"] == pytest.approx(1.5 / 3)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["longer_wins"] == result["longer_wins"]
    assert {"options", "device", "torch", "transformers", "commit"} <= printed.keys()


def test_ties_are_asked_for_only_where_an_arm_takes_them(tmp_path):
    words = ["--eval-data", "v.parquet", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match=r"^--data FILE is needed"):
        options.main([*words, "--groups", "int8", "peer"])
    with pytest.raises(ValueError, match=r"v.parquet: no such file"):  # so nothing else is needed
        options.main([*words, "--data", "x.parquet", "--groups", "int8", "peer", "--seeds", "0"])
    with pytest.raises(ValueError, match="--data FILE and --ties FILE are needed"):
        options.main([*words, "--data", "x.parquet", "--groups", "int8", "pair"])
