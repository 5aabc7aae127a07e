"""A judge from Python gives what infer.py writes, whatever is given to it and however many at once.

judge = load_judge("runs/ab", "runs/ba", tta="all")
judge(prompt, a, b), judge(prompts, as, bs), judge.best(prompt, answers)

Compared with: the probabilities that infer.py writes for a file of the same texts, rows predicted alone from
a text written by hand, and the pairs of four answers counted by hand.
"""

import json
import shutil
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from helpers import TEXTS, rows_of_all_lengths, write_pairs

import infer
from minarena.ensemble import judge as judges
from minarena.ensemble import predict
from minarena.ensemble.judge import load_judge
from minarena.files.pairs import read_pairs
from minarena.runtime import memory


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """With mojibake, which infer.py repairs, an empty answer, and one that is over --max-length."""
    table = rows_of_all_lengths(9)
    table.loc[1, "prompt"], table.loc[2, "response_a"] = "schÃ¶n &amp; gut", ""
    table.loc[3, "response_b"] = "long " * 100
    return table


def both(folder, tmp_path) -> str:
    """The adapter again, as one that was trained on both orders."""
    copy = shutil.copytree(folder, tmp_path / "both") / "train_config.json"
    text = json.dumps(json.loads(copy.read_text(encoding="utf-8")) | {"order": "both"})
    copy.write_text(text, encoding="utf-8")
    return str(tmp_path / "both")


@pytest.mark.parametrize("case", ["ab", "ba", "both", "tta", "weights", "uncertain", "middle"])
def test_one_pair_and_lists_have_the_probabilities_that_infer_writes(case, runs, table, tmp_path):
    adapters, options = {
        "ab": (runs[:1], {}),
        "ba": (runs[1:], {}),
        "both": ([both(runs[1], tmp_path)], {}),
        "tta": (runs, {"tta": "all"}),
        "weights": (runs, {"weights": [3, 1]}),
        "uncertain": (runs, {"tta": "uncertain", "tta_fraction": 0.5}),
        "middle": (runs, {"truncation": "middle", "max_length": 200, "model": None}),
    }[case]
    data = write_pairs(tmp_path / "rows.csv", table)
    words = ["--adapter", *adapters, "--data", data, "--out", str(tmp_path / "s.csv")]
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    infer.main([*words, "--probs", str(tmp_path / "p.parquet")])
    expected = pd.read_parquet(tmp_path / "p.parquet")["winner_model_a"].to_numpy()
    judge = load_judge(*adapters, **options)
    p = judge(*(table[name].tolist() for name in TEXTS))
    np.testing.assert_allclose(p, expected, rtol=0, atol=1e-6)
    assert len(p) == 9 and np.std(p) > 0.01
    if case == "uncertain":  # of one row none is the nearest half
        return
    one = [judge(*row) for row in table[TEXTS].itertuples(index=False)]
    assert all(type(p) is float for p in one)
    np.testing.assert_allclose(one, expected, rtol=0, atol=1e-6)


def test_adapters_take_turns_over_one_base_and_each_is_read_once(runs, alone, table, monkeypatch):
    loaded, real = [], predict.load_adapter_
    monkeypatch.setattr(predict, "load_adapter_", lambda m, folder: loaded.append(folder) or real(m, folder))
    judge = load_judge(*runs)
    for row in table.tail(3).to_dict("records"):
        expected = (alone(row, 0, "ab") + alone(row, 1, "ba")) / 2
        assert judge(*(row[name] for name in TEXTS)) == pytest.approx(expected, abs=1e-5)
    assert loaded == runs


def test_lists_of_messages_are_written_as_in_a_file_and_mixed_with_texts(runs, tmp_path):
    def said(*turns):
        return [{"role": role, "content": text} for role, text in turns]

    begun = said(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why is it blue?"))
    rows = [
        ("Why?", "Because.", "No idea."),
        (begun, said(("assistant", "Air.")), said(("assistant", "Paint."))),
        (None, begun + said(("assistant", "Air.")), begun + said(("assistant", "Paint."))),
        ("Why?", said(("assistant", "Because.")), said(("assistant", "No idea."))),
        ("Why?", "Because.", "No idea."),
        (begun, "Air.", "Paint."),
    ]
    file = tmp_path / "messages.jsonl"
    file.write_text(json.dumps(dict(zip(TEXTS, rows[1], strict=True))), encoding="utf-8")
    (written,) = read_pairs([str(file)])[TEXTS].itertuples(index=False)
    assert "System: Be brief." in written[0] and written[1] == "Air."
    judge = load_judge(runs[0])
    p = judge(*zip(*rows, strict=True))
    assert p[1] == pytest.approx(judge(*written), abs=1e-6)
    assert p[1:3].tolist() == pytest.approx([p[5]] * 2, abs=1e-6)
    assert p[[3, 4]].tolist() == pytest.approx([p[0]] * 2, abs=1e-6) and abs(p[0] - p[1]) > 1e-3
    for row, expected in zip(rows, p, strict=True):
        assert judge(*row) == pytest.approx(expected, abs=1e-6)
    looks = '[{"role": "user", "content": "Hi"}]'  # a text is a text
    assert judge(looks, "a", "b") != pytest.approx(judge("Hi", "a", "b"), abs=1e-6)


def test_best_ranks_by_the_mean_probability_to_win_in_both_orders(runs, alone):
    answers = ["Blue light is scattered more.", "No idea, sorry!", "It is painted so, they say. " * 3, "Air."]
    ranked = load_judge(*runs, weights=[3, 1], tta="none").best("Why is the sky blue?", answers)
    wins = {answer: [] for answer in answers}
    for a, b in permutations(answers, 2):
        row = dict(zip(TEXTS, ("Why is the sky blue?", a, b), strict=True))
        p = [np.mean([alone(row, number, order) for order in ("ab", "ba")]) for number in (0, 1)]
        wins[a].append(0.75 * p[0] + 0.25 * p[1])
    expected = {answer: np.mean(p) for answer, p in wins.items()}
    assert [answer for answer, _ in ranked] == sorted(answers, key=expected.get, reverse=True)
    assert dict(ranked) == pytest.approx(expected, abs=1e-5)
    assert np.mean([p for _, p in ranked]) == pytest.approx(0.5, abs=1e-6)


def test_a_cut_is_said_and_a_long_list_has_a_bar_where_one_pair_is_silent(runs, monkeypatch, capsys):
    monkeypatch.setattr(judges, "LONG", 3)
    labels, real = [], memory.predict_p_first

    def watched(model, rows, compute, label, *more):
        labels.append(label)
        return real(model, rows, compute, label, *more)

    monkeypatch.setattr(memory, "predict_p_first", watched)
    judge = load_judge(runs[0])
    capsys.readouterr()
    judge("Why?", "Because.", "No idea.")
    assert not capsys.readouterr().err
    judge(["Why?"] * 3, ["Because."] * 3, ["No idea."] * 3)
    assert labels == [None, f"{runs[0]} ab"]
    capsys.readouterr()
    judge("Why?", "long " * 100, "No idea.")
    assert "cut       1 of 1 rows are over --max-length 200 tokens" in capsys.readouterr().err


def test_what_cannot_be_judged_is_one_line(runs, tmp_path):
    judge = load_judge(runs[0])
    assert judge([], [], []).shape == (0,)
    three = r"must be three texts or messages, or three equal lists"
    for given, named in (
        ((["q"] * 3, ["a"] * 3, ["b"] * 2), f"{three}: a list of 3, a list of 3, a list of 2"),
        (("q", ["a"], ["b"]), f"{three}: no list, a list of 1"),
        (("q", "a", 3), three),
        ((3, 4, 5), three),
        (
            (["q", "q"], ["a", 3], ["b", "b"]),
            "judge: row 2, column a: 3 is not a list of texts",
        ),
        (("q", {"role": "narrator", "content": "x"}, "b"), "judge: row 1, column a: .*narrator"),
        ((None, "a", "b"), "judge: row 1, column prompt: null is not"),
        (("q", [{"role": "user"}], "b"), "judge: row 1, column a"),
    ):
        with pytest.raises(ValueError, match=named) as error:
            judge(*given)
        assert "\n" not in str(error.value)
    for prompt, answers in (("q", "text"), ("q", ["one"]), (["q", "q"], ["a", "b"]), ("q", 3)):
        with pytest.raises(ValueError, match="best: must be given one prompt and a list of two answers"):
            judge.best(prompt, answers)
    for adapters, options, named in (
        ([], {}, "--adapter DIR is needed"),
        ([str(tmp_path)], {}, "no adapter_config.json there"),
        ([runs], {}, "no adapter_config.json there"),
        ([3], {}, "--adapter 3: no adapter_config.json there"),
        (runs, {"tta": "al"}, "argument --tta: invalid choice: 'al'"),
        (runs, {"weights": [1]}, "--weights: give 2 numbers of 0 or more, one for each --adapter"),
        (runs, {"weights": [1, -1]}, "--weights: give 2 numbers of 0 or more"),
        (runs, {"weights": "ab"}, "argument --weights: invalid float value: 'ab'"),
        (runs, {"max_length": 2.5}, "argument --max-length: invalid integer value: '2.5'"),
        (runs, {"max_length": 4}, "--max-length 4: must be 8 or more"),
        (runs, {"dtype": "fp64"}, "argument --dtype: invalid choice"),
        (runs, {"out": "x.csv"}, "load_judge: no option out; there are model, tta, "),
        (runs, {"model": str(tmp_path)}, "no config.json: not a model folder"),
    ):
        with pytest.raises(ValueError, match=named) as error:
            load_judge(*adapters, **options)
        assert "\n" not in str(error.value)
