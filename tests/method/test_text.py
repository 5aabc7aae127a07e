"""A pair of answers becomes token ids: repair, template, left cut, BOS and EOS.

rows = encode(tokenizer, repaired(table), max_length=2200)     one int32 array of ids a row
encode(tokenizer, repaired(swapped(table)), 2200)              the same rows, shown in the other order
pad_id(tokenizer)                                              what fills rows up: its pad token, else its EOS

Compared with: the template written out by hand, the tokenizer's own answer to one whole string, and decoding.
Four tokenizers: bytes (tiny.py); Gemma's class with a small vocabulary; Qwen's, which has no BOS; that one
with no pad token.
"""

import json

import ftfy
import numpy as np
import pandas as pd
import pytest
from tokenizers import pre_tokenizers
from transformers import GemmaTokenizer, Qwen2Tokenizer

from minarena.data import swapped
from minarena.files.pairs import read_pairs
from minarena.files.repair import repaired
from minarena.files.tokenizer import load_tokenizer
from minarena.text import encode, pad_id
from minarena.tiny import byte_tokenizer, demo_pairs

# These merges reach over the seams of the template, as those of real vocabularies do.
MERGES = [("\n", "\n"), (".", "\n\n"), (".\n\n", "<"), (":", " "), (": ", "A"), ("e", "n"), ("t", "h")]


def gemma():
    letters = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
    merges = [tuple(part.replace(" ", "▁") for part in pair) for pair in MERGES]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *letters, *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=["<start_of_turn>"])


def qwen(pad="<|endoftext|>"):
    code = {"\n": "Ċ", " ": "Ġ"}  # a byte-level vocabulary's letters for these two bytes
    merges = [tuple("".join(code.get(c, c) for c in part) for part in pair) for pair in MERGES]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    tokenizer.pad_token = pad
    return tokenizer


TOKENIZERS = {"bytes": byte_tokenizer, "gemma": gemma, "qwen": qwen, "qwen, no pad": lambda: qwen(None)}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def pairs(*texts) -> pd.DataFrame:
    """A table from (prompt, response_a, response_b) tuples."""
    table = pd.DataFrame(texts, columns=["prompt", "response_a", "response_b"])
    return table.assign(id=[str(i) for i in range(len(table))], label=1.0)


def whole(tokenizer, prompt: str, a: str, b: str) -> list[int]:
    """Ids of the row's text, uncut and without BOS and EOS, by the tokenizers library itself."""
    text = f"<prompt>: {prompt}\n\n<response_a>: {a}\n\n<response_b>: {b}"
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def ends(tokenizer) -> tuple[list[int], list[int]]:
    begin = [] if tokenizer.bos_token is None else [tokenizer.convert_tokens_to_ids(tokenizer.bos_token)]
    return begin, [tokenizer.convert_tokens_to_ids(tokenizer.eos_token)]


TEXTS = [
    ("Why then?", "A thing.", "Another\n\nthing."),
    ("", "", ""),
    ("为什么?", "مرحبا " * 9, "🙂 naïve"),
    ("a", "b" * 400, "c"),
]


def test_a_row_is_bos_the_template_as_one_string_and_eos(tokenizer):
    begin, end = ends(tokenizer)
    rows = encode(tokenizer, pairs(*TEXTS), max_length=10_000)
    for row, texts in zip(rows, TEXTS, strict=True):
        assert row.dtype == np.int32 and row.tolist() == begin + whole(tokenizer, *texts) + end


@pytest.mark.parametrize("name", ["gemma", "qwen"])
def test_tokenising_the_parts_apart_would_give_other_ids(name):
    """Else the test above could not tell one string from three parts."""
    tokenizer = TOKENIZERS[name]()
    prompt, a, b = "Why. Then.", "A.", "A."
    seams = [f"<prompt>: {prompt}", f"\n\n<response_a>: {a}", f"\n\n<response_b>: {b}"]
    parts = [i for s in seams for i in tokenizer.backend_tokenizer.encode(s, add_special_tokens=False).ids]
    assert parts != whole(tokenizer, prompt, a, b)


@pytest.mark.parametrize("max_length", [8, 9, 40, 63])
def test_a_long_row_loses_its_start_and_keeps_bos_and_eos(tokenizer, max_length):
    begin, end = ends(tokenizer)
    for row, texts in zip(encode(tokenizer, pairs(*TEXTS), max_length), TEXTS, strict=True):
        uncut = whole(tokenizer, *texts)
        assert len(row) == min(max_length, len(begin) + len(uncut) + 1)
        assert row[: len(begin)].tolist() == begin and row[-1:].tolist() == end
        middle = row[len(begin) : -1].tolist()
        assert middle == uncut[len(uncut) - len(middle) :]


def test_a_row_that_just_fits_is_not_cut(tokenizer):
    begin, end = ends(tokenizer)
    length = len(begin) + len(whole(tokenizer, *TEXTS[0])) + 1
    fits, cut = (encode(tokenizer, pairs(TEXTS[0]), n)[0].tolist() for n in (length, length - 1))
    assert fits == begin + whole(tokenizer, *TEXTS[0]) + end
    assert cut == begin + fits[len(begin) + 1 :]


def test_special_tokens_in_a_users_text_are_letters(tokenizer):
    special = {tokenizer.convert_tokens_to_ids(token): token for token in tokenizer.all_special_tokens}
    assert len(special) >= 2
    text = " ".join(special.values()) + "".join(special.values())
    row = encode(tokenizer, pairs((text, text, text)), 10_000)[0].tolist()
    begin, end = ends(tokenizer)
    assert [i for i in row if i in special] == begin + end
    assert tokenizer.decode(row[len(begin) : -1]).count(tokenizer.eos_token) == 6
    # the tokenizer itself, asked plainly, makes special tokens of them
    plainly = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert set(plainly) >= special.keys()


def test_how_many_rows_are_tokenised_together_changes_nothing(tokenizer):
    table = pairs(*TEXTS * 3)
    together, alone = (encode(tokenizer, table, 50, batch_rows=n) for n in (1024, 5))
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]


def test_the_pad_id_is_the_tokenizers_own_or_eos_where_it_has_none():
    assert pad_id(byte_tokenizer()) == 0 and pad_id(gemma()) == 0
    with_pad, without = qwen(), qwen(pad=None)
    assert pad_id(with_pad) == with_pad.convert_tokens_to_ids("<|endoftext|>") != with_pad.eos_token_id
    assert pad_id(without) == without.convert_tokens_to_ids("<|im_end|>")


def test_repair_is_ftfys_for_the_three_texts_and_nothing_else():
    broken = "schÃ¶n \u200bâ€œquotedâ€\x9d &amp; ﬁne\r\n\x07"
    table = pairs((broken, broken + "a", broken + "b")).assign(id=broken, language=broken)
    mended = repaired(table)
    assert (
        mended.loc[0, "prompt"].startswith('schön \u200b"quoted"') and "\x07" not in mended.loc[0, "prompt"]
    )
    for column in ("prompt", "response_a", "response_b"):
        assert list(mended[column]) == [ftfy.fix_text(text) for text in table[column]]
    assert mended.loc[0, "id"] == mended.loc[0, "language"] == broken


def test_swap_gives_byte_for_byte_what_no_swap_gives_on_the_mirrored_file(tokenizer, tmp_path):
    table = demo_pairs(40, seed=9)
    original, mirrored = [], []
    for row in table.to_dict("records"):
        a_wins = row.pop("label") == 1.0
        original.append({**row, "winner": "model_a" if a_wins else "model_b"})
        other = {"response_a": row["response_b"], "response_b": row["response_a"]}
        mirrored.append({**row, **other, "winner": "model_b" if a_wins else "model_a"})
    for name, rows in (("original", original), ("mirrored", mirrored)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    swap = swapped(repaired(read_pairs([str(tmp_path / "original.jsonl")])))
    plain = repaired(read_pairs([str(tmp_path / "mirrored.jsonl")]))
    swap_rows, plain_rows = encode(tokenizer, swap, 150), encode(tokenizer, plain, 150)
    assert [row.tobytes() for row in swap_rows] == [row.tobytes() for row in plain_rows]
    assert list(swap["label"]) == list(plain["label"]) and list(swap["id"]) == list(plain["id"])
    not_swapped = encode(tokenizer, repaired(read_pairs([str(tmp_path / "original.jsonl")])), 150)
    assert [row.tobytes() for row in not_swapped] != [row.tobytes() for row in plain_rows]


def test_a_folder_without_a_usable_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no usable tokenizer"):
        load_tokenizer(str(tmp_path))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="endless: the tokenizer must be a fast one with an EOS token"):
        load_tokenizer(str(tmp_path / "endless"))


def test_a_tokenizer_comes_back_from_its_folder_as_it_was(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    text = tokenizer.eos_token
    table = pairs(*TEXTS, (text, text, text))
    before, after = encode(tokenizer, table, 99), encode(again, table, 99)
    assert [row.tolist() for row in before] == [row.tolist() for row in after]
    assert pad_id(again) == pad_id(tokenizer)
