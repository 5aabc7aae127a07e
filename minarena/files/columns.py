"""Which column of a file is what: all spellings as data, and the way out where they do not tell.

    form, columns = columns_of(head, {"winner": "vote"}, path, True)    answers, {"prompt": "question", ..}

A name counts without case, spaces and signs. Two answers are a pair of names: a word of ANSWERS and two sides
of SIDES, in either order (response_a and response_b, answer1 and answer2, human_ref_A and human_ref_B). A new
spelling is a word in a table. What it does not do: look into texts (cells.py), or guess: what is not known is
refused, with the --columns that settle it.
"""

from collections.abc import Iterable, Iterator

import pandas as pd

from minarena.data import GROUPS


def split_sides(words: str) -> list[tuple[str, ...]]:
    return [tuple(word.split("/")) for word in words.split()]


SIDES = split_sides("a/b 1/2 0/1 left/right first/second")
BETTER = split_sides("chosen/rejected preferred/nonpreferred preferred/dispreferred preferred/rejected")
BETTER += split_sides("accepted/rejected better/worse winning/losing messages/rejectedresponse /rejected")
ANSWERS = "response answer output completion conversation messages text reply summary candidate generation"
ANSWERS += " conv humanref continuation origresponse modelresponse modeloutput modelanswer assistant"
SCORES = "overallscore score avgrating averagerating rating reward rank votes upvotes pmscore"
PAIRS = {  # two keys -> (words, sides)
    ("a", "b"): (f"{ANSWERS} ", SIDES),  # the last word is none: columns a and b
    ("chosen", "rejected"): (f" {ANSWERS}", BETTER),
    ("score_a", "score_b"): (SCORES, SIDES),
    ("score_chosen", "score_rejected"): (SCORES, BETTER),
    ("model_a", "model_b"): ("model modelname generator llm", SIDES),
    ("vote_a", "vote_b"): ("winnermodel winner win", SIDES),
}
NAMES = {  # key -> its names; the first that a file has is taken
    "id": "id uid uuid questionid conversationid promptid pairid comparisonid sampleid exampleid idx index",
    "language": "language lang",
    "system": "system systemprompt systemmessage",
    "history": "context history trajectory",
    "prompt": "originstruction prompt question instruction query userquery userprompt post problem",
    "input": "input",
    "dialogue": "messages conversation conversations contents",  # where nothing else holds the prompt
    "turn": "turn",
    "winner": "winner winnermodel verdict preferred preferredresponse preferredanswer preferredcompletion"
    " preferredmodel preference humanpreference origpreference betterresponseid betterresponse betteranswer"
    " betterid better selected chosen choice vote",
    "strength": "preferencestrength overallpreference",
    "vote_tie": "winnertie tie",
    "label": "label labels target gold",
    "many": "completions answers responses candidates generations outputs summaries replies",
    "scores": "overallscores scores ratings rating rewards ranks",
    **{name: name for name in GROUPS},
}
NAMES_OF_SIDES = {w + side for w in f" {ANSWERS} model".split(" ") for both in SIDES for side in both}
CONTEXT = ("system", "history", "dialogue", "prompt", "input")  # parts of the prompt, in this order
NAMED = ("language", *GROUPS)  # what kind of row it is: kept in the table, but not shown to the model
VERDICTS = ("winner model_a model_b", "strength", "vote_a vote_b vote_tie", "score_a score_b")  # by rank
# form -> what a file may have beside id, NAMED, CONTEXT and a verdict
KEYS = {"answers": "a b turn", "chosen": "chosen rejected score_chosen score_rejected", "many": "many scores"}


def squeeze(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def column(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column, or by a dotted name (data.prompt, annotations.0.selected) what stands inside its cells."""
    if name in frame:
        return frame[name]
    outer, *steps = name.split(".")
    return pd.Series([inside(cell, steps) for cell in frame[outer]], dtype=object)


def inside(cell, steps: list[str]):
    for step in steps:
        inner = {str(i): part for i, part in enumerate(cell)} if isinstance(cell, list) else cell
        cell = inner.get(step) if isinstance(inner, dict) else None
    return cell


def columns_of(head: pd.DataFrame, given: dict, path: str, training: bool, words: dict) -> tuple[str, dict]:
    """(a form of KEYS, key -> column) by the names of a file's columns.

    given: --columns, which win over every spelling. training: a label is needed. words: --winner-words,
    which settle what a column label means. Raises ValueError that names the way out.
    """
    for key, name in given.items():
        if name not in head and name.partition(".")[0] not in head:
            raise ValueError(f"{path}: --columns {key}={name}: no such column; it has {listed(head)}")
    if len(given.keys() & {"score_a", "score_b"}) == 1:
        raise ValueError(f"{path}: --columns score_a=NAME score_b=NAME: one of the two is missing")
    known = matched(((name, name) for name in head.columns if name not in given.values()), given)
    two, better = ({x, y} <= known.keys() for x, y in (("a", "b"), ("chosen", "rejected")))
    verdict = next((keys.split() for keys in VERDICTS if keys.split()[0] in known), [])
    if words and "label" in known and not verdict:
        known["winner"], verdict = known["label"], VERDICTS[0].split()
    if two and better and not verdict and "chosen" not in given:  # chosen: A beside response_a is a word
        sides, a, b = (column(head, known[key]).tolist() for key in ("chosen", "a", "b"))
        if all(squeeze(str(cell)) in NAMES_OF_SIDES and cell not in a + b for cell in sides):
            known["winner"], verdict = known.pop("chosen"), VERDICTS[0].split()
    if better and "a" not in given and not (two and verdict and "chosen" not in given):
        form = "chosen"
    elif two:
        form = "answers"
    elif "many" in known and all(isinstance(cell, list) for cell in column(head, known["many"])):
        form = "many"
    else:
        raise ValueError(missing(head, path, known, [key for key in ("a", "b") if key not in known]))
    if training and form == "answers" and not verdict and "label" in known:
        why = f"column {known['label']}: which answer a value of it means is not known"
        option = f"--columns winner={known['label']} --winner-words a=WORD b=WORD"
        raise ValueError(f"{path}: {why}: {option} says it")
    a, b = (squeeze(known.get(key, "")) for key in "ab")  # b's words, scores and signs would be about a
    if form == "answers" and any(b in (a.replace(y, x, 1), x.join(a.rsplit(y, 1))) for x, y in SIDES):
        raise ValueError(f"{path}: --columns a={known['a']} b={known['b']}: b is the first: turn them round")
    keys = {"id", *NAMED, *CONTEXT, *KEYS[form].split(), *(verdict if form == "answers" else given)}
    return form, {key: name for key, name in known.items() if key in keys}


def matched(names: Iterable[tuple[str, str]], given: dict[str, str]) -> dict[str, str]:
    """key -> column by the spellings. names: (what is compared, the column's name)."""
    pool, known = {}, dict(given)
    for word, name in names:
        pool.setdefault(squeeze(word), name)
    for keys, (words, sides) in PAIRS.items():
        if sides is SIDES and {"a", "b"} <= known.keys():  # response_a_score
            sides = [*sides, (squeeze(known["a"]), squeeze(known["b"]))]
        both = [(w + x, w + y) for w in words.split(" ") for x, y in sides]
        both += [(x + w, y + w) for w in words.split(" ") for x, y in sides]
        found = next((pair for pair in both if pool.keys() >= set(pair)), ())
        if not known.keys() & set(keys):
            known |= {key: pool[name] for key, name in zip(keys, found, strict=False)}
    for key, words in NAMES.items():
        free = [pool[word] for word in words.split() if pool.get(word) not in {None, *known.values()}]
        known |= {key: free[0]} if free and key not in known else {}
    return known


def missing(head: pd.DataFrame, path: str, known: dict[str, str], lacks: list[str]) -> str:
    """Why a file cannot be read: the nearest layout, what it lacks of it, and the --columns that would do."""
    names = {squeeze(name): name for name in head.columns}
    inside = [leaf for name, cell in head.iloc[0].items() for leaf in leaves(str(name), cell)]
    inside.sort(key=lambda leaf: leaf.count("."))
    guess = matched(((leaf.rpartition(".")[2], leaf) for leaf in inside), known)
    for word in ANSWERS.split():  # answer_a and response_b: no pair, and yet no riddle
        halves = {"a": [word + a for a, _ in SIDES], "b": [word + b for _, b in SIDES]}
        guess = {k: names[half] for k, side in halves.items() for half in side if half in names} | guess
    guess = {"prompt": guess.get("history", guess.get("dialogue", "NAME"))} | guess
    keys, layout = ["prompt", "a", "b", "winner"], "two answers a and b with a winner"
    if known.keys() & {"chosen", "rejected"}:
        keys, layout = ["prompt", "chosen", "rejected"], "chosen and rejected answers"
        lacks = lacks if "prompt" in lacks else [key for key in keys[1:] if key not in known]
    lacks = [key for key in lacks if key not in guess] or lacks
    wanted = [key for key in keys if key in lacks or key in guess.keys() - known]
    shown = " ".join(f"{key}={guess.get(key, 'NAME')}" for key in wanted)
    alone = [names[word] for word in ANSWERS.split() if word in names and "a" not in guess]
    why = f" (a row has one answer, {alone[0]}: put two to a prompt into one row)" if alone else ""
    why += " (if no column holds it, put it into one)" if lacks == ["prompt"] and "NAME" in shown else ""
    why = f"{path}: nearest layout: {layout}; missing: {', '.join(lacks)}{why}; it has {listed(head)}"
    return f"{why}; --columns {shown} would say where"


def leaves(name: str, cell) -> Iterator[str]:
    """The dotted names of all that stands in a cell, ten steps deep: what --columns can name."""
    yield name
    inner = cell if isinstance(cell, dict) else dict(enumerate(cell[:1] if isinstance(cell, list) else []))
    for step, part in inner.items() if name.count(".") < 10 else ():
        yield from leaves(f"{name}.{step}", part)


def longest_text(cell) -> str:
    """.KEY of the longest text in a cell of keys and values; "" where there is none."""
    texts = {k: v for k, v in cell.items() if isinstance(v, str)} if isinstance(cell, dict) else {}
    return max((f".{key}" for key in texts), key=lambda key: len(texts[key[1:]]), default="")


def listed(head: pd.DataFrame) -> str:
    return ", ".join(name if name.isprintable() else repr(name) for name in head.columns[:30])[:300]
