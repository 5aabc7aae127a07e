"""Files of every layout become the same table, and no row is lost in silence.

read_pairs([path], ties="drop")      training: rows that teach nothing are left out, and reported by reason
read_pairs([path])                   inference: every row
table.label: 1 where response_a won, 0 where response_b did, 0.5 for a tie; table.pseudo: a model's pair

Each test writes a small file in the layout that the data set really has (its columns, JSON in cells, lists of
messages, whole dialogues), and compares with what was written. tests/test_data.py has the competition's own
layout and damaged files.
"""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from minarena.data import split, swapped
from minarena.files import pairs
from minarena.files.pairs import read_pairs


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def bot(text: str) -> dict:
    return {"role": "assistant", "content": text}


def jsonl(path, rows) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def parquet(path, rows) -> str:
    pd.DataFrame(rows).to_parquet(path, index=False)
    return str(path)


def chosen_rows(n: int) -> list[dict]:
    return [
        {"chosen": [user(f"q{i}"), bot(f"good{i}")], "rejected": [user(f"q{i}"), bot(f"bad{i}")]}
        for i in range(n)
    ]


# ---------------------------------------------------------------------------------------------- LMSYS


def lmsys(i, prompt: list, a, b, votes="100") -> dict:
    """A row as the LMSYS csv has it: JSON lists as text, `/` and non-ASCII escaped, votes one-hot."""
    cells = [json.dumps(cell).replace("/", "\\/") for cell in (prompt, a, b)]
    row = dict(zip(("id", "prompt", "response_a", "response_b"), (i, *cells), strict=True))
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    return row | dict(zip(names, map(int, votes), strict=True))


def test_lmsys_turns_votes_and_odd_cells(tmp_path):
    rows = [
        lmsys(30192, ["one/two?"], ["a/b é 🍕"], ["no"], "100"),
        lmsys(7, ["q1", "q2"], ["same", "last a"], ["same", "last b"], "010"),
        lmsys(8, ["q"], [None], ["x"], "010"),
        lmsys(9, ["q"], ["x"], [], "100"),
        lmsys(10, ["q"], ["", ""], ["x"], "010"),
        lmsys(11, ["q"], ["same"], ["same"], "001"),
        lmsys(12, ["q"], ["x"], ["y"], "001"),
        lmsys(13, [None], ["x"], ["y"], "100"),
    ]
    path = tmp_path / "lmsys.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    table = read_pairs([str(path)]).set_index("id")
    assert list(table.index) == [str(row["id"]) for row in rows]
    assert list(table["label"]) == [1, 0, 0, 1, 0, 0.5, 0.5, 1]
    first, second = table.loc["30192"], table.loc["7"]
    assert (first["prompt"], first["response_a"], first["response_b"]) == ("one/two?", "a/b é 🍕", "no")
    assert second["prompt"] == "User: q1\n\nAssistant: same\n\nUser: q2"
    assert (second["response_a"], second["response_b"]) == ("last a", "last b")
    assert [table.loc[i, "response_a"] for i in ("8", "10")] == ["", ""] and table.loc[
        "9", "response_b"
    ] == ""


def test_lmsys_lone_surrogates_are_replaced(tmp_path):
    path = tmp_path / "lmsys.csv"
    row = lmsys(1, ["q"], ["A"], ["B"])
    row["response_a"] = '["lone \\ud83c half", "pair \\ud83c\\udf55"]'
    pd.DataFrame([row]).to_csv(path, index=False)
    table = read_pairs([str(path)])
    assert table.loc[0, "response_a"] == "pair 🍕" and "lone \ufffd half" in table.loc[0, "prompt"]
    table.to_parquet(tmp_path / "can_be_written.parquet")


def test_lmsys_test_is_known_by_its_cells_and_plain_text_is_not_taken_for_it(tmp_path):
    rows = [lmsys(1, ["q"], ["A"], ["B"]), lmsys(2, ["p", "q"], ["A", "C"], ["B", "D"])]
    columns = ["id", "prompt", "response_a", "response_b"]
    path = tmp_path / "test.csv"
    pd.DataFrame(rows)[columns].to_csv(path, index=False)
    table = read_pairs([str(path)])
    assert list(table["response_a"]) == ["A", "C"] and table["label"].isna().all()
    plain = [{"id": "1", "prompt": '["q"]', "response_a": "[sic]", "response_b": '["B"]'}]
    assert read_pairs([jsonl(tmp_path / "plain.jsonl", plain)]).loc[0, "prompt"] == '["q"]'


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": "no list"}, "row 2, column prompt: 'no list' is not a JSON list of turns"),
        ({"response_b": '{"a": 1}'}, "row 2, column response_b"),
        ({"response_a": '["a", 3]'}, "row 2, column response_a"),
        ({"winner_model_b": 1}, "row 2, column winner_tie: not one of the three winners is 1"),
        ({"winner_model_a": 0}, "row 2, column winner_tie"),
        ({"winner_tie": "maybe"}, "row 2, column winner_tie: 'maybe' is neither 0 nor 1"),
    ],
)
def test_a_broken_lmsys_cell_is_named(change, named, tmp_path):
    rows = [lmsys(1, ["q"], ["A"], ["B"]), {**lmsys(2, ["q"], ["A"], ["B"]), **change}]
    path = tmp_path / "lmsys.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"lmsys.csv: ") as error:
        read_pairs([str(path)])
    assert named in str(error.value)


# ---------------------------------------------------------------------------------------------- conversations


def test_arena_conversations_and_all_four_winners(tmp_path):
    winners = ["model_a", "model_b", "tie", "tie (bothbad)"]
    a = [user("q1"), bot("early a"), user("q2"), bot("last a")]
    b = [user("q1"), bot("early b"), user("q2"), bot("last b")]
    rows = [
        {
            "question_id": f"q-{i}",
            "winner": w,
            "conversation_a": a,
            "conversation_b": b,
            "language": "English",
        }
        for i, w in enumerate(winners)
    ]
    table = read_pairs([parquet(tmp_path / "arena.parquet", rows)])
    assert list(table["id"]) == ["q-0", "q-1", "q-2", "q-3"] and list(table["label"]) == [1, 0, 0.5, 0.5]
    assert list(table["language"]) == ["English"] * 4
    assert set(table["response_a"]) == {"last a"} and set(table["response_b"]) == {"last b"}
    # both early answers are there, in an order that does not depend on who is a
    [prompt] = set(table["prompt"])
    order = ["User: q1", "Assistant (one): early a", "Assistant (the other): early b", "User: q2"]
    assert prompt == "\n\n".join(order)
    mirrored = [{**row, "conversation_a": b, "conversation_b": a} for row in rows]
    other = read_pairs([parquet(tmp_path / "mirrored.parquet", mirrored)])
    texts = ["prompt", "response_a", "response_b"]
    pd.testing.assert_frame_equal(other[texts], swapped(table)[texts])


def test_system_turns_and_earlier_turns_are_the_prompt_and_a_lone_question_stays_bare(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"chosen": [user("why?"), bot("yes")], "rejected": [user("why?"), bot("no")]},
        {"chosen": [system, user("why?"), bot("yes")], "rejected": [system, user("why?"), bot("no")]},
        {
            "chosen": [user("1"), bot("2"), user("3"), bot("y")],
            "rejected": [user("1"), bot("2"), user("3"), bot("n")],
        },
    ]
    rows = [{"source": "x", "prompt": "last turn", "question": "first turn", **row} for row in rows]
    table = read_pairs([parquet(tmp_path / "orpo.parquet", rows)])
    assert list(table["prompt"]) == [
        "why?",
        "System: Be brief.\n\nUser: why?",
        "User: 1\n\nAssistant: 2\n\nUser: 3",
    ]
    best = table["response_a"].where(table["label"] == 1, table["response_b"])
    assert list(best) == ["yes", "yes", "y"]


def test_ultrafeedback_drops_equal_scores_whatever_the_ties(tmp_path, capsys):
    rows = [
        {**row, "score_chosen": 8.0, "score_rejected": 8.0 - i % 2} for i, row in enumerate(chosen_rows(6))
    ]
    path = parquet(tmp_path / "ultra.parquet", rows)
    for ties in ("drop", "half"):
        assert len(read_pairs([path], ties=ties)) == 3
        assert f"{path}: chosen layout, 6 rows read, 3 used; 3 with equal scores" in capsys.readouterr().err


def test_hh_dialogues_zipped(tmp_path):
    start = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three: or four?\n\nAssistant:"
    rows = [
        {"chosen": f"{start} good\n\nHumanity: is no mark", "rejected": f"{start} bad"},
        {"chosen": f"{start}", "rejected": f"{start} not empty"},
    ]
    table = read_pairs([jsonl(tmp_path / "train.jsonl.gz", rows)])
    assert set(table["prompt"]) == {"User: one\n\nAssistant: two\n\nUser: three: or four?"}
    texts = {frozenset(pair) for pair in zip(table["response_a"], table["response_b"], strict=True)}
    assert texts == {frozenset(("good\n\nHumanity: is no mark", "bad")), frozenset(("", "not empty"))}


@pytest.mark.parametrize("cell", ["a plain answer", None, 7, [{"role": "user"}], ["text"], {"role": "user"}])
def test_a_cell_that_is_no_conversation_is_named(cell, tmp_path):
    rows = [*chosen_rows(1), {**chosen_rows(1)[0], "rejected": cell}]
    path = jsonl(tmp_path / "dpo.jsonl", rows)
    with pytest.raises(ValueError, match="row 2, column rejected") as error:
        read_pairs([path])
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------- the coin


def test_chosen_is_dealt_by_a_coin_balanced_and_the_same_however_much_is_read(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "dpo.jsonl", chosen_rows(1001))
    table = read_pairs([path])
    for row in table.to_dict("records"):
        i = row["prompt"][1:]
        assert (row["response_a"], row["response_b"]) == (f"good{i}", f"bad{i}")[:: 1 if row["label"] else -1]
    label = table["label"].to_numpy()
    assert abs(label.sum() - 1001 / 2) <= 0.5  # balanced, and so is each pair of rows: any part is, too
    assert set(label[:1000].reshape(500, 2).sum(axis=1)) == {1}
    first = label[:1000:2]  # the coin of each pair: fair, and no pattern (five standard errors of 500 throws)
    assert abs(first.mean() - 0.5) < 5 * 0.5 / 500**0.5
    assert abs((first[1:] == first[:-1]).mean() - 0.5) < 5 * 0.5 / 499**0.5
    monkeypatch.setattr(pairs, "ROWS", 7)
    pd.testing.assert_frame_equal(read_pairs([path]), table)
    pd.testing.assert_frame_equal(read_pairs([path], limit=300), table.head(300))


# ---------------------------------------------------------------------------------------------- pseudo-labels


def test_pairs_of_probabilities_are_soft_labels_with_and_without_ids(tmp_path):
    texts = [{"prompt": f"q{i}", "response_a": "A", "response_b": "B"} for i in range(3)]
    soft = [[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]
    ours = [
        {"id": f"x{i}", **row, "winner": pair} for i, (row, pair) in enumerate(zip(texts, soft, strict=True))
    ]
    theirs = [
        {**row, "winner": str(np.array(pair))} for row, pair in zip(texts, soft, strict=True)
    ]  # "[0.25 0.75]"
    first = read_pairs([parquet(tmp_path / "ours.parquet", ours)], ties="drop")
    assert list(first["id"]) == ["x0", "x1", "x2"]
    path = tmp_path / "theirs.csv"
    pd.DataFrame(theirs).to_csv(path, index=False)
    second = read_pairs([str(path)], ties="drop")
    for table in (first, second):  # a half is a label here, not a tie
        assert list(table["label"]) == [0.25, 1.0, 0.5] and table["pseudo"].all()
    assert second["id"].is_unique


@pytest.mark.parametrize("pair", [[0.5, 0.6], [1.2, -0.2], [0.5], [0.2, 0.3, 0.5], [None, 1.0], ["a", "b"]])
def test_a_pair_that_is_no_probabilities_is_named(pair, tmp_path):
    row = {"prompt": "q", "response_a": "A", "response_b": "B"}
    path = jsonl(tmp_path / "pseudo.jsonl", [{**row, "winner": [0.5, 0.5]}, {**row, "winner": pair}])
    with pytest.raises(ValueError, match=r"row 2, column winner: .* is not a pair of probabilities"):
        read_pairs([path])


def test_rows_that_people_judged_and_pseudo_labels_are_told_apart_and_only_the_first_are_held_out(tmp_path):
    row = {"prompt": "q", "response_a": "A", "response_b": "B"}
    people = jsonl(tmp_path / "a.jsonl", [{"id": f"h{i}", **row, "winner": "model_a"} for i in range(10)])
    model = jsonl(tmp_path / "b.jsonl", [{"id": f"m{i}", **row, "winner": [0.9, 0.1]} for i in range(10)])
    table = read_pairs([people, model], ties="drop")
    assert list(table["pseudo"]) == [False] * 10 + [True] * 10
    train, held_out = split(table, n_splits=2, fold=1)
    assert list(held_out["id"]) == ["h1", "h3", "h5", "h7", "h9"] and len(train) == 15
    assert "pseudo" not in read_pairs([people])
