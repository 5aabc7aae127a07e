"""infer.py as a filter and on one pair, and what it says of groups of rows.

infer.py --adapter DIR... --prompt TEXT --answers FILE_A FILE_B     one line, and one object of JSON
some_program | infer.py --adapter DIR... --data -                   a line of JSON a row
infer.py --adapter DIR... --data benchmark.jsonl                    accuracy by subset, and the mean of these

Compared with: rows predicted alone from a text written by hand, what the same rows in a file give, and
scikit-learn.
"""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import TEXTS, counted, rows_of_all_lengths
from sklearn.metrics import accuracy_score

import infer
import train
from minarena.report.groups import weak
from minarena.report.predictors import predictors_of
from minarena.report.runs import read_run
from minarena.tiny import demo_pairs


@pytest.fixture
def stdin(monkeypatch):
    """A function: bytes -> what sys.stdin has."""

    def give(data: bytes):
        class Pipe(io.BytesIO):
            def seekable(self):
                return False

        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(Pipe(data))))

    return give


def lines_of(table: pd.DataFrame, *columns: str) -> bytes:
    return table[[*columns, *TEXTS]].to_json(orient="records", lines=True).encode()


ROW = {"prompt": "Why is the sky blue?", "response_a": "Light is scattered.", "response_b": "Sorry, no idea."}


@pytest.fixture
def files(tmp_path) -> list[str]:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(ROW[f"response_{name}"] + "\n", encoding="utf-8")
    return [str(tmp_path / f"{name}.txt") for name in "ab"]


def test_one_pair_is_judged_in_both_orders_in_one_line_and_writes_no_file(runs, alone, files, capsys):
    result = infer.main(["--adapter", *runs, "--prompt", ROW["prompt"], "--answers", *files])
    out, err = capsys.readouterr()
    p = {(n, order): alone(ROW, n, order) for n in (0, 1) for order in ("ab", "ba")}
    ab, ba = (np.mean([p[n, order] for n in (0, 1)]) for order in ("ab", "ba"))
    assert json.loads(out) == result and len(out.splitlines()) == 1
    assert result["p_a"] == pytest.approx((p[0, "ab"] + p[1, "ba"]) / 2, abs=1e-5)
    assert [result[f"p_a_{order}"] for order in ("ab", "ba")] == pytest.approx([ab, ba], abs=1e-5)
    assert result["disagreement"] == pytest.approx(abs(ab - ba), abs=1e-5) and abs(ab - ba) > 1e-3
    assert result["out"] is None and result["cut"] == 0 and result["rows"] == 1
    (line,) = err.splitlines()
    assert line == (
        f"P(the first answer is preferred) {result['p_a']:.3f}: {ab:.3f} where it is shown first, {ba:.3f} "
        f"where second, {abs(ab - ba):.3f} apart; nothing is cut"
    )  # and working_folder checks that there is no submission.csv


def test_each_order_of_one_pair_is_computed_once_by_each_adapter(runs, files, monkeypatch):
    calls = counted(monkeypatch)
    infer.main(["--adapter", *runs, "--prompt", ROW["prompt"], "--answers", *files])
    assert calls == [1] * 4


def test_what_is_cut_of_one_pair_is_said_and_a_typed_out_is_written(runs, files, tmp_path, capsys):
    words = ["--adapter", runs[0], "--prompt", "long " * 90, "--answers", *files]
    result = infer.main([*words, "--out", str(tmp_path / "s.csv"), "--tta", "all", "--weights", "2"])
    tokens = 2 + len("<prompt>: \n\n<response_a>: \n\n<response_b>: ") + 450 + 19 + 15
    assert result["tokens"] == tokens and result["cut"] == tokens - 200
    assert result["p_a"] == pytest.approx((result["p_a_ab"] + result["p_a_ba"]) / 2, abs=1e-9)
    said = capsys.readouterr().err
    assert f"{tokens} tokens are cut to 200" in said
    assert "cut       1 of 1 rows are over --max-length 200 tokens" in said
    assert pd.read_csv(tmp_path / "s.csv")["winner"].tolist() == [
        "model_a" if result["p_a"] > 0.5 else "model_b"
    ]


@pytest.mark.parametrize("ids", [True, False])
def test_lines_of_stdin_are_answered_by_lines_of_stdout(ids, runs, tmp_path, stdin, capsys):
    table = rows_of_all_lengths(8)
    columns = ["id"] if ids else []
    (tmp_path / "rows.jsonl").write_bytes(lines_of(table, *columns))
    words = ["--adapter", *runs, "--tta", "all"]
    file = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "s.csv")]
    infer.main([*words, *file, "--probs", str(tmp_path / "p.parquet")])
    expected = pd.read_parquet(tmp_path / "p.parquet")
    capsys.readouterr()
    stdin(lines_of(table, *columns))
    infer.main([*words, "--data", "-"])
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [list(row) for row in rows] == [["id", "winner_model_a", "winner_model_b"]] * 8
    assert [row["id"] for row in rows] == expected["id"].tolist()
    p = [row["winner_model_a"] for row in rows]
    assert p == pytest.approx(expected["winner_model_a"].tolist(), abs=1e-14)
    assert "output    lines of JSON on stdout" in err and "(stdin): two answers" in err
    stdin(lines_of(table, *columns))
    result = infer.main([*words, "--data", "-", "--out", str(tmp_path / "other.csv")])
    assert json.loads(capsys.readouterr().out) == result  # as for any file
    assert (tmp_path / "other.csv").read_bytes() == (tmp_path / "s.csv").read_bytes()


GOOD = json.dumps(ROW).encode() + b"\n"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", r"\(stdin\): no rows"),
        (b"\n \n", r"\(stdin\): no rows"),
        (GOOD + b'{"prompt": "q", \n', r"\(stdin\): not readable as jsonl: row 2: "),
        (b'{"prompt": "q", \n', r"\(stdin\): not readable as jsonl: row 1: "),
        (GOOD + b"7\n", "row 2: not an object with the columns as keys"),
        (GOOD + b'{"prompt": "q", "response_a": "a"}\n', r"\(stdin\): row 2, column response_b: null is not"),
        (b'{"prompt": "q", "response_a": "a"}\n', "missing: b; it has prompt, response_a"),
        (GOOD + GOOD.replace(b"blue", b"bl\xfce"), "row 2: line 2 is not UTF-8"),
        (GOOD.decode().encode("utf-16"), "line 1 is not UTF-8"),
        (GOOD + GOOD.replace(b'"Light is scattered."', b"3"), "row 2, column response_a: 3 is not text"),
    ],
)
def test_what_stdin_cannot_be_is_said_in_one_line(data, named, runs, stdin):
    stdin(data)
    with pytest.raises(ValueError, match=named) as error:
        infer.main(["--adapter", *runs, "--data", "-"])
    assert "\n" not in str(error.value)


def test_options_of_one_pair_that_do_not_go_together_are_refused(runs, files, tmp_path, stdin, capsys):
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    one = f"--prompt x --answers {' '.join(files)}"
    for words, named in (
        ("--prompt x", "--prompt TEXT and --answers FILE_A FILE_B go together"),
        (f"--answers {files[0]} {files[1]}", "--prompt TEXT and --answers FILE_A FILE_B go together"),
        (f"--prompt x --answers {files[0]}", "--prompt TEXT and --answers FILE_A FILE_B go together"),
        (f"{one} {files[0]}", "--prompt TEXT and --answers FILE_A FILE_B go together"),
        (f"{one} --data x.csv", "--prompt and --answers are the row to judge: drop --data"),
        (f"{one} --limit 3", "drop --limit"),
        (f"{one} --pseudo x.parquet", "drop --pseudo"),
    ):
        with pytest.raises(SystemExit):
            infer.main(["--adapter", *runs, *words.split()])
        assert named in capsys.readouterr().err
    for words, named in (
        (f"--prompt x --answers {files[0]} {tmp_path}/none.txt", "none.txt: No such file or directory"),
        (f"--prompt x --answers {files[0]} {tmp_path}", f"--answers {tmp_path}: Is a directory"),
        (f"--prompt x --answers {files[0]} {tmp_path}/latin.txt", "latin.txt: line 1 is not UTF-8"),
        (f"{one} --out {files[0]}", "must end in .csv or .parquet"),
    ):
        with pytest.raises(ValueError, match=named):
            infer.main(["--adapter", *runs, *words.split()])
    stdin(lines_of(rows_of_all_lengths(30).assign(winner=["model_a", "model_b"] * 15), "winner"))
    with pytest.raises(ValueError, match="--data -: stdin leaves no file that could be compared later"):
        train.main(["--data", "-", "--n-splits", "2", "--out", str(tmp_path / "run")])


# ------------------------------------------------------------------------------------------- groups of rows


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> str:
    """A file of chosen and rejected answers with subsets of 30, 25, 20 and 5 rows, and one without a name."""
    table = demo_pairs(81, seed=11)
    better = table["label"] == 1
    rows = pd.DataFrame({"id": [f"r{i}" for i in range(81)], "prompt": table["prompt"]})
    rows["chosen"] = table["response_a"].where(better, table["response_b"])
    rows["rejected"] = table["response_b"].where(better, table["response_a"])
    rows["Subset"] = np.repeat(np.array(["chat", "code", 7, "few", None], object), [30, 25, 20, 5, 1])
    path = tmp_path_factory.mktemp("benchmark") / "benchmark.jsonl"
    rows.sample(frac=1, random_state=0).to_json(path, orient="records", lines=True)
    return str(path)


def test_a_labelled_file_with_subsets_has_an_accuracy_of_each_and_their_mean(
    benchmark, runs, tmp_path, monkeypatch, capsys
):
    def drawn(found, table, parts, world):  # tiny adapters prefer one side, which hides rows mixed up
        p = np.random.default_rng(0).random(len(table))
        return pd.Series(p, index=table["id"]).sample(frac=1, random_state=0), {"seconds": 0.0}

    monkeypatch.setattr(infer, "predict", drawn)
    words = ["--adapter", *runs, "--data", benchmark, "--out", str(tmp_path / "s.csv")]
    result = infer.main([*words, "--probs", str(tmp_path / "p.csv")])
    said = capsys.readouterr().err
    p = pd.read_csv(tmp_path / "p.csv")["p_chosen"]
    subset = pd.read_json(benchmark, lines=True, dtype=False)["Subset"].astype(str)
    expected = {name: accuracy_score(np.ones(n), p[subset == name] > 0.5) for name, n in SIZES.items()}
    assert result["groups"].keys() == {"subset"}
    assert result["groups"]["subset"]["accuracy"] == pytest.approx(expected)
    assert result["groups"]["subset"]["mean"] == pytest.approx(np.mean([*expected.values()]))
    assert abs(result["groups"]["subset"]["mean"] - result["accuracy"]) > 1e-3
    for name, n in SIZES.items():
        assert f"accuracy  {expected[name]:.4f} ± " in said and f"  subset {name}, {n} rows" in said
    mean = f"accuracy  {np.mean([*expected.values()]):.4f}           the mean over 3 of 4 groups of subset"
    assert mean in said and "subset few" not in said


SIZES = {"7": 20, "chat": 30, "code": 25}


def test_the_report_shows_the_subsets_of_the_files_that_a_run_was_held_out_on(tiny, benchmark, tmp_path):
    words = ["--model", tiny, "--data", benchmark, "--eval-data", benchmark.replace("benchmark.j", "other.j")]
    table = pd.read_json(benchmark, lines=True, dtype=False)
    table.assign(id=table["id"] + "-x").to_json(words[-1], orient="records", lines=True)
    run = str(tmp_path / "run")
    train.main([*words, "--limit", "16", "--lora-r", "4", "--out", run])
    predictors = predictors_of([read_run(run, [])], [], [])
    page = weak(predictors[-1])
    for name, n in SIZES.items():
        assert f"<td>subset {name}</td><td>{n}</td>" in page
    assert "The mean over the 3 groups is" in page and "subset few" not in page
