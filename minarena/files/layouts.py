"""The columns of any known layout -> the table of pairs of data.py.

    WSDM Cup          id, prompt, response_a, response_b as plain text; winner (train), also `tie`
    LMSYS             the same, each text a JSON list of turns; winner_model_a, winner_model_b, winner_tie
    arena 33k         conversation_a, conversation_b: lists of {role, content}; winner; question_id
    chosen, rejected  lists of {role, content} (UltraFeedback with its scores, ORPO-DPO-mix), or whole
                      dialogues "\\n\\nHuman: .. \\n\\nAssistant: .." (hh-rlhf)
    pseudo-labels     prompt, response_a, response_b, winner = [p_a, p_b]; with or without id

Recognised by the columns. Of a conversation the last answers are compared and all before is the prompt. Where
a file has no ids they are made from the texts. Everything wrong with a file is a ValueError that names file,
row (the first is 1) and column. What it does not do: open files (files.py), repair text (text.py), or guess.
A new layout is a line in LAYOUTS and a function.
"""

import json
import re
from collections.abc import Callable
from hashlib import blake2b
from itertools import zip_longest

import numpy as np
import pandas as pd

from minarena.data import TEXTS

WINNERS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}


def layout(frame: pd.DataFrame, path: str) -> Callable:
    """The converter for a file, by the columns (and where they leave it open, the first row) of its start."""
    double = frame.columns[frame.columns.duplicated()]
    if len(double):
        raise ValueError(f"{path}: column {double[0]}: stands there twice")
    for columns, fits, convert in LAYOUTS:
        if columns <= set(frame.columns) and fits(frame.iloc[0]):
            return convert
    missing = sorted({"id", *TEXTS} - set(frame.columns))
    has = ", ".join(name if name.isprintable() else shown(name) for name in frame.columns[:30])
    raise ValueError(f"{path}: missing column {', '.join(missing)}; it has {has[:300]}")


def from_competition(frame: pd.DataFrame, path: str) -> pd.DataFrame:
    texts = [each(frame, path, column, plain_text, "not text") for column in TEXTS]
    return pairs(frame, path, *texts, winners(frame, path) if "winner" in frame else np.nan, "id")


def from_pseudo_labels(frame: pd.DataFrame, path: str) -> pd.DataFrame:
    texts = [each(frame, path, column, plain_text, "not text") for column in TEXTS]
    label = each(frame, path, "winner", probability, "not a pair of probabilities that add up to 1")
    return pairs(frame, path, *texts, label, "id", pseudo=True)


def from_lmsys(frame: pd.DataFrame, path: str) -> pd.DataFrame:
    prompts, a, b = (each(frame, path, column, turns, "not a JSON list of turns") for column in TEXTS)
    label = np.full(len(frame), np.nan)
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    if set(names) <= set(frame.columns):
        votes = np.array([each(frame, path, name, zero_or_one, "neither 0 nor 1") for name in names])
        for row in frame["row"][votes.sum(axis=0) != 1]:
            raise ValueError(f"{path}: row {row}, column winner_tie: not one of the three winners is 1")
        label = votes[0] + votes[2] / 2
    talks = [[talk(*row) for row in zip(prompts, answers, strict=True)] for answers in (a, b)]
    return pairs(frame, path, *compared(*talks), label, "id")


def from_arena(frame: pd.DataFrame, path: str) -> pd.DataFrame:
    talks = [each(frame, path, f"conversation_{x}", messages, "not a list of {role, content}") for x in "ab"]
    return pairs(frame, path, *compared(*talks), winners(frame, path), "question_id")


def from_chosen(frame: pd.DataFrame, path: str) -> pd.DataFrame:
    problem = "neither a list of {role, content} nor a dialogue of Human and Assistant"
    talks = [each(frame, path, column, messages, problem) for column in ("chosen", "rejected")]
    equal = False
    if {"score_chosen", "score_rejected"} <= set(frame.columns):
        scores = [each(frame, path, f"score_{x}", float, "no number") for x in ("chosen", "rejected")]
        equal = np.equal(*scores)
    return pairs(frame, path, *compared(*talks), 1.0, None, equal_scores=equal)


# Columns of each layout: the first that fits is taken. Where columns do not tell, the first row does.
LAYOUTS = [
    ({"id", *TEXTS, "winner_model_a", "winner_model_b", "winner_tie"}, lambda row: True, from_lmsys),
    ({"conversation_a", "conversation_b", "winner"}, lambda row: True, from_arena),
    ({"chosen", "rejected"}, lambda row: True, from_chosen),
    ({*TEXTS, "winner"}, lambda row: str(row["winner"]).startswith("["), from_pseudo_labels),
    ({"id", *TEXTS}, lambda row: "winner" not in row and all(map(is_turns, row[[*TEXTS]])), from_lmsys),
    ({"id", *TEXTS}, lambda row: True, from_competition),
]


def pairs(frame, path, prompt, response_a, response_b, label, id_column, pseudo=False, equal_scores=False):
    """The table from its parts, which are lists, arrays or one value for all rows."""
    made = id_column not in frame
    if made:
        texts = zip(prompt, response_a, response_b, strict=True)
        ids = [blake2b("\0".join(row).encode(), digest_size=10).hexdigest() for row in texts]
    else:
        ids = each(frame, path, id_column, identifier, "no id")
    table = {"id": ids, "prompt": prompt, "response_a": response_a, "response_b": response_b, "label": label}
    table |= {"pseudo": pseudo, "equal_scores": equal_scores, "made_id": made, "row": frame["row"]}
    table |= {"language": frame["language"]} if "language" in frame else {}
    dtypes = dict.fromkeys(("id", *TEXTS), "str") | {"label": float}
    return pd.DataFrame(table, index=frame.index).astype(dtypes)


def winners(frame: pd.DataFrame, path: str) -> list[float]:
    return each(frame, path, "winner", WINNERS.__getitem__, "neither model_a nor model_b nor a tie")


def compared(talks_a: list[list], talks_b: list[list]) -> tuple[list[str], list[str], list[str]]:
    """Conversations, lists of (role, text), -> (all that came before as one text, last answer a, last answer
    b), each a list of rows. A conversation that does not end with an answer has the empty one."""
    prompts, answers_a, answers_b = [], [], []
    for a, b in zip(talks_a, talks_b, strict=True):
        ends = [talk.pop()[1] if talk and talk[-1][0] == "assistant" else "" for talk in (a, b)]
        prompts.append(written(a, b))
        answers_a.append(ends[0])
        answers_b.append(ends[1])
    return prompts, answers_a, answers_b


def written(a: list[tuple[str, str]], b: list[tuple[str, str]]) -> str:
    """What was said before the last answers, as one text; a lone question stays as it is.

    Where the two sides differ (earlier answers in the arenas) both stand there, sorted: were they in the
    order of a and b, the prompt would have to be swapped with the responses.
    """
    lines = []
    for x, y in zip_longest(a, b):
        said = sorted({turn for turn in (x, y) if turn and turn[1].strip()})
        marks = (" (one)", " (the other)") if len(said) == 2 else ("",)
        lines += [(role.capitalize() + mark, text) for (role, text), mark in zip(said, marks, strict=False)]
    if [name for name, _ in lines] == ["User"]:
        return lines[0][1]
    return "\n\n".join(f"{name}: {text}" for name, text in lines)


def talk(prompts: list[str], answers: list[str]) -> list[tuple[str, str]]:
    """Turns of the user and of one model, side by side -> one conversation."""
    turns = zip_longest([("user", text) for text in prompts], [("assistant", text) for text in answers])
    return [turn for both in turns for turn in both if turn is not None]


# ------------------------------------------------------------------------------ a cell -> its value, or raise


def each(frame: pd.DataFrame, path: str, column: str, convert: Callable, problem: str) -> list:
    """convert(cell) of a whole column; a cell on which it raises is a ValueError that names the place."""
    values = []
    for row, cell in zip(frame["row"], frame[column], strict=True):
        try:
            values.append(convert(cell))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
            null = frame["row"][frame[column].isna()]  # of [1, null] pandas makes floats: null is to blame
            place = f"{path}: row {row if null.empty else null.iloc[0]}, column {column}"
            raise ValueError(f"{place}: {shown(cell) if null.empty else 'null'} is {problem}") from error
    return values


def shown(value) -> str:
    """The start of any value, on one line and without the marks that turn a terminal's text round."""
    try:
        return " ".join(repr(value).split())[:60]
    except (RecursionError, ValueError):  # of an integer with more than 4,300 digits, too
        return "what is nested too deeply or too long to show"


def identifier(cell) -> str:
    if not isinstance(cell, str | int | np.integer) or cell == "":
        raise TypeError
    return plain_text(str(cell))


def plain_text(cell) -> str:
    """Text without lone halves of UTF-16 pairs, which JSON can hold and neither a tokenizer nor parquet
    takes; whole pairs are joined."""
    if not isinstance(cell, str):
        raise TypeError
    return cell if cell.isascii() else cell.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def turns(cell) -> list[str]:
    """LMSYS' cells: a JSON list of texts, null for the empty one."""
    found = json.loads(cell)
    if not isinstance(found, list):
        raise TypeError
    return ["" if turn is None else plain_text(turn) for turn in found]


def is_turns(cell) -> bool:
    try:
        turns(cell)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def messages(cell) -> list[tuple[str, str]]:
    """A conversation: a list of {role, content}, or hh-rlhf's text."""
    if isinstance(cell, str):
        start, *said = re.split(r"\n\n(Human|Assistant):", plain_text(cell))
        if start.strip() or not said:
            raise ValueError
        roles = ["user" if name == "Human" else "assistant" for name in said[::2]]
        return list(zip(roles, map(str.strip, said[1::2]), strict=True))
    return [(plain_text(m["role"]), "" if m["content"] is None else plain_text(m["content"])) for m in cell]


def probability(cell) -> float:
    """P(a wins) of a pair [p_a, p_b], also as text with or without commas."""
    pair = cell.strip().strip("[]").replace(",", " ").split() if isinstance(cell, str) else cell
    a, b = map(float, pair)
    if not (a >= 0 and b >= 0 and abs(a + b - 1) < 0.01):
        raise ValueError
    return a / (a + b)


def zero_or_one(cell) -> float:
    if float(cell) not in (0.0, 1.0):
        raise ValueError
    return float(cell)
