"""Pseudo-labels: each label belongs to its id, whatever happens on the way, and train.py reads them back.

infer.py --adapter DIR... --data FILE --pseudo pseudo.parquet [--exclude FILE] [--pseudo-threshold 0.95]
infer.py --distill RUN... --data train.parquet --pseudo distilled.parquet
train.py --data distilled.parquet --eval-data valid.parquet

Compared with: each row predicted alone, from a text written by hand, so that no sorting, batch, part or file
can put a label beside another row; and with the tables of the folds themselves.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CPU, TEXTS, label_file, rows_of_all_lengths, write_pairs

import infer
import train
from minarena.ensemble import predict
from minarena.ensemble.adapters import find_adapter
from minarena.ensemble.predict import Predictor, predict_pairs
from minarena.files.base import load_backbone
from minarena.files.pairs import read_pairs
from minarena.model import PreferenceModel
from minarena.step import Compute
from minarena.tiny import byte_tokenizer, demo_pairs

# ---------------------------------------------------------------------------------------------- by id


@pytest.mark.parametrize("part_rows", [5, 10_000])
def test_each_probability_belongs_to_its_id(runs, alone, tiny, part_rows, monkeypatch):
    """Fails if predictions come back in the order of lengths, or are written back by position after it."""
    monkeypatch.setattr(predict, "PART", part_rows)
    table = rows_of_all_lengths()
    lengths = table[TEXTS].map(len).sum(axis=1)
    assert not lengths.is_monotonic_increasing and not lengths.is_monotonic_decreasing
    model = PreferenceModel(load_backbone(tiny, CPU, torch.float32), torch.nn.Identity())
    adapters = [find_adapter(run) for run in runs]
    p = predict_pairs(Predictor(model, byte_tokenizer(), Compute(token_budget=900), 200), table, adapters)
    expected = {
        row["id"]: (alone(row, 0, "ab") + alone(row, 1, "ba")) / 2 for row in table.to_dict("records")
    }
    assert len(p) == len(table) and p.index.is_unique
    spread = np.std([*expected.values()])
    for i, value in expected.items():
        assert p[i] == pytest.approx(value, abs=1e-5)
    assert spread > 0.01  # else any order of the values would pass


def test_the_label_file_joins_labels_and_texts_by_id_and_leaves_out_what_the_seed_left_out(
    runs, alone, tmp_path, small_parts, capsys
):
    table = rows_of_all_lengths().drop(columns="label")
    table.loc[2, "response_a"], table.loc[4, "response_b"], table.loc[6, "response_a"] = "", " ", "\n"
    table.loc[8, "prompt"] = "  A prompt that is known.\n"
    data = str(tmp_path / "rows.parquet")
    table.to_parquet(data)
    known = pd.DataFrame(
        {"id": ["k"], "prompt": ["A prompt that is known."], "response_a": "x", "response_b": "y"}
    )
    known.to_csv(tmp_path / "known.csv", index=False)
    out = str(tmp_path / "pseudo.parquet")
    words = ["--adapter", *runs, "--tta", "all", "--data", data, "--pseudo", out]
    result = infer.main([*words, "--exclude", str(tmp_path / "known.csv"), "--token-budget", "900"])
    said = capsys.readouterr().err
    assert "3 with an empty response" in said and "1 rows have a prompt that is in --exclude" in said
    kept = table.drop(index=[2, 4, 6, 8])
    labels = label_file(out)
    assert list(labels) == list(kept["id"]) and result["labels"] == len(kept) == result["rows"]
    for row in kept.to_dict("records"):
        passes = [alone(row, number, order) for number in (0, 1) for order in ("ab", "ba")]
        assert labels[row["id"]] == pytest.approx(np.mean(passes), abs=1e-5)
    written = pd.read_parquet(out).set_index("id")[TEXTS]
    pd.testing.assert_frame_equal(written, kept.set_index("id")[TEXTS])
    assert not Path(f"{out}.parts").exists() and not Path("submission.csv").exists()


def test_a_conversations_own_prompt_column_is_excluded_too(tmp_path, capsys):
    """The seed dropped the prompts of the ORPO set, whose column has the last question only."""
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q1"}]
    row = {
        "prompt": "q1",
        **{c: [*talk, {"role": "assistant", "content": c}] for c in ("chosen", "rejected")},
    }
    pd.DataFrame([row]).to_parquet(tmp_path / "orpo.parquet")
    rows = pd.DataFrame({"id": ["1", "2", "3"], "prompt": ["q1", "System: s\n\nUser: q1", "q2"]})
    rows.assign(response_a="x", response_b="y").to_csv(tmp_path / "rows.csv", index=False)
    words = ["--adapter", "x", "--pseudo", "p.parquet", "--data", str(tmp_path / "rows.csv")]
    config = infer.parse(infer.InferConfig, [*words, "--exclude", str(tmp_path / "orpo.parquet")])
    assert list(infer.unlabelled(config)["id"]) == ["3"]


def test_above_a_threshold_labels_are_hard_and_the_other_rows_are_left_out(runs, tmp_path):
    data = write_pairs(tmp_path / "rows.csv", rows_of_all_lengths())
    soft, hard = tmp_path / "soft.parquet", tmp_path / "hard.parquet"
    words = ["--adapter", runs[0], "--data", data]
    infer.main([*words, "--pseudo", str(soft)])
    confidence = {i: max(p, 1 - p) for i, p in label_file(soft).items()}
    threshold = float(np.median([*confidence.values()]))
    infer.main([*words, "--pseudo", str(hard), "--pseudo-threshold", str(threshold)])
    labels = label_file(hard)
    assert labels == {i: float(p > 0.5) for i, p in label_file(soft).items() if confidence[i] > threshold}
    assert 0 < len(labels) < len(confidence) and set(labels.values()) <= {0.0, 1.0}
    with pytest.raises(ValueError, match=r"--pseudo-threshold 0\.9999: no row is that sure"):
        infer.main([*words, "--pseudo", str(tmp_path / "none.parquet"), "--pseudo-threshold", "0.9999"])


def test_options_that_make_no_sense_together_are_refused(runs, tmp_path):
    (tmp_path / "there.parquet").write_text("x")
    out = f"--pseudo {tmp_path}/p.parquet"
    a = f"--adapter {runs[0]}"
    for words, named in (
        (f"{a} --data x.csv --exclude y.csv", "--pseudo FILE is needed"),
        (f"{a} --data x.csv --pseudo-threshold 0.9", "--pseudo FILE is needed"),
        ("--distill d --data x.csv", "--pseudo FILE is needed"),
        (f"{a} {out}", "--pseudo needs --data FILE"),
        (f"{a} {out} --data x.csv --probs p.csv", "drop --probs"),
        (f"{a} {out} --data x.csv --pseudo-threshold 1.5", "--pseudo-threshold 1.5: must be"),
        (f"{a} --data x.csv --pseudo {tmp_path}/there.parquet", "there.parquet exists"),
        (f"{a} --data x.csv --pseudo {tmp_path}/p.txt", "must end in .csv or .parquet"),
    ):
        with pytest.raises(ValueError, match=named):
            infer.main(words.split())


# ---------------------------------------------------------------------------------------------- distillation


def folds(tmp_path, data: str, k: int = 3) -> tuple[list[str], dict[str, float]]:
    """k finished runs, as far as --distill looks at them, and the probability of each id, drawn at random."""
    table = read_pairs([data], ties="drop")
    rng = np.random.default_rng(4)
    p = dict(zip(table["id"], rng.random(len(table)), strict=True))
    folders = []
    for fold in range(k):
        folder = tmp_path / f"fold{fold}"
        folder.mkdir(exist_ok=True)
        held_out = table[table.index % k == fold].sample(frac=1, random_state=fold)
        held_out = held_out[["id", "label"]].assign(p_a=[p[i] for i in held_out["id"]])
        held_out.to_parquet(folder / "eval.parquet")
        files = train.records([data])
        record = {
            "data_files": files,
            "eval_data": None,
            "n_splits": k,
            "fold": fold,
            "limit": None,
            "ties": "drop",
        }
        (folder / "train_config.json").write_text(json.dumps(record))
        folders.append(str(folder))
    return folders, p


def test_distilled_labels_are_each_rows_own_held_out_probability(tmp_path):
    table = rows_of_all_lengths()
    table.loc[5, "response_a"] = ""  # not used, by the runs and by --distill alike
    data = write_pairs(tmp_path / "train.parquet", table)
    runs, p = folds(tmp_path, data)
    out = tmp_path / "distilled.parquet"
    result = infer.main(["--distill", *reversed(runs), "--data", data, "--pseudo", str(out)])
    assert label_file(out) == pytest.approx(p) and len(p) == len(table) - 1 == result["labels"]
    assert list(label_file(out)) == list(read_pairs([data], ties="drop")["id"])
    back = read_pairs([str(out)], ties="drop")
    assert back["pseudo"].all() and dict(zip(back["id"], back["label"], strict=True)) == pytest.approx(p)


def test_distillation_refuses_what_is_not_held_out_probabilities_of_these_rows(tmp_path):
    data = write_pairs(tmp_path / "train.parquet", rows_of_all_lengths())
    other = write_pairs(tmp_path / "other.parquet", rows_of_all_lengths(22))
    runs, _ = folds(tmp_path, data)
    words = ["--data", data, "--pseudo", str(tmp_path / "d.parquet"), "--distill"]
    with pytest.raises(ValueError, match=r"7 rows were held out by no run \(folds 0, 1 of 3 are here\)"):
        infer.main([*words, *runs[:2]])
    with pytest.raises(ValueError, match=f"{runs[0]}: was not trained on folds of --data {other}"):
        infer.main(["--data", other, *words[2:], *runs])
    with pytest.raises(ValueError, match=r"not a finished run of train.py: .*eval\.parquet"):
        infer.main([*words, str(tmp_path)])
    record = Path(runs[2]) / "train_config.json"
    begun = json.loads(record.read_text()) | {"init_adapter": "runs/first"}  # it may have seen every row
    record.write_text(json.dumps(begun))
    with pytest.raises(
        ValueError, match=f"{runs[2]}: began from --init-adapter runs/first, which may have seen"
    ):
        infer.main([*words, *runs])
    record.write_text(json.dumps(begun | {"init_adapter": None}))
    path = Path(runs[1]) / "eval.parquet"
    held_out = pd.read_parquet(path)
    held_out.assign(label=1 - held_out["label"]).to_parquet(path)  # as if a and b had been dealt otherwise
    with pytest.raises(ValueError, match="is not in --data with the same label"):
        infer.main([*words, *runs])
    assert not (tmp_path / "d.parquet").exists()


def test_folds_trained_by_train_py_can_be_distilled_and_trained_on(tiny, pairs_file, tmp_path):
    base = f"--model {tiny} --limit 24 --batch-size 8 --lora-r 4 --max-length 200".split()
    for fold in (0, 1):
        more = f"--data {pairs_file} --n-splits 2 --fold {fold} --out {tmp_path}/{fold}"
        train.main([*base, *more.split()])
    out = str(tmp_path / "d.parquet")
    runs = [str(tmp_path / "0"), str(tmp_path / "1")]
    infer.main(["--distill", *runs, "--data", pairs_file, "--pseudo", out])
    held_out = pd.concat([pd.read_parquet(f"{run}/eval.parquet") for run in runs]).set_index("id")["p_a"]
    assert label_file(out) == pytest.approx(held_out.to_dict()) and len(held_out) == 24
    valid = write_pairs(tmp_path / "valid.csv", demo_pairs(4, seed=77, held_out=True))
    result = train.main([*base, "--data", out, "--eval-data", valid, "--out", str(tmp_path / "student")])
    assert result["rows"] == 24 and result["steps"] == 3
