"""A pair of answers -> token ids: repair, template, cut, BOS and EOS.

    <prompt>: P\\n\\n<response_a>: A\\n\\n<response_b>: B        BOS first, EOS last, tokenised as ONE string

Tokenising P, A and B apart would give other ids at the seams with some tokenizers. The marks are plain text,
not special tokens: the base was never trained on special tokens of ours, and a left cut may remove the first
mark anyway. What it does not do: pad (batching.py), or defend against an answer that contains the marks
themselves.
"""

import contextlib
import multiprocessing
import os
import re

import ftfy
import numpy as np
import pandas as pd
from tqdm import tqdm

from minarena.data import TEXTS
from minarena.runtime.console import first_line

TEMPLATE = "<prompt>: {}\n\n<response_a>: {}\n\n<response_b>: {}"
BATCH = 1024  # rows that are Python strings and lists at a time: a table is held in a few times its bytes
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


def load_tokenizer(folder: str):
    """The base's fast tokenizer; ValueError where it is missing or has no token that could end a row."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds here, for one user's mistake
        raise ValueError(f"{folder}: no usable tokenizer or config.json: {first_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer must be a fast one with an EOS token")
    return tokenizer


def check_vocabulary(tokenizer, embeddings: int) -> None:
    """ValueError where the model has no embedding for a token, which on a GPU ends the process."""
    last = max(
        tokenizer.vocab_size - 1, tokenizer.eos_token_id, tokenizer.bos_token_id or 0, pad_id(tokenizer)
    )
    if last >= embeddings:
        reason = f"its tokenizer has token {last}, the model has {embeddings} embeddings"
        raise ValueError(f"--model {tokenizer.name_or_path}: {reason}: another model's tokenizer?")


def pad_id(tokenizer) -> int:
    """The id that fills rows up: the base's pad token, or EOS where it has none.

    The mask says what is padding, never the id: with pad = EOS (Qwen, SmolLM2) the two look the same.
    """
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode(
    tokenizer, table: pd.DataFrame, max_length: int, truncation: str = "left", batch_rows: int = BATCH
) -> list[np.ndarray]:
    """Token ids of each row as it stands in the table (swap the table to get the other order).

    Returns int32 arrays of at most max_length tokens. A row that is too long loses its beginning (left) or
    the middle of each part (middle, snip.py), never its BOS or EOS.

    BOS and EOS are added by hand: `add_eos_token = True` on a Gemma tokenizer silently drops the BOS
    (transformers 5.23). Texts cannot become special tokens: `split_special_tokens` spells an `<eos>` in them
    out in ordinary tokens.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [tokenizer.eos_token_id]
    room = max_length - len(begin) - len(end)  # at least 6: config.py asks for 8
    settings = dict(add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    settings |= dict(verbose=False, return_offsets_mapping=truncation == "middle")
    rows, bar = [], tqdm(total=len(table), desc="tokenise", unit="row", leave=False, disable=None)
    for i in range(0, len(table), batch_rows):
        texts = [*zip(*(table[column].iloc[i : i + batch_rows] for column in TEXTS), strict=True)]
        batch = tokenizer([TEMPLATE.format(*row) for row in texts], **settings)
        if truncation == "middle":
            ids = middle_cut(tokenizer, texts, batch, room)
        else:
            ids = [ids[-room:] for ids in batch["input_ids"]]
        rows += [np.array(begin + row + end, dtype=np.int32) for row in ids]
        bar.update(len(texts))
    bar.close()
    return rows


def middle_cut(tokenizer, texts: list[tuple], batch, room: int) -> list[list[int]]:
    """The ids of a batch of rows, those of more than `room` tokens cut in the middle of each part."""
    from minarena.truncation import cut_middle, spans

    def mark(tokens: int) -> list[int]:
        return tokenizer(f" (snip {tokens} tokens) ", add_special_tokens=False)["input_ids"]

    cut = []
    for row, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        parts = spans(TEMPLATE.split("{}"), row)
        cut.append(ids if len(ids) <= room else cut_middle(ids, offsets, parts, room, mark))
    return cut
