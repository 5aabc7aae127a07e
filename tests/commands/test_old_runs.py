"""Runs made by an earlier commit are still runs: infer.py, the report and --resume take them unchanged.

tests/fixtures/82acc6f has a finished run, the same run cut off after five of its eight steps, and the
probabilities that that commit's infer.py printed. Compared with: those files. An option that a record lacks
counts as the value that gave the old behaviour; keys that are no longer options (`swap`) are ignored.
"""

import json
import shutil

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file

import infer
import train
from minarena.report import __main__ as report

OLD = REPOSITORY / "tests" / "fixtures" / "82acc6f"
WORDS = ["--limit", "64", "--batch-size", "8", "--lora-r", "4", "--save-every", "5", "--resume", "--out"]


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def test_infer_predicts_with_an_old_run_what_the_old_commit_predicted(old, tmp_path):
    words = ["--adapter", str(old / "finished"), "--limit", "64", "--out", str(tmp_path / "s.csv")]
    infer.main([*words, "--probs", str(tmp_path / "p.csv")])
    before, now = pd.read_csv(old / "probs.csv"), pd.read_csv(tmp_path / "p.csv")
    pd.testing.assert_frame_equal(now, before, rtol=0, atol=1e-5)
    assert now["winner_model_a"].std() > 0.01  # the rows differ


def test_the_report_reads_old_runs(old, tmp_path, capsys):
    page = tmp_path / "r.html"
    report.main([str(old / "finished"), str(old / "cut_off"), "--out", str(page)])
    assert json.loads(capsys.readouterr().out)["runs"] == [str(old / "finished"), str(old / "cut_off")]
    assert "8 of 8 steps" in page.read_text() and "5 of 8 steps, unfinished" in page.read_text()


def test_an_old_run_that_was_cut_off_is_resumed_to_the_end_that_the_straight_run_had(old, capsys):
    result = train.main([*WORDS, str(old / "cut_off")])
    assert (result["steps"], result["resumed_after"]) == (8, 5)
    ends = [load_file(old / name / "adapter_model.safetensors") for name in ("cut_off", "finished")]
    start = load_file(OLD / "cut_off" / "checkpoint-5" / "adapter_model.safetensors")
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-3, atol=1e-5)
    assert any((tensor - start[name]).abs().max() > 1e-3 for name, tensor in ends[0].items())
    tables = [pd.read_parquet(old / name / "eval.parquet") for name in ("cut_off", "finished")]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-4)


def test_an_old_finished_run_has_nothing_left_to_do_and_prints_its_result(old, capsys):
    result = train.main([*WORDS, str(old / "finished")])
    assert "nothing is left to do" in capsys.readouterr().err
    assert result["steps"] == 8 and result["eval"]["accuracy"] == result["eval"]["ab"]["accuracy"]


def test_an_option_that_the_record_lacks_counts_as_the_old_behaviour_and_unknown_keys_as_nothing(
    old, monkeypatch
):
    path = old / "cut_off" / "train_config.json"
    record = json.loads(path.read_text())
    assert record.pop("swap") is False and record.pop("head_dropout") == 0.1 and record.pop("ties") == "drop"
    path.write_text(json.dumps(record | {"an option of the past": 3}))
    with pytest.raises(ValueError, match=r"--resume: head_dropout was 0\.1, now it is 0\.2"):
        train.main([*WORDS, str(old / "cut_off"), "--head-dropout", "0.2"])
    taken = []
    monkeypatch.setattr(
        train, "train_step", lambda *arguments, **more: taken.append(more["dropout_seed"][1]) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        train.main([*WORDS, str(old / "cut_off")])
    assert taken == [5]  # five steps are done: it goes on with the next
