"""A pair of answers -> token ids: repair, template, left cut, BOS and EOS.

    <prompt>: P\\n\\n<response_a>: A\\n\\n<response_b>: B        BOS first, EOS last, tokenised as ONE string

Tokenising P, A and B apart would give other ids at the seams with some tokenizers. The marks are plain text,
not special tokens: the base was never trained on special tokens of ours, and a left cut may remove the first
mark anyway. What it does not do: pad (batching.py), or defend against an answer that contains the marks
themselves.
"""

import ftfy
import numpy as np
import pandas as pd
from tqdm import tqdm

from minarena.data import TEXTS

TEMPLATE = "<prompt>: {}\n\n<response_a>: {}\n\n<response_b>: {}"


def repaired(table: pd.DataFrame) -> pd.DataFrame:
    """The table with mojibake, control characters and the like mended by ftfy (https://ftfy.readthedocs.io).

    Once for each text, before rows are shown in one order or the other: it is slow (a regular-expression
    library).
    """
    texts = {
        column: [ftfy.fix_text(text) for text in tqdm(table[column], f"repair {column}", leave=False)]
        for column in TEXTS
    }
    return table.assign(**texts)


def load_tokenizer(folder: str):
    """The base's fast tokenizer. Raises ValueError where it is missing or has no token that could end a
    row."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises a dozen kinds here, for one user's mistake
        raise ValueError(f"{folder}: no usable tokenizer: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer must be a fast one with an EOS token")
    return tokenizer


def pad_id(tokenizer) -> int:
    """The id that fills rows up: the base's pad token, or EOS where it has none. The mask says what is
    padding, never the id: with pad = EOS (Qwen, SmolLM2) the two look the same."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode(tokenizer, table: pd.DataFrame, max_length: int, batch_rows: int = 1024) -> list[np.ndarray]:
    """Token ids of each row as it stands in the table (swap the table to get the other order): int32 arrays
    of at most max_length tokens. A row that is too long loses its beginning, never its BOS or EOS.

    BOS and EOS are added by hand: `add_eos_token = True` on a Gemma tokenizer silently drops the BOS
    (transformers 5.23). Texts cannot become special tokens: `split_special_tokens` spells an `<eos>` in them
    out, letter by letter.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [tokenizer.eos_token_id]
    room = max_length - len(begin) - len(end)  # at least 6: config.py asks for 8
    texts = [TEMPLATE.format(*row) for row in zip(*(table[column] for column in TEXTS), strict=True)]
    rows = []
    for i in tqdm(range(0, len(texts), batch_rows), "tokenise", leave=False):
        batch = tokenizer(
            texts[i : i + batch_rows],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        rows += [np.array(begin + ids[-room:] + end, dtype=np.int32) for ids in batch["input_ids"]]
    return rows
