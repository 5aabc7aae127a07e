"""What is odd about the rows is said before anything slow, and what teaches nothing but a side is refused.

say_encoding(tokenizer, table, 200, "left", {"ab"})     rows cut, and rows that lose their first answer

Compared with: token ids counted by hand (the tiny tokenizer has one token a byte), and loops over rows.
"""

import json

import pandas as pd
import pytest
from bad_input import jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import infer
import train
from minarena.files.pairs import read_pairs
from minarena.runtime.warn import refuse_one_sided, say_encoding, say_unknown_characters
from minarena.text import encode


def table_of(rows: list[tuple], **more) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["prompt", "response_a", "response_b"]).astype("str")
    return table.assign(id=[str(i) for i in range(len(rows))], **more)


def written(path, rows: list[dict]) -> str:
    path.write_bytes(jsonl(*rows))
    return str(path)


def rows_file(path, n: int, winner=lambda i: "model_a", prompt=lambda i: f"q{i}", **more) -> str:
    rows = [
        {"id": i, "prompt": prompt(i), "response_a": f"A{i}", "response_b": f"B{i}", **more} for i in range(n)
    ]
    return written(path, [{**row, "winner": winner(i)} for i, row in enumerate(rows)])


def test_rows_that_are_cut_and_rows_that_lose_the_answer_shown_first_are_counted(tokenizer, capsys):
    table = table_of(
        [("q", "a" * n, "b" * m) for n, m in ((5, 5), (150, 20), (20, 150), (20, 400), (400, 20))]
    )
    for orders in ({"ab"}, {"ba"}, {"ab", "ba"}):
        gone = 0
        for row in table.itertuples():
            shown = {"ab": (row.response_a, row.response_b), "ba": (row.response_b, row.response_a)}
            texts = [
                f"<prompt>: {row.prompt}\n\n<response_a>: {x}\n\n<response_b>: {y}"[-98:]
                for x, y in map(shown.get, orders)
            ]
            gone += any(text.startswith("\n\n<response_b>") or "response_b>: " not in text for text in texts)
        cut = sum(len(row) == 100 for row in encode(tokenizer, table, 100))
        say_encoding(tokenizer, table, 100, "left", orders)
        said = capsys.readouterr().err
        assert (
            said.startswith(f"cut       {cut} of 5 rows are over --max-length 100 tokens")
            and f"{gone} of them" in said
        )
    say_encoding(tokenizer, table, 100, "middle", {"ab"})
    assert "of them" not in capsys.readouterr().err
    say_encoding(tokenizer, table, 1000, "left", {"ab"})
    assert capsys.readouterr().err == ""


def test_characters_without_a_token_are_said_with_their_rows(tokenizer, capsys):
    words = {"<unk>": 0, "e": 1, "é": 2, "a": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    small = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    table = table_of([("é", "a", "e"), ("é", "字", "e"), ("é", "字", "ß"), ("字", "a", "e")])
    say_unknown_characters(small, table.iloc[:1])
    assert capsys.readouterr().err == ""
    say_unknown_characters(small, table.iloc[:2], table.iloc[2:])
    said = capsys.readouterr().err
    assert said == "3 rows hold characters that the tokenizer cannot represent (2: ß 字)\n"
    say_unknown_characters(tokenizer, table)  # bytes represent everything
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("winner", ["model_a", "model_b"])
def test_winners_on_one_side_are_refused_in_training_and_said_elsewhere(winner, tmp_path, runs, capsys):
    path = rows_file(tmp_path / "rows.jsonl", 40, lambda i: winner)
    out = ["--out", str(tmp_path / "run"), "--n-splits", "4"]
    with pytest.raises(
        ValueError, match=f"response_{winner[-1]} wins all 30 rows: only the side .* --order both"
    ):
        train.main(["--data", path, *out])
    assert f"{path}: response_{winner[-1]} wins 100% of the rows" in capsys.readouterr().err
    infer.main(["--adapter", runs[0], "--data", path, "--out", str(tmp_path / "s.csv")])
    assert "wins 100% of the rows" in capsys.readouterr().err
    few = pd.DataFrame({"label": [1.0] * 19 + [0.5] * 5})
    refuse_one_sided(few, "ab")
    many = pd.DataFrame({"label": [1.0] * 20})
    refuse_one_sided(many, "both")
    refuse_one_sided(many.assign(chosen=1.0), "ab")  # the texts dealt these
    with pytest.raises(ValueError, match="response_a wins all 20 rows"):
        refuse_one_sided(many, "ab")


def test_prompts_of_held_out_rows_that_are_trained_on_are_counted_and_can_be_held_out_whole(tmp_path, capsys):
    path = rows_file(
        tmp_path / "rows.jsonl", 40, lambda i: ["model_a", "model_b"][i % 2], lambda i: f"q{i // 4}"
    )
    words = ["--data", path, "--n-splits", "5", "--lora-r", "2", "--epochs", "1"]
    train.main([*words, "--out", str(tmp_path / "rows")])
    said = "8 of 8 held-out rows have a prompt that is trained on, too (--split-by prompt"
    assert said in capsys.readouterr().err
    train.main([*words, "--out", str(tmp_path / "prompts"), "--split-by", "prompt"])
    assert "is trained on, too" not in capsys.readouterr().err
    held_out = pd.read_parquet(tmp_path / "prompts" / "eval.parquet")["id"]
    assert list(held_out) == [str(i) for i in [*range(0, 4), *range(20, 24)]]


def test_the_reading_of_chosen_files_is_recorded_and_an_older_one_is_refused(tmp_path, runs, capsys):
    path = written(
        tmp_path / "dpo.jsonl",
        [{"prompt": f"q{i}", "chosen": f"A{i}", "rejected": f"B{i}"} for i in range(40)],
    )
    out = tmp_path / "run"
    words = ["--data", path, "--n-splits", "4", "--lora-r", "2", "--out", str(out)]
    train.main(words)
    record = json.loads((out / "train_config.json").read_text())
    assert record["reading"] == 2 and record["columns"] == [] and record["split_by"] == "row"
    assert train.main([*words, "--resume"])["steps"] > 0
    with pytest.raises(ValueError, match=r"--resume: winner_words was \[\], now it is \['a=1'\]"):
        train.main([*words, "--resume", "--winner-words", "a=1"])
    del record["reading"], record["columns"], record["winner_words"], record["split_by"]
    (out / "train_config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="--resume: reading was 1, now it is 2"):
        train.main([*words, "--resume"])
    pseudo = ["--pseudo", str(tmp_path / "p.parquet")]
    with pytest.raises(
        ValueError, match="--distill: a run dealt the chosen answers of --data to other sides"
    ):
        infer.main(["--distill", str(out), "--data", path, *pseudo])
    probs = tmp_path / "probs.parquet"
    capsys.readouterr()
    infer.main(
        ["--adapter", runs[0], "--data", path, "--out", str(tmp_path / "s.csv"), "--probs", str(probs)]
    )
    assert "model_a is the chosen answer or the other, by a hash of the texts" in capsys.readouterr().err
    found = pd.read_parquet(probs)
    label = read_pairs([path])["label"].to_numpy()
    right = found["winner_model_a"].where(label == 1, found["winner_model_b"])
    assert list(found["p_chosen"]) == pytest.approx(list(right)) and 0 < label.mean() < 1


def test_integer_ids_are_integers_in_the_output(tmp_path, runs):
    path = rows_file(tmp_path / "rows.jsonl", 12, lambda i: ["model_a", "model_b"][i % 2])
    infer.main(["--adapter", runs[0], "--data", path, "--out", str(tmp_path / "s.parquet")])
    out = pd.read_parquet(tmp_path / "s.parquet")
    assert out["id"].dtype == "int64" and list(out["id"]) == list(range(12))


def test_data_and_eval_data_may_both_count_from_0(tmp_path):
    side = lambda i: ["model_a", "model_b"][i % 2]  # noqa: E731
    path = rows_file(tmp_path / "train.jsonl", 16, side)
    other = rows_file(tmp_path / "test.jsonl", 8, side, lambda i: f"another {i}")
    words = ["--lora-r", "2", "--out", str(tmp_path / "run")]
    assert train.main(["--data", path, "--eval-data", other, *words])["rows"] == 16
    with pytest.raises(ValueError, match=r"--eval-data .*train.jsonl: id '0' is in --data, too"):
        train.main(["--data", path, "--eval-data", path, *words])
