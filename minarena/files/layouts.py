"""The columns of a file -> the table of pairs of data.py, in three independent steps.

    how = reading_of(head, path, ..)     what the columns are, by the first rows of a file
    table = table_of(frame, how)         its next rows: texts (cells.py), verdicts

Which columns (columns.py), how a text is written (cells.py), and how the verdict is (verdicts.py). The three
do not depend on each other: every combination is read. Everything wrong with a file is a ValueError that
names file, row (the first is 1) and column. What it does not do: open files (formats.py), repair texts
(repair.py), or guess.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

import numpy as np
import pandas as pd

from minarena.data import TEXTS
from minarena.files import cells
from minarena.files.columns import CONTEXT, NAMED, column, columns_of, longest_text, missing
from minarena.files.verdicts import against_best, exact, verdicts, winner_words

ROW = "(row)"  # the column of a frame with the row's number in the file
PART = "(part)"  # and of a spread one with the number of the pair in its row
TOLD = {"answers": "two answers", "chosen": "chosen and rejected", "many": "several answers a prompt"}
SIDES_OF = {"answers": ("a", "b"), "chosen": ("chosen", "rejected"), "many": ()}  # of a form
ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError, StopIteration)


@dataclass
class Reading:
    """How a file is read. form: of TOLD. columns: key -> column. kinds: key -> cells.kind_of. words: what the
    column winner may say. several: answers to a prompt. repeats: whether answers begin with the prompt."""

    path: str
    form: str
    columns: dict[str, str]
    kinds: dict[str, str]
    words: dict[str, float]
    several: bool
    repeats: bool


def reading_of(head: pd.DataFrame, path: str, given: dict, words: dict, training: bool) -> Reading:
    """How a file is read; ValueError says what is missing. head: its first rows. given, words: --columns,
    --winner-words. training: labels count."""
    if len(double := head.columns[head.columns.duplicated()]):
        raise ValueError(f"{path}: column {double[0]}: stands there twice")
    form, columns = columns_of(head, given, path, training, words)
    sides, values = SIDES_OF[form], {key: column(head, name).tolist() for key, name in columns.items()}
    texts = [key for key in (*CONTEXT, *sides) if key in values]
    rest = [cell for key in texts if key in ("prompt", *sides) for cell in values[key]]
    kinds = {key: cells.kind_of(values[key], rest, form != "answers") for key in texts}
    written = {kinds[side].replace("json", "list") for side in sides}
    if len(written) == 2 and not (form == "chosen" and kinds["rejected"] == "text" and "list" in written):
        written = " and ".join(f"{columns[side]} ({kinds[side]})" for side in sides)
        raise ValueError(f"{path}: columns {written}: must both be texts, or both lists of messages")
    read = {key: readable(values[key], kinds[key]) for key in texts}
    lists = [value for side in sides for value in read[side] if isinstance(value, list)]
    spoken = any(len(x) > 1 if is_turns(x) else any(role == "user" for role, _ in x) for x in lists)
    # the dialogue last: it counts only where no other column is left that holds the prompt
    for key in sorted(columns.keys() & set(CONTEXT), key=lambda key: key == "dialogue"):
        elsewhere = key == "dialogue" and (spoken or columns.keys() & {"prompt", "history"})
        nulls = sum(map(null, values[key]))
        unread = key != "prompt" and len(read[key]) + nulls < len(head)
        if elsewhere or unread or (nulls == len(head) and (key != "prompt" or "dialogue" in columns)):
            del columns[key]
    if not spoken and not set(CONTEXT) & set(columns):
        raise ValueError(missing(head, path, columns, ["prompt"]))
    turns = any(map(is_turns, read.get("prompt", [])))
    lone = form == "chosen" and lists != [] and all(map(is_turns, lists)) and not turns
    several = form == "many" or (lone and bool(set(CONTEXT) & set(columns)))  # without a prompt: a dialogue
    plain = sides and len(head) > 1 and {kinds.get(key) for key in ("prompt", *sides)} == {"text"}
    rows = zip(*(values[key] for key in ("prompt", *sides)), strict=True) if plain else []
    rows = [(prompt.strip(), *answers) for prompt, *answers in rows if is_turns([prompt, *answers])]
    repeats = all(start and all(text.startswith(start) for text in answers) for start, *answers in rows)
    repeats = repeats and rows != []
    return Reading(path, form, columns, kinds, winner_words(columns, words), several, repeats)


def table_of(frame: pd.DataFrame, how: Reading) -> pd.DataFrame:
    """frame: the file's own columns, and ROW. Beside data.py's columns the table has row, made_id (whether
    the id is made of the texts) and number (whether the file's id is an integer)."""
    if how.several:
        frame, better, worse, label = spread(frame, how)
    else:
        better, worse = (each(frame, how, side) for side in SIDES_OF[how.form])
        label = 1 - equal_scores(frame, how) / 2
    table = {"id": None} | dict(zip(TEXTS, texts_of(frame, how, better, worse), strict=True))
    table |= {"label": label, "pseudo": False, "row": frame[ROW], "number": False}
    if how.form == "answers":
        table["label"], table["pseudo"] = verdicts(frame, how.columns, how.words, partial(each, frame, how))
    else:  # which side the chosen answer stands on is a matter of the texts alone
        rows = list(zip(*map(table.get, TEXTS), strict=True))
        is_a = np.array([throws_a(*row) for row in rows], bool)
        table["response_a"] = [row[1] if a else row[2] for row, a in zip(rows, is_a, strict=True)]
        table["response_b"] = [row[2] if a else row[1] for row, a in zip(rows, is_a, strict=True)]
        table |= {"label": np.where(is_a, label, 1 - label), "chosen": is_a.astype(float)}
    named = {key: column(frame, how.columns[key]).map(named_kind) for key in NAMED if key in how.columns}
    if "id" in how.columns:
        own, table["id"] = column(frame, how.columns["id"]), each(frame, how, "id", identifier, "no id")
        table["number"] = [not how.several and type(cell) is int and abs(cell) < 2**63 for cell in own]
        if how.several:
            table["id"] = [f"{own}-{part}" for own, part in zip(table["id"], frame[PART], strict=True)]
    else:
        table["id"] = [digest(*row, size=10).hex() for row in zip(*map(table.get, TEXTS), strict=True)]
    dtypes = dict.fromkeys(("id", *TEXTS, *named), "str") | {"label": float}
    table |= named | {"made_id": "id" not in how.columns}
    return pd.DataFrame(table, index=frame.index).astype(dtypes)


def table_of_lists(prompts: list, a: list, b: list) -> pd.DataFrame:
    """Texts or lists of messages, mixed as they may be -> the table, its ids the numbers of the rows."""
    columns = {key: key for key in ("prompt", "a", "b")}
    frame = pd.DataFrame(dict(zip(columns, (prompts, a, b), strict=True)), dtype=object)
    kinds = frame.map(lambda cell: "text" if isinstance(cell, str) else "list")
    parts = []
    for kind, part in frame.assign(**{ROW: range(1, len(a) + 1)}).groupby([kinds[key] for key in columns]):
        kind = dict(zip(columns, kind, strict=True))
        parts.append(table_of(part, Reading("judge", "answers", columns, kind, {}, False, False)))
    table = pd.concat(parts).sort_index()
    return table.assign(id=table["row"].astype(str))


def digest(*texts: str, size: int) -> bytes:
    return blake2b("\0".join(texts).encode(), digest_size=size).digest()


def throws_a(prompt: str, better: str, worse: str) -> bool:
    """Whether the chosen answer is a: a coin that the prompt and the two answers throw, whichever was chosen,
    in every command, file and part of a file."""
    first, second = sorted((better, worse))
    return (digest(prompt, first, second, size=1)[0] % 2 == 1) == (better == first)


def texts_of(frame: pd.DataFrame, how: Reading, a: list, b: list) -> tuple[list, list, list]:
    """(prompts, the first answers, the second ones) of what the cells say."""
    context = [key for key in CONTEXT if key in how.columns]
    texts = how.several or all(how.kinds[side] == "text" for side in SIDES_OF[how.form])
    parts = [each(frame, how, key, needed=texts and context == ["prompt"]) for key in context]
    if texts and context == ["prompt"] and how.kinds["prompt"] == "text":  # the usual case: three texts
        starts = [start.strip() if how.repeats else "" for start in parts[0]]
        return parts[0], *(list(map(str.removeprefix, side, starts)) for side in (a, b))
    turns = column(frame, how.columns["turn"]) if "turn" in how.columns else [None] * len(frame)
    rows = []
    for row, *values, one, other, turn in zip(frame[ROW], *parts, a, b, turns, strict=True):
        if is_turns(one) != is_turns(other):
            where = f"{how.path}: row {row}, column {how.columns[SIDES_OF[how.form][1]]}"
            raise ValueError(f"{where}: one answer has roles, the other none")
        talks = conversations(dict(zip(context, values, strict=True)), one, other)
        turn = int(re.match(r"\d{,9}", str(turn))[0] or 0)  # of 2.0, too; 0 is the whole conversation
        talks = [cells.up_to_answer(talk, turn) for talk in talks]
        rows.append(cells.last_answers(*talks, parted=how.form != "answers"))
    return tuple(map(list, zip(*rows, strict=True))) if rows else ([], [], [])


def conversations(values: dict, *answers) -> list[cells.Talk]:
    """The two conversations of a row. values: what its columns of the prompt say, by key."""
    if all(map(is_turns, (values.get("prompt"), *answers))):  # LMSYS
        prompt = values.pop("prompt")
        both = [cells.interleaved(prompt, side) for side in answers]
    else:
        both = [side[0] if values and is_turns(side) and len(side) == 1 else side for side in answers]
        both = [cells.talk(side, "assistant") for side in both]
        # a dialogue, and the other answer alone
        if values.keys() <= {"system"} and [role for role, _ in both[1]] == ["assistant"]:
            both[1] = both[0][:-1] + both[1]
    asked = [values.pop(key) for key in ("history", "prompt", "input") if isinstance(values.get(key), str)]
    parts = [cells.talk(said, key if key == "system" else "user") for key, said in values.items()]
    parts += [[("user", "\n\n".join(filter(str.strip, asked)))]] if asked else []
    # An answer, or room for one, is no prompt
    done = [("assistant", ""), *(side[-1] for side in both if side)]
    parts = [said[:-1] if said[-1:] and said[-1] in done else said for said in parts]
    return [cells.with_context([said for said in parts if said], side) for side in both]


def is_turns(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def null(cell) -> bool:
    return cell is None or cell != cell


def readable(values: list, kind: str) -> list:
    """What the cells that can be read say; whichever cannot is named when its row comes."""
    found = []
    for cell in values:
        with suppress(*ERRORS):
            found.append(cells.content(cell, kind))
    return found


def equal_scores(frame: pd.DataFrame, how: Reading) -> np.ndarray:
    """Whether chosen and rejected have one score; a score that is null is none."""
    keys = [key for key in how.columns if how.form == "chosen" and "score" in key][:2]  # those given first
    scores = [each(frame, how, key, lambda x: np.nan if null(x) else float(x), "no number") for key in keys]
    return np.equal(*scores) if len(scores) == 2 else np.zeros(len(frame), bool)


def spread(frame: pd.DataFrame, how: Reading) -> tuple[pd.DataFrame, list, list, np.ndarray]:
    """Several answers a row -> (a row a pair of the best and another, the best, the others, P(best wins))"""
    if how.form == "many":
        names = [how.columns[key] for key in ("many", "scores") if key in how.columns]
        first = longest_text(column(frame.head(1), f"{names[0]}.0").iloc[0])
        two = f"--columns a={names[0]}.0{first} b={names[0]}.1{first} would compare the first two"
        problem = f"not a list of answers with a score or rank each; {two}"
        pairs = each(frame, how, "many", partial(against_best, name=names[-1]), problem, *names)
    else:
        sides = [each(frame, how, side) for side in SIDES_OF[how.form]]
        pairs = [[(x, y, 1.0) for x in better for y in worse] for better, worse in zip(*sides, strict=True)]
    better, worse, label = ([pair[i] for row in pairs for pair in row] for i in range(3))
    place = np.repeat(np.arange(len(frame)), [len(row) for row in pairs])
    numbers = [number for row in pairs for number in range(1, len(row) + 1)]
    return frame.iloc[place].reset_index(drop=True).assign(**{PART: numbers}), better, worse, np.array(label)


# ------------------------------------------------------------------------------ a cell -> its value, or raise


def each(frame: pd.DataFrame, how: Reading, key: str, convert=None, problem="", *names, needed=True):
    """[convert(cell), ..] of a key's column, or of the columns `names`; where it raises, ValueError names row
    and column. By default what the cell says. needed=False: a null counts as an empty text."""
    name = names[0] if names else how.columns[key]
    first = values = column(frame, name).tolist()
    if names[1:]:
        values = zip(*(column(frame, name) for name in names), strict=True)
    if not convert:
        kind, problem = how.kinds[key], cells.IS_NOT[how.kinds[key]]
        said = cells.plain_text if kind == "text" else partial(cells.content, kind=kind)
        convert = said if needed else lambda cell: "" if null(cell) else said(cell)
    converted = []
    try:
        for cell in values:  # no map: a StopIteration of convert would end it without a word
            converted.append(convert(cell))
    except ERRORS as error:
        place = len(converted)
        if isinstance(first[place], float):  # of [1, null] pandas makes floats: the null is to blame
            place = next((i for i, cell in enumerate(first) if null(cell)), place)
        row, cell = frame[ROW].iloc[place], first[place]
        what = f"{'null' if null(cell) else shown(cell)} is {problem}{way_out(key, name, first, cell)}"
        raise ValueError(f"{how.path}: row {row}, column {name}: {what}") from error
    return converted


def way_out(key: str, name: str, values: list, cell) -> str:
    """What helps with a cell that cannot be read: the column's words, or the longest text inside the cell."""
    if key == "winner":
        words = sorted(set(map(shown, values)))
        return f" (it holds {', '.join(words)})" if 1 < len(words) < 6 else ""
    inner = longest_text(cell)
    return f"; --columns {key}={name}{inner} would say what to read" if inner else ""


def shown(value) -> str:
    """The start of any value, on one line and without the marks that turn a terminal's text round."""
    try:
        return " ".join(repr(value).split())[:60]
    except (RecursionError, ValueError):  # of an integer with more than 4,300 digits, too
        return "what is nested too deeply or too long to show"


def named_kind(cell) -> str | None:
    """The language or group of a row, None where the cell names none."""
    return cells.plain_text(str(cell)) if isinstance(cell, str | int | float) and not null(cell) else None


def identifier(cell) -> str:
    if not isinstance(cell, str | int) or cell == "":
        raise TypeError
    return cells.plain_text(str(cell))


def describe_reading(how: Reading, head: pd.DataFrame, given: dict[str, str]) -> tuple[str, str]:
    """(what a file was read as, with its columns; which were not used; `given`: --winner-words)"""
    columns = " ".join(f"{key}={name}" for key, name in how.columns.items())
    used = {part for name in how.columns.values() for part in (name, name.partition(".")[0])}
    others = ", ".join(str(name) for name in head.columns if name not in used)
    met = set(column(head, how.columns["winner"]).map(exact)) if given and "winner" in how.columns else set()
    idle = " ".join(f"{key}={word}" for key, word in given.items() if exact(word) not in met)
    left = f"; not used: {others:.300}" if others else ""
    left += f"; --winner-words {idle}: not in the first {len(head):,} rows" if idle else ""
    return f"{TOLD[how.form]} ({columns})", left
