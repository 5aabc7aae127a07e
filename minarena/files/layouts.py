"""The columns of a file -> the table of pairs of data.py, in three independent steps.

    reading = reading_of(head, path, ..)     what the columns are, by the first rows of a file
    table = table_of(frame, reading)                     its next rows: texts (cells.py), verdicts

Which columns (columns.py), how a text is written (cells.py), and how the verdict is (verdicts.py): each is
said once, and any of one goes with any of the others. Everything wrong with a file is a ValueError that names
file, row (the first is 1) and column. What it does not do: open files (formats.py), repair texts (repair.py),
or guess.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

import numpy as np
import pandas as pd

from minarena.data import TEXTS
from minarena.files import cells
from minarena.files.columns import CONTEXT, NAMED, column, columns_of, longest_text, missing
from minarena.files.verdicts import against_best, verdicts, winner_words

ROW = "(row)"  # the column of a frame with the row's number in the file
PART = "(part)"  # and of a spread one with the number of the pair in its row
TOLD = {"answers": "two answers", "chosen": "chosen and rejected", "many": "several answers a prompt"}
SIDES = {"answers": ("a", "b"), "chosen": ("chosen", "rejected"), "many": ()}  # of a form
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


def reading_of(
    head: pd.DataFrame, path: str, given: dict[str, str], words: dict[str, str], training: bool
) -> Reading:
    """head: the first rows of the file. given, words: --columns, --winner-words. training: labels count."""
    double = head.columns[head.columns.duplicated()]
    if len(double):
        raise ValueError(f"{path}: column {double[0]}: stands there twice")
    form, columns = columns_of(head, given, path, training, words)
    sides, told = SIDES[form], {key: column(head, name).tolist() for key, name in columns.items()}
    texts = [key for key in (*CONTEXT, *sides) if key in told]
    rest = [cell for key in texts if key in ("prompt", *sides) for cell in told[key]]
    kinds = {key: cells.kind_of(told[key], rest, form != "answers") for key in texts}
    written = {kinds[side].replace("json", "list") for side in sides}
    if len(written) == 2 and not (form == "chosen" and kinds["rejected"] == "text" and "list" in written):
        written = " and ".join(f"{columns[side]} ({kinds[side]})" for side in sides)
        raise ValueError(f"{path}: columns {written}: must both be texts, or both lists of messages")
    read = {key: readable(told[key], kinds[key]) for key in texts}
    lists = [value for side in sides for value in read[side] if isinstance(value, list)]
    spoken = any(len(x) > 1 if is_turns(x) else any(role == "user" for role, _ in x) for x in lists)
    for key in sorted(columns.keys() & set(CONTEXT), key="dialogue".__eq__):  # the dialogue last:
        elsewhere = key == "dialogue" and (spoken or columns.keys() & {"prompt", "history"})  # what is left
        nulls = sum(map(null, told[key]))
        unread = key != "prompt" and len(read[key]) + nulls < len(head)
        if elsewhere or unread or (nulls == len(head) and (key != "prompt" or "dialogue" in columns)):
            del columns[key]
    if not spoken and not set(CONTEXT) & set(columns):
        raise ValueError(missing(head, path, columns, ["prompt"]))
    turns = any(map(is_turns, read.get("prompt", [])))
    several = form == "many" or (form == "chosen" and lists != [] and all(map(is_turns, lists)) and not turns)
    several = several and bool(set(CONTEXT) & set(columns))  # else the turns are a dialogue
    rows = zip(*(told.get(key, []) for key in ("prompt", *sides)), strict=False)
    plain = sides and len(head) > 1 and {kinds.get(key) for key in ("prompt", *sides)} == {"text"}
    repeats = bool(plain) and all(strings(*row) and begin_with(*row) for row in rows)
    words = winner_words(columns, words) if form == "answers" else {}
    return Reading(path, form, columns, kinds, words, several, repeats)


def table_of(frame: pd.DataFrame, r: Reading) -> pd.DataFrame:
    """frame: the file's own columns, and ROW. Beside data.py's columns the table has row, made_id (whether
    the id is made of the texts) and number (whether the file's id is an integer)."""
    if r.several:
        frame, better, worse, label = spread(frame, r)
    else:
        better, worse = (each(frame, r, side) for side in SIDES[r.form])
        label = 1 - equal_scores(frame, r) / 2
    table = {"id": None} | dict(zip(TEXTS, texts_of(frame, r, better, worse), strict=True))
    table |= {"label": label, "pseudo": False, "row": frame[ROW], "number": False}
    if r.form == "answers":
        table["label"], table["pseudo"] = verdicts(frame, r.columns, r.words, partial(each, frame, r))
    else:  # which side the chosen answer stands on is a matter of the texts alone
        rows = list(zip(*(table[text] for text in TEXTS), strict=True))
        is_a = np.array([throws_a(*row) for row in rows], bool)
        table["response_a"] = [row[1] if a else row[2] for row, a in zip(rows, is_a, strict=True)]
        table["response_b"] = [row[2] if a else row[1] for row, a in zip(rows, is_a, strict=True)]
        table |= {"label": np.where(is_a, label, 1 - label), "chosen": is_a.astype(float)}
    named = {key: r.columns[key] for key in NAMED if key in r.columns}
    table |= {key: column(frame, name).map(named_kind) for key, name in named.items()}
    if "id" in r.columns:
        own, table["id"] = column(frame, r.columns["id"]), each(frame, r, "id", identifier, "no id")
        table["number"] = [not r.several and type(cell) is int and abs(cell) < 2**63 for cell in own]
        if r.several:
            table["id"] = [f"{own}-{part}" for own, part in zip(table["id"], frame[PART], strict=True)]
    else:
        rows = zip(*(table[text] for text in TEXTS), strict=True)
        table["id"] = [digest(*row, size=10).hex() for row in rows]
    dtypes = dict.fromkeys(("id", *TEXTS, *named), "str") | {"label": float}
    return pd.DataFrame(table | {"made_id": "id" not in r.columns}, index=frame.index).astype(dtypes)


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


def texts_of(frame: pd.DataFrame, r: Reading, a: list, b: list) -> tuple[list, list, list]:
    """(prompts, the first answers, the second ones) of what the cells say."""
    context = [key for key in CONTEXT if key in r.columns]
    texts = r.several or all(r.kinds[side] == "text" for side in SIDES[r.form])
    parts = [each(frame, r, key, needed=texts and context == ["prompt"]) for key in context]
    if texts and context == ["prompt"] and r.kinds["prompt"] == "text":  # the usual case: three texts
        starts = [start.strip() if r.repeats else "" for start in parts[0]]
        return parts[0], *(list(map(str.removeprefix, side, starts)) for side in (a, b))
    turns = column(frame, r.columns["turn"]).map(turn_number) if "turn" in r.columns else [0] * len(frame)
    rows = []
    for row, *told, one, other, turn in zip(frame[ROW], *parts, a, b, turns, strict=True):
        if is_turns(one) != is_turns(other):
            where = f"{r.path}: row {row}, column {r.columns[SIDES[r.form][1]]}"
            raise ValueError(f"{where}: one answer has roles, the other none")
        talks = conversations(dict(zip(context, told, strict=True)), one, other)
        talks = [cells.up_to_answer(talk, turn) for talk in talks]
        rows.append(cells.last_answers(*talks, parted=r.form != "answers"))
    return tuple(map(list, zip(*rows, strict=True))) if rows else ([], [], [])


def conversations(told: dict, *answers) -> list[cells.Talk]:
    """The two conversations of a row. told: what its columns of the prompt say, by key."""
    if all(map(is_turns, (told.get("prompt"), *answers))):  # LMSYS
        prompt = told.pop("prompt")
        both = [cells.interleaved(prompt, side) for side in answers]
    else:
        both = [side[0] if told and is_turns(side) and len(side) == 1 else side for side in answers]
        both = [cells.talk(side, "assistant") for side in both]
        if isinstance(answers[0], list) and isinstance(answers[1], str):  # a dialogue, and its other answer
            both[1] = both[0][:-1] + both[1]
    asked = [told.pop(key) for key in ("history", "prompt", "input") if isinstance(told.get(key), str)]
    parts = [cells.talk(said, key if key == "system" else "user") for key, said in told.items()]
    parts += [[("user", "\n\n".join(filter(str.strip, asked)))]] if asked else []
    # An answer, or room for one, is no prompt
    done = [("assistant", ""), *(side[-1] for side in both if side)]
    parts = [said[:-1] if said[-1:] and said[-1] in done else said for said in parts]
    return [cells.with_context([said for said in parts if said], side) for side in both]


def is_turns(value) -> bool:
    return isinstance(value, list) and strings(*value)


def strings(*values) -> bool:
    return all(isinstance(value, str) for value in values)


def begin_with(start: str, *texts: str) -> bool:
    return start.strip() != "" and all(text.startswith(start.strip()) for text in texts)


def null(cell) -> bool:
    return cell is None or cell != cell


def readable(told: list, kind: str) -> list:
    """What the cells that can be read say; whichever cannot is named when its row comes."""
    found = []
    for cell in told:
        with suppress(*ERRORS):
            found.append(cells.content(cell, kind))
    return found


def equal_scores(frame: pd.DataFrame, r: Reading) -> np.ndarray:
    """Whether chosen and rejected have one score; a score that is null is none."""
    keys = [key for key in ("score_chosen", "score_rejected") if key in r.columns]
    scores = [
        each(frame, r, key, lambda x: float("nan" if null(x) or x == "" else x), "no number") for key in keys
    ]
    return np.equal(*scores) if len(scores) == 2 else np.zeros(len(frame), bool)


def spread(frame: pd.DataFrame, r: Reading) -> tuple[pd.DataFrame, list, list, np.ndarray]:
    """Several answers a row -> (a row a pair of the best and another, the best, the others, P(best wins))"""
    if r.form == "many":
        names = [r.columns[key] for key in ("many", "scores") if key in r.columns]
        cell = column(frame, names[0]).iloc[0]
        first = longest_text(cell[0]) if isinstance(cell, list) and cell else ""
        two = f"--columns a={names[0]}.0{first} b={names[0]}.1{first} would compare the first two"
        problem = f"not a list of answers with a score or rank each; {two}"
        pairs = each(frame, r, "many", partial(against_best, name=names[-1]), problem, *names)
    else:
        sides = [each(frame, r, side) for side in SIDES[r.form]]
        pairs = [[(x, y, 1.0) for x in better for y in worse] for better, worse in zip(*sides, strict=True)]
    better, worse, label = ([pair[i] for row in pairs for pair in row] for i in range(3))
    place = np.repeat(np.arange(len(frame)), [len(row) for row in pairs])
    numbers = [number for row in pairs for number in range(1, len(row) + 1)]
    return frame.iloc[place].reset_index(drop=True).assign(**{PART: numbers}), better, worse, np.array(label)


# ------------------------------------------------------------------------------ a cell -> its value, or raise


def each(
    frame: pd.DataFrame,
    r: Reading,
    key: str,
    convert: Callable | None = None,
    problem="",
    *names,
    needed=True,
) -> list:
    """convert(cell) of a key's column, or of the columns `names`; a cell on which it raises is a ValueError
    that names the place. By default what the cell says, which needs not be something if not `needed`."""
    name = names[0] if names else r.columns[key]
    first = told = column(frame, name).tolist()
    if names[1:]:
        told = zip(*(column(frame, name) for name in names), strict=True)
    if not convert:
        kind, problem = r.kinds[key], cells.IS_NOT[r.kinds[key]]
        said = cells.plain_text if kind == "text" else partial(cells.content, kind=kind)
        convert = said if needed else lambda cell: "" if null(cell) else said(cell)
    values = []
    try:
        for cell in told:  # no map: a StopIteration of convert would end it without a word
            values.append(convert(cell))
    except ERRORS as error:
        place = len(values)
        if isinstance(first[place], float):  # of [1, null] pandas makes floats: the null is to blame
            place = next((i for i, cell in enumerate(first) if null(cell)), place)
        row, cell = frame[ROW].iloc[place], first[place]
        what = f"{'null' if null(cell) else shown(cell)} is {problem}{way_out(key, name, first, cell)}"
        raise ValueError(f"{r.path}: row {row}, column {name}: {what}") from error
    return values


def way_out(key: str, name: str, told: list, cell) -> str:
    """What helps with a cell that cannot be read: the column's words, or the longest text inside the cell."""
    if key == "winner":
        words = sorted(set(map(shown, told)))
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


def turn_number(cell) -> int:
    """0, for the whole conversation, where it is none."""
    with suppress(*ERRORS):
        return int(float(cell))
    return 0


def identifier(cell) -> str:
    if not isinstance(cell, str | int) or cell == "":
        raise TypeError
    return cells.plain_text(str(cell))


def told(r: Reading, head: pd.DataFrame) -> tuple[str, str]:
    """(what a file was read as, with its columns; which were not used)"""
    columns = " ".join(f"{key}={name}" for key, name in r.columns.items())
    used = {part for name in r.columns.values() for part in (name, name.partition(".")[0])}
    others = ", ".join(str(name) for name in head.columns if name not in used)
    return f"{TOLD[r.form]} ({columns})", f"; not used: {others:.300}" if others else ""
