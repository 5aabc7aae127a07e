"""What is odd about the rows, said in one line each before anything slow.

    say_shared_prompts(pairs, held_out)           prompts that are held out and trained on
    refuse_one_sided(pairs, "ab")                 winners that all stand on one side teach the side
    say_unknown_characters(tokenizer, table)      characters that the tokenizer has no token for
    say_encoding(tokenizer, table, 2200, "left", {"ab"})     that, rows cut, and rows that lose an answer

Reads tables of data.py and changes nothing.
"""

import re

import pandas as pd

from minarena.data import TEXTS
from minarena.runtime.console import say
from minarena.text import AS_TEXT, BATCH, TEMPLATE

SIGN_FROM, REFUSED_FROM = 10, 20  # rows with a winner; fewer on one side are chance


def hard_winners(table: pd.DataFrame) -> pd.Series:
    """1 or 0 of each row with a winner, without rows that a model labelled and chosen / rejected ones."""
    own = table["chosen"].isna() if "chosen" in table else True
    by_people = ~table["pseudo"] if "pseudo" in table else True
    return table["label"][table["label"].isin((0, 1)) & own & by_people]


def say_one_sided(table: pd.DataFrame, path: str, columns: dict[str, str]) -> None:
    """Say which column wins nearly all rows, with the option that reads it as the chosen one. columns: names
    of the answers by `a` and `b`."""
    winners = hard_winners(table)
    mean = winners.mean()
    if len(winners) >= SIGN_FROM and not 0.1 <= mean <= 0.9:
        better, worse = ("a", "b") if mean > 0.5 else ("b", "a")
        share, option = max(mean, 1 - mean), f"--columns chosen={columns[better]} rejected={columns[worse]}"
        say(f"{path}: {columns[better]} wins {share:.0%} of the rows; if it is the better one: {option}")


def refuse_one_sided(table: pd.DataFrame, order: str) -> None:
    """ValueError where all winners stand on one side: a model would learn the side, and nothing else."""
    winners = hard_winners(table)
    if order != "both" and len(winners) >= REFUSED_FROM and winners.nunique() == 1:
        side, other = ("a", "b") if winners.iloc[0] == 1 else ("b", "a")
        why = f"response_{side} wins all {len(winners):,} rows: only the side would be learnt"
        option = f"--columns chosen=response_{side} rejected=response_{other} (the file's names)"
        raise ValueError(f"--data: {why}: {option}, or --order both")


def check_disjoint(pairs: pd.DataFrame, held_out: pd.DataFrame, path: str) -> None:
    """ValueError where a row of --eval-data is in --data; ids alone do not tell: both may count from 0."""
    rows = [set(zip(table["id"], table["prompt"], strict=True)) for table in (pairs, held_out)]
    if shared := sorted(set.intersection(*rows)):
        raise ValueError(f"--eval-data {path}: id {shared[0][0]!r} is in --data, too")


def say_shared_prompts(pairs: pd.DataFrame, held_out: pd.DataFrame) -> None:
    """Say how many held-out rows have a prompt that is trained on."""
    shared = held_out["prompt"].isin(set(pairs["prompt"])).sum()
    if shared:
        rows = f"{shared:,} of {len(held_out):,} held-out rows"
        say(f"{rows} have a prompt that is trained on, too (--split-by prompt holds out whole prompts)")


def say_unknown_characters(tokenizer, *tables: pd.DataFrame) -> None:
    """Say how many rows hold characters that the tokenizer cannot represent. ASCII is taken as known: looking
    through all texts would take as long as reading them."""
    table = pd.concat(tables)
    texts = [text for name in TEXTS for text in table[name] if not text.isascii()]
    lost = {c for c in set().union(*texts) if c.isprintable() and c.strip() and unknown(tokenizer, c)}
    if lost:
        some = re.compile(f"[{''.join(map(re.escape, lost))}]")
        rows = pd.concat([table[name].str.contains(some) for name in TEXTS], axis=1).any(axis=1).sum()
        shown = " ".join(sorted(lost)[:10])
        say(f"{rows:,} rows hold characters that the tokenizer cannot represent ({len(lost)}: {shown})")


def unknown(tokenizer, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids)


def say_encoding(tokenizer, table: pd.DataFrame, max_length: int, truncation: str, orders: set[str]) -> None:
    """Say how many rows are cut, how many lose the answer shown first, and unknown characters. orders: in
    which a row is shown; a cut takes the answer that is shown first."""
    say_unknown_characters(tokenizer, table)
    room, cut, gone = max_length - 1 - (tokenizer.bos_token_id is not None), 0, 0
    mark = TEMPLATE.split("{}")[2]
    for i in range(0, len(table), BATCH):
        rows = [*zip(*(table[name].iloc[i : i + BATCH] for name in TEXTS), strict=True)]
        tokens = lengths(tokenizer, [TEMPLATE.format(*row) for row in rows])
        rows = [row for row, n in zip(rows, tokens, strict=True) if n > room]
        cut += len(rows)
        if rows and truncation == "left":
            last = [
                lengths(tokenizer, [mark + row[{"ab": 2, "ba": 1}[order]] for row in rows])
                for order in orders
            ]
            gone += sum(max(each) >= room for each in zip(*last, strict=True))
    if cut:
        lost = f", {gone:,} of them without anything of the answer shown first" if gone else ""
        say(f"cut       {cut:,} of {len(table):,} rows are over --max-length {max_length} tokens{lost}")


def lengths(tokenizer, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, **AS_TEXT)["input_ids"]]
