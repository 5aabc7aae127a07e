"""Which answer of a row won: words, probabilities, names of models, votes, scores or a signed strength.

    words = winner_words(columns, {"a": "1"})     what a cell of the column winner may say
    verdicts(frame, columns, words, each)         (P(a wins) of each row, whether it is two probabilities)

Any case, space and sign. What could be read in two ways stands in no table here and is refused: 0, 1 and 2
beside columns that are not numbered so.
"""

import math
import re
from collections.abc import Callable

import numpy as np
import pandas as pd

from minarena.files.cells import plain_text
from minarena.files.columns import ANSWERS, SCORES, SIDES, column, squeeze

TIES = "tie draw both equal same neither bothbad bothgood tiebothbad tiebothgood tieinconsistent"
ANSWER_KEYS = "response answer text output completion content generation"
SIGNS = {">": 1.0, ">>": 1.0, "<": 0.0, "<<": 0.0, "=": 0.5}  # of A>B, also as [[A>B]]
NO_NUMBER = "no number: leave such rows out, or take another verdict by --columns winner=NAME"
NO_VOTE = "not, with the other votes, one winner; --columns winner=NAME takes another verdict"
NO_PAIR = "not a pair of probabilities that add up to 1 (percent: a hundredth; a tie's share: half to each)"
RANK = re.compile("rank(?!er)", re.IGNORECASE)  # the lower is better; a reranker's score is no rank
VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5}


def winner_words(columns: dict[str, str], given: dict[str, str]) -> dict[str, float]:
    """Word -> P(a wins). given: --winner-words. Bare numbers count beside columns that are numbered so."""
    typed = [exact(name) for name in given.values()]
    if len(set(typed)) < len(typed):
        raise ValueError(f"--winner-words: one word has two meanings: {', '.join(given.values())}")
    a, b = (squeeze(columns.get(key, "")) for key in "ab")
    digits = tuple("".join(filter(str.isdigit, name)) for name in (a, b))
    known = dict.fromkeys(TIES.split(), 0.5)
    for x, y in [SIDES[0], *SIDES[3:], digits if digits in SIDES else SIDES[1]]:
        words = f"{ANSWERS} model" if x.isdigit() and digits not in SIDES else f" {ANSWERS} model option"
        known |= {word + x: 1.0 for word in words.split(" ")} | {word + y: 0.0 for word in words.split(" ")}
        known |= {f"={x}{sign}{y}": p for sign, p in SIGNS.items()}
        known |= {f"={y}{sign}{x}": 1 - p for sign, p in SIGNS.items()}
    known |= {"1.0": 1.0, "2.0": 0.0} if digits == ("1", "2") else {}
    known |= {a: 1.0, b: 0.0, "model_a": 1.0, "model_b": 0.0}
    return known | {word: VALUES[key] for key, name in given.items() for word in (name, exact(name))}


def exact(cell) -> str:
    """A cell as --winner-words are compared: 1, "1" and 1.0 are one word, whatever the file's type."""
    text = "".join(str(cell).casefold().split()).strip("[]")
    try:
        return f"={float(text):g}"
    except ValueError:
        return f"={text}"


def verdicts(frame: pd.DataFrame, columns: dict[str, str], words: dict[str, float], each: Callable) -> tuple:
    """(P(a wins) (rows,), NaN where the file has no verdict; (rows,) bool or False: whether the label is a
    pair of probabilities). ValueError names row and column. each(key, convert, problem): layouts.each."""

    def winner(cells) -> float:
        cell, *models = cells if isinstance(cells, tuple) else (cells,)
        if isinstance(cell, str) and cell in words:  # the usual case first
            return words[cell]
        if is_pair(cell):
            return probability(cell)
        text, same = str(cell).strip(), exact(cell)
        text = text if text.lstrip("+-").replace(".", "").isdigit() else squeeze(text)
        if same not in words and text not in words and models.count(cell) == 1:
            return 1.0 - models.index(cell)
        return words[same] if same in words else words[text]

    if "winner" in columns:
        names = [columns[key] for key in ("winner", "model_a", "model_b") if key in columns]
        soft = np.array([is_pair(cell) for cell in column(frame, columns["winner"])], bool)
        problem = f"neither {columns['a']} nor {columns['b']} nor a tie in any usual word"
        problem += ": --winner-words a=WORD b=WORD tie=WORD says which means which"
        problem = NO_PAIR if soft.all() else problem
        return np.array(each("winner", winner, problem, *names), float), soft
    if "strength" in columns:
        return 0.5 - np.sign(each("strength", number, NO_NUMBER)) / 2, False
    if "vote_a" in columns:
        names = [columns[key] for key in ("vote_a", "vote_b", "vote_tie") if key in columns]
        return np.array(each("vote_a", vote, NO_VOTE, *names)), False
    if "score_a" in columns:
        a, b = (np.array(each(f"score_{x}", number, NO_NUMBER)) for x in "ab")
        return 0.5 + np.sign(b - a if RANK.search(columns["score_a"]) else a - b) / 2, False
    return np.full(len(frame), np.nan), False


def is_pair(cell) -> bool:
    return isinstance(cell, list) or (isinstance(cell, str) and re.match(r"\[(?!\[)", cell))


def probability(cell) -> float:
    """P(a wins) of a pair [p_a, p_b], also as text with or without commas."""
    pair = cell.strip().strip("[]").replace(",", " ").split() if isinstance(cell, str) else cell
    a, b = map(float, pair)
    if not (a >= 0 and b >= 0 and abs(a + b - 1) < 0.01):
        raise ValueError
    return a / (a + b)


def number(cell) -> float:
    if not math.isfinite(value := float(cell)):  # NaN is neither more nor less than another score
        raise ValueError
    return value


def vote(cells: tuple) -> float:
    """P(a wins) of votes for a, b and, where there is such a column, a tie; raises unless one alone is 1."""
    votes = [float(cell) for cell in cells]
    if sorted(votes) != [0] * (len(votes) - 1) + [1]:
        raise ValueError
    return votes[0] + sum(votes[2:]) / 2


def against_best(cell: list | tuple, name: str = "") -> list[tuple[str, str, float]]:
    """[(best, other, P(best wins)), ..], 0.5 for equal scores; raises where an answer lacks a text or score.

    cell: answers with a score each, or (answers, scores). name: the column of scores.
    """
    answers, scores = cell if isinstance(cell, tuple) else (cell, [])
    if not scores:
        found = [{squeeze(key): value for key, value in answer.items()} for answer in answers]
        shared = set.intersection(*map(set, found))
        key, name = [next(key for key in keys.split() if key in shared) for keys in (ANSWER_KEYS, SCORES)]
        answers = [answer[key] for answer in found]
        scores = [answer[name] for answer in found]
    texts, sign = [plain_text(answer) for answer in answers], -1 if RANK.search(name) else 1
    scores = [sign * number(score) for _, score in zip(texts, scores, strict=True)]
    best = scores.index(max(scores))
    others = [i for i in range(len(scores)) if i != best]
    return [(texts[best], texts[i], 0.5 if scores[i] == scores[best] else 1.0) for i in others]
