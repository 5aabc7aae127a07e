"""Texts as people wrote them: ftfy mends mojibake, control characters and the like, as the recipe trained.

https://ftfy.readthedocs.io. Once for each text, when a file is read and before it is tokenised. What it does
not do: change the meaning of a text, or touch lone surrogates (layouts.py replaces them when it reads).
"""

import contextlib
import multiprocessing
import os
import re

import ftfy
import pandas as pd
from tqdm import tqdm

from minarena.data import TEXTS
from minarena.text import BATCH

POOL_FROM = 20_000  # rows; starting processes takes some seconds, in which one process repairs about as many
# What ftfy can change in ASCII text is HTML entities and control characters: half of all texts need no ftfy
TOUCHED = re.compile(r"[&\x00-\x08\x0b-\x1f\x7f]")


def repaired(table: pd.DataFrame, workers: int | None = None, ranks: int = 1) -> pd.DataFrame:
    """The table with mojibake, control characters and the like mended by ftfy (https://ftfy.readthedocs.io).

    Once for each text, before rows are shown in one order or the other: it is slow (a regular-expression
    library). workers: processes (None: all cores, for a long table, shared by the `ranks` of this machine).
    They come from a fork server: a fork of this process, with its threads, could hang.
    """
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) // ranks) if len(table) >= POOL_FROM else 1
    with contextlib.ExitStack() as stack:
        each = map
        if workers > 1:
            start = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
            each = stack.enter_context(start.Pool(workers)).imap
        return table.assign(**{column: repaired_column(table[column], each) for column in TEXTS})


def repaired_column(texts: pd.Series, each) -> pd.Series:
    """each: map, or a pool's imap, which gives results in order, too."""
    batches = (texts.iloc[i : i + BATCH].tolist() for i in range(0, len(texts), BATCH))
    fixed = [texts.iloc[:0]]
    with tqdm(total=len(texts), desc=f"repair {texts.name}", unit="row", leave=False, disable=None) as bar:
        for part in each(fix_texts, batches):
            fixed.append(pd.Series(part, dtype="str"))
            bar.update(len(part))
    return pd.concat(fixed).set_axis(texts.index)


def fix_texts(texts: list[str]) -> list[str]:
    return [text if text.isascii() and not TOUCHED.search(text) else ftfy.fix_text(text) for text in texts]
