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
from minarena.files import formats
from minarena.files.pairs import read_pairs
from minarena.files.verdicts import probability


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
        ({"winner_model_b": 1}, "row 2, column winner_model_a: '1' is not, with the other votes, one winner"),
        ({"winner_model_a": 0}, "row 2, column winner_model_a"),
        ({"winner_tie": "maybe"}, "row 2, column winner_model_a"),
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
    for row in rows:
        asked = [turn["content"] for turn in row["chosen"] if turn["role"] == "user"]
        row |= {"source": "x", "prompt": asked[-1], "question": asked[0]}
    table = read_pairs([parquet(tmp_path / "orpo.parquet", rows)])
    assert list(table["prompt"]) == [
        "why?",
        "System: Be brief.\n\nUser: why?",
        "User: 1\n\nAssistant: 2\n\nUser: 3",
    ]
    best = table["response_a"].where(table["label"] == 1, table["response_b"])
    assert list(best) == ["yes", "yes", "y"]


@pytest.mark.parametrize("names", ["score_chosen score_rejected", "chosen-rating rejected-rating"])
def test_equal_scores_are_ties_however_spelt(names, tmp_path, capsys):
    first, second = names.split()
    rows = [{**row, first: 8.0, second: 8.0 - i % 2} for i, row in enumerate(chosen_rows(6))]
    path = parquet(tmp_path / "ultra.parquet", rows)
    assert len(read_pairs([path], ties="drop")) == 3
    assert "6 rows read, 3 used; 3 ties (--ties half keeps them)" in capsys.readouterr().err
    assert sorted(read_pairs([path], ties="half")["label"].between(0.1, 0.9)) == [False] * 3 + [True] * 3


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


def test_chosen_is_dealt_by_a_coin_that_the_texts_throw(tmp_path, monkeypatch):
    rows = chosen_rows(1001)
    table = read_pairs([jsonl(tmp_path / "dpo.jsonl", rows)])
    for row in table.to_dict("records"):
        i = row["prompt"][1:]
        assert (row["response_a"], row["response_b"]) == (f"good{i}", f"bad{i}")[:: 1 if row["label"] else -1]
        assert row["chosen"] == row["label"]
    label = table["label"].to_numpy()  # fair, and no pattern: five standard errors of 1001 throws
    assert abs(label.mean() - 0.5) < 5 * 0.5 / 1001**0.5
    assert abs((label[1:] == label[:-1]).mean() - 0.5) < 5 * 0.5 / 1000**0.5
    shuffled = read_pairs([jsonl(tmp_path / "other.jsonl", rows[:300:-1])]).set_index("id")
    same = table.set_index("id").loc[shuffled.index]
    pd.testing.assert_frame_equal(shuffled, same)
    turned = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]  # whichever was chosen
    other = read_pairs([jsonl(tmp_path / "turned.jsonl", turned)])
    texts = ["id", "prompt", "response_a", "response_b"]
    pd.testing.assert_frame_equal(other[texts], table[texts])
    assert list(other["label"]) == list(1 - label)
    monkeypatch.setattr(formats, "ROWS", 7)
    pd.testing.assert_frame_equal(read_pairs([str(tmp_path / "dpo.jsonl")]), table)
    pd.testing.assert_frame_equal(read_pairs([str(tmp_path / "dpo.jsonl")], limit=300), table.head(300))


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


def test_probabilities_that_were_rounded_are_made_to_add_up_to_1():
    assert probability([0.33, 0.665]) == pytest.approx(0.33 / 0.995, abs=1e-12)


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


# ---------------------------------------------------------------------------------------------- three parts

TEXT = {"prompt": "q", "a": "A!", "b": "B!"}


def say_human(value: str) -> dict:
    return {"from": "human", "value": value}


# How a row may be written: its texts, whatever the verdict. All mean: prompt q, answers A! and B!
TEXTS = {
    "text": {"prompt": "q", "response_a": "A!", "response_b": "B!"},
    "numbered": {"question": "q", "answer1": "A!", "answer2": "B!"},
    "from zero": {"instruction": "q", "response_0": "A!", "response_1": "B!"},
    "capitals": {"History": "q", "human_ref_A": "A!", "human_ref_B": "B!"},
    "turns": {"prompt": ["q"], "response_a": ["A!"], "response_b": ["B!"]},
    "turns as JSON": {"prompt": '["q"]', "response_a": '["A!"]', "response_b": '["B!"]'},
    "messages": {"conversation_a": [user("q"), bot("A!")], "conversation_b": [user("q"), bot("B!")]},
    "messages as JSON": {
        "messages_a": json.dumps([user("q"), bot("A!")]),
        "messages_b": json.dumps([user("q"), bot("B!")]),
    },
    "answers as messages": {"prompt": [user("q")], "output_1": [bot("A!")], "output_2": [bot("B!")]},
    "one message": {"messages": [user("q")], "completion_a": bot("A!"), "completion_b": bot("B!")},
    "from and value": {
        "conversation_a": [say_human("q"), {"from": "gpt", "value": "A!"}],
        "conversation_b": [say_human("q"), {"from": "Model", "value": "B!"}],
    },
    "parts": {
        "conversation_a": [user([{"type": "text", "text": "q"}, {"type": "image", "image": "x"}]), bot("A!")],
        "conversation_b": [user([{"type": "text", "text": "q"}]), {"role": "BOT ", "content": ["B!"]}],
    },
    "prompt repeated": {
        "prompt": "q",
        "conversation_a": [user("q"), bot("A!")],
        "conversation_b": [user("q"), bot("B!")],
    },
    "prompt in text": {"prompt": "q", "response_a": "qA!", "response_b": "qB!"},
    "parts of a text": {
        "conv_A": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "A!"}]}],
        "conv_B": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "B!"}]}],
    },
}
# How the verdict may be said: a wins, b wins, a tie
VERDICTS = {
    "model_a": ("winner", "model_a", "model_b", "tie"),
    "letters": ("Winner", "A", " b ", "tie (bothbad)"),
    "response": ("preference", "response_a", "Response B", "both_bad"),
    "signs": ("verdict", "A>B", "[[b >> a]]", "A=B"),
    "sides": ("preferred", "left", "right", "tie (inconsistent)"),
    "models": ("verdict", "Model A", "assistant_b", "both good"),
    "probabilities": ("winner", [1.0, 0.0], "[0, 1]", [0.5, 0.5]),
    "mixed": ("winner", "model_a", [0.0, 1.0], "tie"),
    "strength": ("preference_strength", -3, 1, 0),
    "strength 3": ("overall_preference", -1, 2, 0),
    "scores": (("score_a", "score_b"), (9, 2), (1.5, 2), (3, 3)),
    "ranks": (("rank_1", "rank_2"), (1, 2), (2, 1), (1, 1)),
    "votes": (("winner_model_a", "winner_model_b", "winner_tie"), (1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "names": (("winner", "model_a", "model_b"), ("x", "x", "y"), ("y", "x", "y"), ("tie", "x", "y")),
    "counts": (("votes_a", "votes_b"), (5, 1), (0, 2), (3, 3)),
    "spelt out": ("preferred_completion", "Completion A", "completion_b", "Tie"),
    "none": ((), (), (), ()),
}


@pytest.mark.parametrize("said", VERDICTS)
@pytest.mark.parametrize("written", TEXTS)
def test_texts_and_verdicts_of_any_kind_go_together(written, said, tmp_path):
    names, *values = VERDICTS[said]
    names = (names,) if isinstance(names, str) else names
    values = [value if isinstance(value, tuple) else (value,) for value in values]
    rows = [TEXTS[written] | dict(zip(names, value, strict=True)) for value in values]
    table = read_pairs([jsonl(tmp_path / "rows.jsonl", rows)])
    assert table[["prompt", "response_a", "response_b"]].to_numpy().tolist() == [["q", "A!", "B!"]] * 3
    assert table["label"].tolist() == [1, 0, 0.5] if said != "none" else table["label"].isna().all()
    assert table["id"].is_unique and "chosen" not in table


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_count_beside_columns_that_are_numbered_so_and_nowhere_else(first, tmp_path):
    numbered = {f"response_{first}": "A!", f"response_{first + 1}": "B!"}
    rows = [{"prompt": "q", **numbered, "better_response_id": first + i % 2} for i in range(3)]
    assert list(read_pairs([jsonl(tmp_path / "rows.jsonl", rows)])["label"]) == [1, 0, 1]
    for value in (2 - 2 * first, "-1", True, 0.5, None):
        path = jsonl(tmp_path / "bad.jsonl", [*rows, {**rows[0], "better_response_id": value}])
        with pytest.raises(ValueError, match=r"row 4, column better_response_id: .* --winner-words a=WORD"):
            read_pairs([path])
    for value in (0, 1, 2, 1.0, "1", "0"):
        with pytest.raises(ValueError, match=r"row 1, column winner: .* --winner-words a=WORD b=WORD"):
            read_pairs([jsonl(tmp_path / "ab.jsonl", [{**TEXTS["text"], "winner": value}])])


CHOSEN_TEXTS = {
    "text": {"prompt": "q", "chosen": "A!", "rejected": "B!"},
    "spelt": {"instruction": "q", "chosen_response": "A!", "rejected_response": "B!"},
    "explicit": {"prompt": [user("q")], "chosen": [bot("A!")], "rejected": [bot("B!")]},
    "implicit": {"chosen": [user("q"), bot("A!")], "rejected": [user("q"), bot("B!")]},
    "text prompt": {"prompt": "q", "chosen": [bot("A!")], "rejected": [bot("B!")]},
    "dialogue": {"chosen": "\n\nHuman: q\n\nAssistant: A!", "rejected": "\n\nHuman: q\n\nAssistant: B!"},
    "dialogue prompt": {"prompt": "\n\nHuman: q\n\nAssistant: ", "chosen": "A!", "rejected": "B!"},
    "conversations": {"conversations": [say_human("q")], "chosen": bot("A!"), "rejected": bot("B!")},
    "preferred": {"prompt": "q", "preferred_output": [bot("A!")], "non_preferred_output": [bot("B!")]},
    "messages beside": {  # the answer itself is no prompt
        "messages": [user("q"), bot("A!")],
        "chosen": [user("q"), bot("A!")],
        "rejected": [user("q"), bot("B!")],
    },
    "prompt ends with the answer": {"prompt": [user("q"), bot("A!")], "chosen": "A!", "rejected": "B!"},
    "repeated": {"prompt": "q", "chosen": "qA!", "rejected": "qB!"},
    "turns": {"chosen": ["q", "A!"], "rejected": ["q", "B!"]},
    "messages inside": {
        "input": {"messages": [user("q")], "tools": []},
        "preferred_output": [bot("A!")],
        "non_preferred_output": [bot("B!")],
    },
    "one dialogue": {"messages": [user("q"), bot("A!")], "rejected_response": "B!"},
    "two dialogues": {"messages": [user("q"), bot("A!")], "rejected_messages": [user("q"), bot("B!")]},
    "no prompt beside the rejected": {"chosen": [user("q"), bot("A!")], "rejected": [bot("B!")]},
    "one rejected": {"query": "q", "response": "A!", "rejected_response": "B!", "history": []},
    "list of rejected": {"prompt": "q", "chosen": ["A!"], "rejected": ["B!"]},
    "completions": {
        "instruction": "q",
        "completions": [{"response": "B!", "overall_score": 1.0}, {"response": "A!", "overall_score": 8}],
    },
    "ranks": {"prompt": "q", "answers": [{"answer": "B!", "rank": 2.0}, {"answer": "A!", "rank": 1.0}]},
    "lists": {"prompt": "q", "responses": ["B!", "A!"], "scores": [1, 2]},
    "lists of ranks": {"prompt": "q", "responses": ["B!", "A!"], "ranks": [2, 1]},
    "lists of a reranker": {
        "prompt": "q",
        "responses": [{"text": "B!", "score": 1}, {"text": "A!", "score": 2}],
    },
}


@pytest.mark.parametrize("written", CHOSEN_TEXTS)
def test_the_better_answer_wins_however_a_file_says_which_it_is(written, tmp_path):
    table = read_pairs([jsonl(tmp_path / "rows.jsonl", [CHOSEN_TEXTS[written]] * 2)])
    assert table["prompt"].tolist() == ["q", "q"] and len(table) == 2
    for row in table.to_dict("records"):
        assert (row["response_a"], row["response_b"]) == ("A!", "B!")[:: 1 if row["label"] == 1 else -1]
        assert row["label"] in (0, 1) and row["chosen"] == row["label"]


def test_a_prompt_in_several_columns_becomes_one(tmp_path):
    answers = {"response_a": "A!", "response_b": "B!"}
    rows = [
        {"system": "Be brief.", "prompt": "q", **answers},
        {"system": None, "prompt": "q", "input": "in short", **answers},
        {"system": "", "prompt": "q", "input": "", "history": "before", **answers},
    ]
    table = read_pairs([jsonl(tmp_path / "rows.jsonl", rows)])
    assert table["prompt"].tolist() == ["System: Be brief.\n\nUser: q", "q\n\nin short", "before\n\nq"]
    rows = [{"instruction": "q", "history": [["Earlier?", "Yes."]], "chosen": "A", "rejected": "B"}]
    table = read_pairs([jsonl(tmp_path / "pairs.jsonl", rows)])
    assert table["prompt"].tolist() == ["User: Earlier?\n\nAssistant: Yes.\n\nUser: q"]
    talk = [user("Earlier?"), bot("Yes.")]
    rows = [{"prompt": talk, "chosen": [user("q"), bot(x)], "rejected": [user("q"), bot("B!")]} for x in "AB"]
    rows[1]["prompt"] = [user("Earlier?"), bot("Yes."), user("q")]
    table = read_pairs([jsonl(tmp_path / "history.jsonl", rows)])
    assert set(table["prompt"]) == {"User: Earlier?\n\nAssistant: Yes.\n\nUser: q"}


@pytest.mark.parametrize("nulls", [["history"], ["prompt"], ["system", "history", "input", "prompt"]])
def test_a_column_of_nulls_is_no_prompt_so_the_dialogue_beside_it_is_one(nulls, tmp_path):
    row = {"system": "Be kind.", "messages": [user("q")], "response_a": "A!", "response_b": "B!"}
    table = read_pairs([jsonl(tmp_path / "rows.jsonl", [row | dict.fromkeys(nulls)] * 3)])
    asked = "q" if "system" in nulls else "System: Be kind.\n\nUser: q"
    assert table["prompt"].tolist() == [asked] * 3


@pytest.mark.parametrize("name", ["score", "rank", "reranker_score"])
def test_of_ranks_the_lower_is_better_and_of_a_rerankers_scores_the_higher(name, tmp_path):
    row = {"prompt": "q", "response_a": "A!", "response_b": "B!", f"{name}_a": 1, f"{name}_b": 2}
    columns = {f"score_{side}": f"{name}_{side}" for side in "ab"}
    table = read_pairs([jsonl(tmp_path / "rows.jsonl", [row])], columns=columns)
    assert table["label"].tolist() == [1 if name == "rank" else 0]


@pytest.mark.parametrize("name", ["{}_score", "score_{}", "{}-rating"])
def test_scores_may_be_named_after_their_answers(name, tmp_path):
    for one, two in (("response_a", "response_b"), ("conv_A", "conv_B"), ("answer_1", "answer_2")):
        row = {"prompt": "q", one: "A!", two: "B!", name.format(one): 2, name.format(two): 1}
        assert read_pairs([jsonl(tmp_path / "rows.jsonl", [row])])["label"].tolist() == [1]


def test_chosen_and_rejected_may_name_the_sides_whose_texts_stand_beside_them(tmp_path):
    row = {"prompt": "q", "response_a": "A!", "response_b": "B!"}
    for one, two in (("A", "B"), ("response_a", "response_b"), ("Model A", "Model B")):
        rows = [row | {"chosen": one, "rejected": two}, row | {"chosen": two, "rejected": one}]
        table = read_pairs([jsonl(tmp_path / "rows.jsonl", rows)])
        assert table["label"].tolist() == [1, 0] and set(table["response_a"]) == {"A!"}
    rows = [row | {"chosen": "B!", "rejected": "A!"}] * 3
    assert set(read_pairs([jsonl(tmp_path / "rows.jsonl", rows)])["chosen"]) <= {0, 1}


@pytest.mark.parametrize(
    "verdict",
    [
        {"winner": "model_1"},
        {"winner": [0.9, 0.1]},
        {"winner": "x", "model_1": "x", "model_2": "y"},
        {"preference_strength": -1},
        {"score_1": 2, "score_2": 1},
        {"winner_1": 1, "winner_2": 0},
    ],
)
@pytest.mark.parametrize("names", [("response_{}", "12"), ("{}_text_of_model", "12")])
def test_sides_that_are_named_the_wrong_way_round_are_refused(names, verdict, tmp_path):
    """Whatever says who won, says it of the file's own first and second answer."""
    a, b = (names[0].format(side) for side in names[1])
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", a: "A!", b: "B!", **verdict}])
    with pytest.raises(ValueError, match=f"--columns a={b} b={a}: .* turn them round"):
        read_pairs([path], columns={"a": b, "b": a})
    table = read_pairs([path], columns={"a": a, "b": b})
    assert table["label"][0] > 0.5 and table["response_a"][0] == "A!"


def test_what_decides_is_told_and_the_other_verdicts_are_not_used(tmp_path, capsys):
    row = {"prompt": "q", "response_a": "A!", "response_b": "B!", "score_a": 1, "score_b": 2}
    row |= {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0, "winner": "model_a"}
    assert read_pairs([jsonl(tmp_path / "rows.jsonl", [row])])["label"].tolist() == [1]
    left = "not used: score_a, score_b, winner_model_a, winner_model_b, winner_tie"
    said = "two answers (a=response_a b=response_b prompt=prompt winner=winner), 1 rows read, 1 used; "
    assert said + left in capsys.readouterr().err


def test_the_answers_of_the_turn_that_a_file_names_are_compared(tmp_path):
    talks = {f"conversation_{x}": [user("q1"), bot(f"{x}1"), user("q2"), bot(f"{x}2")] for x in "ab"}
    rows = [{**talks, "turn": turn, "winner": "model_a"} for turn in (1, 2, 3)]
    table = read_pairs([parquet(tmp_path / "bench.parquet", rows)])
    assert table["response_a"].tolist() == ["a1", "a2", "a2"] and table["prompt"][0] == "q1"
    for turn in (1.0, "1", "1.0", None, "multi"):  # of [1, null] pandas makes 1.0
        table = read_pairs([jsonl(tmp_path / "bench.jsonl", [row | {"turn": turn} for row in rows])])
        assert set(table["response_a"]) == {"a1" if str(turn)[0] == "1" else "a2"}


def test_dialogues_that_part_before_their_last_turn_are_compared_from_there_on(tmp_path):
    chosen = [user("q"), bot("A!"), user("Thanks."), bot("Welcome.")]
    row = {"chosen": chosen, "rejected": [user("q"), bot("B!")]}
    table = read_pairs([jsonl(tmp_path / "rows.jsonl", [row])])
    assert table["prompt"].tolist() == ["q"]
    assert {table["response_a"][0], table["response_b"][0]} == {
        "A!\n\nUser: Thanks.\n\nAssistant: Welcome.",
        "B!",
    }


def test_a_lone_cell_that_looks_like_json_is_text_and_a_lone_one_that_does_not_is_refused(tmp_path):
    rows = [{"id": i, "prompt": "q", "response_a": "A", "response_b": "B", "winner": "a"} for i in range(4)]
    rows[2]["prompt"] = '["q", "r"]'
    assert read_pairs([jsonl(tmp_path / "text.jsonl", rows)])["prompt"][2] == '["q", "r"]'
    listed = [{**row, "prompt": '["q"]', "response_a": '["A"]', "response_b": '["B"]'} for row in rows]
    listed[3]["response_b"] = "plain"
    with pytest.raises(ValueError, match="row 4, column response_b: 'plain' is not a JSON list"):
        read_pairs([jsonl(tmp_path / "json.jsonl", listed)])
    listed[3]["response_b"] = "['python', 'list']"
    with pytest.raises(ValueError, match="row 4, column response_b"):
        read_pairs([jsonl(tmp_path / "python.jsonl", listed)])


def test_several_answers_a_prompt_share_their_place_and_have_ids_of_their_own(tmp_path):
    answers = [
        {"answer": text, "rank": rank} for text, rank in (("mid", 2), ("best", 1), ("last", 3), ("too", 1))
    ]
    rows = [{"id": f"r{i}", "prompt": f"q{i}", "answers": answers} for i in range(3)]
    table = read_pairs([jsonl(tmp_path / "rows.jsonl", rows)], ties="half")
    assert list(table["id"]) == [f"r{i}-{k}" for i in range(3) for k in (1, 2, 3)]
    assert list(table.index) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    better = table["response_a"].where(table["chosen"] == 1, table["response_b"])
    assert set(better) == {"best"} and (table["label"] == 0.5).sum() == 3
    train, held_out = split(table, n_splits=3, fold=1)
    assert set(held_out["prompt"]) == {"q1"} and set(train["prompt"]) == {"q0", "q2"}
