"""A pair of answers -> token ids: template, cut, BOS and EOS.

    <prompt>: P\\n\\n<response_a>: A\\n\\n<response_b>: B        BOS first, EOS last, tokenised as ONE string

Tokenising P, A and B separately would give other ids at the seams with some tokenizers. The marks are plain
text, not special tokens: the base was never trained on special tokens of ours, and a left cut may remove the
first mark anyway. What it does not do: pad (batching.py), or defend against an answer that contains the marks
themselves.
"""

import numpy as np
import pandas as pd
from tqdm import tqdm

from minarena.data import TEXTS
from minarena.truncation import spans, truncate_middle

TEMPLATE = "<prompt>: {}\n\n<response_a>: {}\n\n<response_b>: {}"
BATCH = 1024  # rows that are Python strings and lists at a time: a table is held in a few times its bytes
# How a tokenizer is asked: a text has no special tokens, whatever stands in it, and none are added
AS_TEXT = dict(
    add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
)


def pad_id(tokenizer) -> int:
    """The id that pads a row: the base's pad token, or EOS where it has none.

    The mask says what is padding, never the id: with pad = EOS (Qwen, SmolLM2) the two look the same.
    """
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode(
    tokenizer, table: pd.DataFrame, max_length: int, truncation: str = "left", batch_rows: int = BATCH
) -> list[np.ndarray]:
    """Token ids of each row as it stands in the table (swap the table to get the other order).

    Returns int32 arrays of at most max_length tokens. A row that is too long loses its beginning (left) or
    the middle of each part (middle, truncation.py), never its BOS or EOS.

    BOS and EOS are added by hand: `add_eos_token = True` on a Gemma tokenizer silently drops the BOS
    (transformers 5.23). Texts cannot become special tokens: `split_special_tokens` writes an `<eos>` in a
    text as ordinary tokens.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [tokenizer.eos_token_id]
    room = max_length - len(begin) - len(end)  # at least 6: config.py asks for 8
    settings = AS_TEXT | {"return_offsets_mapping": truncation == "middle"}
    rows, bar = [], tqdm(total=len(table), desc="tokenise", unit="row", leave=False, delay=1, disable=None)
    for i in range(0, len(table), batch_rows):
        texts = [*zip(*(table[column].iloc[i : i + batch_rows] for column in TEXTS), strict=True)]
        batch = tokenizer([TEMPLATE.format(*row) for row in texts], **settings)
        if truncation == "middle":
            ids = truncate_batch(tokenizer, texts, batch, room)
        else:
            ids = [ids[-room:] for ids in batch["input_ids"]]
        rows += [np.array(begin + row + end, dtype=np.int32) for row in ids]
        bar.update(len(texts))
    bar.close()
    return rows


def truncate_batch(tokenizer, texts: list[tuple], batch, room: int) -> list[list[int]]:
    """The ids of a batch of rows; rows of more than `room` tokens are cut in the middle of each part."""

    def mark(tokens: int) -> list[int]:
        return tokenizer(f" (snip {tokens} tokens) ", add_special_tokens=False)["input_ids"]

    cut = []
    for row, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        parts = spans(TEMPLATE.split("{}"), row)
        cut.append(ids if len(ids) <= room else truncate_middle(ids, offsets, parts, room, mark))
    return cut
