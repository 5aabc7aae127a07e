"""Texts as people wrote them: ftfy mends mojibake, control characters and the like, as the recipe trained.

https://ftfy.readthedocs.io. Once for each text, when a file is read and before it is tokenised. What it does
not do: change the meaning of a text, or touch lone surrogates (layouts.py replaces them when it reads).
"""

import multiprocessing
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import ModuleType

import ftfy
import pandas as pd
from tqdm import tqdm

from minarena.data import TEXTS
from minarena.text import BATCH

POOL_FROM = 20_000  # rows; starting processes takes some seconds, in which one process repairs about as many
# What ftfy can change in ASCII text is HTML entities and control characters: half of all texts need no ftfy
TOUCHED = re.compile(r"[&\x00-\x08\x0b-\x1f\x7f]")


def repaired(table: pd.DataFrame, workers: int | None = None, ranks: int = 1) -> pd.DataFrame:
    """The table with its texts repaired, before rows are shown in one order or the other: ftfy is slow.

    workers: processes (None: all cores, for a long table, shared by the `ranks` of this machine).
    Where they die (killed for their memory, say), a line says so and this process does it.
    """
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) // ranks) if len(table) >= POOL_FROM else 1
    if workers > 1:
        try:
            with processes(workers) as each:
                return table.assign(**{column: repaired_column(table[column], each) for column in TEXTS})
        except (BrokenProcessPool, OSError, EOFError):  # the last two: the fork server itself has died
            # not console.say: that file imports torch, which the processes would then import, too
            print(f"The {workers} processes that repair texts died: one does it, slowly", file=sys.stderr)
    return table.assign(**{column: repaired_column(table[column], map) for column in TEXTS})


@contextmanager
def processes(workers: int) -> Iterator[Callable]:
    """A `map` by other processes, with results in order.

    They come from a fork server: a fork of this process, with its threads, could hang. Each would first
    import the running script again: seconds for torch, and where the script lacks its
    `if __name__ == "__main__":` the whole work. So an empty module stands for `__main__` meanwhile.
    """
    start = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    # Ctrl-C reaches them as well: they die of it without a traceback
    pool = ProcessPoolExecutor(workers, start, signal.signal, (signal.SIGINT, signal.SIG_DFL))
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield partial(in_order, pool, 2 * workers)
    finally:
        sys.modules["__main__"] = main
        pool.shutdown(cancel_futures=True)


def in_order(pool: ProcessPoolExecutor, ahead: int, call: Callable, batches: Iterator) -> Iterator:
    """map(call, batches) by the pool; at most `ahead` batches wait (Executor.map would hold all)."""
    waiting = deque(pool.submit(call, batch) for batch in islice(batches, ahead))
    while waiting:
        waiting.extend(pool.submit(call, batch) for batch in islice(batches, 1))
        yield waiting.popleft().result()


def repaired_column(texts: pd.Series, each) -> pd.Series:
    """each: map, or the one that processes() gives."""
    batches = (texts.iloc[i : i + BATCH].tolist() for i in range(0, len(texts), BATCH))
    fixed = [texts.iloc[:0]]
    look = {"desc": f"repair {texts.name}", "unit": "row", "leave": False, "delay": 1, "disable": None}
    with tqdm(total=len(texts), **look) as bar:
        for part in each(fix_texts, batches):
            fixed.append(pd.Series(part, dtype="str"))
            bar.update(len(part))
    return pd.concat(fixed).set_axis(texts.index)


def fix_texts(texts: list[str]) -> list[str]:
    return [text if text.isascii() and not TOUCHED.search(text) else ftfy.fix_text(text) for text in texts]
