"""What a cell of a file says: text, turns, or messages; and conversations put side by side.

    kind_of(cells)            how the cells of a column are written: text, list, json, dialogue
    content(cell, kind)       a text; a list of turns; or a list of (role, text)
    last_answers(a, b)        two conversations -> (all before as one text, last answer a, last answer b)

What a column is, most of its first cells say: a lone cell that looks like JSON is text. What it does not do:
know columns or verdicts.
"""

import json
import re
from collections import Counter
from itertools import chain, cycle, zip_longest

ROLES = {
    "user": "user human prompter instruction question customer",
    "assistant": "assistant model gpt bot chatgpt ai chatbot answer",
    "system": "system developer",
    "tool": "tool function function_call tool_call tool_response observation environment",
}
ROLES = {word: role for role, words in ROLES.items() for word in words.split()}
ROLE_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "parts")
# How a list of texts or messages begins where it is written out as text, be it JSON or not
LISTED = re.compile(r"\s*(\[\s*([{\"']|null\b|None\b|\])|{\s*[\"'](role|from|content|value)\b)")
MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # hh-rlhf's
IS_NOT = {  # kind -> what a cell of such a column is not
    "text": "not text",
    "list": "not a list of texts or of {role, content}",
    "json": "not a JSON list of turns or of {role, content}",
    "dialogue": "not a dialogue of Human and Assistant",
}
Talk = list[tuple[str, str]]  # (role, text) of each turn


def kind_of(cells: list, rest: list, dialogues: bool) -> str:
    """How the cells of a column are written. rest: the cells of all text columns, which decide for a file of
    one row or two: there a column alone says too little."""
    texts, share = [cell for cell in cells if isinstance(cell, str)], 1 / 2 if len(cells) > 2 else 2 / 3
    shapes = Counter(isinstance(cell, list | dict) for cell in cells if cell is not None)
    if shapes.most_common(1) and shapes.most_common(1)[0][0]:
        return "list"
    if dialogues and sum(MARK.match(text) is not None for text in texts) > len(texts) / 2:
        return "dialogue"
    texts = texts if len(cells) > 2 else [cell for cell in rest if isinstance(cell, str)]
    return "json" if sum(LISTED.match(text) is not None for text in texts) > share * len(texts) else "text"


def content(cell, kind: str) -> str | list[str] | Talk:
    """Raises one of the ERRORS of layouts.py where the cell is not what the kind says."""
    if kind == "text":
        return plain_text(cell)
    if kind == "dialogue":
        start, *said = MARK.split(plain_text(cell))
        if start.strip() or not said:
            raise ValueError
        roles = ["user" if name == "Human" else "assistant" for name in said[::2]]
        return list(zip(roles, map(str.strip, said[1::2]), strict=True))
    cell = json.loads(cell) if kind == "json" and isinstance(cell, str) else cell
    if not isinstance(cell, list | dict):
        raise TypeError
    cell = cell.get("messages", [cell]) if isinstance(cell, dict) else cell
    if any(isinstance(turn, dict) for turn in cell):
        return [message(turn) for turn in cell]
    # also turns in pairs: [[asked, said], ..]
    turns = [text for turn in cell for text in (turn if isinstance(turn, list) else [turn])]
    return ["" if turn is None else plain_text(turn) for turn in turns]


def plain_text(cell) -> str:
    """Text without lone halves of UTF-16 pairs, which JSON can hold and neither a tokenizer nor parquet
    takes; whole pairs are joined."""
    if not isinstance(cell, str):
        raise TypeError
    return cell if cell.isascii() else cell.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def message(turn: dict) -> tuple[str, str]:
    """(role, text). Of a content in parts (text, images) the texts count."""
    role, text = [next(turn[key] for key in keys if key in turn) for keys in (ROLE_KEYS, TEXT_KEYS)]
    if isinstance(text, list):
        parts = [part if isinstance(part, str) else part.get("text") for part in text]
        text = "\n".join(part for part in parts if part is not None)
    return ROLES[role.strip().casefold()], "" if text is None else plain_text(text)


# ------------------------------------------------------------------------------------------ conversations


def talk(value: str | list, role: str = "user") -> Talk:
    """Give each turn its speaker. A text: `role`. A list of texts: user and assistant alternate. Messages
    carry their own roles."""
    if isinstance(value, str):
        return [(role, value)]
    turns = zip(cycle(("user", "assistant")), value)
    return [turn if isinstance(turn, tuple) else (who, turn) for who, turn in turns]


def interleaved(prompts: list[str], answers: list[str]) -> Talk:
    """LMSYS' turns of the user and of one model, side by side -> one conversation."""
    turns = zip_longest([("user", text) for text in prompts], [("assistant", text) for text in answers])
    return [turn for turn in chain.from_iterable(turns) if turn is not None]


def with_context(parts: list[Talk], said: Talk) -> Talk:
    """Put the prompt's columns (`parts`) before a conversation; turns that it repeats are not put twice."""
    for part in reversed(parts):
        before, new = ([(role, text.strip()) for role, text in turns] for turns in (said[:-1], part))
        if not any(before[i : i + len(new)] == new for i in range(len(before) - len(new) + 1)):
            shared = max(k for k in range(len(new) + 1) if new[len(new) - k :] == before[:k])
            said = part[: len(part) - shared] + said
    return said


def up_to_answer(said: Talk, turn: int) -> Talk:
    """The conversation up to the answer of that number (from 1), whole if it has fewer."""
    answers = [i for i, (role, _) in enumerate(said, 1) if role == "assistant"]
    return said[: answers[turn - 1]] if 1 <= turn <= len(answers) else said


def last_answers(a: Talk, b: Talk, parted: bool = False) -> tuple[str, str, str]:
    """A conversation that does not end with an answer has the empty one. parted: if the two differ before
    their last turn, everything after the shared turns is the answer."""
    ends = [len(said) - (len(said) > 0 and said[-1][0] == "assistant") for said in (a, b)]
    if parted and a[: ends[0]] != b[: ends[1]]:
        same = next(i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y)
        return written(a[:same], a[:same]), in_words(a[same:]), in_words(b[same:])
    last = ["".join(text for _, text in said[end:]) for said, end in zip((a, b), ends, strict=True)]
    return written(a[: ends[0]], b[: ends[1]]), *last


def in_words(said: Talk) -> str:
    """Turns as one text; a lone one that the assistant begins with stays as it is."""
    lines = [f"{role.capitalize()}: {text}" for role, text in said]
    return "\n\n".join([said[0][1], *lines[1:]] if said and said[0][0] == "assistant" else lines)


def written(a: Talk, b: Talk) -> str:
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
